"""Whether two networks compute the same function, and in which sense."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flatminima.objective import unwrapped
from flatminima.symmetries.base import EXACT
from flatminima.symmetries.execution import double_copy, outputs, run

Relation = Literal["same", "same within rounding", "same probabilities", "same up to temperature", "different"]

_ROUNDINGS = (
    10.0  # a change of the outputs within so many times what one random rounding of the weights does is rounding
)


@dataclass(frozen=True)
class FunctionComparison:
    """How the outputs of two networks differ on the same rows, in double precision.

    Attributes:
        relation: ``"same"``: to 1e-9 of the largest output; ``"same within rounding"``: within what rounding the weights to
            their own type does; ``"same probabilities"``: up to one number added to all classes of a row; ``"same up to
            temperature"``: up to one positive factor; else ``"different"``.
        max_change: largest difference of the outputs, relative to the largest output of the first.
        rounding: the same between a network and itself with its weights rounded once more at random.
        factor: the temperature: outputs of the second over those of the first, if that is what differs.
        agreement: share of rows (of tokens, of pixels) with the same predicted class; ``None`` without class targets.
    """

    relation: Relation
    max_change: float
    rounding: float
    factor: float | None
    agreement: float | None

    @property
    def same_loss(self) -> bool:
        """Whether everything that the loss of a classifier sees is the same."""
        return self.relation in ("same", "same within rounding", "same probabilities")


def compare_functions(
    first: nn.Module, second: nn.Module, pairs: Sequence[tuple[Any, Any]], *, mode: str, classes: bool, seed: int = 0
) -> FunctionComparison:
    """Compare the outputs of two networks of one architecture over all batches.

    Args:
        first, second: in their own precision, which decides what rounding explains.
        pairs: batches of (inputs, targets).
        mode: ``"eval"`` or ``"train"``.
        classes: whether the targets are classes.
        seed: of the random rounding.

    Cost: four forward passes.

    Example:
        >>> net = nn.Linear(2, 3)
        >>> data = [(torch.randn(4, 2), torch.zeros(4, dtype=torch.long))]
        >>> compare_functions(net, net, data, mode="eval", classes=True).relation
        'same'
    """
    twins = [double_copy(model, mode) for model in (first, second)]
    rounded = [_rounded(model, twin, seed) for model, twin in zip((first, second), twins, strict=True)]
    found: list[list[Tensor]] = [[], [], [], []]
    agree, count, axis = 0, 0, None
    for inputs, targets in pairs:
        batch = [outputs(run(twin, inputs)) for twin in (*twins, *rounded)]
        for store, parts in zip(found, batch, strict=True):
            store.extend(parts)
        axis = _class_axis(batch[0][0], targets) if classes else None
        if axis is not None:
            same = batch[0][0].argmax(axis) == batch[1][0].argmax(axis)
            agree, count = agree + int(same.sum()), count + same.numel()
    a, b, a_rounded, b_rounded = found
    change, rounding = _change(a, b), max(_change(a, a_rounded), _change(b, b_rounded))
    agreement = agree / count if count else None
    if change <= EXACT:
        return FunctionComparison("same", change, rounding, None, agreement)
    if change <= _ROUNDINGS * rounding:
        return FunctionComparison("same within rounding", change, rounding, None, agreement)
    allowed = max(EXACT, _ROUNDINGS * rounding)
    centred = [[x - x.mean(-1 if axis is None else axis, keepdim=True) for x in outs] for outs in (a, b)]
    if classes and _change(*centred) <= allowed:
        return FunctionComparison("same probabilities", change, rounding, None, agreement)
    factor = sum(float((x * y).sum()) for x, y in zip(a, b, strict=True)) / max(
        sum(float((x * x).sum()) for x in a), torch.finfo(torch.float64).tiny
    )
    if classes and factor > 0 and _change(a, [x / factor for x in b]) <= allowed:
        return FunctionComparison("same up to temperature", change, rounding, factor, agreement)
    return FunctionComparison("different", change, rounding, None, agreement)


def _rounded(model: nn.Module, twin: nn.Module, seed: int) -> nn.Module:
    """A copy whose weights moved by up to half a unit of rounding of their own type."""
    own = dict(unwrapped(model)[0].named_parameters())
    moved = double_copy(twin, "train" if twin.training else "eval")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in moved.named_parameters():
            draw = torch.rand(p.shape, generator=generator, dtype=torch.float64).to(p.device) - 0.5
            p.mul_(1 + torch.finfo(own[name].dtype).eps * draw)
    return moved


def _change(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    gap = max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))
    size = max(float(x.abs().max()) for x in a)
    return gap / size if size else 0.0 if gap == 0 else float("inf")


def _class_axis(out: Tensor, targets: Any) -> int | None:
    """The axis of the outputs that counts classes; ``None`` where the targets do not say."""
    shape = tuple(targets.shape) if isinstance(targets, Tensor) else ()
    if out.shape[:-1] == shape or (isinstance(targets, Tensor) and targets.shape == out.shape):
        return -1
    return 1 if out.ndim > 2 and (out.shape[0], *out.shape[2:]) == shape else None
