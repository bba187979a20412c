"""What the convex problems share: risks, sharpness by power iteration, and the way into an ordinary objective."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

from flatminima.names import unknown
from flatminima.objective import Objective
from flatminima.problems.convex_risk import Risk, Sharpness

_HUGE = 1e150
_RISE = 1e-13  # relative rise of the loss below which an ascent has arrived


def length(vectors: Tensor) -> Tensor:
    """Euclidean norms over the last dimension, ``(..., d)`` to ``(...)``, without the overflow of squares.

    Example:
        >>> length(torch.tensor([3e-200, 4e-200], dtype=torch.float64)).item()
        5e-200
    """
    largest = vectors.abs().amax(-1)
    scale = torch.where((largest > 0) & largest.isfinite(), largest, torch.ones_like(largest))
    found: Tensor = scale * torch.linalg.vector_norm(vectors / scale[..., None], dim=-1)
    return found


def mean_loss(output: Tensor, target: Tensor) -> Tensor:
    """The mean of the losses that the models of the convex problems put out; the target is not looked at."""
    return output.mean()


class LossModel(nn.Module):
    """A module whose output are losses: ``loss(*parameters, x, **constants)``.

    Args:
        loss: must be differentiable in the parameters, and picklable.
        parameters: copied, and trained.
        constants: copied, as buffers.
    """

    def __init__(
        self, loss: Callable[..., Tensor], parameters: dict[str, Tensor], constants: dict[str, Tensor] | None = None
    ) -> None:
        super().__init__()
        self._loss, self._constants = loss, tuple(constants or {})
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value.clone()))
        for name, value in (constants or {}).items():
            self.register_buffer(name, value.clone())

    def forward(self, x: Tensor) -> Tensor:
        """The losses of the examples in ``x``, ``(rows,)``."""
        return self._loss(*self.parameters(), x, **{name: getattr(self, name) for name in self._constants})


class ConvexProblem(ABC):
    r"""A convex learning problem: losses :math:`f(w, z) \ge 0`, a distribution of :math:`z`, a sample :math:`S` of it.

    Points are flat vectors ``(d,)``; methods that say ``(..., d)`` take any number of points at once. Where a point may be
    left out, :attr:`start` is meant.

    Attributes:
        n: examples in the sample.
        d: parameters.
        start: :math:`w_1` of the theorem, ``(d,)``.
        smoothness: :math:`\beta`, the Lipschitz constant of every gradient.
        lipschitz: the Lipschitz constant of every loss on the unit ball.
        flatness_radius: :math:`\rho`, the radius of a ball in which every loss is zero.
        largest_loss: of any example in the unit ball: a bound on a risk from there on says nothing.
        tie_breaks: the rules by which :meth:`maximiser` chooses.
    """

    n: int
    d: int
    start: Tensor
    smoothness: float
    lipschitz: float
    flatness_radius: float
    largest_loss: float
    tie_breaks: tuple[str, ...]

    @abstractmethod
    def losses(self, w: Tensor) -> Tensor:
        """The loss of every example of the sample, ``(..., d)`` to ``(..., rows)``."""

    @abstractmethod
    def value_and_gradient(self, w: Tensor) -> tuple[Tensor, Tensor]:
        r""":math:`F_S` and its gradient in closed form, ``(..., d)`` to ``(...)`` and ``(..., d)``. Cost: 1 gradient."""

    @abstractmethod
    def population_risk(self, w: Tensor | None = None, *, draws: int = 20_000, seed: int = 0) -> Risk:
        r""":math:`F(w) = E_z f(w, z)`, exact where there is a closed form, else over ``draws`` fresh examples."""

    @property
    @abstractmethod
    def minimisers(self) -> dict[str, Tensor]:
        """Minimisers of the empirical risk by name, each ``(d,)``."""

    @abstractmethod
    def model(self, w: Tensor | None = None) -> nn.Module:
        """A module whose output on the inputs of :meth:`data` are the losses of the examples, its parameters at ``w``."""

    @abstractmethod
    def data(self) -> tuple[Tensor, Tensor]:
        """Inputs and (empty) targets, one row an example."""

    @abstractmethod
    def fresh(self, rows: int, seed: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of so many new examples, for the model: validation data."""

    def maximiser(
        self,
        w: Tensor,
        radius: float,
        tie_break: str,
        step: int,
        generator: torch.Generator,
        iterations: int = 400,
    ) -> Tensor:
        r"""A maximiser :math:`v` of :math:`F_S(w + v)` over :math:`\lVert v\rVert \le r`, ``(..., d)``.

        Args:
            w: ``(..., d)``.
            radius: :math:`r`.
            tie_break: which, where there are several: one of :attr:`tie_breaks`. ``"power"``: whatever power iteration
                finds from random starts, a maximiser only up to its own accuracy.
            step: of the run, from 1.
            generator: for the rules that draw.
            iterations: of ``"power"``, at most.
        """
        radius = positive("radius", radius, zero=True)
        if tie_break not in self.tie_breaks:
            raise ValueError(unknown(f"tie-breaking rule of {type(self).__name__}", tie_break, self.tie_breaks))
        if tie_break == "power":
            return self._ascend(w, radius, self._random_starts(w, radius, 6, generator), iterations)
        return self._exact_maximiser(w, radius, tie_break, step, generator)

    def _exact_maximiser(
        self, w: Tensor, radius: float, tie_break: str, step: int, generator: torch.Generator
    ) -> Tensor:
        raise NotImplementedError  # pragma: no cover - a problem without closed form has the rule "power" alone

    # ----- risks -----------------------------------------------------------------------------------------------------

    def empirical_risk(self, w: Tensor | None = None) -> float:
        r""":math:`F_S(w)`, the mean loss over the sample."""
        return float(self.value_and_gradient(self._point(w))[0])

    def gradient(self, w: Tensor | None = None) -> Tensor:
        r""":math:`\nabla F_S(w)`, ``(d,)``."""
        return self.value_and_gradient(self._point(w))[1]

    def _point(self, w: Tensor | None) -> Tensor:
        if w is None:
            return self.start
        if real_tensor("the point", w).shape != (self.d,):
            raise ValueError(f"expected a point of shape ({self.d},), got a tensor of shape {tuple(w.shape)}")
        if not bool(w.isfinite().all()):
            raise ValueError("the point has entries that are NaN or infinite")
        return w.detach().to(self.start)

    # ----- sharpness -------------------------------------------------------------------------------------------------

    def sharpness(
        self,
        radius: float,
        w: Tensor | None = None,
        *,
        closed_form: bool = True,
        starts: int = 8,
        seed: int = 0,
    ) -> Sharpness:
        r"""The sharpness :math:`\max_{\lVert v\rVert\le r} F_S(w + v) - F_S(w)`, exact or between two bounds.

        Without a closed form the lower bound is the best of power iterations :math:`v \leftarrow r\,g/\lVert g\rVert`,
        :math:`g = \nabla F_S(w + v)`, which for a convex loss never descend, from named directions and ``starts`` random ones;
        the upper bound is the least of those the problem knows, among them
        :math:`r\lVert\nabla F_S(w)\rVert + \tfrac12\beta r^2`.

        Args:
            radius: :math:`r`, not negative.
            w: the point, ``(d,)``.
            closed_form: ``False`` searches also where there is one.
            starts, seed: of the random directions.
        """
        radius, starts = positive("radius", radius, zero=True), check_count("starts", starts, 0)
        w = self._point(w)
        value, gradient = self.value_and_gradient(w)
        closed = self._exact_sharpness(w, radius) if closed_form else None
        if closed is not None:
            risk, direction = closed
            rise = max(0.0, risk - float(value))
            return Sharpness(rise, rise, direction, True)
        generator = torch.Generator().manual_seed(seed)
        named = [gradient, w, -w, *self._directions(w)]
        sizes = length(torch.stack(named))
        first = [radius * v / size for v, size in zip(named, sizes, strict=True) if size > 0]
        drawn = self._random_starts(w, radius, starts, generator)
        best = self._ascend(w, radius, torch.stack([*first, *drawn, torch.zeros_like(w)]))
        lower = float(self.value_and_gradient(w + best)[0] - value)
        smooth = radius * float(length(gradient)) + 0.5 * self._curvature() * radius**2
        upper = min([smooth, *(risk - float(value) for risk in self._risk_bounds(w, radius))])
        if lower <= 0.0:
            lower, best = 0.0, torch.zeros_like(best)
        return Sharpness(lower, max(lower, upper), best, False)

    def _exact_sharpness(self, w: Tensor, radius: float) -> tuple[float, Tensor] | None:
        """The largest risk in the ball and where it is, if a closed form applies."""
        return None

    def _directions(self, w: Tensor) -> list[Tensor]:
        """Directions in which a random search does not look."""
        return []

    def _risk_bounds(self, w: Tensor, radius: float) -> list[float]:
        """Upper bounds on the risk in the ball."""
        return []

    def _curvature(self) -> float:
        """An upper bound on the curvature, at most :attr:`smoothness`."""
        return self.smoothness

    def _random_starts(self, w: Tensor, radius: float, count: int, generator: torch.Generator) -> Tensor:
        drawn = torch.randn((count, *w.shape), generator=generator, dtype=torch.float64).to(w)
        return drawn * (radius / length(drawn))[..., None]

    def _ascend(self, w: Tensor, radius: float, v: Tensor, iterations: int = 400) -> Tensor:
        """The best of several ascents, ``(starts, ..., d)`` to ``(..., d)``."""
        before = torch.full(v.shape[:-1], -math.inf, dtype=v.dtype)
        value = before
        for _ in range(iterations):
            value, gradient = self.value_and_gradient(w + v)
            if not bool((value - before > _RISE * value).any()):
                break
            size = length(gradient)
            moves = size > 0
            step = gradient * (radius / torch.where(moves, size, torch.ones_like(size)))[..., None]
            v, before = torch.where(moves[..., None], step, v), value
        best = value.argmax(0)
        return v.gather(0, best[None, ..., None].expand(1, *v.shape[1:]))[0]

    # ----- as an objective -------------------------------------------------------------------------------------------

    def objective(self, w: Tensor | None = None, **options: Any) -> Objective:
        """The empirical risk as an :class:`~flatminima.objective.Objective`, its parameters at ``w``.

        Args:
            w: ``(d,)``; the flat vector of the objective has the same layout.
            options: of the objective.
        """
        return Objective(self.model(w), mean_loss, self.data(), **options)


