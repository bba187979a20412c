"""The plots of the SWAD reproduction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from flatminima.report.domains_tables import label
from flatminima.report.numbers import as_finite
from flatminima.report.panels import (
    Panel,
    axis,
    colour,
    drawn,
    finite,
    is_log,
    log_axis,
    log_range,
    marker,
    safe,
    spread,
)

Results = Mapping[str, Any]
#: Methods that have a colour, in the plots that tell methods apart.
SHOWN = ("erm/selected", "erm/swa", "erm/tail", "erm/swad", "sam/selected", "sam/swad", "erm/last")
#: Points of the loss plane: name of the reader -> index of its colour.
POINTS = {"selected": SHOWN.index("erm/selected"), "tail": SHOWN.index("erm/tail"), "swad": SHOWN.index("erm/swad")}
_ZERO = {"type": "line", "x0": 0, "x1": 0, "yref": "paper", "y0": 0, "y1": 1, "layer": "below"}


def _zero() -> dict[str, Any]:
    return _ZERO | {"line": {"color": "var(--rule)", "width": 1.4}}


def forest(results: Results) -> list[Panel]:
    """Every comparison: the difference with its interval, and a mark for each target."""
    rows = results["comparisons"]
    if not rows:
        return []
    traces: list[Any] = []
    reach = [0.0]
    for place, row in enumerate(rows):
        low, high = as_finite(row["low"]), as_finite(row["high"])
        text = f"{safe(label(results, row['method']))} − {safe(label(results, row['baseline']))}"
        if low is not None and high is not None:
            line = {"color": "var(--ink)", "width": 2}
            traces.append(go.Scatter(x=[low, high], y=[place, place], mode="lines", line=line, hoverinfo="skip"))
            reach += [low, high]
        hover = text + "<br>%{x:+.2f} points<extra></extra>"
        traces.append(
            go.Scatter(x=[row["difference"]], y=[place], mode="markers", marker=marker(3, 10), hovertemplate=hover)
        )
        values = list(row["per_target"].values())
        reach += values
        names = [safe(name) for name in row["per_target"]]
        traces.append(
            go.Scatter(
                x=values, y=[place + 0.26] * len(values), mode="markers", text=names,
                marker={"symbol": "line-ns-open", "size": 9, "color": "var(--muted)"},
                hovertemplate=text + "<br>%{text}: %{x:+.2f} points<extra></extra>",
            )
        )  # fmt: skip
    names = [f"{label(results, r['method'])} − {label(results, r['baseline'])}" for r in rows]
    y = axis(
        "", tickmode="array", tickvals=list(range(len(rows))), ticktext=[safe(name) for name in names],
        range=[len(rows) - 0.4, -0.6], showgrid=False, ticks="", showline=False,
    )  # fmt: skip
    x = axis("difference of target accuracy, points", range=list(spread(reach, 0.08)))
    figure = drawn(traces, x, y, 80 + 44 * len(rows), shapes=[_zero()])
    return [
        Panel(
            figure,
            "Differences on the unseen domain",
            "Paired differences with 95 % intervals; small marks are targets.",
        )
    ]


def curves(results: Results) -> list[Panel]:
    """Source validation loss of ERM's trainings, one panel per target, with the averaged steps shaded and the threshold."""
    runs = [run for run in results["runs"] if run["algorithm"] == "erm" and run["draw"] == 0 and run["history"]["step"]]
    losses = finite(value for run in runs for value in run["history"]["validation_loss"])
    if not losses:
        return []
    log = is_log(losses, 8.0)
    scale = log_axis(*log_range(losses)) if log else {"range": list(spread(losses))}
    last = results["steps"] - 1
    windows = {
        (row["target"], row["seed"]): row
        for row in results["valley"]["runs"]
        if row["method"] == "erm/swad" and row["draw"] == 0
    }
    panels = []
    for target in results["plan"]["targets"]:
        traces: list[Any] = []
        shapes = []
        for run in (run for run in runs if run["target"] == target):
            hover = f"seed {run['seed']}<br>step %{{x}}, validation loss %{{y:.4g}}<extra></extra>"
            line = {"color": colour(1), "width": 1.6}
            history = run["history"]
            traces.append(
                go.Scatter(
                    x=history["step"], y=history["validation_loss"], mode="lines", line=line, hovertemplate=hover
                )
            )
            window = windows.get((target, run["seed"]))
            if window is None:
                continue
            box = {
                "type": "rect",
                "x0": window["start_step"],
                "x1": window["end_step"],
                "yref": "paper",
                "y0": 0,
                "y1": 1,
            }
            tone = colour(3) if window["converged"] else "var(--muted)"
            shapes.append(box | {"fillcolor": tone, "opacity": 0.1, "line": {"width": 0}, "layer": "below"})
            if (threshold := as_finite(window["threshold"])) is not None:
                dashed = {"color": colour(3), "width": 1.1, "dash": "dash"}
                shown = f"seed {run['seed']}<br>threshold %{{y:.4g}}<extra></extra>"
                ends = [window["detected_at"], last]
                traces.append(go.Scatter(x=ends, y=[threshold] * 2, mode="lines", line=dashed, hovertemplate=shown))
            chosen = run["methods"].get("selected", {}).get("step")
            if chosen in history["step"]:
                at = history["validation_loss"][history["step"].index(chosen)]
                traces.append(
                    go.Scatter(
                        x=[chosen], y=[at], mode="markers", marker=marker(0, 8),
                        hovertemplate=f"seed {run['seed']}<br>selected checkpoint, step %{{x}}<extra></extra>",
                    )
                )  # fmt: skip
        if traces:
            x = axis("optimiser step", range=[0, last * 1.03], nticks=5)
            figure = drawn(traces, x, axis("source validation loss", **scale), 260, shapes=shapes)
            text = "Source validation loss over steps; the steps that SWAD averages are shaded."
            panels.append(Panel(figure, f"Target {target}", text))
    return panels


