r"""What to step along: the gradient at the weights and the one at the perturbed weights, made into one.

Projections and norms are those of all parameters together (some libraries project tensor by tensor). A parameter without a
gradient in the second pass is not stepped; one without a gradient in the first counts as zero there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from flatminima.optim.directions import Point


class Perturbed:
    r"""SAM: :math:`g_\epsilon`, the gradient at the perturbed weights. Memory: nothing."""

    needs_clean = False
    remembers = False
    keeps: tuple[str, ...] = ()  # names of what it leaves in a point's memory

    def combine(self, clean: list[Tensor], there: list[Tensor], at: Point) -> None:
        """Change ``there`` in place into the gradient to step along."""

    def without(self, at: Point) -> None:
        """Change ``at.gradients`` in place, on a step without a second pass."""

    def after(self, parameters: Sequence[Tensor], rates: Iterable[float]) -> None:
        """Move the parameters once more, after the base's step."""


class SurrogateGap(Perturbed):
    r"""GSAM: :math:`g_\epsilon - \alpha\, g_\perp`, with :math:`g_\perp` the part of :math:`g` across :math:`g_\epsilon`.

    It lowers the gap :math:`L(w + \epsilon) - L(w)` without raising the perturbed loss. Zhuang et al., "Surrogate Gap
    Minimization Improves Sharpness-Aware Training" (2022); let ``rho`` follow the learning rate as they do by
    setting it in the groups. Memory: one more copy of the gradient.
    """

    needs_clean = True

    def __init__(self, alpha: float = 0.4) -> None:
        if not math.isfinite(alpha):
            raise ValueError(f"alpha must be finite, got {alpha}")
        self.alpha = alpha

    def combine(self, clean: list[Tensor], there: list[Tensor], at: Point) -> None:
        """``there += -alpha (clean - projection of clean on there)``."""
        square = at.dot(there, there)
        if square > 0:
            torch._foreach_mul_(there, 1 + self.alpha * at.dot(clean, there) / square)
        torch._foreach_add_(there, clean, alpha=-self.alpha)


class Weighted(Perturbed):
    r"""WSAM: the sharpness :math:`L(w + \epsilon) - L(w)` with the weight :math:`a = \gamma / (1 - \gamma)`.

    Decoupled, the base steps along :math:`g` and then :math:`w \leftarrow w - \mathrm{lr}\, a\, (g_\epsilon - g)`, outside
    of its momentum and second moments; otherwise it steps along :math:`(1 - a)\, g + a\, g_\epsilon`. Yue et al.,
    "Sharpness-Aware Minimization Revisited: Weighted Sharpness as a Regularization Term" (2023). Memory: two more copies
    of the gradient, or one.

    Args:
        gamma: in [0, 1); 1/2 coupled is SAM, 0 the base.
        decouple: see above.
    """

    needs_clean = True

    def __init__(self, gamma: float = 0.9, decouple: bool = True) -> None:
        if not 0 <= gamma < 1:
            raise ValueError(f"gamma must be in [0, 1), got {gamma}")
        self.weight, self.decouple = gamma / (1 - gamma), decouple
        self._sharpness: list[Tensor] = []

    def combine(self, clean: list[Tensor], there: list[Tensor], at: Point) -> None:
        """Decoupled, ``there`` becomes ``clean`` and the difference waits for :meth:`after`."""
        if self.decouple:
            self._sharpness = list(torch._foreach_sub(there, clean))
            if at.unit != 1.0:
                torch._foreach_mul_(self._sharpness, at.unit)
            torch._foreach_copy_(there, clean)
        else:
            torch._foreach_mul_(there, self.weight)
            torch._foreach_add_(there, clean, alpha=1 - self.weight)

    def after(self, parameters: Sequence[Tensor], rates: Iterable[float]) -> None:
        """The step along the sharpness."""
        for p, s, rate in zip(parameters, self._sharpness, rates, strict=False):
            p.add_(s, alpha=-rate * self.weight)
        self._sharpness = []


class Reuse(Perturbed):
    r"""LookSAM: what the last perturbation found is used again until the next.

    A SAM step keeps the unit vector :math:`u` along the part of :math:`g_\epsilon` orthogonal to :math:`g`; the steps between
    go along :math:`g + \alpha \lVert g \rVert u`. Liu et al., "Towards Efficient and Scalable Sharpness-Aware Minimization"
    (2022).
    There is no direction where that part is no larger than rounding, :math:`100\,\mathrm{eps}\,\lVert g_\epsilon\rVert`, or
    8 eps in half precision.
    Memory: one more copy of the parameters, kept between steps and saved, another while it is renewed, and one of the gradient.
    """

    needs_clean = True
    remembers = True
    keeps = ("across",)

    def __init__(self, alpha: float = 0.7) -> None:
        if not math.isfinite(alpha):
            raise ValueError(f"alpha must be finite, got {alpha}")
        self.alpha = alpha

    def combine(self, clean: list[Tensor], there: list[Tensor], at: Point) -> None:
        """Keep the direction; ``there`` stays."""
        square = at.dot(clean, clean)
        along = at.dot(clean, there) / square if square > 0 else 0.0
        across = list(torch._foreach_sub(there, list(clean), alpha=along))
        size = at.norm(across)
        if size <= max(map(_rounding, {g.dtype for g in there}), default=0.0) * at.length:
            at.memory.pop("across", None)  # a unit vector of noise would be as long as a real one
        elif math.isfinite(size):
            torch._foreach_div_(across, size)
            at.memory["across"] = dict(zip(at.parameters, across, strict=True))

    def without(self, at: Point) -> None:
        """Add the kept direction, as long as a share of this gradient."""
        across = at.memory.get("across", {})
        known = [(g, across[p]) for p, g in zip(at.parameters, at.gradients, strict=True) if p in across]
        if known and math.isfinite(at.length):
            torch._foreach_add_([g for g, _ in known], [u for _, u in known], alpha=self.alpha * at.length)


def _rounding(kind: torch.dtype) -> float:
    """What rounding leaves of a difference of parallel vectors, relative to them: of the entries, and of the long sums."""
    return torch.finfo(kind).eps * (8 if kind.itemsize < 4 else 100)  # those of half precision are summed in double
