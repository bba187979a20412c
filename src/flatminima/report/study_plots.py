"""The plots of a study: correlations as a forest, and every network against every measure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from flatminima.report.numbers import as_finite, plain
from flatminima.report.panels import (
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
from flatminima.study.value_names import is_share, outcome_word

Results = Mapping[str, Any]
#: Kind of correlation -> what it is called; the order of colours.
KINDS = {
    "raw": "raw",
    "within": "within cells",
    "partial": "given training loss and weight norm",
    "partial_margin": "given margin too",
    "orbit": "after a random function-preserving move",
    "corrected": "corrected for noise",
}
_STEP = 0.13  # between the kinds of one measure
_MOST_LEVELS = 8


def kinds_shown(results: Results) -> list[str]:
    """Kinds that at least one measure has."""
    rows = [row for part in results["data"] for row in part["correlations"]]
    return [kind for kind in KINDS if any((row[kind] or {}).get("value") is not None for row in rows)]


def forest(results: Results) -> list[Panel]:
    """One panel for each data set: every kind of correlation of every measure, with its interval."""
    shown = kinds_shown(results)
    panels = []
    for part in results["data"]:
        rows = ordered(part["correlations"])
        if not rows:
            continue
        traces: list[Any] = []
        reach = [-0.3, 0.3]
        for kind in shown:
            index = list(KINDS).index(kind)
            points = []
            for place, row in enumerate(rows):
                found = row[kind] or {}
                value, low, high = (as_finite(found.get(name)) for name in ("value", "low", "high"))
                if value is None:
                    continue
                low, high = (value if end is None else end for end in (low, high))
                points.append((place, row, value, low, high, found["n"]))
                reach += [low, high]
            if not points:
                continue
            shift = _STEP * (shown.index(kind) - (len(shown) - 1) / 2)
            traces.append(
                go.Scatter(
                    x=[value for _, _, value, *_ in points], y=[place + shift for place, *_ in points], mode="markers",
                    marker=marker(index, 8 if kind == "raw" else 6.5),
                    error_x={
                        "type": "data", "symmetric": False, "thickness": 1.4, "width": 0, "color": colour(index),
                        "array": [high - value for _, _, value, _, high, _ in points],
                        "arrayminus": [value - low for _, _, value, low, _, _ in points],
                    },
                    text=[
                        f"{safe(row['label'])}, {KINDS[kind]}<br>ρ = {signed(value)} [{signed(low)}, {signed(high)}], n = {n}"
                        for _, row, value, low, high, n in points
                    ],
                    hovertemplate="%{text}<extra></extra>",
                )
            )  # fmt: skip
        low, high = spread(reach, 0.04)
        stripes = [
            {
                "type": "rect", "xref": "paper", "x0": 0, "x1": 1, "y0": place - 0.5, "y1": place + 0.5, "layer": "below",
                "fillcolor": "var(--grid)", "opacity": 0.35, "line": {"width": 0},
            }
            for place in range(0, len(rows), 2)
        ]  # fmt: skip
        zero = {
            "type": "line", "x0": 0, "x1": 0, "yref": "paper", "y0": 0, "y1": 1, "layer": "below",
            "line": {"color": "var(--muted)", "width": 1.4},
        }  # fmt: skip
        # In lines that leave a telephone room for the plot, and rows high enough for them.
        labels = [wrapped(row["label"], 20) for row in rows]
        height = max(30, 11 * len(shown), 15 * max(1 + label.count("<br>") for label in labels))
        y = axis(
            "", tickmode="array", tickvals=list(range(len(rows))), ticktext=labels,
            range=[len(rows) - 0.5, -0.5], showgrid=False, ticks="", showline=False,
        )  # fmt: skip
        # Short and few: on a telephone the plot is 100 pixels wide.
        x = axis("Spearman's ρ", range=[max(low, -1.05), min(high, 1.05)], nticks=5, tickangle=0)
        figure = drawn(traces, x, y, 70 + height * len(rows), shapes=[*stripes, zero])
        title = f"{part['name']}, {part['n']} networks"
        panels.append(
            Panel(figure, title, f"Correlations of every measure with {results['outcome']} on {part['name']}.")
        )
    return panels


def ordered(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Rows by the size of their correlation within cells, the largest first."""

    def size(row: Mapping[str, Any]) -> float:
        value = as_finite((row["within"] or row["raw"] or {}).get("value"))
        return -1.0 if value is None else abs(value)

    return sorted(rows, key=size, reverse=True)


