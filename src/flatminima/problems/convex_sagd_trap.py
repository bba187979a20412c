r"""A flat empirical minimum that sharpness-aware gradient descent walks into and that generalises badly (Theorem 3).

Schliserman, Vansover-Hager and Koren, "Flat Minima and Generalization: Insights from Stochastic Convex Optimization"
(arXiv:2511.03548). The theorem is a statement about *one* choice among several maximisers: see ``tie_break``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from flatminima.problems.convex_base import check_count, length, positive
from flatminima.problems.convex_columns import ColumnProblem
from flatminima.problems.convex_flat_sharp import dead_zone
from flatminima.problems.convex_risk import Certificate, Check, Risk, expectation
from flatminima.problems.convex_sample import Kind, Sample, event_probability

#: The proved constant of the lower bound, over all admissible parameters, and the one that is printed.
FLOOR, PRINTED_FLOOR = 1.0221e-4, 2.5e-5


class SAGDTrap(ColumnProblem):
    r"""The losses :math:`\tfrac\beta2 [q - \rho]_+^2` with :math:`q^2 = \sum_{ij} [z_i w_{ij}]_+^2 + \alpha^2 w_a^2`.

    The :math:`z_i` are fair signs (in a sample, bit 1 is +1). With probability at least one half some column :math:`I` is
    +1 in all ``n`` examples. From :math:`w_1 = 0` the displacement of largest risk is any unit vector of the positive part of
    block *I*, or :math:`\pm e_a`. Choosing the next unused slot of block *I* at each step, SA-GD fills the block with
    :math:`-a = -\eta\beta(r - \rho)`, one entry a step: its empirical risk stays zero, its sharpness-aware risk is minimal, and

    .. math:: F(\hat w_\tau) = \tfrac\beta4 \bigl[\lVert \hat w_\tau\rVert - \rho\bigr]_+^2, \qquad
              \lVert\hat w_\tau\rVert^2 = a^2\Bigl[(\tau - 1) + \tfrac{(m-1)(2m-1)}{6m}\Bigr], \quad m = T - \tau + 1 .

    Args:
        n: examples.
        steps: :math:`T`, iterates and slots of a block.
        flatness_radius: :math:`\rho`.
        auxiliary_weight: :math:`\alpha` in [0, 1]; 1 is the paper's loss. Below 1 the harmless maximisers :math:`\pm e_a` are
            no longer as good, and a maximiser that nobody chose walks into the trap as well (our variant).
        smoothness: :math:`\beta`.
        sample: one of ``n`` examples, or the representation of the canonical one.
        dtype: of points and losses.

    Raises:
        ValueError: a value out of range, a sample of another size, too many columns to hold.

    Example:
        >>> f = SAGDTrap(300, 64, flatness_radius=0.1, sample="spurious")
        >>> [round(f.suffix_risk(tau, lr=0.25, radius=0.6), 8) for tau in (1, 32, 64)]
        [0.05536138, 0.12436385, 0.19898591]
    """

    def __init__(
        self,
        n: int,
        steps: int,
        flatness_radius: float = 0.1,
        *,
        auxiliary_weight: float = 1.0,
        smoothness: float = 1.0,
        sample: Sample | Kind = "dense",
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.flatness_radius = positive("flatness_radius", flatness_radius, zero=True)
        self.auxiliary_weight = positive("auxiliary_weight", auxiliary_weight, zero=True)
        if self.flatness_radius >= 1.0 or self.auxiliary_weight > 1.0:
            raise ValueError(
                f"flatness_radius must be below 1 and auxiliary_weight at most 1, got {flatness_radius} and {auxiliary_weight}"
            )
        self.smoothness = self.lipschitz = positive("smoothness", smoothness)
        self.largest_loss = 0.5 * self.smoothness * (1.0 - self.flatness_radius) ** 2
        super().__init__(n, steps, sample, dtype)
        self.steps = self.slots
        self._arguments = {
            "steps": self.steps, "flatness_radius": self.flatness_radius, "auxiliary_weight": self.auxiliary_weight,
            "smoothness": self.smoothness,
        }  # fmt: skip
        self.tie_breaks = ("adversarial", "uniform", "power")
        if self.auxiliary_weight == 1.0:
            self.tie_breaks = ("adversarial", "auxiliary", "uniform", "power")
        sign = torch.zeros(len(self.sample), dtype=dtype)
        sign[list(self.sample.ones)] = 1.0
        sign[list(self.sample.zeros)] = -1.0
        self._sign = sign

    @property
    def minimisers(self) -> dict[str, Tensor]:
        """``"origin"``: flat, and its population risk is zero."""
        return {"origin": torch.zeros_like(self.start)}

    @property
    def event_probability(self) -> float:
        """That an i.i.d. sample has a column of +1."""
        return event_probability(self.n, "some")

    def certify(self, lr: float, radius: float) -> Certificate:
        """Whether the theorem speaks of SA-GD with this step size and radius on this sample."""
        rise, root = self._rise(lr, radius), math.sqrt(self.steps)
        return Certificate(
            (
                Check("a column of ones", bool(self.sample.ones), len(self.sample.ones), 1),
                Check("T >= 2", self.steps >= 2, self.steps, 2, True),
                Check("lr (r - rho) <= 1 / sqrt T", rise <= (1 + 1e-12) / root, rise, 1 / root, True),
                Check("3 rho < lr (r - rho) sqrt T", 3 * self.flatness_radius < rise * root,
                      3 * self.flatness_radius, rise * root, True),
            )
        )  # fmt: skip

    def suffix_risk(self, tau: int, *, lr: float, radius: float) -> float:
        r""":math:`F(\hat w_\tau)` of the adversarial run, the mean of its iterates :math:`\tau, \ldots, T`, in closed form.

        Args:
            tau: from 1 (all iterates) to ``steps`` (the last one).
            lr, radius: of the run.
        """
        if check_count("tau", tau) > self.steps:
            raise ValueError(f"tau must be one of 1 ... {self.steps}, got {tau}")
        a, m = max(0.0, self._rise(lr, radius)), self.steps - tau + 1
        size = a * math.sqrt((tau - 1) + (m - 1) * (2 * m - 1) / (6 * m))
        return 0.25 * self.smoothness * max(0.0, size - self.flatness_radius) ** 2

    def floor(self, *, lr: float, radius: float) -> float:
        r"""The proved lower bound :math:`1.0221 \cdot 10^{-4}\, \beta a^2 T` on :meth:`suffix_risk`, for every :math:`\tau`.

        0 where nothing more is proved: for :math:`T < 2` or :math:`3\rho \ge a \sqrt T`.
        """
        rise = self._rise(lr, radius)
        if self.steps < 2 or 3 * self.flatness_radius >= rise * math.sqrt(self.steps):
            return 0.0
        return FLOOR * self.smoothness * rise**2 * self.steps

    def _rise(self, lr: float, radius: float) -> float:
        r""":math:`a = \eta\beta(r - \rho)`, by which the adversary's run moves a slot; less where an example was left out."""
        step = positive("lr", lr) * self.smoothness * self.sample.counted
        return step * (positive("radius", radius, zero=True) - self.flatness_radius)

    # ----- the loss --------------------------------------------------------------------------------------------------

    def _loss(self) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
        weight = self.auxiliary_weight
        return partial(_losses, rho=self.flatness_radius, beta=self.smoothness, weight=weight), {}

    def value_and_gradient(self, w: Tensor) -> tuple[Tensor, Tensor]:
        r""":math:`F_S` and its gradient, ``(..., d)`` to ``(...)`` and ``(..., d)``."""
        blocks, auxiliary = self.split(w)
        up, down, weight = blocks.clamp(min=0.0), blocks.clamp(max=0.0), self.auxiliary_weight**2
        squares = _squares(up, down, auxiliary, self._share, weight)
        value, slope = dead_zone(squares, self.flatness_radius, self.smoothness)
        pull = slope * self._weights
        pulled = up * (pull @ self._share)[..., None] + down * (pull @ (1.0 - self._share))[..., None]
        return (value * self._weights).sum(-1), self.join(pulled, weight * auxiliary * pull.sum(-1))

    def population_risk(self, w: Tensor | None = None, *, draws: int = 20_000, seed: int = 0) -> Risk:
        r""":math:`F(w)`, exact while few different columns are in use (2^20 combinations of signs)."""
        blocks, auxiliary = self.split(self._point(w).double())
        blocks = blocks / self._root.double()[:, None]
        return expectation(
            lambda squares: dead_zone(squares, self.flatness_radius, self.smoothness)[0],
            (self.auxiliary_weight * float(auxiliary)) ** 2, self.sample.sizes,
            blocks.clamp(min=0.0).square().sum(-1), blocks.clamp(max=0.0).square().sum(-1), draws=draws, seed=seed,
        )  # fmt: skip

    # ----- sharpness -------------------------------------------------------------------------------------------------

    def _seen(self, w: Tensor) -> Tensor | None:
        """What all examples see of points, ``(..., d)``: the part of largest rise. ``None`` where there is no closed form."""
        blocks, auxiliary = self.split(w)
        if bool((blocks * (self._sign == 0)[:, None] != 0).any()):
            return None
        sign = self._sign[:, None]
        seen = sign * (sign * blocks).clamp(min=0.0)
        if self.auxiliary_weight < 1.0:
            slots = (seen != 0) | ((blocks == 0) & (sign != 0))  # seen already, or free to be
            if bool((auxiliary != 0).any()) or not bool(slots.any(-1).any(-1).all()):
                return None
        return self.join(seen, auxiliary)

    def _exact_sharpness(self, w: Tensor, radius: float) -> tuple[float, Tensor] | None:
        seen = self._seen(w)
        if seen is None:
            return None
        size = float(length(seen))
        if size > 0:
            direction = radius * seen / size
        elif self.auxiliary_weight == 1.0:
            direction = radius * self.auxiliary_unit()
        else:
            direction = self._ties(w, radius, "uniform", 1, torch.Generator().manual_seed(0))
        reached = max(0.0, size + radius - self.flatness_radius)
        return 0.5 * self.smoothness * self.sample.counted * reached**2, direction

    def _exact_maximiser(
        self, w: Tensor, radius: float, tie_break: str, step: int, generator: torch.Generator
    ) -> Tensor:
        seen = self._seen(w)
        if seen is None:
            raise ValueError(
                "the largest rise has no closed form here: a column is in use that is not unanimous, or, with an auxiliary "
                "weight below 1, the auxiliary number is, or no slot of a unanimous column is free. Use tie_break='power'"
            )
        size = length(seen)[..., None]
        if bool((size > 0).all()):
            return radius * seen / size
        ties = self._ties(w, radius, tie_break, step, generator)
        return torch.where(size > 0, radius * seen / torch.where(size > 0, size, torch.ones_like(size)), ties)

    def _ties(self, w: Tensor, radius: float, tie_break: str, step: int, generator: torch.Generator) -> Tensor:
        """A maximiser where no example sees anything of ``w``: all of them are as long, on free entries of the right sign."""
        blocks = self.split(w)[0]
        if tie_break == "auxiliary":
            return radius * self.auxiliary_unit().expand_as(w)
        if tie_break == "adversarial":
            columns = [*self.sample.ones, *self.sample.zeros]
            if not columns:
                raise ValueError("no column of the sample is unanimous: there is nothing for an adversary to choose")
            if step > self.steps or bool((blocks[..., columns[0], step - 1] != 0).any()):
                raise ValueError(
                    f"slot {step} of the spurious block is not free: the adversary plays from w_1 = 0, T steps"
                )
            return radius * self._sign[columns[0]] * self.unit(columns[0], step).expand_as(w)
        drawn = torch.randn(w.shape, generator=generator, dtype=torch.float64).to(w)
        block, auxiliary = self.split(drawn)
        free = (blocks == 0) * self._sign[:, None] * block.abs()
        ties = self.join(free, auxiliary if self.auxiliary_weight == 1.0 else torch.zeros_like(auxiliary))
        return radius * ties / length(ties)[..., None]

    def _directions(self, w: Tensor) -> list[Tensor]:
        blocks, _ = self.split(w)
        found = [self.auxiliary_unit(), -self.auxiliary_unit()]
        for column in (*self.sample.ones[:1], *self.sample.zeros[:1]):
            free = (blocks[column] == 0).nonzero()[:1, 0].tolist()
            found += [self._sign[column] * self.unit(column, slot + 1) for slot in free]
        return found

    def _risk_bounds(self, w: Tensor, radius: float) -> list[float]:
        blocks, auxiliary = self.split(w)
        up, down = blocks.clamp(min=0.0), blocks.clamp(max=0.0)
        sizes = _squares(up, down, auxiliary, self._share, self.auxiliary_weight**2).sqrt()
        reached = 0.5 * self.smoothness * (sizes + radius - self.flatness_radius).clamp(min=0.0).square()
        return [float((reached * self._weights).sum())]


def _squares(up: Tensor, down: Tensor, auxiliary: Tensor, share: Tensor, weight: float) -> Tensor:
    seen = up.square().sum(-1) @ share.T + down.square().sum(-1) @ (1.0 - share).T
    return seen + weight * auxiliary.square()[..., None]


def _losses(blocks: Tensor, auxiliary: Tensor, share: Tensor, *, rho: float, beta: float, weight: float) -> Tensor:
    squares = _squares(blocks.clamp(min=0.0), blocks.clamp(max=0.0), auxiliary, share, weight**2)
    return dead_zone(squares, rho, beta)[0]
