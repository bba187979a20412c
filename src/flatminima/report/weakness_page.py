"""The page of the weakness reproduction: the abstract's correlations, every rival beside them, and each network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from flatminima.report.numbers import integer, plain
from flatminima.report.page import Key
from flatminima.report.panels import Panel, axis, colour, drawn, marker, safe, symbol
from flatminima.report.reproduction import check_schema, render_reproduction
from flatminima.report.study_tables import part_table
from flatminima.report.tables import Cell, Column, Table

Results = Mapping[str, Any]
_QUESTION = "Does weakness predict test accuracy, and better than cheap measures?"
_SHOWN = (
    "test.accuracy",
    "train.loss",
    "train.epochs",
    "measure.pair_proxy",
    "measure.trace",
    "measure.parameter_norm",
)


def render_weakness(results: Results) -> str:
    """Render the results of ``flatminima reproduce weakness`` as one HTML page.

    Args:
        results: what :func:`flatminima.protocols.reproduce_weakness` returns.

    Returns:
        The page, to be written as UTF-8; it asks for nothing over the network.

    Raises:
        ValueError: the dictionary has another schema than 1.

    Example:
        >>> render_weakness({"schema": 2})
        Traceback (most recent call last):
        ValueError: results have schema 2, but this version reads schema 1: make them anew
    """
    check_schema(results)
    studies = [study for study in results["studies"] if study["networks"]["seed"]]
    names = results["labels"]
    return render_reproduction(
        "weakness.html",
        results,
        question=_QUESTION,
        source="Bennett (arXiv:2605.05209)",
        contents=[
            ("abstract", "The abstract"), ("rivals", "The rivals"), ("verdicts", "Verdicts"), ("networks", "Networks"),
        ],
        facts=[
            ("Networks", integer(sum(len(study["networks"]["seed"]) for study in studies)), "trained and measured"),
            ("CPU time", f"{sum(study['cpu_seconds'] for study in studies) / 3600:.1f} h", "for all of them"),
        ],
        keys=[Key("as trained", 0, symbol(0)), Key("after random function-preserving moves", 1, symbol(1))],
        tables={
            "correlations": [correlation_table(study, names) for study in studies],
            "networks": [network_table(study) for study in studies],
            "counts": counts_table(results["studies"]),
            "verdicts": verdict_table(results["verdicts"]),
            "parts": part_table(results),
        },
        plots={
            "forest": [forest(study, names) for study in studies],
            "scatter": [panel for study in studies if (panel := scatter(study)) is not None],
        },
    )  # fmt: skip


def correlation_table(study: Results, names: Mapping[str, str]) -> Table:
    """Every measure's rank correlation with test accuracy, largest in size first."""
    columns = (
        Column("Measure", "", False), Column("As trained", "95 % interval"), Column("p"),
        Column("After random moves", "95 % interval"), Column("Networks"),
    )  # fmt: skip
    rows = []
    for entry in _ordered(study):
        raw = entry["raw"]
        rows.append(
            (
                Cell(names.get(entry["name"], entry["name"]), entry["name"]), _estimate(raw),
                Cell(plain(raw["p"], 2), "", (raw["p"],)), _estimate(entry["orbit"]), Cell(integer(raw["n"]), "", (raw["n"],)),
            )
        )  # fmt: skip
    return Table(f"correlations-{study['name']}", study["name"], columns, tuple(rows))


def network_table(study: Results) -> Table:
    """Each network with the numbers of the abstract."""
    networks = study["networks"]
    shown = [name for name in _SHOWN if name in networks["values"]]
    columns = (Column("Seed", "subset", False), *(Column(name.split(".", 1)[1].replace("_", " ")) for name in shown))
    rows = []
    for at, seed in enumerate(networks["seed"]):
        cells = [Cell(plain(networks["values"][name][at], 6), "", (networks["values"][name][at],)) for name in shown]
        status = networks["status"][at]
        heading = str(networks["subset"][at]) + ("" if status == "finished" else f", {status}")
        rows.append((Cell(str(seed), heading), *cells))
    return Table(f"networks-{study['name']}", f"{study['name']}: {len(rows)} networks", columns, tuple(rows))


def counts_table(studies: Sequence[Results]) -> Table:
    """How many networks of each study there are, and what became of them."""
    columns = (
        Column("Study", "", False), Column("Networks"), Column("Finished"), Column("Missed", "the stop criterion"),
        Column("Failed"), Column("Not run"),
    )  # fmt: skip
    body = [
        (
            Cell(study["name"], study["description"]),
            *(Cell(integer(study["counts"][key]), "", (study["counts"][key],)) for key in _COUNTS),
        )
        for study in studies
    ]
    return Table("counts", "Studies", columns, tuple(body))


