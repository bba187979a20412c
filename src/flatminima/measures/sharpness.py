"""Sharpness as the rise of the loss within a fixed Euclidean distance: at worst, and on average."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flatminima.measures.base import Measurement, Workbench, register
from flatminima.objective import NonFiniteDerivativeError, NonFiniteLossError, Objective


@register(
    "sam_sharpness",
    "SAM sharpness",
    "Largest rise of the loss found within distance rho; a lower bound of the true maximum.",
)
def sam_sharpness(bench: Workbench) -> Measurement:
    r"""Worst-case sharpness :math:`\max_{\lVert\delta\rVert_2 \le \rho} L(w+\delta) - L(w)`, from below.

    The value is achieved at a point that was evaluated, so the true maximum is at least as large. To second order it is at most
    :math:`\rho\lVert g\rVert + \rho^2\lambda_{\max}/2`. Source: Foret et al. (2021), eq. 1. Cost: up to 2 * ascent_steps
    gradients.
    """
    ones = torch.ones(bench.objective.n, dtype=torch.float64, device=bench.objective.device)
    return ascend("sam_sharpness", bench, ones, bench.options.rho)


@register(
    "average_sharpness",
    "average-case sharpness",
    "Mean rise of the loss over random displacements of a fixed length.",
)
def average_sharpness(bench: Workbench) -> Measurement:
    r"""Average-case sharpness :math:`\mathbb{E}_u[L(w + \gamma u)] - L(w)`, *u* uniform on the unit sphere.

    Antithetic pairs cancel the odd orders. The error is a standard error over pairs. Source: Cha et al. (2021), section 3.
    Cost: 2/3 gradient a pair.
    """
    objective, options = bench.objective, bench.options
    generator = torch.Generator().manual_seed(bench.seed + 2)
    w = objective.point()
    start = objective.loss()
    rises = torch.empty(options.draws, dtype=torch.float64)
    for i in range(options.draws):
        u = torch.randn(objective.n, dtype=torch.float64, generator=generator).to(objective.device)
        step = (options.radius / u.norm() * u).to(w.dtype)
        rises[i] = (objective.loss(w + step) + objective.loss(w - step)) / 2 - start
    return Measurement(
        "average_sharpness", float(rises.mean()), float(rises.std()) / math.sqrt(options.draws), "standard error", True
    )


def ascend(name: str, bench: Workbench, scale: Tensor, radius: float) -> Measurement:
    r"""Rise of the loss over the ellipsoid :math:`\{T s : \lVert s \rVert_2 \le r\}`, :math:`T` = diag(``scale``), from below.

    The generalised power method :math:`s \leftarrow r\, T g / \lVert T g\rVert` has no step size and, where the loss is convex
    in the ball, never decreases it (Journee et al., 2010). It starts from the gradient and from a random direction, and stops
    when a step gains less than one part in a thousand; the best point counts, and the spread of the two starts is the error
    that can be given for a maximum that is only known from below.
    """
    objective, options = bench.objective, bench.options
    w = objective.point()
    start, gradient = objective.loss_and_gradient()
    generator = torch.Generator().manual_seed(bench.seed + 3)
    noise = torch.randn(objective.n, dtype=torch.float64, generator=generator).to(objective.device)
    runs = [
        _climb(objective, w, start, scale, radius, first, options.ascent_steps) for first in (gradient * scale, noise)
    ]
    best = max(runs)
    spread = best[0] - min(runs)[0] if math.isfinite(best[0]) else None
    return Measurement(name, best[0], spread, "lower bound, spread of starts", best[1], note=f"radius {radius:g}")


def _climb(
    objective: Objective, w: Tensor, start: float, scale: Tensor, radius: float, direction: Tensor, steps: int
) -> tuple[float, bool]:
    best, previous = 0.0, -math.inf  # the centre belongs to the ball
    for _ in range(steps):
        norm = float(direction.norm())
        if norm == 0:
            return best, True
        at = w + (scale * direction * (radius / norm)).to(w.dtype)
        try:
            value, gradient = objective.loss_and_gradient(at)
        except NonFiniteDerivativeError:
            return best, False
        except NonFiniteLossError:
            return math.inf, True
        rise = value - start
        best = max(best, rise)
        if rise - previous <= 1e-3 * abs(rise):
            return best, True
        previous, direction = rise, scale * gradient
    return best, False