def accuracies(results: Results) -> list[Panel]:
    """Accuracy of the live iterate over the steps, on the sources and on the target, for seed 0."""
    panels = []
    for target in results["plan"]["targets"]:
        run = next(
            (
                run
                for run in results["runs"]
                if (run["algorithm"], run["target"], run["seed"], run["draw"]) == ("erm", target, 0, 0)
            ),
            None,
        )
        if run is None or len(run["history"]["oracle_accuracy"]) != len(run["history"]["step"]):
            continue
        steps, history = run["history"]["step"], run["history"]
        traces = []
        for name, values, style in (
            ("sources, held out", history["validation_accuracy"], "var(--muted)"),
            ("target, held out", history["oracle_accuracy"], colour(2)),
        ):
            hover = f"{name}<br>step %{{x}}, %{{y:.1f}} %<extra></extra>"
            percent = [100 * value for value in values]
            traces.append(
                go.Scatter(x=steps, y=percent, mode="lines", line={"color": style, "width": 1.8}, hovertemplate=hover)
            )
        for reader, index in POINTS.items():
            found = run["methods"].get(reader)
            if found is not None:
                hover = f"{reader}: {100 * found['target_accuracy']:.1f} % on the target<extra></extra>"
                line = {"color": colour(index), "width": 1.4, "dash": "dot"}
                level = [100 * found["target_accuracy"]] * 2
                traces.append(go.Scatter(x=[0, steps[-1]], y=level, mode="lines", line=line, hovertemplate=hover))
        x = axis("optimiser step", range=[0, steps[-1] * 1.03], nticks=5)
        panels.append(
            Panel(
                drawn(traces, x, axis("accuracy, %", range=[0, 101]), 240), f"Target {target}", "Accuracy over steps."
            )
        )
    return panels


def flatness(results: Results) -> list[Panel]:
    """Rise of the loss over the distance, and how it differs from ERM's; on the sources and on the target."""
    flat = results["flatness"]
    rows = [row for row in flat["rows"] if row["method"] in SHOWN and as_finite(row["mean"]) is not None]
    panels = []
    for title, pick in (("Rise of the loss", _absolute), ("Difference from selected ERM", _relative)):
        for where in ("source", "target"):
            here = [row for row in rows if row["where"] == where]
            base = {row["radius"]: row["mean"] for row in here if row["method"] == "erm/selected"}
            traces: list[Any] = []
            for index, method in enumerate(SHOWN):
                points = [
                    (row["radius"], found) for row in here if row["method"] == method and (found := pick(row, base))
                ]
                if points:
                    traces.append(_with_error(points, index, safe(label(results, method))))
            values = [value for trace in traces for value in trace.y]
            if not values:
                continue
            radii = [row["radius"] for row in here]
            x = axis("γ, distance in parameter space", **log_axis(*log_range([min(radii) * 0.93, max(radii) * 1.07])))
            if pick is _absolute:
                scale = (
                    log_axis(*log_range(values, 0.12)) if min(values) > 0 else {}
                )  # far from a minimum it can be negative
                y = axis("F_γ", **scale)
            else:
                y = axis("F_γ minus ERM's, % of ERM's", zeroline=True, zerolinecolor="var(--rule)")
            place = "on the source domains" if where == "source" else "on the target"
            panels.append(
                Panel(drawn(traces, x, y, 320), f"{title}, {place}", f"{title} against the distance, {place}.")
            )
    return panels


