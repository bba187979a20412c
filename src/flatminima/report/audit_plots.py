"""The plots of an audit: how far each number moves, the law of the trace, and two minima side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go

from flatminima.report import labels, plots
from flatminima.report.numbers import as_finite, factor, plain, with_error
from flatminima.report.panels import Panel, axis, colour, drawn, log_axis, log_range, marker, safe, spread, wrapped

Results = Mapping[str, Any]
_AXIS = 26  # characters of an axis title that a telephone has room for beside the names of the measures
_INVARIANT, _COORDINATES = 3, 5  # colours of the style sheet


def orbits(audit: Results) -> list[Panel]:
    """Every value over the network's own, on a log scale: one row a measure, one mark a member."""
    kinds = [s["kind"] for s in audit["symmetries"] if s["preserves"] == "outputs"]
    names = [name for name, row in audit["changes"].items() if row]
    traces, ends = [], [1.0]
    for index, kind in enumerate(kinds):
        xs, ys, texts = [], [], []
        for row, name in enumerate(names):
            own = as_finite(audit["measures"][name]["value"])
            for value in audit["changes"][name][kind]["values"]:
                number = as_finite(value)
                if own and number is not None and number / own > 0:
                    xs.append(number / own)
                    ys.append(row + 0.5 * ((index + 0.5) / len(kinds) - 0.5))
                    label = safe(audit["measures"][name]["label"])
                    texts.append(f"{label}: {plain(number)}, {factor(number / own)}<br>{safe(labels.symmetry(kind))}")
        ends += xs
        traces.append(
            go.Scatter(
                x=xs, y=ys, mode="markers", marker=marker(index + 1, 8) | {"opacity": 0.85}, text=texts,
                hovertemplate="%{text}<extra></extra>",
            )
        )  # fmt: skip
    if len(ends) == 1:
        return []
    low, high = log_range([*ends, 0.8, 1.25])
    x = axis(wrapped("value at a member / value at the network", _AXIS), **log_axis(low, high))
    ticks = {"tickmode": "array", "tickvals": list(range(len(names)))}
    ticks["ticktext"] = [wrapped(audit["measures"][name]["label"], 22) for name in names]
    y = axis("", **ticks, range=[len(names) - 0.4, -0.6], ticks="", zeroline=False)
    line = {
        "type": "line",
        "x0": 1,
        "x1": 1,
        "yref": "paper",
        "y0": 0,
        "y1": 1,
        "line": {"color": "var(--ink)", "width": 1},
    }
    figure = drawn(traces, x, y, 80 + 36 * len(names), shapes=[line])
    return [
        Panel(
            figure,
            "How far does each number move while no output does?",
            "Value at each random member over the network's.",
        )
    ]


def orbit_keys(audit: Results) -> list[str]:
    """The kinds in the order of their marks."""
    return [labels.symmetry(s["kind"]) for s in audit["symmetries"] if s["preserves"] == "outputs"]


def heatmap(audit: Results) -> list[Panel]:
    """By which factor each measure changes under each kind of symmetry that keeps the outputs."""
    kinds = [s["kind"] for s in audit["symmetries"] if s["preserves"] == "outputs"]
    names = [name for name, row in audit["changes"].items() if row]
    ratios = {name: {kind: audit["changes"][name][kind]["max_ratio"] for kind in kinds} for name in names}
    return plots.audit_heatmap(
        {"measures": audit["measures"], "audit": {"measures": names, "symmetries": kinds, "max_ratio": ratios}}
    )


