"""The plots of the F2M reproduction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from flatminima.report.fewshot_tables import label
from flatminima.report.numbers import as_finite
from flatminima.report.panels import (
    COLOURS,
    Panel,
    axis,
    colour,
    drawn,
    is_log,
    log_axis,
    log_range,
    marker,
    safe,
    spread,
    wrapped,
)

Results = Mapping[str, Any]
#: Methods in the order in which they get a colour; there are eight.
PRIORITY = (
    "baseline", "f2m", "f2m-no-noise", "f2m-no-clamp", "crt", "ft", "sam-clamp", "f2m-frozen", "sam", "joint", "fsll", "icarl",
    "rebalance", "swa", "f2m-swad", "f2m-released", "plain-no-clamp",
)  # fmt: skip
_CURVES = (("accuracy", "All classes so far", 0), ("base", "Base classes", 0), ("novel", "Novel classes so far", 1))


def shown(results: Results) -> list[str]:
    """The methods that have a colour."""
    present = [row["name"] for row in results["methods"]]
    return [name for name in PRIORITY if name in present][:COLOURS]


def curves(results: Results) -> list[Panel]:
    """Accuracy over sessions: on all classes, on base classes, on novel classes; intervals over base seeds."""
    rows = {row["name"]: row for row in results["methods"]}
    panels = []
    for name, title, first in _CURVES:
        traces: list[Any] = []
        values: list[float] = []
        for index, method in enumerate(shown(results)):
            stats = rows[method]["sessions"][name]
            points = [(t + 1 + first, as_finite(s["mean"]), s) for t, s in enumerate(stats)]
            kept = [(x, y, s) for x, y, s in points if y is not None]
            if not kept:
                continue
            halves = [_half(s) for _, _, s in kept]
            hover = f"{safe(label(results, method))}<br>session %{{x:.0f}}: %{{y:.1f}} %<extra></extra>"
            traces.append(
                go.Scatter(
                    x=[x + 0.03 * (index - 3.5) for x, _, _ in kept], y=[y for _, y, _ in kept], mode="lines+markers",
                    marker=marker(index, 7), line={"color": colour(index), "width": 1.5}, hovertemplate=hover,
                    error_y={"type": "data", "array": [h or 0.0 for h in halves], "thickness": 1, "width": 2,
                             "color": colour(index)},
                )
            )  # fmt: skip
            values += [y + sign * (h or 0.0) for (_, y, _), h in zip(kept, halves, strict=True) for sign in (-1, 1)]
        if traces:
            x = axis("session", dtick=1, range=[0.6, results["plan"]["sessions"] + 0.4])
            low, high = spread(values)
            y = axis("accuracy, %", range=[max(low, -2.0), min(high, 102.0)])
            panels.append(Panel(drawn(traces, x, y, 330), title, f"{title}: accuracy after every session, by method."))
    return panels


def _half(stat: Mapping[str, Any]) -> float | None:
    low, high = as_finite(stat.get("low")), as_finite(stat.get("high"))
    return None if low is None or high is None else (high - low) / 2


def forest(results: Results) -> list[Panel]:
    """Every comparison: differences of the mean accuracy and of the last session's base and novel accuracy."""
    return [
        panel
        for quantity, title in (
            ("average", "Mean accuracy"),
            ("base", "Base, last session"),
            ("novel", "Novel, last session"),
        )
        if (panel := _forest(results, quantity, title)) is not None
    ]


def _forest(results: Results, quantity: str, title: str) -> Panel | None:
    rows = results["comparisons"]
    if not rows:
        return None
    traces: list[Any] = []
    reach = [0.0]
    names = [wrapped(f"{label(results, r['method'])} − {label(results, r['baseline'])}", 24) for r in rows]
    for place, (row, text) in enumerate(zip(rows, names, strict=True)):
        stat = row["quantities"][quantity]
        mean, low, high = (as_finite(stat.get(key)) for key in ("mean", "low", "high"))
        if mean is None:
            continue
        if low is not None and high is not None:
            line = {"color": "var(--ink)", "width": 2}
            traces.append(go.Scatter(x=[low, high], y=[place, place], mode="lines", line=line, hoverinfo="skip"))
            reach += [low, high]
        hover = text + "<br>%{x:+.2f} points<extra></extra>"
        traces.append(go.Scatter(x=[mean], y=[place], mode="markers", marker=marker(3, 10), hovertemplate=hover))
        reach.append(mean)
    y = axis(
        "", tickmode="array", tickvals=list(range(len(rows))), ticktext=names, range=[len(rows) - 0.4, -0.6], showgrid=False,
        ticks="", showline=False,
    )  # fmt: skip
    zero = {
        "type": "line", "x0": 0, "x1": 0, "yref": "paper", "y0": 0, "y1": 1, "layer": "below",
        "line": {"color": "var(--rule)", "width": 1.4},
    }  # fmt: skip
    x = axis("difference, points", range=list(spread(reach, 0.08)))
    figure = drawn(traces, x, y, 80 + 36 * len(rows), shapes=[zero])
    return Panel(figure, title, f"{title}: paired differences with 95 % intervals over base seeds.")


_FLATNESS = (
    ("indicator", "I, mean (L − L*)²"),
    ("worst", "worst loss in the box"),
    ("worst_drift", "drift at the worst point"),
)


def flatness(results: Results) -> list[Panel]:
    """The loss in the box for every base network, on train and test images."""
    rows = results["flatness"]["rows"]
    bases = list(dict.fromkeys(row["base"] for row in rows))
    panels = []
    for quantity, title in _FLATNESS if bases else ():
        traces: list[Any] = []
        values: list[float] = []
        for index, part in enumerate(("train", "test")):
            points = [(bases.index(r["base"]), r[quantity]) for r in rows if r["part"] == part]
            kept = [(x, s) for x, s in points if as_finite(s["mean"]) is not None]
            halves = [_half(s) or 0.0 for _, s in kept]
            traces.append(
                go.Scatter(
                    x=[x + 0.16 * (index - 0.5) for x, _ in kept], y=[s["mean"] for _, s in kept], mode="markers",
                    marker=marker(index, 9), hovertemplate=f"{part} images: %{{y:.3g}}<extra></extra>",
                    error_y={"type": "data", "array": halves, "thickness": 1, "width": 3, "color": colour(index)},
                )
            )  # fmt: skip
            values += [s["mean"] + sign * h for (_, s), h in zip(kept, halves, strict=True) for sign in (-1, 1)]
        names = {"tickmode": "array", "tickvals": list(range(len(bases))), "ticktext": [safe(b) for b in bases]}
        x = axis("", **names, range=[-0.6, len(bases) - 0.4], showgrid=False)
        scale = log_axis(*log_range(values, 0.1)) if is_log(values, 8.0) else {"range": list(spread(values, 0.1))}
        panels.append(Panel(drawn(traces, x, axis(title, **scale), 300), title, f"{title}, by base network."))
    return panels


PLOTS: Sequence[str] = ("curves", "forest", "flatness")
