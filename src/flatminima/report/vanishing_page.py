"""The page of the vanishing advantage: the abstract's differences, split into batch size and learning rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from flatminima.report.numbers import integer, plain, with_error
from flatminima.report.page import Key
from flatminima.report.panels import Panel, axis, colour, drawn, log_axis, marker, symbol
from flatminima.report.reproduction import check_schema, render_reproduction
from flatminima.report.study_tables import part_table
from flatminima.report.tables import Cell, Column, Table
from flatminima.report.weakness_page import _estimate, counts_table, verdict_table
from flatminima.study.value_names import word

Results = Mapping[str, Any]
_QUESTION = "Does the advantage of large batches vanish with more data, and is it one of batches?"
_KINDS = ("as the source", "small batches' rate", "large batches' rate")


def render_vanishing(results: Results) -> str:
    """Render the results of ``flatminima reproduce vanishing`` as one HTML page.

    Args:
        results: what :func:`flatminima.protocols.reproduce_vanishing` returns.

    Returns:
        The page, to be written as UTF-8; it asks for nothing over the network.

    Raises:
        ValueError: the dictionary has another schema than 1.

    Example:
        >>> render_vanishing({"schema": 2})
        Traceback (most recent call last):
        ValueError: results have schema 2, but this version reads schema 1: make them anew
    """
    check_schema(results)
    studies = results["studies"]
    return render_reproduction(
        "vanishing.html",
        results,
        question=_QUESTION,
        source="Bennett (arXiv:2605.05209)",
        contents=[
            ("abstract", "The abstract"), ("split", "Batch or rate"), ("trace", "The trace"), ("cells", "Every cell"),
        ],
        facts=[
            ("Networks", integer(sum(len(s["networks"]["seed"]) for s in studies)), "trained and measured"),
            ("CPU time", f"{sum(study['cpu_seconds'] for study in studies) / 3600:.1f} h", "for all of them"),
        ],
        keys=[Key(_words(kind), index, symbol(index)) for index, kind in enumerate(_KINDS)],
        tables={
            "differences": difference_table(results["differences"]),
            "correlations": correlation_table(results["correlations"]),
            "agreement": agreement_table(results["agreement"]),
            "cells": cell_table(results["cells"]),
            "counts": counts_table(studies),
            "verdicts": verdict_table(results["verdicts"]),
            "parts": part_table(results),
        },
        plots={"differences": [difference_plot(results["differences"])]},
    )  # fmt: skip


def difference_table(differences: Sequence[Results]) -> Table:
    """Large minus small batches, by rows: as the source compares them, and at each learning rate."""
    columns = (Column("Training rows", "", False), *(Column(_words(kind), "points; 95 % interval") for kind in _KINDS))
    rows = []
    for n in sorted({entry["rows"] for entry in differences}):
        by_kind = {entry["kind"]: entry for entry in differences if entry["rows"] == n}
        rows.append((Cell(integer(n)), *(_difference(by_kind[kind]) for kind in _KINDS)))
    return Table("differences", "Large minus small batches", columns, tuple(rows))


def _difference(entry: Results) -> Cell:
    if entry["low"] is None:
        found, missed = ([entry[f"{kind}_{batch}"] for batch in ("large", "small")] for kind in ("n", "missed"))
        counts = f"finished {found[0]} and {found[1]}, missed {missed[0]} and {missed[1]}"
        return Cell("—", counts, verdict=entry["outcome"])
    ends = f"{entry['low']:+.2f} to {entry['high']:+.2f}".replace("-", "−")
    tone = "good" if entry["outcome"] == "equivalent" else "bad" if entry["outcome"] == "different" else ""
    return Cell(
        f"{entry['difference']:+.2f}".replace("-", "−"), f"{ends}; n = {entry['n_large']} and {entry['n_small']}",
        (entry["difference"], entry["low"], entry["high"]), entry["outcome"], tone,
    )  # fmt: skip


def difference_plot(differences: Sequence[Results]) -> Panel:
    """The three differences against the number of rows."""
    traces, values = [], [0.0]
    for index, kind in enumerate(_KINDS):
        found = [entry for entry in differences if entry["kind"] == kind and entry["low"] is not None]
        values += [entry[end] for entry in found for end in ("low", "high")]
        traces.append(
            go.Scatter(
                x=[entry["rows"] * 1.04 ** (index - 1) for entry in found], y=[entry["difference"] for entry in found],
                mode="lines+markers", marker=marker(index, 9), line={"color": colour(index), "width": 1.2},
                error_y={
                    "type": "data", "symmetric": False, "thickness": 1.4, "width": 0, "color": colour(index),
                    "array": [entry["high"] - entry["difference"] for entry in found],
                    "arrayminus": [entry["difference"] - entry["low"] for entry in found],
                },
                customdata=[(entry["rows"], entry["low"], entry["high"]) for entry in found],
                hovertemplate=(
                    f"{_words(kind)}, %{{customdata[0]:,}} rows: %{{y:.2f}} points "
                    "[%{customdata[1]:.2f}, %{customdata[2]:.2f}]<extra></extra>"
                ),
            )
        )  # fmt: skip
    x = axis("training rows", **log_axis(2.6, 4.9))
    y = axis("large minus small batches, points", zeroline=True, zerolinecolor="var(--muted)")
    return Panel(drawn(traces, x, y, 360), "Large minus small batches", "Difference in accuracy against training rows.")


def correlation_table(found: Sequence[Results]) -> Table:
    """Trace and patterns against accuracy in the source's two regimes."""
    columns = (
        Column("Training rows", "measure", False), Column("Pooled", "over both regimes"), Column("Within regimes"),
        Column("Reliability", "two calls, within regimes"), Column("Networks"),
    )  # fmt: skip
    body = [
        (
            Cell(integer(e["rows"]), _label(e["name"])), _estimate(e["pooled"]), _estimate(e["within"]),
            _estimate(e["reliability"]), Cell(integer(e["networks"])),
        )
        for e in found
    ]  # fmt: skip
    return Table("correlations", "Rank correlation with test accuracy", columns, tuple(body))


