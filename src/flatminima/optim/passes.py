"""Evaluating the gradient more than once, as if it had been once: random numbers, running statistics, micro-batches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from operator import attrgetter

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from flatminima.optim.closures import Work, evaluate
from flatminima.optim.ranks import Accumulation, ranks_of

_ON_CPU = attrgetter("is_cpu")


class Passes:
    """What the passes of a step share.

    Args:
        model: its normalisation layers keep the running statistics of the first pass; gradients of several closures are
            averaged over its ranks once.
        replay_rng: later passes draw the random numbers of the first.
    """

    def __init__(self, model: nn.Module | None, replay_rng: bool) -> None:
        self.model, self.replay_rng = model, replay_rng
        self.ranks = ranks_of(model)
        self._random: tuple[Tensor, dict[torch.device, Tensor]] | None = None

    def remember(self, parameters: Sequence[Tensor]) -> None:
        """Note the state of the random number generators before a first pass."""
        if self.replay_rng:
            devices = set() if all(map(_ON_CPU, parameters)) else {p.device for p in parameters}
            states = {d: torch.get_device_module(d).get_rng_state(d) for d in devices if d.type not in ("cpu", "meta")}
            self._random = (torch.get_rng_state(), states)

    def replay(self) -> None:
        """Go back to that state before a later pass."""
        if self.replay_rng and self._random is not None:
            torch.set_rng_state(self._random[0])
            for device, state in self._random[1].items():
                torch.get_device_module(device).set_rng_state(state, device)

    @contextlib.contextmanager
    def statistics_kept(self) -> Iterator[None]:
        """Running means, variances and counters are afterwards what they were before; blocks may be nested."""
        modules = [] if self.model is None else [m for m in self.model.modules() if isinstance(m, _NormBase)]
        buffers = [b for m in modules for b in m.buffers(recurse=False)]
        saved = [b.clone() for b in buffers]
        try:
            yield
        finally:
            if buffers:
                with torch.no_grad():
                    torch._foreach_copy_(buffers, saved)

    def run(self, work: Work, parameters: Sequence[Tensor]) -> Tensor:
        """Loss and gradients of all closures, weighted; the gradients lie in ``.grad``."""
        if len(work.closures) == 1 and work.weights[0] == 1:
            return evaluate(work.closures[0], parameters, work.scaler)
        accumulation = Accumulation(self.ranks, parameters)
        losses = [
            accumulation.evaluate(closure, weight, work.scaler, last=i == len(work.closures) - 1)
            for i, (closure, weight) in enumerate(zip(work.closures, work.weights, strict=True))
        ]
        return weighted(losses, work.weights)


def weighted(losses: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted sum of some losses."""
    total = losses[0] * weights[0]
    for loss, weight in zip(losses[1:], weights[1:], strict=True):
        total = total + loss * weight
    return total