def laws(audit: Results) -> list[Panel]:
    """The trace of every member of a diagonal symmetry, measured against predicted, in units of the network's own."""
    traces, ends = [], []
    for index, law in enumerate(audit["laws"]):
        trace = as_finite(law["trace"])
        rows = [
            tuple(as_finite(v) for v in row)
            for row in zip(
                law["predicted"], law["predicted_errors"], law["measured"], law["measured_errors"], strict=True
            )
        ]
        points = [
            (p / trace, (e or 0) / trace, m / trace, (s or 0) / trace) for p, e, m, s in rows if trace and p and m
        ]
        points = [point for point in points if point[0] > 0 and point[2] > 0]
        if not points:
            continue
        ends += [end for point in points for end in (point[0], point[2])]
        bars = {"type": "data", "thickness": 1.2, "width": 3, "color": colour(index + 1)}
        traces.append(
            go.Scatter(
                x=[p[0] for p in points], y=[p[2] for p in points], mode="markers", marker=marker(index + 1, 9),
                error_x=bars | {"array": [abs(p[1]) for p in points]}, error_y=bars | {"array": [abs(p[3]) for p in points]},
                text=[
                    f"{safe(labels.symmetry(law['symmetry']))}<br>predicted {factor(p[0])}, measured {factor(p[2])}"
                    for p in points
                ],
                hovertemplate="%{text}<extra></extra>",
            )
        )  # fmt: skip
    if not traces:
        return []
    low, high = log_range([*ends, 0.8, 1.25])
    diagonal = go.Scatter(
        x=[10**low, 10**high],
        y=[10**low, 10**high],
        mode="lines",
        line={"color": "var(--muted)", "width": 1},
        hoverinfo="skip",
    )
    figure = drawn(
        [diagonal, *traces], axis("predicted trace / own trace", **log_axis(low, high)),
        axis("measured trace / own trace", **log_axis(low, high)), 320,
    )  # fmt: skip
    return [
        Panel(figure, "The trace does what the law says", "Measured against predicted Hessian trace of every member.")
    ]


def law_keys(audit: Results) -> list[str]:
    """The kinds in the order of their marks."""
    return [labels.symmetry(law["symmetry"]) for law in audit["laws"]]


def differences(comparison: Results) -> list[Panel]:
    """The relative difference of every measure of flatness with its error; full marks are invariant."""
    rows = [d for d in comparison["differences"] if d["of_flatness"] and as_finite(d["difference"]) is not None]
    if not rows:
        return []
    xs, errors, texts = [], [], []
    for d in rows:
        size = (abs(d["first"]) + abs(d["second"])) / 2 or 1.0
        xs.append(d["difference"] / size)
        errors.append((as_finite(d["error"]) or 0.0) / size)
        texts.append(f"{safe(d['label'])}: {with_error(d['difference'], d['error'])}<br>{safe(d['basis'])}")
    shade = [colour(_INVARIANT if d["trusted"] else _COORDINATES) for d in rows]
    marks = go.Scatter(
        x=xs, y=list(range(len(rows))), mode="markers",
        marker={
            "size": 11, "color": shade, "symbol": ["circle" if d["trusted"] else "diamond-open" for d in rows],
            "line": {"width": 2, "color": shade},
        },
        error_x={"type": "data", "array": [3 * e for e in errors], "thickness": 1.6, "width": 5, "color": "var(--muted)"},
        text=texts, hovertemplate="%{text}<extra></extra>",
    )  # fmt: skip
    ends = [
        0.0,
        *(x - 3 * e for x, e in zip(xs, errors, strict=True)),
        *(x + 3 * e for x, e in zip(xs, errors, strict=True)),
    ]
    low, high = spread([max(-2.2, min(2.2, end)) for end in ends], 0.08)
    ticks = {"tickmode": "array", "tickvals": list(range(len(rows)))}
    ticks["ticktext"] = [wrapped(d["label"], 22) for d in rows]
    a, b = comparison["names"]
    x = axis(wrapped(f"({b} − {a}) / mean of the two", _AXIS), range=[low, high])
    y = axis("", **ticks, range=[len(rows) - 0.5, -0.5], ticks="")
    line = {
        "type": "line",
        "x0": 0,
        "x1": 0,
        "yref": "paper",
        "y0": 0,
        "y1": 1,
        "line": {"color": "var(--ink)", "width": 1},
    }
    figure = drawn([marks], x, y, 90 + 34 * len(rows), shapes=[line])
    return [
        Panel(figure, "How do they differ?", "Relative difference of every measure of flatness, bars are three errors.")
    ]
