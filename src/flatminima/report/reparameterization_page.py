"""The page of the reparameterisation experiment: self-contained, like every report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flatminima.report import reparameterization_plots as plots
from flatminima.report.numbers import integer, plain
from flatminima.report.page import Key
from flatminima.report.panels import symbol
from flatminima.report.reproduction import check_schema, render_reproduction
from flatminima.report.tables import Cell, Column, Table

_QUESTION = "Is flatness a matter of coordinates, and is weakness not?"


def render_reparameterization(results: Mapping[str, Any]) -> str:
    """Render the results of ``flatminima reproduce reparameterization`` as one HTML page.

    Args:
        results: what :func:`flatminima.protocols.reproduce_reparameterization` returns.

    Returns:
        The page, to be written as UTF-8; it asks for nothing over the network.

    Raises:
        ValueError: the dictionary has another schema than 1.

    Example:
        >>> render_reparameterization({"schema": 2})
        Traceback (most recent call last):
        ValueError: results have schema 2, but this version reads schema 1: make them anew
    """
    check_schema(results)
    records, measures, settings = results["networks"], results["measures"], results["settings"]
    copies = sum(len(record["copies"]) for record in records)
    return render_reproduction(
        "reparameterization.html",
        results,
        question=_QUESTION,
        source="Bennett (arXiv:2605.05209)",
        contents=[("trace", "The trace"), ("measures", "What stays"), ("weakness", "Weakness"), ("setup", "Setup")],
        facts=[
            ("Networks", str(len(records)), f"of {len(settings['hidden'])} hidden layers, on {settings['data']}"),
            ("Copies", str(copies), "of them, by β and γ"),
            ("Pairs", integer(settings["probes"] * 10), "decided for each pair proxy, with proofs"),
        ],
        keys={
            "gammas": [Key(f"γ = {g:g}", index, symbol(index)) for index, g in enumerate(settings["gammas"])],
            "measures": [Key(m["label"], index, symbol(index)) for index, m in enumerate(measures.values())],
        },
        tables={
            "networks": network_table(records, settings),
            "measures": measure_table(records, measures),
            "pairs": pair_table(results["narrow"]),
            "rewired": rewired_table(results["rewired"]),
        },
        plots={"laws": plots.trace_laws(records), "ratios": plots.ratios(records, measures)},
    )


def network_table(records: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> Table:
    """Every network, its trace, and what rescaling makes of it."""
    beta = max(settings["betas"])
    columns = (
        Column("Network", "epochs", False), Column("Accuracy", "unseen; training"),
        Column("Trace", "share of the second layer"),
        Column(f"Times at β = {beta:g}", "largest over the grid"), Column("Least trace over β", "at β"),
        Column("Activation patterns", "first; second layer"),
    )  # fmt: skip
    body = []
    for record in records:
        values = [copy["measures"]["trace"]["value"] for copy in record["copies"]]
        at = next(c for c in record["copies"] if (c["beta"], c["gamma"]) == (beta, 1.0))["measures"]["trace"]["value"]
        share = record["blocks"][list(record["blocks"])[2]] / record["trace"]
        first, second = record["copies"][0]["patterns"]
        body.append(
            (
                Cell(record["name"], f"{record['epochs']} epochs"),
                Cell(f"{record['test_accuracy']:.4f}", f"{record['accuracy']:.4f}", (record["test_accuracy"],)),
                Cell(plain(record["trace"], 5), plain(share, 3), (record["trace"], share)),
                Cell(plain(at / record["trace"], 4), plain(max(values) / record["trace"], 4), (at / record["trace"],)),
                Cell(
                    plain(record["least"]["trace"], 5), plain(record["least"]["beta"], 4), (record["least"]["trace"],)
                ),
                Cell(integer(first), integer(second), (first, second)),
            )
        )
    return Table("networks", "The networks and their traces", columns, tuple(body))


def measure_table(records: Sequence[Mapping[str, Any]], measures: Mapping[str, Mapping[str, Any]]) -> Table:
    """Every measure at every network, and how far it moves over the copies."""
    columns = (
        Column("Measure", "by theorem", False),
        *(Column(record["name"], "largest factor over the copies") for record in records),
    )
    body = []
    for name, entry in measures.items():
        cells = []
        for record in records:
            values = [copy["measures"][name]["value"] for copy in record["copies"]]
            moved = max(max(v / values[0], values[0] / v) for v in values)
            stays = abs(moved - 1.0) <= 1e-6
            factor = f"1 + {moved - 1.0:.0e}" if stays else plain(moved, 4)
            tone = "good" if stays == entry["unchanged"] else "bad"
            cells.append(Cell(plain(values[0], 5), factor, (values[0], moved), "stays" if stays else "moves", tone))
        body.append((Cell(entry["label"], "unchanged" if entry["unchanged"] else "changes"), *cells))
    return Table("measures", "What stays with the function and what does not", columns, tuple(body))


def pair_table(narrows: Sequence[Mapping[str, Any]]) -> Table:
    """The pair proxy of every copy of the narrow networks."""
    columns = (
        Column("Copy", "", False),
        *(Column(f"Pair proxy, seed {record['seed']}", "decisions that differ") for record in narrows),
    )
    names = [copy["name"] for copy in narrows[0]["copies"]]
    body = [(Cell("the network itself"), *(Cell(integer(r["value"]), "", (r["value"],)) for r in narrows))]
    for i, name in enumerate(names):
        cells = []
        for record in narrows:
            copy = record["copies"][i]
            differ = copy["changed"] + copy["undecided"]
            cells.append(
                Cell(
                    integer(copy["pair_proxy"]), str(differ), (copy["pair_proxy"], differ), tone="bad" if differ else ""
                )
            )
        body.append((Cell(name), *cells))
    return Table("pairs", "The pair proxy of networks with eight features", columns, tuple(body))


def rewired_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The network with a unit that nobody reads."""
    columns = (Column("Bias of the unread unit", "", False), Column("Pair proxy"), Column("Exact extension"))
    body = [
        (
            Cell(f"{row['bias']:g}"), Cell(str(row["pair_proxy"]), "", (row["pair_proxy"],)),
            Cell(str(row["extension"]), "", (row["extension"],)),
        )
        for row in rows
    ]  # fmt: skip
    return Table("rewired", "Three networks that agree on every input", columns, tuple(body))
