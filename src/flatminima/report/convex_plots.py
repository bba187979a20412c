"""The plots of the convex reproduction."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from flatminima.report.numbers import plain
from flatminima.report.panels import Panel, axis, colour, drawn, log_axis, marker, safe, spread

Record = Mapping[str, Any]
#: Colours by what a line is, the same in every plot of the page.
FALLS, HARMLESS, UNIFORM, POWER, PRINTED = 2, 0, 1, 3, 4
TIE_COLOURS = {"adversarial": FALLS, "auxiliary": HARMLESS, "uniform": UNIFORM, "power": POWER}
SUFFIX_COLOURS = {0.75: 5, 0.5: 6, 0.25: 7}  # by where in the run the mean begins
VARIANT_COLOURS = {"paper": PRINTED, "corrected": UNIFORM, "conditioned": POWER}
_HEAT = [[0.0, "var(--heat-0)"], [0.5, "var(--heat-1)"], [1.0, "var(--heat-2)"]]
_FLOOR = 1e-6


def _line(x: Sequence[Any], y: Sequence[Any], index: int | str, name: str, **line: Any) -> go.Scatter:
    style, name = colour(index) if isinstance(index, int) else index, safe(name)
    return go.Scatter(
        x=list(x), y=list(y), mode="lines", line={"color": style, "width": 2.0} | line, name=name,
        hovertemplate=f"{name}<br>%{{x:.5g}}: %{{y:.5g}}<extra></extra>",
    )  # fmt: skip


def planes(record: Record) -> list[Panel]:
    """Empirical, sharpness-aware and population risk over the plane of the hidden column and the auxiliary axis."""
    panels = []
    titles = {
        "empirical": "What the sample shows: empirical risk",
        "aware": f"What SAM minimises: largest empirical risk within r = {record['radius']:g}",
        "population": "What counts: population risk",
    }
    for name, title in titles.items():
        z = [[math.sqrt(max(value, 0.0)) for value in row] for row in record[name]]
        # Levels of the root: in a quadratic bowl they are evenly spaced. The first one is the flat region.
        traces: list[Any] = [
            go.Contour(
                x=record["x"], y=record["y"], z=z, showscale=False, line={"width": 0.6, "color": "var(--rule)"},
                contours={"start": 1e-3, "end": 0.5, "size": 0.06}, colorscale=_HEAT, zmin=0.0, zmax=0.5,
                customdata=record[name],
                hovertemplate="hidden %{x:.3g}, auxiliary %{y:.3g}<br>risk %{customdata:.4g}<extra></extra>",
            )
        ]  # fmt: skip
        for label, point in record["points"].items():
            turn = [2 * math.pi * i / 60 for i in range(61)]
            r = record["radius"]
            traces.append(
                go.Scatter(
                    x=[point[0] + r * math.cos(a) for a in turn], y=[point[1] + r * math.sin(a) for a in turn],
                    mode="lines", hoverinfo="skip", line={"color": "var(--ink)", "width": 1.0, "dash": "dot"},
                )
            )  # fmt: skip
            traces.append(
                go.Scatter(
                    x=point[:1], y=point[1:], mode="markers+text", text=[label], cliponaxis=False,
                    textposition=f"bottom {'left' if label == 'flat' else 'right'}",
                    textfont={"size": 12, "color": "var(--ink)"}, hovertemplate=f"{label}<extra></extra>",
                    marker={"size": 9, "color": "var(--ink)", "symbol": "x" if label == "sharp" else "circle"},
                )
            )  # fmt: skip
        x = axis("w along the hidden column", range=[record["x"][0], record["x"][-1]], showgrid=False)
        y = axis("w along the auxiliary axis", range=[record["y"][0], record["y"][-1]], showgrid=False,
                 scaleanchor="x", constrain="domain")  # fmt: skip
        panels.append(Panel(drawn(traces, x, y, 250), title, f"{title}, over a plane of weights."))
    return panels


def suffix_risks(runs: Sequence[Record]) -> list[Panel]:
    """The population risk of every suffix average, at the end of the run."""
    panels = []
    for problem, title in (("sagd", "Trap of SA-GD"), ("sam", "Trap of SAM")):
        chosen = [run for run in runs if run["problem"] == problem]
        steps = range(1, len(chosen[0]["suffix"]) + 1)
        traces = [
            _line(
                steps,
                run["suffix"],
                _colour_of(run["label"]),
                run["label"],
                dash="dash" if "printed" in run["label"] else "solid",
            )
            for run in chosen
        ]
        top = max(max(run["suffix"]) for run in chosen)
        y = axis("population risk of ŵ_τ", range=[-0.04 * top, 1.08 * top])
        x = axis("τ: the average is over w_τ, ..., w_T", range=[0, len(steps) + 1])
        panels.append(Panel(drawn(traces, x, y, 300), title, "Population risk against where the average begins."))
    return panels


def _colour_of(label: str) -> int:
    if "printed" in label:
        return PRINTED
    if "uniform" in label:
        return UNIFORM
    return FALLS if "adversarial" in label or label == "SAM" else HARMLESS


def along_the_run(runs: Sequence[Record]) -> list[Panel]:
    """Risk against the step: of the iterate, of averages that began earlier, and the empirical risk."""
    panels = []
    for run in runs:
        if run["every"] is None:
            continue
        steps = len(run["every"])
        traces = [_line(range(1, steps + 1), run["last"], FALLS, "iterate w_t, step", width=2.4)]
        for share, index in SUFFIX_COLOURS.items():
            tau = max(1, round(share * steps))
            means = [row[tau - 1] for row in run["every"][tau - 1 :]]
            traces.append(_line(range(tau, steps + 1), means, index, f"mean of w_{tau} ... w_t, step"))
        traces.append(_line(range(1, steps + 1), run["mean"], UNIFORM, "mean of w_1 ... w_t, step"))
        traces.append(
            _line(range(1, steps + 1), run["empirical"], "var(--ink)", "empirical risk, step", dash="dot", width=1.6)
        )
        top = max(run["last"])
        y = axis("risk", range=[-0.04 * top, 1.08 * top])
        panels.append(
            Panel(drawn(traces, axis("step t", range=[0, steps + 1]), y, 300), run["label"], "Risk against the step.")
        )
    return panels


def every_suffix(runs: Sequence[Record]) -> list[Panel]:
    """The population risk of the mean of ``w_tau ... w_t``, for every tau and t."""
    panels = []
    for run in runs:
        if run["every"] is None:
            continue
        steps = len(run["every"])
        z = [[row[tau] if tau < len(row) else None for row in run["every"]] for tau in range(steps)]
        heat = go.Heatmap(
            x=list(range(1, steps + 1)), y=list(range(1, steps + 1)), z=z, colorscale=_HEAT, showscale=False, zmin=0.0,
            hovertemplate="mean of w_%{y} ... w_%{x}<br>risk %{z:.4g}<extra></extra>", hoverongaps=False,
        )  # fmt: skip
        x = axis("step t", range=[0.5, steps + 0.5], showgrid=False)
        y = axis("τ, first iterate of the average", range=[0.5, steps + 0.5], showgrid=False)
        note = f"{run['label']}: from 0 to {plain(max(run['last']), 3)} (most orange)"
        panels.append(Panel(drawn([heat], x, y, 300), note, "Risk of every average at every step."))
    return panels


def tie_breaking(rows: Sequence[Record]) -> list[Panel]:
    """Theorem 3 with every rule: the risk of the suffix averages on a log scale, and what the rule saw."""
    traces: list[Any] = []
    for row in rows:
        name = f"{row['label']}, start {row['start']}, τ ="
        y = [max(value, _FLOOR) for value in row["risks"]]
        dash = "solid" if row["start"] == "0" else "dash"
        traces.append(_line(range(1, len(y) + 1), y, TIE_COLOURS[row["rule"]], name, dash=dash))
    x = axis("τ: the average is over w_τ, ..., w_T", range=[0, len(rows[0]["risks"]) + 1])
    y_axis = axis("population risk of ŵ_τ", **log_axis(-6.15, -0.4))
    return [
        Panel(
            drawn(traces, x, y_axis, 340),
            f"Risk of every suffix average (what is below {_FLOOR:g} is drawn there)",
            "Population risk for every way of breaking ties.",
        )
    ]


def oscillation(records: Sequence[Record]) -> list[Panel]:
    """SA-GD on one axis."""
    panels = []
    for record in records:
        w, steps = record["w"], len(record["w"])
        limit = record["amplitude"]
        traces = [
            _line([1, steps], [s * limit] * 2, "var(--muted)", "limit, step", dash="dot", width=1.4) for s in (-1, 1)
        ]
        traces.append(
            go.Scatter(
                x=list(range(1, steps + 1)), y=w, mode="lines+markers", marker=marker(UNIFORM, 5),
                line={"color": colour(UNIFORM), "width": 1.2}, hovertemplate="step %{x}: %{y:.5g}<extra></extra>",
            )
        )  # fmt: skip
        rho = record["flatness_radius"]
        band = {"type": "rect", "xref": "paper", "x0": 0, "x1": 1, "y0": -rho, "y1": rho, "fillcolor": "var(--good)",
                "opacity": 0.12, "line": {"width": 0}, "layer": "below"}  # fmt: skip
        y = axis("w_t", range=list(spread([*w, -rho, rho, -limit, limit])))
        panels.append(
            Panel(drawn(traces, axis("step t", range=[0, steps + 1]), y, 280, shapes=[band]), record["label"],
                  "The iterates of SA-GD on one axis.")
        )  # fmt: skip
    return panels


def one_dimension(records: Sequence[Record]) -> list[Panel]:
    """Theorem 6: the iterates, and how far their sharpness-aware risk is above the least one."""
    indices = {"gradient descent": HARMLESS, "SAM": FALLS, "SA-GD": UNIFORM}
    panels = []
    for key, title, label in (("w", "The iterates", "w_t"), ("excess", "Above the flattest minimum", "excess of F^r")):
        steps = len(records[0][key])
        traces = [_line(range(1, steps + 1), r[key], indices[r["label"]], f"{r['label']}, step") for r in records]
        values = [value for r in records for value in r[key]]
        y = axis(label, range=list(spread(values)))
        panels.append(Panel(drawn(traces, axis("step t", range=[0, steps + 1]), y, 280), title, f"{title} over steps."))
    return panels


def chain(record: Record) -> list[Panel]:
    """The block of the hidden column along SAM's run."""
    steps = record["steps"]
    filled = [[-value for value in column] for column in zip(*record["slots"], strict=True)]
    heat = go.Heatmap(
        x=list(range(1, steps + 1)), y=list(range(1, steps + 1)), z=filled,
        colorscale=_HEAT, showscale=False, zmin=0.0, zmax=1.05, xgap=1, ygap=1,
        hovertemplate="step %{x}, slot %{y}: −%{z:.3g} η r<extra></extra>",
    )  # fmt: skip
    x = axis("step t", range=[0.5, steps + 0.5], showgrid=False)
    y = axis("slot of the block", range=[0.5, steps + 0.5], showgrid=False)
    title = "Each SAM step fills the next slot with about −η r (orange)"
    return [Panel(drawn([heat], x, y, 280), title, "Which slots of the hidden block are filled at each step.")]