_COUNTS = ("networks", "finished", "missed", "failed", "not run")


def verdict_table(verdicts: Sequence[Results]) -> Table:
    """The hypotheses and what the rules made of them."""
    columns = (
        Column("Hypothesis", "", False),
        Column("Outcome", "", False),
        Column("p", "after Holm"),
        Column("Rule", "", False),
    )
    tones = {"supported": "good", "refuted": "bad"}
    body = [
        (
            Cell(f"{v['name']}: {v['statement']}", v["reason"]), Cell(v["outcome"], tone=tones.get(v["outcome"], "")),
            Cell(plain(v["p_holm"], 2), "", (v["p_holm"],)), Cell(v["rule"]),
        )
        for v in verdicts
    ]  # fmt: skip
    return Table("verdicts", "Hypotheses", columns, tuple(body))


def forest(study: Results, names: Mapping[str, str]) -> Panel:
    """Every correlation with its interval, as trained and after random moves."""
    entries = list(reversed(_ordered(study)))
    traces: list[Any] = []
    for index, (kind, words, shift) in enumerate((("raw", "as trained", 0.14), ("orbit", "after random moves", -0.14))):
        there = [(at, entry) for at, entry in enumerate(entries) if entry[kind] is not None]
        found = [entry[kind] for _, entry in there]
        ends = [[e["value"] if e[end] is None else e[end] for e in found] for end in ("low", "high")]
        traces.append(
            go.Scatter(
                x=[e["value"] for e in found], y=[at + shift for at, _ in there], mode="markers", marker=marker(index, 8),
                error_x={
                    "type": "data", "symmetric": False, "thickness": 1.4, "width": 0, "color": colour(index),
                    "array": [high - e["value"] for high, e in zip(ends[1], found, strict=True)],
                    "arrayminus": [e["value"] - low for low, e in zip(ends[0], found, strict=True)],
                },
                text=[safe(names.get(entry["name"], entry["name"])) for _, entry in there],
                customdata=list(zip(*ends, strict=True)),
                hovertemplate=(
                    f"%{{text}}, {words}: ρ = %{{x:.3f}} [%{{customdata[0]:.3f}}, %{{customdata[1]:.3f}}]<extra></extra>"
                ),
            )
        )  # fmt: skip
    y = axis(
        "", tickmode="array", tickvals=list(range(len(entries))), range=[-0.7, len(entries) - 0.3],
        ticktext=[safe(names.get(entry["name"], entry["name"])) for entry in entries],
    )  # fmt: skip
    x = axis("Spearman's ρ with test accuracy", range=[-1, 1], zeroline=True, zerolinecolor="var(--muted)")
    return Panel(
        drawn(traces, x, y, 90 + 26 * len(entries)),
        study["name"],
        f"Rank correlations with intervals, {study['name']}.",
    )


def scatter(study: Results) -> Panel | None:
    """Test accuracy against the pair proxy, one mark a network."""
    networks = study["networks"]
    values = networks["values"]
    if "measure.pair_proxy" not in values:
        return None
    subsets = sorted(set(networks["subset"]))
    traces = []
    for index, subset in enumerate(subsets):
        own = [at for at, other in enumerate(networks["subset"]) if other == subset]
        traces.append(
            go.Scatter(
                x=[values["measure.pair_proxy"][at] for at in own], y=[_percent(values["test.accuracy"][at]) for at in own],
                mode="markers", marker=marker(index, 6) | {"opacity": 0.7},
                text=[f"seed {networks['seed'][at]}, subset {subset}" for at in own],
                hovertemplate="%{text}: pair proxy %{x}, %{y:.2f} %<extra></extra>",
            )
        )  # fmt: skip
    return Panel(
        drawn(traces, axis("pair proxy"), axis("test accuracy, %"), 300), study["name"],
        f"Test accuracy against pair proxy, {study['name']}.",
    )  # fmt: skip


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _ordered(study: Results) -> list[Results]:
    found = [entry for entry in study["correlations"] if entry["raw"] is not None]
    return sorted(found, key=lambda entry: -abs(entry["raw"]["value"]))


def _estimate(entry: Results | None) -> Cell:
    if entry is None:
        return Cell("")
    ends = tuple(entry[end] for end in ("low", "high"))
    return Cell(
        _signed(entry["value"]),
        "" if None in ends else f"{_signed(ends[0])} to {_signed(ends[1])}",
        (entry["value"], *ends),
    )


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")
