r"""The constants of :class:`~flatminima.problems.convex_sam_trap.SAMTrap`, and what SAM does with them in closed form.

The constants printed in the paper (v2) do not do what its proof says: an inner product in the first step is taken for an
elementwise product, and where :math:`\eta\, 2^{n/2-1} \gtrsim 1` other blocks start chains of their own. The corrected ones
(ours) differ in :math:`\gamma` and :math:`\delta_1` alone. Both are tiny; the conditioned ones (ours, of the same theorem)
keep the gradients a factor of 10^6 to 10^10 larger, so that single precision and a small epsilon do not swallow them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch

from flatminima.names import unknown
from flatminima.problems.convex_base import positive

Variant: TypeAlias = Literal["conditioned", "corrected", "paper"]

_DIGITS = 1e7  # what the smallest gradient has to be above the smallest number: seven digits of it survive


@dataclass(frozen=True)
class Constants:
    r"""The constants of one loss.

    Attributes:
        variant: whose they are.
        epsilon: :math:`\varepsilon`, minus the weight of a zero bit in the trigger.
        lam: :math:`\lambda`, the shift of the chain's first link.
        gamma: :math:`\gamma`, the weight of the trigger.
        delta_1: :math:`\delta_1`, its shift.
        chain: :math:`\delta_2, \ldots, \delta_T`, the links of the chain.
    """

    variant: Variant
    epsilon: float
    lam: float
    gamma: float
    delta_1: float
    chain: tuple[float, ...]


def constants(
    variant: Variant,
    n: int,
    steps: int,
    lr: float,
    radius: float,
    *,
    chain_delta: float | None,
    delta_2: float,
    delta_3: float | None,
    size: float,
    dtype: torch.dtype,
) -> Constants:
    r"""The constants for ``n`` examples, :math:`T` iterates, step size :math:`\eta` and radius :math:`r`.

    Args:
        variant: see the module.
        n, steps, lr, radius: of the problem.
        chain_delta: :math:`\delta_j` for :math:`j \ge 4`; ``None``: ``min(0.1, 0.4 / lr)``.
        delta_2: the first link.
        delta_3: the second; ``None``: ``min(1/2, sigma / (2 lr r))`` of the bound ``size``.
        size: :math:`\lVert v_S\rVert` or an upper bound on it, for ``delta_3``.
        dtype: in which the constants have to be representable.

    Raises:
        ValueError: an unknown variant, a value out of range, a constant that underflows.
    """
    if variant not in get_args(Variant):
        raise ValueError(unknown("variant of the constants", variant, get_args(Variant)))
    chain_delta = min(0.1, 0.4 / lr) if chain_delta is None else positive("chain_delta", chain_delta)
    delta_2 = positive("delta_2", delta_2)
    for name, value in (("chain_delta", chain_delta), ("delta_2", delta_2)):
        if value > 1.0:
            raise ValueError(f"{name} must be at most 1, got {value}")
    columns, larger = 2.0 ** min(n, 1023), max(1.0, lr)
    kappa, d = math.sqrt(columns + 1.0), steps * columns + 1.0
    if variant == "conditioned":
        epsilon = 1.0 / (2 * n)
        lam = radius * epsilon / (2.0 * kappa)
    else:
        epsilon = 1.0 / (2.0 * (d - 1.0))
        lam = radius / 4.0 / d / (d - 1.0)
    if variant == "paper":
        delta_1 = lr * lam / (2.0 * larger * math.sqrt(d))
        gamma = lam / larger / (radius + delta_1)
    else:
        gamma = lam / larger / (2.0 * radius * kappa)
        shift = lr * gamma * radius / 2.0
        delta_1 = min(lam / 2.0, shift / kappa) if variant == "conditioned" else shift / math.sqrt(d)
    # The unit column that has to move receives epsilon of the trigger's slope.
    _refuse_underflow(variant, n, dtype, {"lambda": lam, "gamma": gamma, "delta_1": delta_1,
                                          "the gradient of the spurious column": gamma * delta_1 * epsilon})  # fmt: skip
    if delta_3 is None:
        sigma = lr * delta_2 * (radius * epsilon / size - lam)
        delta_3 = min(0.5, sigma / (2.0 * lr * radius))
    chain = (delta_2, positive("delta_3", delta_3), *(chain_delta,) * max(0, steps - 3))[: steps - 1]
    return Constants(variant, epsilon, lam, gamma, delta_1, chain)


def _refuse_underflow(variant: str, n: int, dtype: torch.dtype, values: dict[str, float]) -> None:
    smallest = float(torch.finfo(dtype).smallest_normal) * float(torch.finfo(dtype).eps)
    for name, value in values.items():
        if not value >= _DIGITS * smallest:
            mend = ["a smaller n"]
            mend += ["dtype=torch.float64"] if dtype != torch.float64 else []
            mend += ["variant='conditioned'"] if variant != "conditioned" else []
            raise ValueError(
                f"n = {n}: {name} = {value:.3g} underflows in {str(dtype).removeprefix('torch.')} with the {variant} "
                f"constants, and the loss would silently be flat; use {' or '.join(mend)}"
            )


@dataclass(frozen=True)
class Chain:
    r"""The block of the one spurious column along SAM's run, exactly (Lemma 8).

    Slot :math:`j` of :math:`w_t` is 0 before step :math:`j`, ``fresh[j]`` at it and ``settled[j]`` after it.

    Attributes:
        steps: :math:`T`.
        sigma: :math:`\sigma`, minus slot 2 of :math:`w_2`.
        forces: :math:`s_t` for :math:`t = 3, \ldots, T`.
        fresh, settled: of slots :math:`2, \ldots, T`.
    """

    steps: int
    sigma: float
    forces: tuple[float, ...]
    fresh: tuple[float, ...]
    settled: tuple[float, ...]

    def suffix_average(self, tau: int) -> tuple[float, ...]:
        """Slots 2 ... T of the mean of the iterates tau ... T, tau at least 2."""
        if not 1 <= tau <= self.steps:
            raise ValueError(f"tau must be one of 1 ... {self.steps}, got {tau}")
        count = self.steps - tau + 1
        return tuple(
            ((fresh if tau <= j else 0.0) + max(0, self.steps - max(tau, j + 1) + 1) * settled) / count
            for j, fresh, settled in zip(range(2, self.steps + 1), self.fresh, self.settled, strict=True)
        )

    def suffix_risk(self, tau: int) -> float:
        r""":math:`\tfrac14 \sum_{j\ge2} \hat w_\tau(j)^2`: the population risk without the trigger, which adds below 1e-9."""
        return 0.25 * math.fsum(value * value for value in self.suffix_average(tau))


def sam_chain(lr: float, radius: float, links: tuple[float, ...], sigma: float) -> Chain:
    r"""The run of SAM with links :math:`\delta_2, \ldots, \delta_T` once :math:`w_2` is reached.

    .. math:: s_3 = r\sqrt{1+\delta_3^2} + \delta_3\sigma, \qquad s_t = r\sqrt{1+\delta_t^2} + \delta_t\,\eta\,s_{t-1}

    Example:
        >>> run = sam_chain(1.0, 1.0, (0.5, 0.0, *[1e-9] * 997), 0.0)      # the limit of weak links
        >>> round(run.suffix_risk(1) / 1000, 4), round(run.suffix_risk(1000) / 1000, 4)
        (0.083, 0.2495)
    """
    steps, forces = len(links) + 1, [0.0]
    for t, link in enumerate(links[1:], start=3):
        before = sigma if t == 3 else lr * forces[-1]
        forces.append(radius * math.sqrt(1.0 + link * link) + link * before)
    forces = forces[1:]
    fresh = [-sigma, *(-lr * s for s in forces)]
    pulls = [lr * link * s for link, s in zip(links[1:], forces, strict=True)]
    settled = [value + pull for value, pull in zip(fresh, [*pulls, 0.0], strict=True)]
    return Chain(steps, sigma, tuple(forces), tuple(fresh), tuple(settled))
