"""Processes that train together: whose gradients a pass leaves behind, and when they are averaged."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flatminima.optim.closures import Closure, evaluate
from flatminima.optim.scaling import Scaling, unit_of
from flatminima.sharding import is_sharded, sharding_modules

if TYPE_CHECKING:
    from flatminima.optim.engine import Engine

Through = Callable[[Tensor, Tensor], Tensor]
Look = tuple[Tensor, contextlib.AbstractContextManager[None], str | None]


class OneProcess:
    """No one to wait for, or no way to tell: gradients in ``.grad`` are taken as they are.

    Attributes:
        defers: whether averaging over the ranks can be put off to a later pass.
        cuts_gradients: whether ``.grad`` holds a shard of what the backward pass found.
    """

    defers = False
    cuts_gradients = False

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Backward passes in this block average nothing over ranks."""
        yield

    @contextlib.contextmanager
    def through(self, function: Through, parameters: Sequence[Tensor]) -> Iterator[None]:
        """Every gradient that arrives in this block passes through ``function(leaf, gradient)`` before it is accumulated."""
        with contextlib.ExitStack() as stack:
            for p in dict.fromkeys(parameters):
                if p.requires_grad:
                    stack.callback(p.register_hook(lambda gradient, p=p: function(p, gradient)).remove)
            yield

    def leaves(self, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        """The tensors in whose ``.grad`` autograd accumulates."""
        return parameters

    def look(self, engine: Engine, closure: Closure, parameters: list[Tensor], scaler: Scaling | None) -> Look:
        """Evaluate alone; the loss, the block in which the weights are displaced by what was found, or why they are not."""
        with self.alone():
            loss = evaluate(closure, parameters, scaler)
        info = engine.displace(unit_of(scaler))
        info.close()
        return loss, _displaced(engine), info.skipped

    def settle(self) -> None:
        """The weights were moved: forget gathered copies of them."""

    def mean(self, loss: Tensor, parameters: Sequence[Tensor]) -> float:
        """The mean of a loss over the ranks that train together, so that all of them decide alike."""
        sharded: Any = next((p for p in parameters if is_sharded(p)), None)
        if sharded is None:
            return float(loss)
        from torch.distributed.tensor import DTensor, Partial

        mesh = sharded.device_mesh
        return float(DTensor.from_local(loss, mesh, [Partial("avg")] * mesh.ndim, run_check=False).full_tensor())


class DataParallel(OneProcess):
    """A ``DistributedDataParallel`` module: replicas, whose gradients are averaged in the backward pass."""

    defers = True

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Backward passes in this block average nothing over ranks."""
        with self._model.no_sync():
            yield

    def mean(self, loss: Tensor, parameters: Sequence[Tensor]) -> float:
        """The mean of a loss over the ranks that train together, so that all of them decide alike."""
        group = getattr(self._model, "process_group", None)
        if group is None:
            return super().mean(loss, parameters)
        total = loss.clone()
        torch.distributed.all_reduce(total, group=group)
        return float(total) / int(group.size())


class Accumulation:
    """A weighted sum of gradients of several closures, averaged over the ranks once, in the last backward pass.

    Gradients accumulate as by hand under ``no_sync``. A closure that calls ``zero_grad`` would lose what the others found, so
    that is kept aside and put back when the first gradient of the last backward pass arrives.
    Memory: one copy of the gradient.
    """

    def __init__(self, ranks: OneProcess, parameters: Sequence[Tensor]) -> None:
        self._ranks, self._parameters = ranks, parameters
        self._kept: dict[Tensor, Tensor] = {}

    def evaluate(self, closure: Closure, weight: float, scaler: Scaling | None, last: bool) -> Tensor:
        """Add one closure's gradients; after the last one the sum lies in ``.grad``."""
        if not self._ranks.defers:
            loss = evaluate(closure, self._parameters, scaler)
            self._keep(weight)
        else:
            loss = self._evaluate_deferred(closure, weight, scaler, last)
        if last:
            self._put_back()
        return loss

    def _evaluate_deferred(self, closure: Closure, weight: float, scaler: Scaling | None, last: bool) -> Tensor:
        arrived = False

        def through(leaf: Tensor, gradient: Tensor) -> Tensor:
            nonlocal arrived
            if last and not arrived:
                self._put_back()
            arrived = True
            return gradient if weight == 1 else gradient * weight

        with self._ranks.through(through, self._parameters), contextlib.nullcontext() if last else self._ranks.alone():
            loss = evaluate(closure, self._parameters, scaler, lambda: arrived)
        if not last:
            self._keep(1.0)
        return loss

    @torch.no_grad()
    def _keep(self, weight: float) -> None:
        for leaf in self._ranks.leaves(self._parameters):
            if leaf.grad is not None:
                # Gradients may live in buckets, which the next pass overwrites.
                part = leaf.grad * weight if weight != 1 or leaf.grad._is_view() else leaf.grad
                self._kept[leaf] = self._kept[leaf] + part if leaf in self._kept else part
                leaf.grad = None

    @torch.no_grad()
    def _put_back(self) -> None:
        for leaf, kept in self._kept.items():
            leaf.grad = kept if leaf.grad is None else leaf.grad + kept
        self._kept = {}


def ranks_of(model: nn.Module | None) -> OneProcess:
    """How the model's processes train together.

    Raises:
        TypeError: ``FullyShardedDataParallel``, whose gradients under ``no_sync`` are of another shape than its parameters.
    """
    if model is not None and any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        raise TypeError(
            "FullyShardedDataParallel (FSDP1) hides which part of a parameter a rank holds: shard the model with "
            "torch.distributed.fsdp.fully_shard (FSDP2) instead"
        )
    if model is not None and sharding_modules(model):
        from flatminima.optim.shards import FullySharded

        return FullySharded(model)
    return DataParallel(model) if model is not None and hasattr(model, "no_sync") else OneProcess()


@contextlib.contextmanager
def _displaced(engine: Engine) -> Iterator[None]:
    try:
        yield
    finally:
        engine.restore()
