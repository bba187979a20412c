"""Evaluating the gradient more than once, as if it had been once: random numbers, running statistics, micro-batches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from flatminima.optim.closures import Work, evaluate
from flatminima.optim.ranks import Accumulation, ranks_of

Random = tuple[Tensor, dict[torch.device, Tensor]]  # states of the generators, of the CPU and of other devices
Statistics = tuple[list[Tensor], list[Tensor]]  # buffers, and what they hold


class Second(NamedTuple):
    """What has to be as it was when a second pass of the caller's is over."""

    random: Random | None
    statistics: Statistics
    check: bool


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
        self._random: Random | None = None
        self._second: Second | None = None

    def remember(self, parameters: Sequence[Tensor]) -> None:
        """Note the state of the random number generators before a first pass."""
        if self.replay_rng:
            self._random = _random(parameters)

    def replay(self) -> None:
        """Go back to that state before a later pass."""
        if self.replay_rng and self._random is not None:
            _set_random(self._random)

    @contextlib.contextmanager
    def statistics_kept(self) -> Iterator[None]:
        """Running means, variances and counters are afterwards what they were before; blocks may be nested."""
        kept = self._statistics()
        try:
            yield
        finally:
            _set_statistics(kept)

    @property
    def remembers(self) -> bool:
        """Whether it is known where the random numbers of a first pass began."""
        return self._random is not None

    @property
    def in_second(self) -> bool:
        """Whether a pass goes on that :meth:`begin_second` began."""
        return self._second is not None

    def begin_second(self, parameters: Sequence[Tensor], check: bool) -> None:
        """A later pass of the caller's begins, with the random numbers of the first if :meth:`remember` was called then.

        Args:
            parameters: on whose devices numbers are drawn.
            check: whether they are the numbers of the first has to be found out.
        """
        check = check and self.replay_rng
        self._second = Second(_random(parameters) if check or self.remembers else None, self._statistics(), check)
        self.replay()

    def end_second(self, parameters: Sequence[Tensor], give_up: bool = False) -> bool:
        """Statistics, and random numbers that were replayed, go on from where they were at :meth:`begin_second`.

        Args:
            parameters: as there.
            give_up: the pass was not made to its end, and there is nothing to compare.

        Returns:
            False where that was checked and the pass drew other numbers than the first.
        """
        assert self._second is not None
        random, statistics, check = self._second
        self._second = None
        _set_statistics(statistics)
        # Passes that begin in one state have drawn the same if they end in one.
        alike = random is None or not check or give_up or _same(random, _random(parameters))
        if random is not None and self.remembers:
            _set_random(random)
        return alike

    def forget(self) -> None:
        """The next first pass begins somewhere else."""
        self._random = None

    def _statistics(self) -> Statistics:
        modules = [] if self.model is None else [m for m in self.model.modules() if isinstance(m, _NormBase)]
        buffers = [b for m in modules for b in m.buffers(recurse=False)]
        return buffers, [b.clone() for b in buffers]

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


def _random(parameters: Sequence[Tensor]) -> Random:
    devices = set() if all(map(_ON_CPU, parameters)) else {p.device for p in parameters}
    states = {d: torch.get_device_module(d).get_rng_state(d) for d in devices if d.type not in ("cpu", "meta")}
    return torch.get_rng_state(), states


def _set_random(random: Random) -> None:
    torch.set_rng_state(random[0])
    for device, state in random[1].items():
        torch.get_device_module(device).set_rng_state(state, device)


def _same(a: Random, b: Random) -> bool:
    return torch.equal(a[0], b[0]) and all(torch.equal(state, b[1][device]) for device, state in a[1].items())


def _set_statistics(statistics: Statistics) -> None:
    buffers, saved = statistics
    if buffers:
        with torch.no_grad():
            torch._foreach_copy_(buffers, saved)


def weighted(losses: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted sum of some losses."""
    total = losses[0] * weights[0]
    for loss, weight in zip(losses[1:], weights[1:], strict=True):
        total = total + loss * weight
    return total