def levels(results: Results) -> tuple[str, list[str]]:
    """The factor by which points are coloured, and its levels: the first with some, or the training subset."""
    points = [network for part in results["data"] for network in part["networks"]]
    names = list(dict.fromkeys(name for network in points for name in network["cell"]))
    candidates = {name: [network["cell"].get(name, "") for network in points] for name in names}
    candidates["training subset"] = [str(network["subset"]) for network in points]
    for name, values in candidates.items():
        found = list(dict.fromkeys(values))
        if 1 < len(found) <= _MOST_LEVELS:
            return name, found
    return "", [""]


def scatter(results: Results) -> list[Panel]:
    """Outcome against each measure, one panel for each measure and data set, one mark for each network."""
    factor, found_levels = levels(results)
    percent, predicted = is_share(results["outcome"]), outcome_word(results["outcome"])
    scale = 100.0 if percent else 1.0
    panels = []
    for part in results["data"]:
        for row in ordered(part["correlations"]):
            label = row["measure"]
            points = [network for network in part["networks"] if label in network["measures"]]
            if not points:
                continue
            values = [network["measures"][label] for network in points]
            outcomes = [scale * network["outcome"] for network in points]
            traces = []
            for index, level in enumerate(found_levels):
                own = [network for network in points if _level(network, factor) == level]
                if own:
                    # WebGL draws thousands of marks, but a page may have only some of its canvases: plain SVG.
                    traces.append(
                        go.Scatter(
                            x=[network["measures"][label] for network in own],
                            y=[scale * network["outcome"] for network in own],
                            mode="markers", marker=marker(index, 5) | {"opacity": 0.7},
                            text=[_hover(network, network["measures"][label], percent) for network in own],
                            hovertemplate="%{text}<extra></extra>",
                        )
                    )  # fmt: skip
            log = is_log(values, 20.0)
            drawn_on = log_axis(*log_range(values)) if log else {"range": list(spread(values)), "nticks": 3}
            main = row["within"] or row["raw"] or {}
            x = axis("", **drawn_on)  # the title above says what it is, in two lines where it is long
            y = axis(f"{predicted}, %" if percent else predicted, range=list(spread(outcomes)))
            title = f"{row['label']}, {part['name']}: ρ = {signed(main.get('value'))}"
            figure = drawn(traces, x, y, 230)
            panels.append(
                Panel(figure, title, f"{predicted} against {row['label']} of each network on {part['name']}.")
            )
    return panels


def _level(network: Mapping[str, Any], factor: str) -> str:
    if not factor:
        return ""
    return str(network["subset"]) if factor == "training subset" else str(network["cell"].get(factor, ""))


def _hover(network: Mapping[str, Any], value: float, percent: bool) -> str:
    outcome = f"{100 * network['outcome']:.2f} %" if percent else plain(network["outcome"], 4)
    cell = ", ".join(f"{safe(name)} {safe(level)}" for name, level in network["cell"].items())
    return (
        f"seed {safe(network['seed'])}, subset {safe(network['subset'])}{'<br>' + cell if cell else ''}"
        f"<br>{plain(value, 5)}: {outcome}<br>run {safe(network['id'])}"
    )


def signed(value: object) -> str:
    """A correlation with its sign and two decimals.

    >>> signed(-0.226), signed(None)
    ('−0.23', '–')
    """
    number = as_finite(value)
    return "–" if number is None else f"{number:+.2f}".replace("-", "−")
