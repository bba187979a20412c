r"""A flat empirical minimum that generalises at random, beside a sharp one that generalises perfectly (Theorem 1).

Schliserman, Vansover-Hager and Koren, "Flat Minima and Generalization: Insights from Stochastic Convex Optimization"
(arXiv:2511.03548).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from flatminima.problems.convex_base import length, positive
from flatminima.problems.convex_columns import ColumnProblem
from flatminima.problems.convex_risk import Certificate, Check, Risk, expectation
from flatminima.problems.convex_sample import Kind, Sample, event_probability


class FlatSharpERM(ColumnProblem):
    r"""The losses :math:`\tfrac\beta2 [q - \rho]_+^2`, :math:`q^2 = \sum_i z_i w_i^2 + w_a^2`, of fair bits :math:`z_i`.

    With probability at least one half some column :math:`I` is zero in all ``n`` examples. The empirical risk then does not
    depend on :math:`w_I`: the unit vector :math:`e_I` is a :math:`\rho`-flat minimum whose population risk is
    :math:`\tfrac14(1-\rho)^2` (the bit is one half of the time), and :math:`\rho e_a` is a minimum as sharp as smoothness
    permits whose population risk is zero. The origin is flat and good.

    Args:
        n: examples.
        flatness_radius: :math:`\rho`, at most 1/2. At 0 the two minima are equally sharp and there is no contrast.
        smoothness: :math:`\beta`.
        sample: one of ``n`` examples, or the representation of the canonical one.
        dtype: of points and losses.

    Raises:
        ValueError: a value out of range, a sample of another size, too many columns to hold.

    Example:
        >>> f = FlatSharpERM(6, flatness_radius=0.25)
        >>> flat, sharp = f.minimisers["flat"], f.minimisers["sharp"]
        >>> f.empirical_risk(flat), f.sharpness(0.25, flat).upper, f.population_risk(flat).value
        (0.0, 0.0, 0.140625)
        >>> f.empirical_risk(sharp), f.sharpness(0.25, sharp).lower, f.population_risk(sharp).value
        (0.0, 0.03125, 0.0)
    """

    tie_breaks = ("auxiliary", "uniform", "power")

    def __init__(
        self,
        n: int,
        flatness_radius: float = 0.25,
        *,
        smoothness: float = 1.0,
        sample: Sample | Kind = "dense",
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.flatness_radius = positive("flatness_radius", flatness_radius, zero=True)
        if self.flatness_radius > 0.5:
            raise ValueError(f"flatness_radius must be at most 1/2, got {flatness_radius}")
        self.smoothness = self.lipschitz = positive("smoothness", smoothness)
        self.largest_loss = 0.5 * self.smoothness * (1.0 - self.flatness_radius) ** 2
        super().__init__(n, 1, sample, dtype)
        self._arguments = {"flatness_radius": self.flatness_radius, "smoothness": self.smoothness}

    @property
    def minimisers(self) -> dict[str, Tensor]:
        r"""``"flat"``: :math:`e_I`, where the sample has a column of zeros; ``"sharp"``: :math:`\rho e_a`; ``"origin"``."""
        found = {"sharp": self.flatness_radius * self.auxiliary_unit(), "origin": torch.zeros_like(self.start)}
        return {"flat": self.unit(self.sample.zeros[0]), **found} if self.sample.zeros else found

    @property
    def event_probability(self) -> float:
        """That an i.i.d. sample has a column of zeros."""
        return event_probability(self.n, "some")

    def certify(self) -> Certificate:
        """Whether the theorem speaks of this sample."""
        return Certificate((Check("a column of zeros", bool(self.sample.zeros), len(self.sample.zeros), 1),))

    # ----- the loss --------------------------------------------------------------------------------------------------

    def _loss(self) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
        return partial(_losses, rho=self.flatness_radius, beta=self.smoothness), {}

    def value_and_gradient(self, w: Tensor) -> tuple[Tensor, Tensor]:
        r""":math:`F_S` and its gradient, ``(..., d)`` to ``(...)`` and ``(..., d)``."""
        blocks, auxiliary = self.split(w)
        squares = blocks[..., 0].square() @ self._share.T + auxiliary.square()[..., None]
        value, slope = dead_zone(squares, self.flatness_radius, self.smoothness)
        pull = slope * self._weights
        gradient = self.join(blocks * (pull @ self._share)[..., None], auxiliary * pull.sum(-1))
        return (value * self._weights).sum(-1), gradient

    def population_risk(self, w: Tensor | None = None, *, draws: int = 20_000, seed: int = 0) -> Risk:
        r""":math:`F(w)`, exact while few different columns are in use (2^20 combinations of bits)."""
        blocks, auxiliary = self.split(self._point(w).double())
        on = (blocks[:, 0] / self._root).square()
        return expectation(
            lambda squares: dead_zone(squares, self.flatness_radius, self.smoothness)[0],
            float(auxiliary) ** 2, self.sample.sizes, on, torch.zeros_like(on), draws=draws, seed=seed,
        )  # fmt: skip

    # ----- sharpness -------------------------------------------------------------------------------------------------

    def _unanimous(self, w: Tensor) -> Tensor | None:
        """The part of a point that every example sees alike, ``(..., d)``; ``None`` where other columns are in use too."""
        seen, hidden = torch.zeros(2, len(self.sample), dtype=self.dtype)
        seen[list(self.sample.ones)] = 1.0
        hidden[list(self.sample.zeros)] = 1.0
        blocks, auxiliary = self.split(w)
        if self.sample.kind != "spurious" and bool((blocks * (1.0 - seen - hidden)[:, None] != 0).any()):
            return None
        return self.join(blocks * seen[:, None], auxiliary)

    def _exact_sharpness(self, w: Tensor, radius: float) -> tuple[float, Tensor] | None:
        seen = self._unanimous(w)
        if seen is None:
            return None
        size = length(seen)
        direction = radius * seen / size if size > 0 else radius * self.auxiliary_unit()
        reached = max(0.0, float(size) + radius - self.flatness_radius)
        return 0.5 * self.smoothness * self.sample.counted * reached**2, direction

    def _exact_maximiser(
        self, w: Tensor, radius: float, tie_break: str, step: int, generator: torch.Generator
    ) -> Tensor:
        seen = self._unanimous(w)
        if seen is None:
            raise ValueError(
                "the largest rise has no closed form where a column is in use that is not unanimous: use 'power'"
            )
        size = length(seen)[..., None]
        ties = self.auxiliary_unit().expand_as(w).clone()
        if tie_break == "uniform":
            free = self.join(torch.zeros_like(self.split(ties)[0]), ties[..., -1])
            for column in self.sample.ones:
                free = free + self.unit(column)
            ties = free * torch.randn(w.shape, generator=generator, dtype=torch.float64).to(w)
            ties = ties / length(ties)[..., None]
        return radius * torch.where(size > 0, seen / torch.where(size > 0, size, torch.ones_like(size)), ties)

    def _directions(self, w: Tensor) -> list[Tensor]:
        return [self.auxiliary_unit(), -self.auxiliary_unit(), *(self.unit(column) for column in self.sample.ones)]

    def _risk_bounds(self, w: Tensor, radius: float) -> list[float]:
        blocks, auxiliary = self.split(w)
        sizes = (blocks[:, 0].square() @ self._share.T + auxiliary.square()).sqrt()
        reached = 0.5 * self.smoothness * (sizes + radius - self.flatness_radius).clamp(min=0.0).square()
        return [float((reached * self._weights).sum())]


def dead_zone(squares: Tensor, rho: float, beta: float) -> tuple[Tensor, Tensor]:
    r""":math:`\tfrac\beta2 [q-\rho]_+^2` and its slope over :math:`q`, :math:`\beta [q-\rho]_+ / q`, elementwise.

    Differentiable also at zero: what lies in the dead zone never meets the square root.

    Example:
        >>> value, slope = dead_zone(torch.tensor([0.0, 4.0]), 1.0, 1.0)
        >>> value.tolist(), slope.tolist()
        ([0.0, 0.5], [0.0, 0.5])
    """
    if rho == 0.0:
        return 0.5 * beta * squares, beta * torch.ones_like(squares)
    outside = squares > rho * rho
    size = torch.where(outside, squares, torch.ones_like(squares)).sqrt()
    over = torch.where(outside, (size - rho).clamp(min=0.0), torch.zeros_like(size))
    return 0.5 * beta * over.square(), beta * over / size


def _losses(blocks: Tensor, auxiliary: Tensor, share: Tensor, *, rho: float, beta: float) -> Tensor:
    squares = blocks[..., 0].square() @ share.T + auxiliary.square()[..., None]
    return dead_zone(squares, rho, beta)[0]