def _label(name: str) -> str:
    layers = {"unseen_patterns_1": "activation patterns, layer 1", "unseen_patterns_2": "activation patterns, layer 2"}
    return layers.get(name) or word(name)


def agreement_table(found: Sequence[Results]) -> Table:
    """How often the others are right where a network is wrong."""
    columns = (
        Column("Training rows", "", False),
        Column("Regime", "", False),
        Column("Others right"),
        Column("Networks"),
    )
    body = [
        (
            Cell(integer(e["rows"])), Cell(f"{e['batch']} batches"),
            Cell(with_error(e["mean"], e["half"]), "", (e["mean"], e["half"])), Cell(integer(e["n"])),
        )
        for e in found
    ]  # fmt: skip
    return Table("agreement", "Shared errors", columns, tuple(body))


def cell_table(cells: Sequence[Results]) -> Table:
    """Every cell of both studies; what missed its criterion is counted, not hidden."""
    columns = (
        Column("Study", "rows", False), Column("Batch"), Column("Learning rate"), Column("Finished", "missed; not run"),
        Column("Test accuracy", "%"), Column("Epochs"), Column("Training loss"), Column("Hessian trace"),
    )  # fmt: skip
    body = []
    for c in cells:
        means = [_mean(c[name], scale) for name, scale in (("test.accuracy", 100.0), ("train.epochs", 1.0))]
        means += [_mean(c[name], 1.0) for name in ("train.loss", "measure.trace")]
        counts = f"{c['missed']}; {c['not run']}"
        body.append(
            (
                Cell(c["study"], integer(c["rows"])), Cell(integer(c["batch_size"])), Cell(plain(c["lr"], 3)),
                Cell(f"{c['finished']} of {c['networks']}", counts, tone="bad" if c["missed"] or c["not run"] else ""), *means,
            )
        )  # fmt: skip
    return Table("cells", "Every cell", columns, tuple(body))


def _mean(entry: Results | None, scale: float) -> Cell:
    if entry is None or entry["mean"] is None:
        return Cell("—")
    value, half = scale * entry["mean"], None if entry["half"] is None else scale * entry["half"]
    return Cell(with_error(value, half), "", (value, half))


def _words(kind: str) -> str:
    return "As the source" if kind == "as the source" else f"Both at the {kind}"
