"""What every plot is built from: panels, axes, colours and safe text.

Colours are CSS variables (``var(--method-1)``): the page's script replaces them by the values of the reader's light or
dark scheme when it draws. Legends belong to the page, not to the figures, so that nothing ever covers the data.
"""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from flatminima.report.numbers import as_finite, plain

Results = Mapping[str, Any]
SYMBOLS = ("circle", "square", "diamond", "triangle-up")
COLOURS = 8


@dataclass(frozen=True)
class Panel:
    """One plot: its figure, a title in plain text, and a sentence for those who cannot see it."""

    figure: go.Figure
    title: str
    description: str


def colour(index: int) -> str:
    """The CSS variable with the colour of the method at ``index``."""
    return f"var(--method-{index % COLOURS})"


def symbol(index: int) -> str:
    """The marker of the method at ``index``: colour is never the only difference, and 32 methods all look different."""
    return SYMBOLS[(index + index // COLOURS) % len(SYMBOLS)]


def marker(index: int, size: float) -> dict[str, Any]:
    """The mark of the method at ``index``, about ``size`` pixels wide."""
    # Plotly's triangles look smaller than its other marks of the same size.
    scale = 1.3 if symbol(index) == "triangle-up" else 1.0
    return {"color": colour(index), "symbol": symbol(index), "size": size * scale}


def safe(text: object) -> str:
    """Text for plotly's labels, which would read tags and placeholders in it."""
    # Plotly reads tags and %{...} in labels; neither may come from a name.
    return html.escape(str(text), quote=False).replace("%{", "% {").replace("$", "&#36;")


def wrapped(text: object, width: int) -> str:
    """``safe`` text in lines of at most about ``width`` characters."""
    return "<br>".join(safe(line) for line in textwrap.wrap(str(text), width) or [""])


def axis(title: str, **options: Any) -> dict[str, Any]:
    """A quiet axis that makes room for its own labels; ``options`` are plotly's."""
    quiet: dict[str, Any] = {
        "title": {"text": title, "standoff": 8, "font": {"size": 12, "color": "var(--muted)"}},
        "gridcolor": "var(--grid)",
        "linecolor": "var(--rule)",
        "zeroline": False,
        "ticks": "outside",
        "ticklen": 4,
        "tickcolor": "var(--rule)",
        "tickfont": {"size": 11},
        "showline": True,
        "automargin": True,
        "nticks": 6,
        "exponentformat": "power",
    }
    return quiet | options


def drawn(traces: Sequence[Any], x: dict[str, Any], y: dict[str, Any], height: int, **layout: Any) -> go.Figure:
    """A figure without template, legend or background, ``height`` pixels high."""
    return go.Figure(
        list(traces),
        go.Layout(
            template=go.layout.Template(),
            xaxis=x,
            yaxis=y,
            height=height,
            margin={"l": 8, "r": 12, "t": 10, "b": 8},
            paper_bgcolor="rgba(0,0,0,0)",
            plot_bgcolor="rgba(0,0,0,0)",
            font={
                "family": "system-ui, -apple-system, Segoe UI, Roboto, sans-serif",
                "size": 12,
                "color": "var(--ink)",
            },
            hoverlabel={"bgcolor": "var(--raised)", "bordercolor": "var(--rule)", "font": {"color": "var(--ink)"}},
            showlegend=False,
            **layout,
        ),
    )


def finite(values: Iterable[object]) -> list[float]:
    """The finite numbers among JSON values."""
    return [number for number in map(as_finite, values) if number is not None]


def spread(values: Sequence[float], pad: float = 0.06) -> tuple[float, float]:
    """The range of an axis that shows all values, with a margin on both sides."""
    low, high = min(values), max(values)
    margin = pad * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def is_log(values: Sequence[float], ratio: float) -> bool:
    """Whether values are positive and span more than ``ratio``, so that a log axis shows them better."""
    return bool(values) and min(values) > 0.0 and max(values) / min(values) > ratio


def log_range(values: Sequence[float], pad: float = 0.06) -> tuple[float, float]:
    """``spread`` in powers of ten."""
    return spread([math.log10(value) for value in values], pad)


def log_axis(low: float, high: float) -> dict[str, Any]:
    """A log axis with ticks at 1, 2, 5 where it is short and at powers of ten where it is long, as plain numbers."""
    steps = (1, 2, 5) if high - low < 1.6 else (1, 3) if high - low < 2.6 else (1,)
    stride = max(1, round((high - low) / 6.0))
    powers = range(math.floor(low), math.ceil(high) + 1, stride)
    ticks = [step * 10.0**power for power in powers for step in steps]
    ticks = [tick for tick in ticks if low <= math.log10(tick) <= high]
    if len(ticks) < 2:  # less than one step of 1, 2, 5: linear ticks on the log axis
        ticks = [float(f"{10.0 ** (low + (high - low) * share):.2g}") for share in (0.1, 0.5, 0.9)]
    return {
        "type": "log",
        "range": [low, high],
        "tickmode": "array",
        "tickvals": ticks,
        "ticktext": [*map(_short, ticks)],
    }


def _short(tick: float) -> str:
    text = plain(tick, 1)
    return text.removeprefix("1 × ") if "×" in text else f"{tick:g}"


def runs_of(results: Results, method: str | None = None) -> list[Mapping[str, Any]]:
    """The runs in the results, or those of one method."""
    return [run for run in results.get("runs") or [] if method is None or str(run.get("method")) == method]