def margins(records: Sequence[Record]) -> list[Panel]:
    """How far other blocks get in the first step, in units of what they may."""
    panels = []
    for lr in dict.fromkeys(r["lr"] for r in records):
        traces = []
        for record in records:
            if record["lr"] == lr:
                y = [max(-v, 1e-3) for v in record["slot"]]
                name = f"{record['variant']} constants, n ="
                traces.append(_line(record["n"], y, VARIANT_COLOURS[record["variant"]], name))
        n = records[0]["n"]
        traces.append(_line([n[0], n[-1]], [1.0, 1.0], "var(--bad)", "limit, n =", dash="dash", width=1.4))
        x, y_axis = (
            axis("examples n", range=[n[0] - 1, n[-1] + 1]),
            axis("largest −w₂(1) / λ of the others", **log_axis(-2.4, 4.3)),
        )
        panels.append(
            Panel(
                drawn(traces, x, y_axis, 300),
                f"Step size η = {lr:.4g}",
                "Margin of the first step against the number of examples.",
            )
        )
    return panels


_QUANTITIES = (("population risk", "Population risk"), ("stability", "Change when an example is left out, squared"))


def bounds(rows: Sequence[Record]) -> list[Panel]:
    """Every experiment beside its bounds, on a log scale."""
    panels = []
    problems = {"DeadZoneRegression": "", "SAGDTrap": " in its trap", "SAMTrap": " in its trap"}
    names = [
        f"{safe(row['method'])}{problems[row['problem']]}<br>n = {row['n']}, T = {row['steps']}, r = {row['radius']:g}"
        for row in rows
    ]
    for quantity, title in _QUANTITIES:
        traces: list[Any] = []
        values: list[float] = []
        for label, pick, index in (
            ("measured", "measured", 3),
            ("bound, our constants", "tight", 1),
            ("bound, the paper's constants", "paper", 4),
        ):
            x = []
            for row in rows:
                cells = {c["kind"]: c for c in row["cells"] if c["quantity"] == quantity}
                cell = cells["paper"]
                x.append(cell["measured"] if pick == "measured" else cells[pick]["bound"])
            values += [v for v in x if v > 0]
            texts = [f"{name}<br>{label}: {plain(v, 3)}" for name, v in zip(names, x, strict=True)]
            traces.append(
                go.Scatter(
                    x=x, y=list(range(len(rows))), mode="markers", marker=marker(index, 9), text=texts,
                    hovertemplate="%{text}<extra></extra>",
                )
            )  # fmt: skip
        limits = [4.0 if quantity == "stability" else row["largest_loss"] for row in rows]
        tick = {"symbol": "line-ns", "size": 14, "line": {"width": 2, "color": "var(--bad)"}}
        traces.append(
            go.Scatter(
                x=limits, y=list(range(len(rows))), mode="markers", marker=tick,
                hovertemplate="beyond %{x:.3g} a bound says nothing<extra></extra>",
            )
        )  # fmt: skip
        low, high = math.log10(min(values)) - 0.3, math.log10(max(values)) + 0.3
        y = axis("", tickmode="array", tickvals=list(range(len(rows))), ticktext=names,
                 range=[len(rows) - 0.5, -0.5], ticks="", showline=False)  # fmt: skip
        panels.append(
            Panel(
                drawn(traces, axis("", **log_axis(low, high)), y, 130 + 36 * len(rows)),
                title,
                f"{title}: measured and bounds.",
            )
        )
    return panels
