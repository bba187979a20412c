"""The plots of a comparison, in small panels that a page can lay out for any width."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import plotly.graph_objects as go

from flatminima.report import labels
from flatminima.report.numbers import MISSING, as_finite, change_factor, factor, plain, with_error
from flatminima.report.panels import (
    Panel,
    Results,
    axis,
    colour,
    drawn,
    finite,
    is_log,
    log_axis,
    log_range,
    marker,
    runs_of,
    safe,
    spread,
    wrapped,
)

Getter = Callable[[Mapping[str, Any]], Any]


def _estimates(
    results: Results, title: str, stat_of: Getter, value_of: Getter, axis_title: str, scale: float
) -> list[Panel]:
    """One quantity, one line per method: every run a small mark, the mean with its 95% interval a large one."""
    traces: list[Any] = []
    names = labels.methods(results)
    for index, summary in enumerate(results.get("methods") or []):
        label = safe(labels.method(summary["method"]))
        values = {run.get("seed"): as_finite(value_of(run)) for run in runs_of(results, names[index])}
        shown = {seed: value * scale for seed, value in values.items() if value is not None}
        if shown:
            traces.append(
                go.Scatter(
                    x=list(shown.values()),
                    y=[index + 0.22] * len(shown),
                    mode="markers",
                    marker=marker(index, 6) | {"opacity": 0.55},
                    name=f"{label}, runs",
                    text=[f"{label}, seed {safe(seed)}: {plain(value)}" for seed, value in shown.items()],
                    hovertemplate="%{text}<extra></extra>",
                )
            )
        stat = stat_of(summary) or {}
        mean, low, high = (as_finite(stat.get(key)) for key in ("mean", "low", "high"))
        if mean is None:
            continue
        known = low is not None and high is not None
        up = [((high if high is not None else mean) - mean) * scale]
        down = [(mean - (low if low is not None else mean)) * scale]
        note = with_error(mean * scale, up[0])
        traces.append(
            go.Scatter(
                x=[mean * scale],
                y=[index],
                mode="markers",
                marker=marker(index, 12),
                error_x={
                    "type": "data",
                    "array": up,
                    "arrayminus": down,
                    "thickness": 2,
                    "width": 5,
                    "color": colour(index),
                    "visible": known,
                },
                name=f"{label}, mean",
                text=[f"{label}, mean: {note}"],
                hovertemplate="%{text}<extra></extra>",
            )
        )
    if not traces:
        return []
    ticks = {"tickmode": "array", "tickvals": list(range(len(names)))}
    ticks["ticktext"] = [wrapped(labels.method(name), 14) for name in names]
    y = axis("", **ticks, range=[len(names) - 0.4, -0.5], showgrid=False, ticks="", showline=False)
    figure = drawn(traces, axis(axis_title), y, 96 + 44 * len(names))
    return [
        Panel(figure, title, f"{title} of every run, and the mean of each method with its 95% interval over seeds.")
    ]


def headline(results: Results) -> list[Panel]:
    """The answer as a picture: test accuracy, and the first measure of flatness, if possible one that survives the audit."""
    panels = _estimates(
        results,
        "Better? Test accuracy",
        lambda summary: summary.get("test_accuracy"),
        lambda run: run.get("test_accuracy"),
        "test accuracy (%) → better",
        100.0,
    )
    directed = [n for n, entry in (results.get("measures") or {}).items() if entry.get("flatter_when") == "lower"]
    verdicts = (results.get("audit") or {}).get("verdict") or {}
    directed.sort(key=lambda name: verdicts.get(name) != "survives")
    if directed:
        name, label = directed[0], labels.measure(results, directed[0])
        panels += _estimates(
            results,
            f"Flatter? {labels.capitalised(label)}",
            lambda summary: (summary.get("measures") or {}).get(name),
            lambda run: ((run.get("measures") or {}).get(name) or {}).get("value"),
            f"flatter ← {safe(label)}{_unit(results['measures'][name])}",
            1.0,
        )
    return panels


def _unit(entry: Mapping[str, Any]) -> str:
    return f" ({safe(entry['unit'])})" if entry.get("unit") else ""


def relative_differences(results: Results) -> list[Panel]:
    """Every measure's paired difference to the first method, in percent of that method's mean, with its interval."""
    summaries = list(results.get("methods") or [])
    names = labels.measures(results)
    if len(summaries) < 2 or not names:
        return []
    traces: list[Any] = []
    extent: list[float] = []
    count = len(summaries) - 1
    for index, summary in enumerate(summaries[1:], start=1):
        xs, ys, texts, up, down = [], [], [], [], []
        for row, name in enumerate(names):
            base = as_finite(((summaries[0].get("measures") or {}).get(name) or {}).get("mean"))
            pair = ((summary.get("versus_first") or {}).get("measures") or {}).get(name) or {}
            delta, low, high = (as_finite(pair.get(key)) for key in ("difference", "low", "high"))
            if delta is None or not base:
                continue
            ends = [
                100.0 * value / abs(base)
                for value in (delta, delta if low is None else low, delta if high is None else high)
            ]
            xs.append(ends[0])
            ys.append(row + (index - (count + 1) / 2) * 0.7 / max(count, 2))
            up.append(None if high is None else ends[2] - ends[0])
            down.append(None if low is None else ends[0] - ends[1])
            extent += ends
            span = f" [{ends[1]:+.1f}, {ends[2]:+.1f}]" if low is not None else ""
            label = f"{safe(labels.measure(results, name))}, {safe(labels.method(summary['method']))}"
            texts.append(f"{label}: {ends[0]:+.1f} %{span}".replace("-", "−"))
        traces.append(
            go.Scatter(
                x=xs,
                y=ys,
                mode="markers",
                marker=marker(index, 9),
                error_x={
                    "type": "data",
                    "array": up,
                    "arrayminus": down,
                    "thickness": 1.6,
                    "width": 4,
                    "color": colour(index),
                },
                name=safe(labels.method(summary["method"])),
                text=texts,
                hovertemplate="%{text}<extra></extra>",
            )
        )
    if not extent:
        return []
    # Two seeds give intervals of thousands of percent: they leave the plot, so that the estimates stay readable.
    low, high = spread([*(max(-200.0, min(200.0, value)) for value in extent), 0.0])
    first = labels.method(summaries[0]["method"])
    bands = [
        {
            "type": "rect",
            "xref": "paper",
            "x0": 0,
            "x1": 1,
            "y0": row - 0.5,
            "y1": row + 0.5,
            "fillcolor": "var(--band)",
            "line": {"width": 0},
            "layer": "below",
        }
        for row in range(0, len(names), 2)
    ]
    zero = {
        "type": "line",
        "x0": 0,
        "x1": 0,
        "yref": "paper",
        "y0": 0,
        "y1": 1,
        "line": {"color": colour(0), "width": 1.5},
    }
    ticks = {"tickmode": "array", "tickvals": list(range(len(names)))}
    audited = (results.get("audit") or {}).get("verdict") or {}
    verdicts = [f"<br><i>audit: {safe(audited[name])}</i>" if audited.get(name) else "" for name in names]
    ticks["ticktext"] = [wrapped(labels.measure(results, n), 20) + v for n, v in zip(names, verdicts, strict=True)]
    y = axis("", **ticks, range=[len(names) - 0.5, -0.5], showgrid=False, ticks="", showline=False)
    x = axis(f"difference to {safe(first)} (% of its mean)", range=[low, high])
    title = f"Every measure, relative to {first}"
    figure = drawn(traces, x, y, 90 + max(46, 16 * count + 14) * len(names), shapes=[*bands, zero])
    return [
        Panel(
            figure, title, "Paired difference of each method to the first, in percent of the first, with 95% intervals."
        )
    ]


def accuracy_against_measures(results: Results) -> list[Panel]:
    """Test accuracy against each measure, one mark per run, with the measurement's own error."""
    accuracies = [value * 100 for value in finite(run.get("test_accuracy") for run in runs_of(results))]
    panels = []
    for name, entry in (results.get("measures") or {}).items():
        traces: list[Any] = []
        shown: list[float] = []
        for index, method in enumerate(labels.methods(results)):
            points = []
            for run in runs_of(results, method):
                measurement = (run.get("measures") or {}).get(name) or {}
                value, accuracy = as_finite(measurement.get("value")), as_finite(run.get("test_accuracy"))
                if value is not None and accuracy is not None:
                    points.append(
                        (value, 100.0 * accuracy, as_finite(measurement.get("error")) or 0.0, run.get("seed"))
                    )
            if not points:
                continue
            shown += [point[0] for point in points]
            label = safe(labels.method(method))
            bars = {"type": "data", "array": [p[2] for p in points], "thickness": 1, "width": 0, "color": colour(index)}
            texts = [
                f"{label}, seed {safe(p[3])}<br>{with_error(p[0], p[2])}<br>test accuracy {p[1]:.2f} %" for p in points
            ]
            traces.append(
                go.Scatter(
                    x=[p[0] for p in points],
                    y=[p[1] for p in points],
                    mode="markers",
                    marker=marker(index, 8) | {"opacity": 0.85},
                    error_x=bars,
                    name=label,
                    text=texts,
                    hovertemplate="%{text}<extra></extra>",
                )
            )
        if not traces:
            continue
        label = labels.measure(results, name)
        scale = (
            log_axis(*log_range(shown, 0.1))
            if is_log(shown, 10.0)
            else {"range": list(spread(shown, 0.1)), "nticks": 4}
        )
        x = axis(wrapped(label, 34) + _unit(entry), **scale)
        figure = drawn(traces, x, axis("test accuracy (%)", range=list(spread(accuracies, 0.1))), 260)
        panels.append(Panel(figure, labels.capitalised(label), f"Test accuracy of every run against {label}."))
    return panels


