r"""Benign convex problems with a dead zone: where flatness does no harm, and the upper bounds are tested.

Not from the paper; the losses are convex, non-negative and smooth with one common flat minimiser, as its upper bounds ask.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from scipy.special import betainc
from torch import Tensor, nn

from flatminima.problems.convex_base import ConvexProblem, LossModel, check_count, check_dtype, finite, positive
from flatminima.problems.convex_risk import Risk


class DeadZoneRegression(ConvexProblem):
    r"""The losses :math:`\tfrac\beta2 [\,|\langle x, w - w^\circ\rangle| - \rho\,]_+^2`, :math:`x` uniform on the unit sphere.

    All of them vanish within :math:`\rho` of :math:`w^\circ = e_1`; :math:`w_1 = 0`. Several samples can be held at once.

    Args:
        n: examples.
        d: parameters, at least 2.
        flatness_radius: :math:`\rho`.
        smoothness: :math:`\beta`.
        seed: of the sample.
        samples: independent samples, as one more dimension of all points, :attr:`start` among them: ``(samples, d)``. They run
            at once; what is about one sample (the sharpness, the objective) is refused.
        dtype: of points and losses.

    Raises:
        ValueError: a value out of range.

    Example:
        >>> f = DeadZoneRegression(20, 40, flatness_radius=0.05)
        >>> f.population_risk(f.minimisers["flat"]).value, round(f.population_risk().value, 6)
        (0.0, 0.0073)
    """

    tie_breaks = ("power",)

    def __init__(
        self,
        n: int,
        d: int = 40,
        flatness_radius: float = 0.0,
        *,
        smoothness: float = 1.0,
        seed: int = 0,
        samples: int | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.n, self.d, dtype = check_count("n", n), check_count("d", d, 2), check_dtype(dtype)
        several = () if samples is None else (check_count("samples", samples),)
        self.flatness_radius = positive("flatness_radius", flatness_radius, zero=True)
        self.smoothness = positive("smoothness", smoothness)
        self.lipschitz = self.smoothness * max(0.0, 2.0 - self.flatness_radius)
        self.largest_loss = 0.5 * self.smoothness * max(0.0, 2.0 - self.flatness_radius) ** 2
        self.start = torch.zeros(*several, self.d, dtype=dtype)
        self.x = self._drawn((*several, self.n), seed)
        self.weights = torch.full((self.n,), 1.0 / self.n, dtype=dtype)
        self._many = False  # several points for each sample
        self.centre = torch.zeros(self.d, dtype=dtype)
        self.centre[0] = 1.0

    def _drawn(self, shape: tuple[int, ...], seed: int) -> Tensor:
        x = torch.randn((*shape, self.d), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        unit: Tensor = x / x.norm(dim=-1, keepdim=True)
        return unit.to(self.start)

    def leave_one_out(self) -> DeadZoneRegression:
        """The same samples as they are and with each example's loss zero: points ``(samples, n + 1, d)``, first all of them."""
        twin = DeadZoneRegression(
            self.n, self.d, self.flatness_radius, smoothness=self.smoothness, dtype=self.start.dtype
        )
        twin.x, twin._many = self.x, True
        twin.start = self.start[..., None, :].repeat_interleave(self.n + 1, -2)
        keep = torch.cat([torch.ones(1, self.n), 1.0 - torch.eye(self.n)]).to(self.start)
        twin.weights = keep / self.n
        return twin

    def _point(self, w: Tensor | None) -> Tensor:
        if self.start.dim() > 1:
            raise ValueError(
                "several samples at once have no single risk and are no single data set: build the problem without samples=, "
                "or use value_and_gradient and population_risks"
            )
        return super()._point(w)

    @property
    def minimisers(self) -> dict[str, Tensor]:
        r"""``"flat"``: :math:`w^\circ`."""
        return {"flat": self.centre.clone()}

    def losses(self, w: Tensor) -> Tensor:
        """The loss of every example, ``(..., d)`` to ``(..., n)``."""
        return 0.5 * self.smoothness * self._over(w)[0].square()

    def _over(self, w: Tensor) -> tuple[Tensor, Tensor]:
        along = self._times(w - self.centre, self.x.mT)
        return (along.abs() - self.flatness_radius).clamp(min=0.0), along.sign()

    def value_and_gradient(self, w: Tensor) -> tuple[Tensor, Tensor]:
        r""":math:`F_S` and its gradient, ``(..., d)`` to ``(...)`` and ``(..., d)``."""
        over, sign = self._over(w)
        pull = self.smoothness * over * sign * self.weights
        value = 0.5 * self.smoothness * (over.square() * self.weights).sum(-1)
        return value, self._times(pull, self.x)

    def _times(self, rows: Tensor, matrix: Tensor) -> Tensor:
        if matrix.dim() == 2 or self._many:
            return rows @ matrix
        return (rows[..., None, :] @ matrix)[..., 0, :]

    def population_risk(self, w: Tensor | None = None, *, draws: int = 20_000, seed: int = 0) -> Risk:
        r""":math:`F(w)` in closed form: of :math:`s = \langle x, u\rangle`, the square is Beta(1/2, (d-1)/2) distributed."""
        first = self.start.reshape(-1, self.d)[0]  # of whatever sample: all start alike
        return Risk(float(self.population_risks(super()._point(first if w is None else w))))

    def population_risks(self, w: Tensor) -> Tensor:
        """:meth:`population_risk` of many points, ``(..., d)`` to ``(...)``."""
        size = (w - self.centre).double().norm(dim=-1)
        rho, rest = self.flatness_radius, (self.d - 1) / 2
        edge = (rho / size.clamp(min=1e-300)).clamp(max=1.0).square().numpy()

        def moment(k: int) -> Tensor:
            """The mean of |s|^k over |s| > rho / size."""
            whole = math.exp(
                math.lgamma((k + 1) / 2) - math.lgamma(0.5) + math.lgamma(self.d / 2) - math.lgamma((k + self.d) / 2)
            )
            return whole * (1.0 - torch.as_tensor(betainc((k + 1) / 2, rest, edge)))

        square: Tensor = size.square() * moment(2) - 2 * rho * size * moment(1) + rho**2 * moment(0)
        return 0.5 * self.smoothness * square.clamp(min=0.0)  # the terms cancel at the edge of the dead zone

    def model(self, w: Tensor | None = None) -> nn.Module:
        """A module with the parameter ``w`` ``(d,)``."""
        loss = partial(_losses, rho=self.flatness_radius, beta=self.smoothness)
        return LossModel(loss, {"w": self._point(w)}, {"centre": self.centre})

    def data(self) -> tuple[Tensor, Tensor]:
        """The examples ``(n, d)`` and empty targets."""
        self._point(None)
        return self.x.clone(), self.x.new_zeros(self.n)

    def fresh(self, rows: int, seed: int) -> tuple[Tensor, Tensor]:
        """New examples ``(rows, d)`` and empty targets."""
        return self._drawn((check_count("rows", rows),), seed), self.x.new_zeros(rows)


