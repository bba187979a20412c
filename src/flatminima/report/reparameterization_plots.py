"""The plots of the reparameterisation experiment."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from flatminima.report.numbers import plain
from flatminima.report.panels import Panel, axis, colour, drawn, log_axis, marker

Record = Mapping[str, Any]


def trace_laws(records: Sequence[Record]) -> list[Panel]:
    """The measured trace of every copy on the curve a/beta^2 + b beta^2 + c, one panel a network."""
    panels = []
    for record in records:
        traces: list[Any] = []
        values: list[float] = []
        curve = record["curve"]
        for index, (gamma, line) in enumerate(curve["gamma"].items()):
            copies = [copy for copy in record["copies"] if f"{copy['gamma']:g}" == gamma]
            measured = [copy["measures"]["trace"]["value"] for copy in copies]
            values += [*line, *measured]
            traces.append(
                go.Scatter(
                    x=curve["beta"], y=line, mode="lines", line={"color": colour(index), "width": 1.6},
                    hovertemplate=f"γ = {gamma}, β = %{{x:.3g}}: %{{y:.4g}} by formula<extra></extra>",
                )
            )  # fmt: skip
            traces.append(
                go.Scatter(
                    x=[copy["beta"] for copy in copies], y=measured, mode="markers", marker=marker(index, 8),
                    hovertemplate=f"γ = {gamma}, β = %{{x:.3g}}: %{{y:.6g}} measured<extra></extra>",
                )
            )  # fmt: skip
        x = axis("β", **log_axis(math.log10(min(curve["beta"])) - 0.05, math.log10(max(curve["beta"])) + 0.05))
        y = axis("trace of the Hessian", **log_axis(math.log10(min(values)) - 0.15, math.log10(max(values)) + 0.15))
        panels.append(Panel(drawn(traces, x, y, 300), record["name"], f"Trace against beta, {record['name']}."))
    return panels


def ratios(records: Sequence[Record], measures: Mapping[str, Record]) -> list[Panel]:
    """How far each measure moves from the network, along beta and along gamma; one panel a network."""
    panels = []
    for record in records:
        first = record["copies"][0]["measures"]
        along = [copy for copy in record["copies"] if copy["gamma"] == 1.0]
        traces: list[Any] = []
        values = [0.5, 2.0]
        for index, (name, entry) in enumerate(measures.items()):
            y = [copy["measures"][name]["value"] / first[name]["value"] for copy in along]
            values += [value for value in y if value > 0]
            traces.append(
                go.Scatter(
                    x=[copy["beta"] for copy in along], y=y, mode="lines+markers", marker=marker(index, 7),
                    line={"color": colour(index), "width": 1.4, "dash": "solid" if entry["unchanged"] else "dot"},
                    text=[f"{entry['label']}: {plain(v, 6)} times that of the network" for v in y],
                    hovertemplate="β = %{x:g}<br>%{text}<extra></extra>",
                )
            )  # fmt: skip
        x = axis("β (γ = 1)", **log_axis(-0.08, math.log10(along[-1]["beta"]) + 0.08))
        y_axis = axis("times that of the network", **log_axis(math.log10(min(values)), math.log10(max(values)) + 0.15))
        panels.append(Panel(drawn(traces, x, y_axis, 300), record["name"], f"Measures against beta, {record['name']}."))
    return panels
