"""One forward pass of a model at parameters that are not its own, repeated exactly and without a trace.

The model is only read: weights, buffers, ``.grad``, train/eval flags, attention settings and the global random state are
what they were before.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from flatminima.batches import ObjectiveError, Piece, moved

LossFn = Callable[[Any, Any], Tensor]


class NonFiniteLossError(FloatingPointError):
    """The loss is NaN or infinite; the message names the batch."""


class NonFiniteDerivativeError(NonFiniteLossError):
    """The loss is finite but a derivative is NaN or infinite; the message names the parameters."""


class Forward:
    """The loss of a piece of data at given parameters.

    Args:
        model: as the user gave it, unwrapped.
        loss_fn: ``loss_fn(output, target)``; ``None``: the ``.loss`` of the model's output.
        names: of the parameters that are given from outside.
        device: where the pieces go.
        train: whether the model is in train mode; dropout is then replayed.
        seed: of the replayed draws, to which the index of the piece is added.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn | None,
        names: Sequence[str],
        device: torch.device,
        *,
        train: bool = False,
        seed: int = 0,
    ) -> None:
        self.model, self.loss_fn, self.names = model, loss_fn, list(names)
        self.device, self.train, self.seed = device, train, seed
        #: In which the last loss came out; a model may compute it in less than its parameters have.
        self.precision: torch.dtype | None = None

    def loss(self, index: int, piece: Piece, values: Sequence[Tensor]) -> Tensor:
        """The loss of one piece, a scalar tensor.

        Raises:
            ObjectiveError: not one floating-point number.
        """
        with self.evaluating(index):
            value = self.loss_of(self.output(piece, values), piece)
        self.precision = value.dtype
        return value

    def loss_of(self, output: Any, piece: Piece) -> Tensor:
        """The loss of an output that is at hand."""
        if self.loss_fn is not None:
            targets = moved(piece.targets, self.device)
            try:
                return _scalar(self.loss_fn(output, targets))
            except IndexError as error:
                _refuse_labels(self.loss_fn, output, targets, piece.batch, error)
                raise
        found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if not isinstance(found, Tensor):
            raise ObjectiveError(
                f"loss_fn=None takes the loss from the model's output, and the {type(output).__name__} has none; "
                "give the labels in the batch, or a loss_fn(output, target)"
            )
        return _scalar(found)

    def output(self, piece: Piece, values: Sequence[Tensor]) -> Any:
        """What the model returns; call it within :meth:`evaluating`."""
        # Copies of the buffers: a layer that updates its statistics in place then updates the copy.
        state: dict[str, Tensor] = {name: b.detach().clone() for name, b in self.model.named_buffers()}
        state.update(zip(self.names, values, strict=True))
        inputs = moved(piece.inputs, self.device)
        if isinstance(inputs, Mapping):
            return functional_call(self.model, state, (), dict(inputs))
        return functional_call(self.model, state, inputs if isinstance(inputs, tuple) else (inputs,))

    def logits(self, index: int, piece: Piece, values: Sequence[Tensor]) -> Tensor:
        """The output as one tensor, for Gauss-Newton and Fisher products.

        Raises:
            ObjectiveError: the model returns something else, or computes its loss itself.
        """
        if self.loss_fn is None:
            raise ObjectiveError(
                "this product needs the loss as a function of the model's output; give loss_fn(output, target) instead of "
                "loss_fn=None"
            )
        with self.evaluating(index):
            output = self.output(piece, values)
        if not isinstance(output, Tensor):
            raise ObjectiveError(
                f"this product needs a model that returns one tensor, got {type(output).__name__}; wrap the model in a "
                "module that returns the tensor"
            )
        return output

    def row_losses(self, index: int, piece: Piece, values: Sequence[Tensor]) -> Tensor:
        """The loss of every row alone, ``(rows,)``.

        Raises:
            ObjectiveError: the rows of the output are not those of the data, or their mean is not the loss of the piece.
        """
        output = self.logits(index, piece, values)
        if output.shape[:1] != (piece.rows,) or not isinstance(piece.targets, Tensor):
            raise ObjectiveError(
                f"a Fisher product needs one output and one target a row; got {tuple(output.shape)} for {piece.rows} rows"
            )
        targets, loss_fn = moved(piece.targets, self.device), self.loss_fn
        whole = self.loss_of(output, piece)
        assert loss_fn is not None

        def alone(row: Tensor, target: Tensor) -> Tensor:
            return loss_fn(row.unsqueeze(0), target.unsqueeze(0)).reshape(())

        with self.evaluating(index):
            try:
                losses: Tensor = torch.func.vmap(alone)(output, targets)
            except RuntimeError:  # an operation that vmap cannot batch
                losses = torch.stack([alone(row, target) for row, target in zip(output, targets, strict=True)])
        mean, loss = float(losses.detach().mean()), float(whole.detach())
        if not abs(mean - loss) <= 1e-3 * max(abs(loss), float(losses.detach().abs().max())):
            raise ObjectiveError(
                f"a Fisher product needs a loss that is the mean over its rows: theirs is {mean:.6g}, the loss {loss:.6g} "
                "(class weights, masked targets or a function of the whole batch); use GaussNewton, or a loss that averages "
                "over rows"
            )
        return losses

    @contextlib.contextmanager
    def evaluating(self, index: int) -> Iterator[None]:
        """Mode, random draws and attention kernel of piece ``index``; everything is put back."""
        flags = [(module, module.training) for module in self.model.modules()]
        fast_path = torch.backends.mha.get_fastpath_enabled()
        cuda = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda), sdpa_kernel(SDPBackend.MATH):
            # torch.manual_seed would reseed every device of the machine, also those that fork_rng does not restore.
            torch.default_generator.manual_seed(self.seed + index)
            for device in cuda:
                position = torch.cuda.current_device() if device.index is None else device.index
                torch.cuda.default_generators[position].manual_seed(self.seed + index)
            try:
                # The fused inference kernel of nn.MultiheadAttention rounds differently from the differentiable one.
                torch.backends.mha.set_fastpath_enabled(False)
                for module, _ in flags:
                    module.training = self.train  # not .train(): some modules merge or rebuild weights in it
                yield
            finally:
                torch.backends.mha.set_fastpath_enabled(fast_path)
                for module, training in flags:
                    module.training = training

    @contextlib.contextmanager
    def in_mode(self, train: bool) -> Iterator[None]:
        """Evaluate in another mode for a while."""
        before, self.train = self.train, train
        try:
            yield
        finally:
            self.train = before


