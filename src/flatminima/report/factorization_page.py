"""The page of the deep-matrix-factorisation reproduction: self-contained, like every report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flatminima.report import factorization_plots as plots
from flatminima.report.numbers import MISSING, as_finite, integer, plain, with_error
from flatminima.report.page import Key
from flatminima.report.panels import symbol
from flatminima.report.reproduction import check_schema, joined, render_reproduction, verdict
from flatminima.report.tables import Cell, Column, Table

_QUESTION = "Sharpness of minima in deep matrix factorisation: do the exact formulas and the escape hold?"


def render_factorization(results: Mapping[str, Any]) -> str:
    """Render the results of ``flatminima reproduce factorization`` as one HTML page.

    Args:
        results: what :func:`flatminima.protocols.reproduce_factorization` returns.

    Returns:
        The page, to be written as UTF-8; it asks for nothing over the network.

    Raises:
        ValueError: the dictionary has another schema than 1.

    Example:
        >>> render_factorization({"schema": 2})
        Traceback (most recent call last):
        ValueError: results have schema 2, but this version reads schema 1: make them anew
    """
    check_schema(results)
    records, methods = results["escape"]["recipes"], results["methods"]
    shown = [c for c in plots.MULTIPLES if any(curve["c"] == c for record in records for curve in record["curves"])]
    return render_reproduction(
        "factorization.html",
        results,
        question=_QUESTION,
        source="Kamber and Parhi (arXiv:2509.25783)",
        contents=[
            ("exact", "Exact expressions"),
            ("flat", "Which minima are flat"),
            ("escape", "The escape"),
            ("methods", "What each method seeks"),
            ("setup", "Setup"),
        ],
        facts=[
            ("Instances", str(len(results["instances"])), "formula, autograd and estimators"),
            (
                "Escape runs",
                str(sum(len(r["runs"]) for r in records)),
                f"of up to {integer(results['settings']['steps'])} steps",
            ),
            ("Seeds", str(results["settings"]["seeds"]), "of each stochastic method"),
        ],
        multiples=[Key(f"c = {c:g}", plots.MULTIPLES.index(c), "circle") for c in shown],
        outcomes=[Key(label, index, symbol(index)) for label, index in plots.OUTCOMES.items()],
        methods=[Key(label, index, symbol(index)) for index, label in enumerate(methods["labels"].values())],
        tables={
            "instances": instance_table(results["instances"]),
            "runs": run_table(results),
            "methods": method_table(results),
        },
        plots={
            "errors": plots.estimator_errors(results["instances"]),
            "phase": plots.phase_diagram(records),
            "losses": plots.losses(records),
            "growth": plots.growth(records),
            "valley": plots.curved_valley(records),
            "settled": plots.settled(records),
            "raw": plots.raw_curvature(records),
            "planes": plots.planes(records),
            "methods": plots.method_plane(methods),
        },
    )


def _both(values: Sequence[object], digits: int = 4) -> str:
    texts = [plain(value, digits) for value in values]
    return texts[0] if len(set(texts)) == 1 else " / ".join(texts)


def _exact(values: Sequence[object]) -> tuple[float | None, ...]:
    return tuple(as_finite(value) for value in values)


def instance_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Formula, dense autograd and estimates of every instance."""
    names = [e["name"] for e in rows[0]["estimates"]] if rows else []
    columns = (
        Column("Instance", "widths", False),
        Column("Sharpness", "exact formula"),
        Column("Dense autograd", "relative difference"),
        Column("Trace", "exact formula"),
        *(Column(f"Estimated {name.replace('_', ' ')}", "± its error; truth inside?") for name in names),
    )
    body = []
    for row in rows:
        off = row["dense"]["sharpness"] / row["sharpness"] - 1.0
        cells = [
            Cell(row["name"], joined(row["widths"])),
            Cell(plain(row["sharpness"], 9), "", (row["sharpness"],)),
            Cell(plain(row["dense"]["sharpness"], 9), plain(off, 1), (row["dense"]["sharpness"], off)),
            Cell(plain(row["trace"], 7), "", (row["trace"],)),
        ]
        for e in row["estimates"]:
            half = (e["high"] - e["low"]) / 2.0
            word, tone = ("inside", "good") if e["inside"] else ("outside", "bad")
            cells.append(Cell(with_error(e["value"], half), "", _exact([e["value"], half]), word, tone))
        body.append(tuple(cells))
    return Table("instances", "Exact values and estimates", columns, tuple(body))


