"""Draws flat-or-better.png from the json files beside it: ``python docs/examples/zoo/picture.py`` (needs Chromium).

One panel per comparison: how much flatter than SGD a minimum is, by the elementwise-adaptive sharpness, which no rescaling of
layers changes, against how much better it predicts. If flat meant better, the points would fall from left to right. What is
far below the others is named at the foot of its panel.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from playwright.sync_api import sync_playwright
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots

HERE = Path(__file__).parent
PANELS = {
    "digits": "Digits, constant rate",
    "digits-cosine": "Digits, cosine",
    "cifar10-cosine": "CIFAR-10 subset, cosine",
}
MEASURE = "adaptive_sharpness"
AVERAGES = ("swa", "ema", "lawa", "tail", "swad")
WIDTH, HEIGHT = 1400, 640
FLOOR = -4  # points of accuracy
MARGIN = 0.1  # decades, for names
PLACES = ("top right", "bottom left", "top left", "bottom right")  # in turn, so that neighbours do not cover each other
TICKS = [0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5]


def points(results: dict[str, Any]) -> list[tuple[str, float, float, float, float]]:
    """Method, ratio of its mean sharpness to SGD's, and the accuracy difference in points with its interval."""
    first = results["methods"][0]["measures"][MEASURE]["mean"]
    found = []
    for method in results["methods"][1:]:
        versus = method["versus_first"]["test_accuracy"]
        ratio = method["measures"][MEASURE]["mean"] / first
        found.append((method["method"], ratio, *(100 * versus[key] for key in ("difference", "low", "high"))))
    return found


def figure() -> go.Figure:
    """The panels."""
    drawn = make_subplots(1, len(PANELS), subplot_titles=list(PANELS.values()), horizontal_spacing=0.06)
    for column, name in enumerate(PANELS, start=1):
        results = json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))
        shown = sorted(points(results), key=lambda p: p[1])
        below = ", ".join(
            f"{m} ({ratio:.2f}; {difference:.1f})" for m, ratio, difference, *_ in shown if difference < FLOOR
        )
        if below:
            drawn.add_annotation(
                text=f"below (sharpness; points): {below}", x=0.02, y=0, xref="x domain", yref="y domain",
                xanchor="left", yanchor="bottom", showarrow=False, font={"size": 10}, row=1, col=column,
            )  # fmt: skip
        shown = [point for point in shown if point[2] >= FLOOR]
        for index, (method, ratio, difference, low, high) in enumerate(shown):
            kind = "#c2601a" if any(a in method for a in AVERAGES) else "#2066a8"
            bar = {
                "type": "data",
                "array": [high - difference],
                "arrayminus": [difference - low],
                "width": 0,
                "thickness": 1,
            }
            drawn.add_trace(
                go.Scatter(
                    x=[ratio], y=[difference], mode="markers+text", text=[method], textposition=PLACES[index % len(PLACES)],
                    textfont={"size": 9, "color": kind}, marker={"color": kind, "size": 7}, error_y=bar | {"color": kind},
                ),
                1, column,
            )  # fmt: skip
        drawn.update_xaxes(
            type="log", tickvals=TICKS, title="adaptive sharpness / SGD's  (left: flatter)", row=1, col=column,
            range=[math.log10(shown[0][1]) - MARGIN, math.log10(shown[-1][1]) + MARGIN],
        )  # fmt: skip
        drawn.add_hline(0, line={"color": "#888", "width": 1}, row=1, col=column)
        drawn.add_vline(1, line={"color": "#888", "width": 1}, row=1, col=column)
    drawn.update_yaxes(title="test accuracy minus SGD's, points", row=1, col=1)
    drawn.update_layout(
        showlegend=False, template="plotly_white", width=WIDTH, height=HEIGHT, margin={"t": 40, "b": 50}
    )
    return drawn


def main() -> None:
    """Draw it in a browser and keep what it shows."""
    page = figure().to_html(include_plotlyjs=False, full_html=False, config={"staticPlot": True})
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        tab.set_content(f"<body style='margin:0'><script>{get_plotlyjs()}</script>{page}</body>")
        tab.wait_for_selector(".main-svg")
        tab.screenshot(path=str(HERE / "flat-or-better.png"))
        browser.close()


if __name__ == "__main__":
    main()