def audit_heatmap(results: Results) -> list[Panel]:
    """The audit: by which factor each measure changes under each symmetry, coloured by its logarithm."""
    audit = results.get("audit") or {}
    names, kinds = list(audit.get("measures") or []), list(audit.get("symmetries") or [])
    if not names or not kinds:
        return []
    ratios = [[change_factor((audit.get("max_ratio") or {}).get(name) or {}, kind) for kind in kinds] for name in names]
    largest = max(finite(ratio for row in ratios for ratio in row), default=1.0)
    logs = [
        [abs(math.log10(min(ratio, largest))) if ratio is not None and ratio > 0 else None for ratio in row]
        for row in ratios
    ]
    texts = [[MISSING if ratio is None else factor(ratio) for ratio in row] for row in ratios]
    rows = [wrapped(labels.measure(results, name), 20) for name in names]
    columns = [wrapped(labels.symmetry(kind), 12) for kind in kinds]
    known = finite(value for row in logs for value in row)
    if not known:
        return []
    heat = go.Heatmap(
        z=logs,
        x=list(range(len(kinds))),
        y=list(range(len(names))),
        text=texts,
        texttemplate="%{text}",
        textfont={"size": 12, "color": "var(--ink)"},
        customdata=[[f"{row}, {column}".replace("<br>", " ") for column in columns] for row in rows],
        hovertemplate="%{customdata}<br>changes by %{text}<extra></extra>",
        colorscale=[[0.0, "var(--heat-0)"], [0.5, "var(--heat-1)"], [1.0, "var(--heat-2)"]],
        zmin=0.0,
        zmax=max([1.0, *known]),
        xgap=3,
        ygap=3,
        hoverongaps=False,
        colorbar={
            "orientation": "h",
            "thickness": 8,
            "len": 1.0,
            "y": 0,
            "yanchor": "top",
            "ypad": 12,
            "outlinewidth": 0,
            "title": {
                "text": "log₁₀ of the change factor",
                "side": "bottom",
                "font": {"size": 12, "color": "var(--muted)"},
            },
            "tickfont": {"size": 11},
            "nticks": 5,
        },
    )
    flat = {"showgrid": False, "ticks": "", "showline": False, "tickmode": "array"}
    x = axis("", **flat, tickvals=list(range(len(kinds))), ticktext=columns, side="top")
    y = axis("", **flat, tickvals=list(range(len(names))), ticktext=rows, range=[len(names) - 0.5, -0.5])
    figure = drawn([heat], x, y, 130 + 44 * len(names))
    title = "How much does each number change when no prediction does?"
    return [
        Panel(figure, title, "Largest factor by which each measure changes under each function-preserving rescaling.")
    ]
