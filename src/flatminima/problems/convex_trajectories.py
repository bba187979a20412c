r"""Gradient descent, SAM and SA-GD as the theory defines them: full batch, no momentum, no projection, no epsilon.

``steps`` counts the iterates :math:`w_1, \ldots, w_T`, so ``steps - 1`` updates are made; the perturbation at :math:`w_T` is
evaluated as well, because the bounds speak of :math:`F_S(w_t + v_t)` for every *t*. All updates are
:math:`w_{t+1} = w_t - \eta\,\nabla F_S(w_t + v_t)`. The optimisers of this library run on the same problems through
:meth:`~flatminima.problems.convex_base.ConvexProblem.objective`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flatminima.problems.convex_base import ConvexProblem, check_count, length, positive, real_tensor

#: A rule of one's own for SA-GD: ``(w, radius, step) -> v``.
Oracle = Callable[[Tensor, float, int], Tensor]


class EpsilonWarning(UserWarning):
    """An epsilon in the denominator has changed what SAM does."""


@dataclass(frozen=True)
class Trajectory:
    r"""A run :math:`w_1, \ldots, w_T`. Only the coordinates that ever moved are kept, step by step.

    Attributes:
        start: :math:`w_1`, ``(..., d)``.
        moved: the coordinates that moved, ``(m,)``, in the order in which they did.
        values: of those coordinates, ``(T, ..., m)``.
        risks: :math:`F_S(w_t)`, ``(T, ...)``.
        perturbed_risks: :math:`F_S(w_t + v_t)`, ``(T, ...)``.
        gradient_norms: :math:`\lVert\nabla F_S(w_t + v_t)\rVert`, ``(T, ...)``.
    """

    start: Tensor = field(repr=False)
    moved: Tensor = field(repr=False)
    values: Tensor = field(repr=False)
    risks: Tensor = field(repr=False)
    perturbed_risks: Tensor = field(repr=False)
    gradient_norms: Tensor = field(repr=False)

    @property
    def steps(self) -> int:
        """:math:`T`, the number of iterates."""
        return len(self.values)

    @property
    def last(self) -> Tensor:
        """:math:`w_T`, ``(..., d)``."""
        return self.iterate(self.steps)

    def iterate(self, t: int) -> Tensor:
        """:math:`w_t`, ``(..., d)``, t from 1."""
        if not 1 <= t <= self.steps:
            raise ValueError(f"t must be one of 1 ... {self.steps}, got {t}")
        return self._whole(self.values[t - 1])

    def suffix_average(self, tau: int, until: int | None = None) -> Tensor:
        r""":math:`\hat w_\tau`, the mean of the iterates ``tau`` ... ``until`` (by default :math:`T`), ``(..., d)``.

        ``tau = 1`` is the mean of all, ``tau = until`` the last iterate.
        """
        until = self.steps if until is None else until
        if not 1 <= tau <= until <= self.steps:
            raise ValueError(f"tau and until must satisfy 1 <= tau <= until <= {self.steps}, got {tau} and {until}")
        return self._whole(self.values[tau - 1 : until].mean(0))

    def _whole(self, values: Tensor) -> Tensor:
        whole = self.start.clone()
        whole[..., self.moved] = values
        return whole


def gd(problem: ConvexProblem, *, lr: float, steps: int, start: Tensor | None = None) -> Trajectory:
    r"""Gradient descent, :math:`v_t = 0`. Cost: ``steps`` gradients.

    Args:
        problem: whose empirical risk is descended.
        lr: :math:`\eta`.
        steps: :math:`T`, iterates.
        start: :math:`w_1`, ``(..., d)``; that of the problem by default. Several points run at once.

    Raises:
        ValueError: a value out of range; a NaN or infinity on the way (the step is named).

    Example:
        >>> from flatminima.problems.convex import SharpSAM1D
        >>> gd(SharpSAM1D(1.0), lr=0.5, steps=4).values[:, 0].tolist()
        [1.0, 0.5, 0.25, 0.125]
    """
    return _run(problem, lr, steps, start, lambda w, step, value, gradient: (None, value, gradient))


def sam(
    problem: ConvexProblem,
    *,
    lr: float,
    radius: float,
    steps: int,
    start: Tensor | None = None,
    epsilon: float = 0.0,
) -> Trajectory:
    r"""SAM, :math:`v_t = r\,g/(\lVert g\rVert + \epsilon)` with :math:`g = \nabla F_S(w_t)`, and 0 where that is zero.

    Args:
        problem, lr, steps, start: as in :func:`gd`.
        radius: :math:`r`.
        epsilon: what many implementations add to the norm; 0 is the definition.

    Warns:
        EpsilonWarning: ``epsilon`` has shortened a perturbation to less than 99 % of the radius, so that this is not SAM.

    Cost: 2 ``steps`` gradients.

    Example:
        >>> from flatminima.problems.convex import SharpSAM1D
        >>> [round(w, 6) for w in sam(SharpSAM1D(0.3), lr=0.25, radius=0.4, steps=4).values[:, 0].tolist()]
        [0.3, 0.125, -0.00625, -0.00625]
    """
    radius, epsilon = positive("radius", radius, zero=True), positive("epsilon", epsilon, zero=True)
    warned = False

    def look(w: Tensor, step: int, value: Tensor, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        nonlocal warned
        size = length(gradient)
        moves = size > 0
        whole = torch.where(moves, size + epsilon, torch.ones_like(size))
        if epsilon > 0 and not warned and bool((moves & (size < 99 * epsilon)).any()):
            warned = True
            share = float((size / whole)[moves].min())
            warnings.warn(
                f"step {step}: epsilon = {epsilon:g} beside a gradient of norm {float(size[moves].min()):.3g} leaves "
                f"{share:.2g} of the radius {radius:g}: this is not SAM, and a trap that it misses proves nothing. Use "
                "epsilon=0, or variant='conditioned' of SAMTrap, whose gradients are larger",
                EpsilonWarning, stacklevel=4,
            )  # fmt: skip
        v = gradient * (radius / whole)[..., None]
        return (v, *problem.value_and_gradient(w + v))

    return _run(problem, lr, steps, start, look)


def sagd(
    problem: ConvexProblem,
    *,
    lr: float,
    radius: float,
    steps: int,
    tie_break: str | Oracle,
    start: Tensor | None = None,
    seed: int = 0,
    iterations: int = 400,
) -> Trajectory:
    r"""Sharpness-aware gradient descent, :math:`v_t \in \arg\max_{\lVert v\rVert\le r} F_S(w_t + v)`, the *global* maximum.

    Args:
        problem, lr, steps, start: as in :func:`gd`.
        radius: :math:`r`.
        tie_break: which maximiser, where there are several. It is part of the algorithm, and in
            :class:`~flatminima.problems.SAGDTrap` it decides everything, so there is no default: one of the problem's
            ``tie_breaks``, or a function ``(w, radius, step) -> v`` with step from 1.
        seed: of the rules that draw.
        iterations: of the rule ``"power"``, at most.

    Raises:
        ValueError: a rule that the problem does not have; a function whose displacement is longer than the radius.

    Cost: ``steps`` gradients and the rule; ``"power"`` takes up to ``iterations`` gradients for each of six starts.

    Example:
        >>> from flatminima.problems.convex import SAGDTrap
        >>> f = SAGDTrap(6, 64, flatness_radius=0.1)
        >>> for rule in ("adversarial", "auxiliary"):
        ...     run = sagd(f, lr=0.25, radius=0.6, steps=64, tie_break=rule)
        ...     print(rule, f.empirical_risk(run.last), round(f.population_risk(run.last).value, 8))
        adversarial 0.0 0.19898591
        auxiliary 0.0 0.0
    """
    radius, iterations = positive("radius", radius, zero=True), check_count("iterations", iterations)
    if not isinstance(tie_break, str) and not callable(tie_break):
        rules = ", ".join(problem.tie_breaks)
        raise ValueError(f"tie_break must be one of {rules}, or a function (w, radius, step) -> v, got {tie_break!r}")
    generator = torch.Generator().manual_seed(seed)

    def look(w: Tensor, step: int, value: Tensor, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        if isinstance(tie_break, str):
            v = problem.maximiser(w, radius, tie_break, step, generator, iterations)
        else:
            v = real_tensor(f"step {step}: the oracle's displacement", tie_break(w, radius, step))
            if v.shape != w.shape or not bool((length(v) <= radius * (1 + 1e-6)).all()):
                raise ValueError(
                    f"step {step}: the oracle must return a displacement of shape {tuple(w.shape)} and length at most "
                    f"{radius:g}, got shape {tuple(v.shape)}"
                    + (f" and length {float(length(v).max()):g}" if v.dim() else "")
                )
        return (v, *problem.value_and_gradient(w + v))

    return _run(problem, lr, steps, start, look)


_Look = Callable[[Tensor, int, Tensor, Tensor], tuple[Tensor | None, Tensor, Tensor]]


def _run(problem: ConvexProblem, lr: float, steps: int, start: Tensor | None, look: _Look) -> Trajectory:
    lr, steps = positive("lr", lr), check_count("steps", steps)
    first = problem.start if start is None else real_tensor("start", start).detach().to(problem.start)
    if first.dim() < 1 or first.shape[-1] != problem.d:
        raise ValueError(f"start: expected points (..., {problem.d}), got a tensor of shape {tuple(first.shape)}")
    try:  # one point each, where the problem holds several samples
        first = first.expand(torch.broadcast_shapes(first.shape, problem.start.shape))
    except RuntimeError:
        raise ValueError(
            f"start: expected points that fit {tuple(problem.start.shape)}, got a tensor of shape {tuple(first.shape)}"
        ) from None
    w = first.clone()
    known, moved = torch.zeros(problem.d, dtype=torch.bool), torch.zeros(0, dtype=torch.long)
    kept, risks, perturbed, norms = [], [], [], []
    for step in range(1, steps + 1):
        kept.append(w[..., moved])
        value, gradient = problem.value_and_gradient(w)
        _, reached, pull = look(w, step, value, gradient)
        size = length(pull)
        if not bool((value.isfinite() & size.isfinite()).all()):
            raise ValueError(
                f"step {step}: the risk or its gradient is NaN or infinite; a smaller lr, or a finite start"
            )
        risks.append(value)
        perturbed.append(reached)
        norms.append(size)
        if step == steps:
            break
        fresh = (pull != 0).reshape(-1, problem.d).any(0) & ~known
        if bool(fresh.any()):
            known |= fresh
            moved = torch.cat([moved, fresh.nonzero()[:, 0]])
        w = w - lr * pull
    values = first[..., moved].expand(steps, *first.shape[:-1], len(moved)).clone()
    for t, row in enumerate(kept):
        values[t, ..., : row.shape[-1]] = row
    return Trajectory(first, moved, values, torch.stack(risks), torch.stack(perturbed), torch.stack(norms))