def check_count(name: str, value: int, least: int = 1) -> int:
    """``value`` as Python's integer, also NumPy's; refused where it is no integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
    return int(value)


def check_dtype(dtype: torch.dtype) -> torch.dtype:
    """``dtype``, refused where it is no floating one."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating one of torch, got {dtype!r}")
    return dtype


def real_tensor(name: str, value: Tensor) -> Tensor:
    """``value``, refused where it is no tensor of real numbers."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor, got a {type(value).__name__}: convert it with torch.as_tensor")
    if value.is_complex():
        raise ValueError(f"{name} must be real, got {value.dtype}")
    return value


def finite(name: str, value: float) -> float:
    """``value`` as a double, refused where it is no finite number."""
    if not _is_finite(value):
        raise ValueError(f"{name} must be finite, got {value!r}")
    return float(value)


def positive(name: str, value: float, *, zero: bool = False) -> float:
    """``value`` as a double, refused where it is no positive finite number."""
    if not _is_finite(value) or value < 0 or (value == 0 and not zero):
        raise ValueError(f"{name} must be finite and {'>= 0' if zero else '> 0'}, got {value!r}")
    value = float(value)
    if value > _HUGE:
        raise ValueError(f"{name} = {value:g} has a square that is no number; it must be at most {_HUGE:g}")
    return value


def _is_finite(value: float) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
