r"""Basin volume: the Gaussian measure of the part of parameter space around a minimum where the loss stays low.

The basin is star-shaped by definition: a ray from the minimum belongs to it until the loss first exceeds :math:`L(w) + c`.
In the coordinates :math:`\theta = w + P t v`, with :math:`v` on the unit sphere and a fixed diagonal :math:`P`, its
measure under the prior :math:`N(0, \tau^2 I)` is

.. math:: \det P\; A_n\; \mathbb{E}_v\Bigl[\int_0^{\rho(v)} t^{n-1} N(w + P t v;\, 0, \tau^2 I)\, dt\Bigr]

with :math:`A_n` the area of the sphere. The integral is computed, the mean over directions is sampled. In many dimensions
it is carried by few directions, which are rarely drawn: the mean of a sample is too small more often than not, and its
logarithm is in expectation a *lower bound* (Jensen). :math:`P` follows the curvature, which makes directions more equal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.special import gammaln, logsumexp
from torch import Tensor

from flatminima.curvature.diagonal import diagonal
from flatminima.curvature.probes import random_stream
from flatminima.measures.base import Measurement, Workbench, register
from flatminima.measures.hessian import curvature_diagonal
from flatminima.measures.invariance import ALL, SIGNED_PERMUTATIONS
from flatminima.objective import NonFiniteLossError, Objective

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(200)
_NATS = 50.0  # below its peak an integrand counts for nothing
_GROWTH = 1.5  # of the steps that look for the first crossing
_PROBES = 30  # of the diagonal that shapes the directions


@dataclass(frozen=True)
class BasinVolume:
    """The logarithm of a basin's Gaussian measure.

    Attributes:
        log_volume: natural logarithm of the estimate; in expectation not above that of the measure.
        error: standard error of it over the directions drawn; it knows nothing of directions that were not.
        effective: directions that carry the estimate (effective sample size); near 1 the error means nothing.
        directions: drawn.
        radii: ``(directions,)``, the distances, in units of :math:`P`, at which the rays leave the basin or the prior.
    """

    log_volume: float
    error: float
    effective: float
    directions: int
    radii: Tensor


def basin_volume(
    objective: Objective,
    *,
    height: float = 0.1,
    prior_std: float = 1.0,
    directions: int = 64,
    curvature: Tensor | None = None,
    seed: int = 0,
) -> BasinVolume:
    r"""Log of the Gaussian measure of the basin :math:`\{\theta : L \le L(w) + c \text{ on the ray from } w\}`.

    Args:
        objective: any.
        height: the *c*, in units of the loss.
        prior_std: the :math:`\tau` of the prior :math:`N(0, \tau^2 I)`.
        directions: rays.
        curvature: nonnegative ``(n,)``, roughly the diagonal of the Hessian; it decides :math:`P_i = (n h_i / 2c +
            \tau^{-2})^{-1/2}`, the shape of the basin were the loss quadratic and its axes those of the parameters. Any
            value gives a valid estimate; zero by default.
        seed: of the directions.

    Returns:
        The log of the measure, in nats, with its standard error and the number of directions behind it.

    Raises:
        ValueError: an argument out of range.

    Cost: about 10 losses a direction, 3 to 4 gradients.

    Source: Scherlis and Belrose, "Estimating the probability of sampling a trained neural network at random" (2025);
        Chiang et al.
    (2023) for the hypothesis that flat minima are found because they are large.

    Example:
        >>> from flatminima.problems import Quadratic
        >>> f = Quadratic(torch.ones(3).double()).objective()               # L = |x|^2 / 2 at its minimum 0
        >>> found = basin_volume(f, height=0.5)                             # P(|x| <= 1) for three normal variables
        >>> round(found.log_volume, 6), round(math.log(0.19874804309879915), 6)
        (-1.615717, -1.615717)
    """
    for name, value in (("height", height), ("prior_std", prior_std)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be positive and finite, got {value}")
    if directions < 2:
        raise ValueError(f"directions must be at least 2, got {directions}")
    n = objective.n
    w = objective.point().double()
    h = torch.zeros_like(w) if curvature is None else curvature.to(w).clamp(min=0)
    shape = (n * h / (2 * height) + prior_std**-2) ** -0.5
    start = objective.loss()
    generator = random_stream(seed, "basin")
    logs: list[float] = []
    radii: list[float] = []
    for _ in range(directions):
        v = torch.randn(n, dtype=torch.float64, generator=generator).to(objective.device)
        guess = min(radii) if radii else math.sqrt(n) * 1e-2
        log, radius = _along(objective, w, shape * v / v.norm(), start + height, prior_std, guess)
        logs.append(log)
        radii.append(radius)
    found = np.array(logs)
    area = math.log(2) + n / 2 * math.log(math.pi) - float(gammaln(n / 2))
    constant = area + float(shape.log().sum()) - n / 2 * math.log(2 * math.pi * prior_std**2)
    total = float(logsumexp(found)) - math.log(len(found))
    weights = np.exp(found - logsumexp(found))
    error = float(weights.std(ddof=1) / weights.mean() / math.sqrt(len(weights)))
    effective = float(1 / (weights**2).sum())
    return BasinVolume(total + constant, error, effective, len(found), torch.tensor(radii))


def _along(
    objective: Objective, w: Tensor, ray: Tensor, level: float, prior_std: float, guess: float
) -> tuple[float, float]:
    r"""``log int_0^rho t^(n-1) exp(-|w + t ray|^2 / 2 tau^2) dt`` and ``rho``, cut where the prior leaves nothing."""
    integrand = _Radial(
        objective.n - 1, float(ray.square().sum()) / prior_std**2, float(w @ ray) / prior_std**2
    )  # fmt: skip
    radius = _first_crossing(objective, w, ray, level, integrand.end, guess)
    return integrand.log_integral(radius) - float(w.square().sum()) / (2 * prior_std**2), radius


def _first_crossing(objective: Objective, w: Tensor, ray: Tensor, level: float, end: float, guess: float) -> float:
    """Where the loss first exceeds the level on a ray, sought in steps of a factor; ``end`` where it does not before."""

    def above(t: float) -> float:
        try:
            return objective.loss((w + t * ray).to(objective.dtype)) - level
        except NonFiniteLossError:
            return math.inf

    low, high = 0.0, min(guess, end)
    excess = above(high)
    while excess <= 0:
        if high >= end:
            return end
        low, high = high, min(high * _GROWTH, end)
        excess = above(high)
    # An error of log(rho) counts n times.
    tolerance = max(1e-4 / objective.n, 4 * float(np.finfo(np.float64).eps))
    if math.isinf(excess):  # no line can be drawn through infinity
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if above(middle) <= 0 else (low, middle)
        return high
    return float(brentq(above, low, high, xtol=tolerance * high, rtol=tolerance))


@dataclass(frozen=True)
class _Radial:
    r"""The integrand :math:`t^m e^{-b t - a t^2/2}` on the half line; its logarithm is concave."""

    m: int
    a: float
    b: float

    def log(self, t: float) -> float:
        """Logarithm of the integrand."""
        power = self.m * math.log(t) if t > 0 else 0.0 if self.m == 0 else -math.inf
        return power - self.b * t - self.a * t**2 / 2

    @property
    def peak(self) -> float:
        """Where it is largest."""
        return max(0.0, (-self.b + math.sqrt(self.b**2 + 4 * self.a * self.m)) / (2 * self.a))

    @property
    def end(self) -> float:
        """Beyond, it counts for nothing."""
        floor, low = self.log(self.peak) - _NATS, self.peak
        high = low + self.a**-0.5
        while self.log(high) > floor:
            high += high - low
        return self._edge(floor, low, high)

    def log_integral(self, radius: float) -> float:
        """Log of the integral from 0 to ``radius``."""
        top = min(self.peak, radius)
        low = self._edge(self.log(top) - _NATS, top, 0.0) if top else 0.0
        t = low + (radius - low) * (_NODES + 1) / 2
        logs = (self.m * np.log(t) if self.m else 0.0) - self.b * t - self.a * t**2 / 2
        return float(logsumexp(logs, b=_WEIGHTS * (radius - low) / 2))

    def _edge(self, floor: float, inside: float, outside: float) -> float:
        """Where the logarithm falls to ``floor``; ``outside`` where it does not."""
        if self.log(outside) >= floor:
            return outside
        for _ in range(200):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if self.log(middle) >= floor else (inside, middle)
        return outside


@register(
    "basin_volume",
    "log basin volume",
    "Log of the Gaussian measure of the region around the minimum where the loss stays low: an estimate from below.",
    flatter_when="higher",
    invariant_under=SIGNED_PERMUTATIONS,
    changes_under=ALL - SIGNED_PERMUTATIONS,
    cost_class="expensive",
)
def log_basin_volume(bench: Workbench) -> Measurement:
    """Log of the measure of the basin of height ``loss_rise`` under N(0, prior_std^2 I), in nats; see :func:`basin_volume`.

    The shape of the directions follows the diagonal of the Hessian, exact or from 30 probes. The error is a standard error
    over directions; a note says how many of them carry the estimate. Cost: about 4 gradients a direction.
    """
    options = bench.options
    h = curvature_diagonal(bench)
    if isinstance(h, str):
        h = diagonal(bench.objective, rtol=1e-6, max_products=_PROBES, seed=bench.seed).values
    found = basin_volume(
        bench.objective, height=options.loss_rise, prior_std=options.prior_std, directions=options.directions, curvature=h,
        seed=bench.seed,
    )  # fmt: skip
    note = (
        f"a lower bound in expectation: {found.effective:.3g} of {found.directions} directions carry the mean; basin of height "
        f"{options.loss_rise:g}, prior N(0, {options.prior_std:g}^2)"
    )
    carried = found.effective >= max(8.0, found.directions / 4)
    return Measurement(
        "basin_volume", found.log_volume, found.error, "standard error of a lower bound", carried, note=note
    )
