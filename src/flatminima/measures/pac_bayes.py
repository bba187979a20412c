r"""PAC-Bayes terms: how much Gaussian noise the weights take before the loss rises by a given amount.

The noise :math:`\sigma` solves :math:`\mathbb{E}_u[L(w + \sigma T u)] - L(w) = r` with :math:`u \sim N(0, I)` and :math:`T
= I`, or :math:`T = \mathrm{diag}|w|` for noise in proportion to each weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.optimize import brentq
from torch import Tensor

from flatminima.curvature.probes import random_stream
from flatminima.measures import scales
from flatminima.measures.base import Measurement, NotApplicableError, Workbench, register
from flatminima.measures.invariance import (
    ALL,
    CHANGES_DISTANCES,
    CHANGES_RATIOS,
    KEEPS_DISTANCES,
    KEEPS_RATIOS,
    NEARLY,
    SIGNED_PERMUTATIONS,
)
from flatminima.objective import NonFiniteLossError, Objective

_TOLERANCE = 1e-3  # relative, of sigma: well below its standard error
_GUESS, _STRIDE, _REACH = 0.03, math.log(4), 16  # sigma is sought within a factor 4^16 of the guess
_CONFIDENCE = 0.05


@dataclass(frozen=True)
class ToleratedNoise:
    """The noise at which the mean loss has risen by the target.

    Attributes:
        sigma: its standard deviation, in units of :math:`T`.
        relative_error: standard error of ``log(sigma)`` from the draws, by the delta method.
        rise: the target.
        draws: antithetic pairs.
    """

    sigma: float
    relative_error: float
    rise: float
    draws: int


def tolerated_noise(
    objective: Objective, scale: Tensor, rise: float, *, draws: int = 16, seed: int = 0
) -> ToleratedNoise:
    r"""Solve :math:`\mathbb{E}_u[L(w + \sigma T u)] - L(w) = r` for :math:`\sigma` in a bracket, all steps with the same draws.

    The draws are antithetic pairs, and common to all :math:`\sigma`, so that the mean rise is a smooth function of it. To
    second order :math:`\sigma^2 = 2r / \mathrm{tr}(THT)`. The standard error is that of the mean rise at the solution over
    its derivative in :math:`\log\sigma`.

    Args:
        objective: any.
        scale: the diagonal of :math:`T`, ``(n,)`` in double precision.
        rise: the target, in units of the loss.
        draws, seed: of the noise.

    Raises:
        NotApplicableError: no noise raises the mean loss that much.

    Cost: 2/3 gradient a pair and step; about 12 steps.
    """
    w = objective.point()
    start = objective.loss()

    def rises(sigma: float) -> Tensor:
        generator = random_stream(seed, "noise")  # the same draws again, without keeping them
        found = torch.empty(draws, dtype=torch.float64)
        for i in range(draws):
            u = torch.randn(objective.n, dtype=torch.float64, generator=generator).to(objective.device)
            step = (sigma * scale * u).to(w.dtype)
            try:
                found[i] = (objective.loss(w + step) + objective.loss(w - step)) / 2 - start
            except NonFiniteLossError:
                found[i] = math.inf
        return found

    def excess(log: float) -> float:
        # Far above the target its size does not matter, and infinity would stop the root finder.
        return min(float(rises(math.exp(log)).mean()), 10 * rise) - rise

    sigma = math.exp(brentq(excess, *_bracket(excess, rise), xtol=_TOLERANCE))
    at = rises(sigma)
    slope = (float(rises(sigma * 1.05).mean()) - float(rises(sigma / 1.05).mean())) / (2 * math.log(1.05))
    error = float(at.std()) / math.sqrt(draws) / slope if slope > 0 else math.inf
    return ToleratedNoise(sigma, math.hypot(error, _TOLERANCE), rise, draws)


def _bracket(excess: Callable[[float], float], rise: float) -> tuple[float, float]:
    """Two values of log(sigma) between which the mean rise crosses the target."""
    log = math.log(_GUESS)
    below = excess(log) < 0
    for _ in range(_REACH):
        further = log + (_STRIDE if below else -_STRIDE)
        if (excess(further) < 0) != below:
            return log, further
        log = further
    raise NotApplicableError(
        f"no Gaussian noise of standard deviation {math.exp(log):.2g} to {_GUESS:g} raises the mean loss by {rise:g}: "
        + ("it stays below" if below else "the least noise raises it by more")
    )


def _noise(bench: Workbench, kind: str) -> ToleratedNoise:
    objective, options = bench.objective, bench.options
    scale = scales.elementwise(objective) if kind == "magnitude" else scales.plain(objective)
    return bench.shared(
        f"noise {kind}",
        lambda: tolerated_noise(objective, scale, options.loss_rise, draws=options.draws, seed=bench.seed),
    )


def _measured(name: str, value: float, found: ToleratedNoise, note: str = "") -> Measurement:
    known = math.isfinite(found.relative_error)
    error = 2 * found.relative_error * value if known else None
    said = f"sigma {found.sigma:.4g} for a rise of {found.rise:g}"
    return Measurement(name, value, error, "standard error", known and found.relative_error < 0.25, note=said + note)


@register(
    "pac_bayes_kl",
    "PAC-Bayes term",
    "Squared length of the weights over the squared noise that they take: the complexity in a PAC-Bayes bound.",
    invariant_under=SIGNED_PERMUTATIONS,
    changes_under=ALL - SIGNED_PERMUTATIONS,
    cost_class="expensive",
    repair=("pac_bayes_magnitude_flatness",),
)
def pac_bayes_kl(bench: Workbench) -> Measurement:
    r""":math:`\mathrm{KL}(N(w, \sigma^2 I) \,\|\, N(0, \sigma^2 I)) = \lVert w \rVert_2^2 / 2\sigma^2`, in nats.

    :math:`\sigma` is the noise that raises the mean loss by ``loss_rise``. The note has the complexity term of
    McAllester's bound, :math:`\sqrt{(\mathrm{KL} + \log(2\sqrt m/\delta))/2m}` with *m* rows and :math:`\delta = 0.05`; that
    :math:`\sigma` was chosen after seeing the data is not paid for in it. Source: Neyshabur et al. (2017); Jiang et al.
    (2019). The error is the standard error that :math:`\sigma` brings. Cost: about 12 * draws * 2/3 gradients, shared.
    """
    found = _noise(bench, "plain")
    value = float(bench.objective.point().double().norm()) ** 2 / (2 * found.sigma**2)
    m = bench.objective.rows
    term = math.sqrt((value + math.log(2 * math.sqrt(m) / _CONFIDENCE)) / (2 * m))
    return _measured("pac_bayes_kl", value, found, f"; McAllester's term is {term:.4g} for {m} rows")


@register(
    "pac_bayes_flatness",
    "PAC-Bayes sharpness",
    "One over the squared noise that the weights take before the mean loss rises by a given amount.",
    invariant_under=KEEPS_DISTANCES,
    changes_under=CHANGES_DISTANCES,
    cost_class="expensive",
    repair=("pac_bayes_magnitude_flatness",),
)
def pac_bayes_flatness(bench: Workbench) -> Measurement:
    r""":math:`1/\sigma^2`, to second order :math:`\mathrm{tr} H / 2r`. Source: Jiang et al. (2019), "PAC-Bayes flatness".

    The error is a standard error. Cost: shared with :func:`pac_bayes_kl`.
    """
    found = _noise(bench, "plain")
    return _measured("pac_bayes_flatness", 1 / found.sigma**2, found)


@register(
    "pac_bayes_magnitude_flatness",
    "magnitude-aware PAC-Bayes sharpness",
    "One over the squared relative noise that the weights take: noise in proportion to the size of each weight.",
    invariant_under=KEEPS_RATIOS,
    almost_under=NEARLY,
    changes_under=CHANGES_RATIOS,
    cost_class="expensive",
)
def pac_bayes_magnitude_flatness(bench: Workbench) -> Measurement:
    r""":math:`1/\sigma'^2` with noise :math:`\sigma' |w_i|` on weight *i*; to second order :math:`\sum_i w_i^2 H_{ii}/2r`.

    Source: Jiang et al. (2019), "magnitude-aware", without the constant that they add to :math:`|w|`. The error is a
        standard error.
    Cost: about 12 * draws * 2/3 gradients.
    """
    found = _noise(bench, "magnitude")
    return _measured("pac_bayes_magnitude_flatness", 1 / found.sigma**2, found)