def plain_gradient(model: nn.Module, forward: Forward, piece: Piece) -> dict[str, Tensor]:
    """The gradient as anyone would write it, ``loss_fn(model(x), y)`` and autograd, by name; the model is left as it was.

    Raises:
        ObjectiveError: not one floating-point number.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    kept = [(b, b.detach().clone()) for b in model.buffers()]
    inputs = moved(piece.inputs, forward.device)
    try:
        with forward.evaluating(0), torch.enable_grad():
            if isinstance(inputs, Mapping):
                output = model(**inputs)
            else:
                output = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
            value = forward.loss_of(output, piece)
        if not (named and value.requires_grad):
            return {}
        found = torch.autograd.grad(value, list(named.values()), allow_unused=True)
    finally:
        with torch.no_grad():
            for buffer, before in kept:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found, strict=True)}


def uses_attention(forward: Forward, piece: Piece, values: Sequence[Tensor]) -> bool:
    """Whether a forward pass runs scaled dot-product attention, whose kernel is chosen here."""
    spy = _AttentionSpy()
    with torch.no_grad(), spy:
        forward.loss(0, piece, values)
    return spy.seen


class _AttentionSpy(TorchFunctionMode):
    seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.scaled_dot_product_attention, F.multi_head_attention_forward):
            self.seen = True
        return func(*args, **(kwargs or {}))


def finite(value: Tensor, piece: Piece, names: Sequence[str], values: Sequence[Tensor]) -> float:
    """A loss as a number.

    Raises:
        NonFiniteLossError: NaN or infinity; the batch and the parameters that hold it are named.
    """
    number = float(value.detach())
    if not math.isfinite(number):
        bad = [name for name, p in zip(names, values, strict=True) if not p.isfinite().all()]
        raise NonFiniteLossError(
            f"the loss of batch {piece.batch} is {number}"
            + (f"; the parameters {', '.join(bad)} hold NaN or infinity" if bad else "")
        )
    return number


def _refuse_labels(loss_fn: LossFn, output: Any, targets: Any, batch: int, error: IndexError) -> None:
    """Say which label the loss could not look up.

    Raises:
        ObjectiveError: there is one.
    """
    labels = isinstance(targets, Tensor) and not (targets.is_floating_point() or targets.dtype == torch.bool)
    if not (labels and isinstance(output, Tensor) and output.dim() >= 2):
        return
    classes = output.shape[1 if output.dim() == targets.dim() + 1 else -1]
    outside = targets[(targets != getattr(loss_fn, "ignore_index", -100)) & ((targets < 0) | (targets >= classes))]
    if outside.numel():
        raise ObjectiveError(
            f"label out of range: batch {batch}: got {int(outside[0])}, expected 0..{classes - 1} (the model's outputs)"
        ) from error


def _scalar(value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise ObjectiveError(f"loss_fn must return a tensor with one element, got {type(value).__name__}")
    if value.numel() != 1:
        raise ObjectiveError(
            f"loss_fn must return one number, the mean over the batch, got a tensor of shape {tuple(value.shape)}; "
            "use reduction='mean'"
        )
    if not value.is_floating_point():
        raise ObjectiveError(f"loss_fn must return a floating-point tensor, got {value.dtype}")
    return value.reshape(())
