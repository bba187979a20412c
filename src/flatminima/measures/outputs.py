"""One forward pass over the data, and what measures read off it: outputs, targets, the features of the last linear layer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flatminima.batches import moved
from flatminima.measures.base import NotApplicableError
from flatminima.objective import Objective, ObjectiveError


@dataclass(frozen=True)
class Seen:
    """What one piece of the data gave.

    Attributes:
        share: of the mean loss of the piece in the objective.
        outputs: of the model.
        targets: as they are in the data.
        inputs: of a layer that was watched.
    """

    share: float
    outputs: Tensor
    targets: Any
    inputs: Tensor | None = None


def forward_rounding(objective: Objective) -> float:
    """Relative rounding of what a forward pass computes, about; that of Hessian products is another matter."""
    return 8 * float(torch.finfo(objective.dtype).eps)


def why_no_outputs(objective: Objective) -> str | None:
    """Why outputs and targets cannot be read off, or ``None``. Cost: none."""
    if objective.loss_fn is None:
        return "the model computes its own loss (loss_fn=None), which hides the outputs"
    if objective.process_group is not None:
        return "the data are spread over several processes"
    return None


def few_rows(objective: Objective) -> tuple[Tensor, Any]:
    """Outputs and targets of the first two rows: batch norm in training has no statistics of one.

    Raises:
        NotApplicableError: the model computes its own loss, returns no tensor, or its data are spread over processes.

    Cost: one forward pass of two rows.
    """
    reason = why_no_outputs(objective)
    if reason is not None:
        raise NotApplicableError(reason)
    index, piece, _ = next(iter(objective._shares()))
    few = piece.cut(0, min(2, piece.rows))
    with torch.no_grad():
        try:
            outputs = objective._forward.logits(index, few, objective._values(None))
        except ObjectiveError as error:
            raise NotApplicableError(str(error)) from error
    return outputs, few.targets


def class_axis(outputs: Tensor, targets: Any) -> int:
    """The axis of the logits along which the classes lie: 1, as cross entropy takes them, or the last.

    Targets that are class numbers decide by their shape; others (class probabilities) have the classes where the outputs have.

    Raises:
        NotApplicableError: neither fits, or there are fewer than two classes.

    Example:
        >>> classes = torch.zeros(6, 8, dtype=torch.long)
        >>> class_axis(torch.zeros(6, 20, 8), classes), class_axis(torch.zeros(6, 8, 20), classes)
        (1, 2)
    """
    if not isinstance(targets, Tensor):
        raise NotApplicableError(f"the targets are not classes: {type(targets).__name__}")
    shape = outputs.shape
    first = outputs.dim() >= 2 and (shape[:1] + shape[2:] == targets.shape or shape == targets.shape)
    if not first and (outputs.dim() < 2 or shape[:-1] != targets.shape):
        raise NotApplicableError(f"outputs {tuple(shape)} are not logits of classes for targets {tuple(targets.shape)}")
    axis = 1 if first else outputs.dim() - 1
    if shape[axis] < 2:
        raise NotApplicableError("there is one class; at least two are needed")
    return axis


def forward(objective: Objective, layer: str | None = None) -> Iterator[Seen]:
    """Outputs (and the inputs of a layer) piece by piece, without gradients. Cost: 1/3 gradient for all of it."""
    values = objective._values(None)
    objective.evaluations.loss += 1
    for index, piece, share in objective._shares():
        with torch.no_grad(), _watched(objective.model, layer) as inputs:
            outputs = objective._forward.logits(index, piece, values)
        yield Seen(share, outputs, moved(piece.targets, objective.device), inputs[0] if inputs else None)


@contextlib.contextmanager
def _watched(model: nn.Module, layer: str | None) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []
    if layer is None:
        yield seen
        return
    handle = model.get_submodule(layer).register_forward_hook(lambda m, args, out: seen.append(args[0].detach()))
    try:
        yield seen
    finally:
        handle.remove()


@dataclass(frozen=True)
class LastLayer:
    """The linear layer at the end of a model.

    Attributes:
        name: of the module.
        bare: whether its outputs are those of the model; otherwise a log-softmax follows.
    """

    name: str
    bare: bool


def last_layer(objective: Objective) -> LastLayer:
    """The :class:`torch.nn.Linear` whose outputs are those of the model, up to a log-softmax.

    Raises:
        NotApplicableError: the model ends otherwise, or the layer is used twice; the message says what was found.

    Cost: one forward pass of two rows.
    """
    calls: list[tuple[str, Tensor]] = []
    handles = [
        module.register_forward_hook(lambda m, args, out, name=name: calls.append((name, out.detach().clone())))
        for name, module in objective.model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        outputs, _ = few_rows(objective)
    finally:
        for handle in handles:
            handle.remove()
    if not calls:
        raise NotApplicableError("the model has no nn.Linear layer")
    name, found = calls[-1]
    bare, logs = (_equal(candidate, outputs) for candidate in (found, found.log_softmax(-1)))
    if not (bare or logs):
        raise NotApplicableError(f"the model does not end in a linear layer: its output is not that of {name!r}")
    used = [n for n, _ in calls].count(name)
    if used > 1:
        raise NotApplicableError(f"the last linear layer {name!r} is used {used} times in one forward pass")
    return LastLayer(name, bare)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.numel() == b.numel() and torch.equal(a.reshape(-1), b.reshape(-1))


def why_no_last_layer(objective: Objective) -> str | None:
    """The reason of :func:`last_layer`, or ``None``."""
    try:
        last_layer(objective)
    except NotApplicableError as error:
        return str(error)
    return None


def tied(objective: Objective, name: str) -> str | None:
    """A sentence that names the other place where a parameter is used, or ``None``."""
    named = dict(objective.model.named_parameters(remove_duplicate=False))
    mine = named[name]
    for other, tensor in named.items():
        if other != name and (tensor is mine or (tensor.numel() and tensor.data_ptr() == mine.data_ptr())):
            return f"{name} is tied to {other}: a formula for one use of it would be wrong"
    return None