class RadialDeadZone(ConvexProblem):
    r"""The loss :math:`\tfrac\beta2 [\,|w| - \rho\,]_+^2` in one dimension, the same for every example.

    SA-GD, :math:`v = r\,\mathrm{sign}\,w`, goes to an ``r``-flat point where :math:`r \le \rho`, and else to a cycle of
    two points of size :math:`\eta\beta(r-\rho)/(2-\eta\beta)`.

    Args:
        flatness_radius: :math:`\rho`.
        start: :math:`w_1`.
        smoothness: :math:`\beta`.

    Example:
        >>> round(RadialDeadZone(0.1).amplitude(lr=0.25, radius=0.3), 9)
        0.028571429
    """

    n = d = 1
    tie_breaks = ("plus", "minus", "power")

    def __init__(self, flatness_radius: float, *, start: float = 0.9, smoothness: float = 1.0) -> None:
        self.flatness_radius = positive("flatness_radius", flatness_radius, zero=True)
        self.smoothness = self.lipschitz = positive("smoothness", smoothness)
        self.largest_loss = 0.5 * self.smoothness * max(0.0, 1.0 - self.flatness_radius) ** 2
        self.start = torch.tensor([finite("start", start)], dtype=torch.float64)

    def amplitude(self, *, lr: float, radius: float) -> float:
        r"""Where :math:`|w_t|` of SA-GD goes: :math:`\rho - r`, unless it starts below, or the size of the cycle.

        Raises:
            ValueError: :math:`\eta\beta \ge 2`, or above 1 where :math:`r \le \rho`.
        """
        step = positive("lr", lr) * self.smoothness
        excess = positive("radius", radius, zero=True) - self.flatness_radius
        if step >= 2.0:
            raise ValueError(f"lr smoothness must be below 2, got {step:g}: SA-GD does not settle with such steps")
        if excess > 0.0:
            return step * excess / (2.0 - step)
        if step > 1.0:
            raise ValueError(
                f"lr smoothness must be at most 1 where r <= rho, got {step:g}: where in the flat region a longer step lands "
                "depends on the start; run sagd"
            )
        return min(abs(float(self.start)), -excess)

    @property
    def minimisers(self) -> dict[str, Tensor]:
        """``"flat"``: 0."""
        return {"flat": torch.zeros_like(self.start)}

    def losses(self, w: Tensor) -> Tensor:
        """The loss, ``(..., 1)`` to ``(..., 1)``."""
        return 0.5 * self.smoothness * (w.abs() - self.flatness_radius).clamp(min=0.0).square()

    def value_and_gradient(self, w: Tensor) -> tuple[Tensor, Tensor]:
        r""":math:`F_S` and its gradient, ``(..., 1)`` to ``(...)`` and ``(..., 1)``."""
        over = (w.abs() - self.flatness_radius).clamp(min=0.0)
        return self.losses(w)[..., 0], self.smoothness * over * w.sign()

    def population_risk(self, w: Tensor | None = None, *, draws: int = 20_000, seed: int = 0) -> Risk:
        """The loss itself: there is nothing random in it."""
        return Risk(self.empirical_risk(w))

    def _exact_sharpness(self, w: Tensor, radius: float) -> tuple[float, Tensor] | None:
        reached = max(0.0, abs(float(w)) + radius - self.flatness_radius)
        return 0.5 * self.smoothness * reached**2, radius * torch.where(w < 0, -1.0, 1.0).to(w)

    def _exact_maximiser(
        self, w: Tensor, radius: float, tie_break: str, step: int, generator: torch.Generator
    ) -> Tensor:
        tie = 1.0 if tie_break == "plus" else -1.0
        return radius * torch.where(w == 0, torch.full_like(w, tie), w.sign())

    def model(self, w: Tensor | None = None) -> nn.Module:
        """A module with the parameter ``w`` ``(1,)``."""
        return LossModel(partial(_radial, rho=self.flatness_radius, beta=self.smoothness), {"w": self._point(w)})

    def data(self) -> tuple[Tensor, Tensor]:
        """One row, which the loss does not look at."""
        return self.fresh(1, 0)

    def fresh(self, rows: int, seed: int) -> tuple[Tensor, Tensor]:
        """So many rows, which the loss does not look at."""
        return self.start.new_zeros(check_count("rows", rows), 1), self.start.new_zeros(rows)


def _losses(w: Tensor, x: Tensor, centre: Tensor, *, rho: float, beta: float) -> Tensor:
    return 0.5 * beta * ((x @ (w - centre)).abs() - rho).clamp(min=0.0).square()


def _radial(w: Tensor, x: Tensor, *, rho: float, beta: float) -> Tensor:
    return (0.5 * beta * (w.abs() - rho).clamp(min=0.0).square()).expand(len(x))
