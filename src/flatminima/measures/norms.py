"""Norms of the parameters."""

from __future__ import annotations

import torch

from flatminima.measures.base import Measurement, Workbench, register


@register(
    "parameter_norm",
    "parameter norm",
    "Euclidean length of all parameters, a rival explanation rather than a flatness.",
    flatter_when=None,
)
def parameter_norm(bench: Workbench) -> Measurement:
    r""":math:`\lVert w \rVert_2` in double precision; the error is its rounding. Cost: none."""
    value = float(bench.objective.point().double().norm())
    return Measurement("parameter_norm", value, torch.finfo(torch.float64).eps * value, "rounding", True)
