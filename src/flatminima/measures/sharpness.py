r"""Sharpness as the rise of the loss within a fixed distance: at worst, and on average; in the Euclidean and the maximum norm.

Every variant is a ball :math:`\{T s : \lVert s \rVert_p \le r\}` (:class:`Ball`), an objective, and "worst" or "average". The
adaptive variants are other :math:`T`, the logit-normalised ones another objective, m-sharpness many objectives.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flatminima.batches import cut_rows
from flatminima.curvature.probes import random_stream
from flatminima.measures import scales
from flatminima.measures.base import Measurement, Workbench, register
from flatminima.measures.invariance import CHANGES_DISTANCES, KEEPS_DISTANCES
from flatminima.objective import NonFiniteDerivativeError, NonFiniteLossError, Objective


@dataclass(frozen=True, eq=False)
class Ball:
    r"""Displacements :math:`\{T s : \lVert s \rVert_p \le r\}` with :math:`T` = diag(``scale``) and p = 2 or infinity."""

    scale: Tensor
    radius: float
    norm: Literal["l2", "linf"] = "l2"

    def towards(self, direction: Tensor) -> Tensor | None:
        """The displacement in the ball that goes furthest along a direction of *s*; ``None`` for no direction."""
        if self.norm == "linf":
            return self.scale * direction.sign() * self.radius if bool(direction.any()) else None
        norm = float(direction.norm())
        return self.scale * direction * (self.radius / norm) if norm else None

    def draw(self, generator: torch.Generator) -> Tensor:
        """A random displacement: *s* uniform on the sphere, or in the box."""
        n, device = len(self.scale), self.scale.device
        if self.norm == "linf":
            s = 2 * torch.rand(n, dtype=torch.float64, generator=generator).to(device) - 1
            return self.scale * (self.radius * s)
        u = torch.randn(n, dtype=torch.float64, generator=generator).to(device)
        return self.scale * (self.radius / float(u.norm()) * u)


def one_step_rise(objective: Objective, ball: Ball) -> float:
    r"""Rise of the loss after the single step of SAM, :math:`L(w + \delta) - L(w)`, which can be negative.

    :math:`\delta = r\, T^2 g / \lVert T g \rVert` in the Euclidean norm, :math:`r\, T\, \mathrm{sign}(T g)` in the maximum
    norm: the best displacement for the linearised loss. Cost: 4/3 gradients.

    Example:
        >>> w = torch.nn.Linear(1, 1, bias=False).double()
        >>> _ = torch.nn.init.constant_(w.weight, 2.0)
        >>> data = torch.ones(1, 1).double(), torch.zeros(1, 1).double()
        >>> f = Objective(w, torch.nn.functional.mse_loss, data)                    # L(w) = w^2 at w = 2
        >>> round(one_step_rise(f, Ball(scales.plain(f), 0.5)), 9)                  # 2.5^2 - 2^2
        2.25
    """
    w = objective.point()
    start, gradient = objective.loss_and_gradient()
    step = ball.towards(ball.scale * gradient)
    return 0.0 if step is None else objective.loss(w + step.to(w.dtype)) - start


@register(
    "sam_sharpness",
    "SAM sharpness",
    "Largest rise of the loss found within distance rho; a lower bound of the true maximum.",
    invariant_under=KEEPS_DISTANCES,
    changes_under=CHANGES_DISTANCES,
    default=True,
    repair=("adaptive_sharpness",),
)
def sam_sharpness(bench: Workbench) -> Measurement:
    r"""Worst-case sharpness :math:`\max_{\lVert\delta\rVert_2 \le \rho} L(w+\delta) - L(w)`, from below.

    The value is achieved at a point that was evaluated, so the true maximum is at least as large. To second order it is at
    most :math:`\rho\lVert g\rVert + \rho^2\lambda_{\max}/2`. Source: Foret et al. (2021), eq. 1. Cost: up to 2 * ascent_steps
    gradients.
    """
    return worst("sam_sharpness", bench, Ball(scales.plain(bench.objective), bench.options.rho))


@register(
    "linf_sharpness",
    "Linf sharpness",
    "Largest rise of the loss found when no weight moves by more than a fixed amount; a lower bound of the true maximum.",
    invariant_under=KEEPS_DISTANCES,
    changes_under=CHANGES_DISTANCES,
    repair=("adaptive_linf_sharpness",),
)
def linf_sharpness(bench: Workbench) -> Measurement:
    r"""Worst-case sharpness in a box, :math:`\max_{\lVert\delta\rVert_\infty \le \rho} L(w+\delta) - L(w)`, from below.

    The ascent goes from corner to corner, :math:`\delta \leftarrow \rho\,\mathrm{sign}(g)`. Source: Keskar et al. (2017),
    without their random subspace. Cost: up to 2 * ascent_steps gradients.
    """
    ball = Ball(scales.plain(bench.objective), bench.options.linf_rho, "linf")
    return worst("linf_sharpness", bench, ball)


@register(
    "average_sharpness",
    "average-case sharpness",
    "Mean rise of the loss over random displacements of a fixed length.",
    invariant_under=KEEPS_DISTANCES,
    changes_under=CHANGES_DISTANCES,
    default=True,
    repair=("adaptive_average_sharpness",),
)
def average_sharpness(bench: Workbench) -> Measurement:
    r"""Average-case sharpness :math:`\mathbb{E}_u[L(w + \gamma u)] - L(w)`, *u* uniform on the unit sphere.

    Antithetic pairs cancel the odd orders. The error is a standard error over pairs. Source: Cha et al. (2021), section 3.
    Cost: 2/3 gradient a pair.
    """
    return average("average_sharpness", bench, Ball(scales.plain(bench.objective), bench.options.radius))


@register(
    "linf_average_sharpness",
    "average-case Linf sharpness",
    "Mean rise of the loss when every weight moves independently and uniformly within a box.",
    invariant_under=KEEPS_DISTANCES,
    changes_under=CHANGES_DISTANCES,
    repair=("adaptive_average_sharpness",),
)
def linf_average_sharpness(bench: Workbench) -> Measurement:
    r"""Average-case sharpness in a box, :math:`\mathbb{E}_u[L(w + a u)] - L(w)`, *u* uniform in :math:`[-1, 1]^n`.

    The half width :math:`a = \gamma\sqrt{3/n}` gives the displacements the mean squared length :math:`\gamma^2` of the sphere
    of average-case sharpness, so to second order both are :math:`\gamma^2\, \mathrm{tr} H / 2n`. Antithetic pairs,
    standard error and cost as there. Source: Andriushchenko et al. (2023), section 3, with T = 1.
    """
    n = bench.objective.n
    ball = Ball(scales.plain(bench.objective), bench.options.radius * math.sqrt(3 / n), "linf")
    return average("linf_average_sharpness", bench, ball)


@register(
    "m_sharpness",
    "m-sharpness",
    "Mean over micro-batches of the largest rise found within distance rho of each one's own loss.",
    invariant_under=KEEPS_DISTANCES,
    changes_under=CHANGES_DISTANCES,
    cost_class="expensive",
)
def m_sharpness(bench: Workbench) -> Measurement:
    r"""m-sharpness :math:`\frac1B \sum_b \max_{\lVert\delta_b\rVert_2 \le \rho} L_b(w+\delta_b) - L_b(w)`, from below.

    The rows of each batch are shuffled and cut into micro-batches :math:`b` of ``micro_batch`` rows; a rest counts by its
    rows (or unmasked targets). If there are more than ``max_micro_batches``, so many are drawn. The error is the standard
    error of that draw; where all were used it is, as for the other maxima, the mean spread of the starts. Source: Foret et
    al. (2021), section 4.1.
    Cost: up to 2 * ascent_steps gradients, of the share of the rows that are used.
    """
    options, objective = bench.options, bench.objective
    parts = list(_micro_batches(objective, options.micro_batch, random_stream(bench.seed, "m-sharpness")))
    everything = len(parts) <= options.max_micro_batches
    if not everything:
        chosen = torch.randperm(len(parts), generator=random_stream(bench.seed, "m-sharpness draw"))
        parts = [parts[i] for i in chosen[: options.max_micro_batches].tolist()]
    found = []
    for part in parts:
        found.append(worst("m_sharpness", bench, Ball(scales.plain(part), options.rho), part))
        objective.evaluations.passes += part.evaluations.gradient_equivalents * part.rows / objective.rows
    weights = torch.tensor([part._total for part in parts], dtype=torch.float64)
    values = torch.tensor([m.value for m in found], dtype=torch.float64)
    value = float((weights * values).sum() / weights.sum())
    if everything:
        kind, spreads = "lower bound, spread of starts", [m.error for m in found if m.error is not None]
        error = math.fsum(spreads) / len(spreads) if spreads else None
    else:
        kind, error = "lower bound, standard error of the draw", float(values.std()) / math.sqrt(len(parts))
    return Measurement(
        "m_sharpness", value, error, kind, all(m.converged for m in found),
        note=f"radius {options.rho:g}, m = {options.micro_batch}, {len(parts)} micro-batches",
    )  # fmt: skip


def _micro_batches(objective: Objective, rows: int, generator: torch.Generator) -> Iterator[Objective]:
    """The rows of every batch, shuffled and cut."""
    for whole in objective._pieces.batches():
        piece = whole if objective._cast is None else objective._in_dtype(whole, objective._cast)
        order = torch.randperm(piece.rows, generator=generator)
        for chosen in order.split(rows):
            pair = tuple(cut_rows(tree, piece.rows, chosen) for tree in (piece.inputs, piece.targets))
            yield objective.with_data([pair])


# ----- the two searches -----------------------------------------------------------------------------------------------


def average(name: str, bench: Workbench, ball: Ball, objective: Objective | None = None) -> Measurement:
    """Mean rise over random displacements of the ball and their mirror images, with its standard error."""
    objective, options = objective or bench.objective, bench.options
    generator = torch.Generator().manual_seed(bench.seed + 2)
    w = objective.point()
    start = objective.loss()
    rises = torch.empty(options.draws, dtype=torch.float64)
    for i in range(options.draws):
        step = ball.draw(generator).to(w.dtype)
        rises[i] = (objective.loss(w + step) + objective.loss(w - step)) / 2 - start
    error = float(rises.std()) / math.sqrt(options.draws)
    return Measurement(name, float(rises.mean()), error, "standard error", True)


def worst(name: str, bench: Workbench, ball: Ball, objective: Objective | None = None) -> Measurement:
    r"""Largest rise of the loss found in a ball, from below.

    The generalised power method :math:`s \leftarrow \arg\max_{\lVert s \rVert_p \le r} \langle T g, s \rangle` has no step
    size and, where the loss is convex in the ball, never decreases it (Journee et al., 2010). It starts from the gradient
    and from a random direction, and stops when a step gains less than one part in a thousand; the best point counts, and
    the spread of the two starts is the error that can be given for a maximum that is only known from below.
    """
    objective, options = objective or bench.objective, bench.options
    w = objective.point()
    start, gradient = objective.loss_and_gradient()
    generator = torch.Generator().manual_seed(bench.seed + 3)
    noise = torch.randn(objective.n, dtype=torch.float64, generator=generator).to(objective.device)
    starts = (gradient * ball.scale, noise)[: options.ascent_starts]
    runs = [_climb(objective, w, start, ball, first, options.ascent_steps) for first in starts]
    best = max(runs)
    spread = best[0] - min(runs)[0] if math.isfinite(best[0]) and len(runs) > 1 else None
    return Measurement(name, best[0], spread, "lower bound, spread of starts", best[1], note=f"radius {ball.radius:g}")


def _climb(
    objective: Objective, w: Tensor, start: float, ball: Ball, direction: Tensor, steps: int
) -> tuple[float, bool]:
    best, previous = 0.0, -math.inf  # the centre belongs to the ball
    for _ in range(steps):
        step = ball.towards(direction)
        if step is None:
            return best, True
        try:
            value, gradient = objective.loss_and_gradient(w + step.to(w.dtype))
        except NonFiniteDerivativeError:
            return best, False
        except NonFiniteLossError:
            return math.inf, True
        rise = value - start
        best = max(best, rise)
        if rise - previous <= 1e-3 * abs(rise):
            return best, True
        previous, direction = rise, ball.scale * gradient
    return best, False
