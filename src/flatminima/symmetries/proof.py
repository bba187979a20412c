"""The proof that a map preserves a function: outputs compared in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .base import EXACT, Member
from .execution import MODES, double_copy, outputs, run
from .kinds import Preserves


@dataclass(frozen=True)
class Proof:
    """The outcome of `prove`.

    Attributes:
        kind: of the symmetry.
        max_change: ``max |output' - output| / max |output|`` in float64, the largest over the outputs if there are several.
            For ``probabilities`` both have their mean over the classes removed first, for ``predictions`` ``output'`` is
            divided by the positive factor that fits best.
        tolerance: up to which `max_change` counts as preserved.
        preserves: what was compared.
    """

    kind: str
    max_change: float
    tolerance: float = EXACT
    preserves: Preserves = "outputs"

    @property
    def preserved(self) -> bool:
        """Whether the outputs agree within the tolerance."""
        return self.max_change <= self.tolerance

    @property
    def status(self) -> str:
        """``proved`` (to 1e-9), ``approximate`` (within a declared, larger tolerance) or ``refuted``."""
        if not self.preserved:
            return "refuted"
        return "proved" if self.tolerance <= EXACT else "approximate"


def prove(model: nn.Module, member: Member, inputs: Any, *, mode: str = "eval") -> Proof:
    """Compare the outputs of a model with those of its image under `member`.

    Both are copies in float64, on the model's device (on the CPU where the device has no float64), with casts to narrower
    types lifted, and both see the same random numbers. Neither the model nor the global random state changes. The proof
    speaks about these inputs and these weights: a path that they leave unused (a layer of zeros) is not put to the test.

    Args:
        model: any module that returns a tensor, tensors, or an object with `logits`.
        member: from `Symmetry.member`.
        inputs: a batch, as the model takes it: a tensor, a tuple for ``model(*inputs)`` or a dictionary for
            ``model(**inputs)``; floating-point inputs are converted to float64.
        mode: ``'eval'`` or ``'train'`` (batch statistics; dropout with the same draws).

    Raises:
        TypeError: the model returns no floating-point tensor.
        ValueError: the model's own output is empty or not finite, so that nothing can be compared.

    Cost: two forward passes, no gradient.

    Example:
        >>> import torch
        >>> from flatminima.symmetries import Scale
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> wrong = Member("example", "rescales the weight, forgets the rest", (Scale("0.weight", torch.tensor(2.0)),))
        >>> prove(net, wrong, torch.randn(5, 4)).preserved
        False
    """
    return Prover(model, inputs, mode).prove(member)


class Prover:
    """`prove` for many members of one model: the model's own outputs are computed once."""

    def __init__(self, model: nn.Module, inputs: Any, mode: str = "eval") -> None:
        if mode not in MODES:
            raise ValueError(f"mode must be 'eval' or 'train', got {mode!r}")
        self._model, self._inputs, self._mode = model, inputs, mode
        self._before = outputs(run(double_copy(model, mode), inputs))
        if not all(out.numel() and bool(out.isfinite().all()) for out in self._before):
            what = "not finite" if all(out.numel() for out in self._before) else "empty"
            raise ValueError(f"the model's output on these inputs is {what}: give inputs on which it can be compared")

    def prove(self, member: Member) -> Proof:
        """See `prove`. Cost: one forward pass."""
        twin = double_copy(self._model, self._mode)
        member.apply_(twin)
        after = outputs(run(twin, self._inputs))
        if len(after) != len(self._before):
            return Proof(member.kind, math.inf, member.tolerance, member.preserves)
        change = max(_change(a, b, member) for a, b in zip(after, self._before, strict=True))
        return Proof(member.kind, change, member.tolerance, member.preserves)


def _change(after: Tensor, before: Tensor, member: Member) -> float:
    if after.shape != before.shape or not bool(after.isfinite().all()):
        return math.inf
    if member.preserves == "probabilities":
        after, before = (out - out.mean(member.class_axis, keepdim=True) for out in (after, before))
    elif member.preserves == "predictions":
        factor = float((after * before).sum() / (before * before).sum().clamp(min=torch.finfo(torch.float64).tiny))
        if factor <= 0:
            return math.inf
        after = after / factor
    change, size = float((after - before).abs().max()), float(before.abs().max())
    return change / size if size > 0 else (0.0 if change == 0 else math.inf)