def run_table(results: Mapping[str, Any]) -> Table:
    """One row per start and step size, both signs together."""
    heads = (
        ("Start", "2/η"),
        ("Growth a step", "predicted"),
        ("Escape step", "predicted"),
        ("Largest loss", ""),
        ("Outcome", "steps taken"),
    )
    columns = (
        Column(*heads[0], False), Column(*heads[1]), Column(*heads[2]), Column(*heads[3]), Column(*heads[4], False),
        Column("Final sharpness", "smallest possible"), Column("Verdict", "", False),
    )  # fmt: skip
    group = next(group for group in results["groups"] if group["name"] == "escape")
    verdicts = {
        (claim["parameters"]["recipe"], claim["parameters"]["c"]): claim["reproduced"]
        for claim in group["claims"]
        if "c" in claim["parameters"]
    }
    rows = []
    for record in results["escape"]["recipes"]:
        for plus, minus in zip(record["runs"][::2], record["runs"][1::2], strict=True):
            runs, c = (plus, minus), plus["c"]
            stable = record["sharpness"] / c
            escaped = [run["escaped_at"] for run in runs]
            predicted = plus["predicted_escape"]
            outcomes = list(dict.fromkeys(run["outcome"] for run in runs))
            taken = " / ".join(dict.fromkeys(integer(run["stopped_at"]) for run in runs))
            rows.append(
                (
                    Cell(f"{record['name']}, c = {c:g}", f"2/η = {plain(stable, 7)}", (stable,)),
                    Cell(_both([r["growth"] for r in runs], 5), plain(1.0 - 2.0 * c, 5), _exact([r["growth"] for r in runs])),
                    Cell(
                        " / ".join(dict.fromkeys("none" if t is None else integer(t) for t in escaped)),
                        MISSING if predicted is None else plain(predicted, 3), _exact(escaped),
                    ),
                    Cell(_both([r["largest_loss"] for r in runs], 3), "", _exact([r["largest_loss"] for r in runs])),
                    Cell(" / ".join(outcomes), taken),
                    Cell(
                        _both([r["sharpness"] for r in runs], 8), plain(record["flattest"], 8),
                        _exact([r["sharpness"] for r in runs]),
                    ),
                    verdict(verdicts[record["name"], c]),
                )
            )  # fmt: skip
    return Table("escape", "Every run of the escape experiment", columns, tuple(rows))


def method_table(results: Mapping[str, Any]) -> Table:
    """Sharpness and trace at the end of every method's runs."""
    methods = results["methods"]
    group = next(group for group in results["groups"] if group["name"] == "methods")
    columns = (
        Column("Method", "step size", False),
        Column("Sharpness", f"smallest possible {plain(methods['flattest'], 4)}"),
        Column("Trace", f"smallest possible {plain(methods['smallest_trace'], 4)}"),
        Column("Verdict", "", False),
    )
    rows = []
    for (name, label), claim in zip(methods["labels"].items(), group["claims"], strict=True):
        runs = [run for run in methods["runs"] if run["method"] == name]
        cells = []
        for key in ("sharpness", "trace"):
            values = [run[key] for run in runs]
            cells.append(Cell(", ".join(plain(value, 5) for value in values), "", _exact(values)))
        rows.append((Cell(label, plain(runs[0]["step_size"], 4)), *cells, verdict(claim["reproduced"])))
    return Table("methods", "Where each method ends", columns, tuple(rows))