_Point = tuple[float, float, float]  # value, lower and upper end


def _absolute(row: Mapping[str, Any], base: Mapping[float, float]) -> _Point | None:
    mean, low, high = (as_finite(row[name]) for name in ("mean", "low", "high"))
    return None if mean is None else (mean, mean if low is None else low, mean if high is None else high)


def _relative(row: Mapping[str, Any], base: Mapping[float, float]) -> _Point | None:
    versus, whole = row.get("versus_erm"), base.get(row["radius"])
    if not versus or not whole or as_finite(versus["difference"]) is None:
        return None
    difference, low, high = (as_finite(versus[name]) for name in ("difference", "low", "high"))
    middle = 100.0 * (difference or 0.0) / whole
    return (middle, middle if low is None else 100.0 * low / whole, middle if high is None else 100.0 * high / whole)


def _with_error(points: Sequence[tuple[float, _Point]], index: int, name: str) -> go.Scatter:
    """A line with intervals; the marks of the methods at one distance stand side by side."""
    error = {
        "type": "data", "symmetric": False, "thickness": 1, "width": 2, "color": colour(index),
        "array": [max(high - y, 0.0) for _, (y, _, high) in points],
        "arrayminus": [max(y - low, 0.0) for _, (y, low, _) in points],
    }  # fmt: skip
    return go.Scatter(
        x=[radius * (1 + 0.02 * (index - len(SHOWN) / 2)) for radius, _ in points], y=[y for _, (y, _, _) in points],
        mode="lines+markers", marker=marker(index, 7), line={"color": colour(index), "width": 1.2}, error_y=error,
        customdata=[radius for radius, _ in points],
        hovertemplate=f"{name}<br>γ = %{{customdata:g}}: %{{y:.4g}}<extra></extra>",
    )  # fmt: skip


def planes(results: Results) -> list[Panel]:
    """The loss over the plane of three iterates, for sources and target, with the methods' weights projected on it."""
    panels = []
    for target, pair in results["planes"].items():
        for where in ("source", "target"):
            plane = pair[where]
            traces: list[Any] = [
                go.Contour(
                    x=plane["x"], y=plane["y"], z=plane["loss"], showscale=False, ncontours=16,
                    line={"width": 0.6, "color": "var(--rule)"},
                    colorscale=[[0.0, "var(--heat-0)"], [0.5, "var(--heat-1)"], [1.0, "var(--heat-2)"]],
                    hovertemplate="x %{x:.3g}, y %{y:.3g}<br>loss %{z:.4g}<extra></extra>",
                )
            ]  # fmt: skip
            corners = [name for name in plane["points"] if name not in POINTS]
            xs, ys = ([plane["points"][name][k] for name in corners] for k in (0, 1))
            traces.append(
                go.Scatter(
                    x=xs, y=ys, mode="lines+markers", text=corners, hovertemplate="iterate at %{text}<extra></extra>",
                    marker={"symbol": "cross", "size": 9, "color": "var(--ink)"}, line={"color": "var(--muted)", "width": 1},
                )
            )  # fmt: skip
            for name, index in POINTS.items():
                if name in plane["points"]:
                    x, y = plane["points"][name]
                    hover = f"{name}, {plane['distance'][name]:.3g} off the plane<extra></extra>"
                    mark = marker(index, 11) | {"line": {"color": "var(--paper)", "width": 1.2}}
                    traces.append(go.Scatter(x=[x], y=[y], mode="markers", marker=mark, hovertemplate=hover))
            x_axis = axis("distance", range=_ends(plane["x"]), showgrid=False)
            y_axis = axis("distance", range=_ends(plane["y"]), showgrid=False)
            of = "source loss" if where == "source" else "target loss"
            figure = drawn(traces, x_axis, y_axis, 300)
            panels.append(Panel(figure, f"Target {target}: {of}", "Loss over the plane of three iterates."))
    return panels


def _ends(values: Sequence[float]) -> list[float]:
    return [values[0], values[-1]]
