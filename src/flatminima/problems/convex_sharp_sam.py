r"""One dimension in which SAM ends at the sharpest minimum although a flat one is near (Theorem 6).

Schliserman, Vansover-Hager and Koren, "Flat Minima and Generalization: Insights from Stochastic Convex Optimization"
(arXiv:2511.03548).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from flatminima.problems.convex_base import ConvexProblem, LossModel, check_count, check_dtype, finite, positive
from flatminima.problems.convex_risk import Certificate, Check, Risk


class SharpSAM1D(ConvexProblem):
    r"""The loss :math:`\tfrac\beta2 [w]_+^2` on :math:`[-1, 1]`, the same for every example.

    Every :math:`w \le 0` is a minimum; -1/2 is 1/2-flat and 0 as sharp as smoothness permits. SAM from :math:`w_1 = 0` meets
    a zero gradient and never moves, so that its sharpness-aware risk stays :math:`\tfrac\beta2 r^2` above the least one. It
    does not hinge on the zero (our version): from :math:`w_1 > 0` it makes steps
    :math:`w \leftarrow (1 - \eta\beta) w - \eta\beta r` until it is at or below zero, freezes there, and ends at least
    :math:`\tfrac\beta2 (1-\eta\beta)^2 r^2` above. SA-GD goes on to the flat point.

    Args:
        start: :math:`w_1` in [-1, 1].
        smoothness: :math:`\beta`.
        dtype: of points and losses.

    Raises:
        ValueError: a value out of range.

    Example:
        >>> f = SharpSAM1D()
        >>> [f.sharpness(0.4, w).lower for w in (f.minimisers["flat"], f.minimisers["sharp"])]
        [0.0, 0.08000000000000002]
    """

    n = d = 1
    tie_breaks = ("unique", "power")
    flatness_radius = 0.5
    event_probability = 1.0

    def __init__(self, start: float = 0.0, *, smoothness: float = 1.0, dtype: torch.dtype = torch.float64) -> None:
        start = finite("start", start)
        if not -1.0 <= start <= 1.0:
            raise ValueError(f"start must be in [-1, 1], got {start}")
        self.smoothness = self.lipschitz = positive("smoothness", smoothness)
        self.largest_loss = 0.5 * self.smoothness
        self.start = torch.tensor([start], dtype=check_dtype(dtype))

    @property
    def minimisers(self) -> dict[str, Tensor]:
        """``"flat"``: -1/2; ``"sharp"``: 0."""
        return {"flat": torch.full_like(self.start, -0.5), "sharp": torch.zeros_like(self.start)}

    def certify(self, radius: float) -> Certificate:
        """Whether the theorem speaks of SAM with this radius from this start."""
        radius = positive("radius", radius, zero=True)
        return Certificate(
            (
                Check("w_1 = 0", float(self.start) == 0.0, float(self.start), 0.0, True),
                Check("r <= 1/2", radius <= 0.5, radius, 0.5, True),
            )
        )

    def floor(self, *, lr: float, radius: float) -> float:
        r""":math:`\tfrac\beta2 (1-\eta\beta)^2 r^2`: what SAM's last iterate exceeds the least sharpness-aware risk by, for
        :math:`\eta\beta < 1` and any start above zero (ours)."""
        left = max(0.0, 1.0 - positive("lr", lr) * self.smoothness)
        return 0.5 * self.smoothness * left**2 * positive("radius", radius, zero=True) ** 2

    def losses(self, w: Tensor) -> Tensor:
        """The loss, ``(..., 1)`` to ``(..., 1)``."""
        return 0.5 * self.smoothness * w.clamp(min=0.0).square()

    def value_and_gradient(self, w: Tensor) -> tuple[Tensor, Tensor]:
        r""":math:`F_S` and its gradient, ``(..., 1)`` to ``(...)`` and ``(..., 1)``."""
        return self.losses(w)[..., 0], self.smoothness * w.clamp(min=0.0)

    def population_risk(self, w: Tensor | None = None, *, draws: int = 20_000, seed: int = 0) -> Risk:
        """The loss itself: there is nothing random in it."""
        return Risk(self.empirical_risk(w))

    def _exact_sharpness(self, w: Tensor, radius: float) -> tuple[float, Tensor] | None:
        return 0.5 * self.smoothness * max(0.0, float(w) + radius) ** 2, torch.full_like(w, radius)

    def _exact_maximiser(
        self, w: Tensor, radius: float, tie_break: str, step: int, generator: torch.Generator
    ) -> Tensor:
        return torch.full_like(w, radius)

    def model(self, w: Tensor | None = None) -> nn.Module:
        """A module with the parameter ``w`` ``(1,)``."""
        return LossModel(partial(_losses, beta=self.smoothness), {"w": self._point(w)})

    def data(self) -> tuple[Tensor, Tensor]:
        """One row, which the loss does not look at."""
        return self.fresh(1, 0)

    def fresh(self, rows: int, seed: int) -> tuple[Tensor, Tensor]:
        """So many rows, which the loss does not look at."""
        return self.start.new_zeros(check_count("rows", rows), 1), self.start.new_zeros(rows)


def _losses(w: Tensor, x: Tensor, *, beta: float) -> Tensor:
    return (0.5 * beta * w.clamp(min=0.0).square()).expand(len(x))
