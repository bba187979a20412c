"""One training apart from its arithmetic: the order of rows, the step size, and when it ends.

A network trained by itself and one in an ensemble go through the same course, so that they can only differ in rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flatminima.study.run_spec import OptimiserSpec, StopSpec


@dataclass(frozen=True, eq=False)
class Training:
    """What is trained, on what, and how.

    Attributes:
        model: at its initial weights; left as it is.
        x, y: training rows ``(n, ...)`` and classes ``(n,)``; the loss is the mean cross entropy.
        optimiser: step size, batch size, ...
        stop: when it ends.
        order_seed: of the order of the rows.
    """

    model: nn.Module
    x: Tensor
    y: Tensor
    optimiser: OptimiserSpec
    stop: StopSpec
    order_seed: int = 0


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A network somewhere on its way.

    Attributes:
        weights: parameters and buffers by name.
        epochs, steps: so far; an epoch that was cut short counts.
        loss: mean cross entropy over all training rows.
        accuracy: over all training rows.
    """

    weights: dict[str, Tensor]
    epochs: int
    steps: int
    loss: float
    accuracy: float


@dataclass(frozen=True, eq=False)
class Trained:
    """How a training ended.

    Attributes:
        stopped: where the stop criterion was met, or the cap reached.
        met: whether the criterion was met.
        failure: why there is no network to speak of (a loss that is not finite), or empty.
        fixed: after ``fixed_steps`` steps, where that was asked for and the loss was finite.
        diverged: why there is nothing ``fixed`` although the training had ended well before, or empty.
    """

    stopped: Snapshot
    met: bool
    failure: str = ""
    fixed: Snapshot | None = None
    diverged: str = ""


class Course:
    """Where one training stands. ``epoch`` and ``step`` count what has been begun and done."""

    def __init__(self, training: Training) -> None:
        self.training = training
        self._generator = torch.Generator().manual_seed(training.order_seed)
        self._stopped: Snapshot | None = None
        self._met = False
        self._failure = ""
        self._diverged = ""
        self._fixed: Snapshot | None = None
        self.epoch = 0
        self.step = 0
        self._end = steps_of(training)

    def order(self) -> Sequence[Tensor]:
        """Begin an epoch: its batches of rows."""
        self.epoch += 1
        rows = len(self.training.y)
        order = torch.randperm(rows, generator=self._generator).to(self.training.y.device)
        batches: Sequence[Tensor] = order.split(self.training.optimiser.batch_size)
        return batches

    @property
    def lr(self) -> float:
        """Step size of the epoch that has begun."""
        return learning_rate(self.training.optimiser, self.epoch - 1, self.training.stop.max_epochs)

    def stepped(self, last: bool) -> bool:
        """Count a step, the ``last`` of its epoch or not; whether the network is to be looked at now."""
        self.step += 1
        if self.step == self.training.stop.fixed_steps and self._fixed is None:
            return True
        if self._stopped is not None:
            return False
        at_end = self.step == self._end
        return at_end or (last and self.epoch % self.training.stop.check_every == 0)

    def look(self, logits: Tensor, weights: dict[str, Tensor]) -> None:
        """Take in the outputs for all training rows, and decide.

        Args:
            logits: ``(n, classes)``, of these weights.
            weights: kept, not copied.
        """
        y, stop = self.training.y, self.training.stop
        loss = float(F.cross_entropy(logits, y))
        right = logits.argmax(1) == y
        found = Snapshot(weights, self.epoch, self.step, loss, float(right.double().mean()))
        if not math.isfinite(loss):
            reason = f"the training loss is {loss} at epoch {self.epoch} (step {self.step})"
            if self._stopped is None:
                self._stopped, self._failure = found, reason
            else:  # the network that the study asks for is there; only the second look at it is lost
                self._diverged = reason
            return
        if self.step == stop.fixed_steps and self._fixed is None:
            self._fixed = found
        at_check = self.step == self._end or (
            self.step % self.steps_per_epoch == 0 and self.epoch % stop.check_every == 0
        )
        if self._stopped is None and at_check:
            part = slice(stop.rows)
            if stop.rule == "loss":
                self._met = (
                    loss if stop.rows is None else float(F.cross_entropy(logits[part], y[part]))
                ) <= _threshold(stop)
            elif stop.rule == "accuracy":
                self._met = float(right[part].double().mean()) >= _threshold(stop)
            else:
                self._met = self.step == self._end
            if self._met or self.step == self._end:
                self._stopped = found

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch."""
        return math.ceil(len(self.training.y) / self.training.optimiser.batch_size)

    @property
    def over(self) -> bool:
        """Whether there is nothing left to do."""
        if self._failure or self._diverged:
            return True
        return self._stopped is not None and (self.training.stop.fixed_steps is None or self._fixed is not None)

    @property
    def fraction(self) -> float:
        """A lower bound on what is done: of the cap, where the criterion is not met before."""
        return 1.0 if self.over else self.step / max(self._end, self.training.stop.fixed_steps or 0)

    def result(self) -> Trained:
        """How it ended; only once it is over."""
        assert self._stopped is not None
        return Trained(self._stopped, self._met and not self._failure, self._failure, self._fixed, self._diverged)


def learning_rate(optimiser: OptimiserSpec, epoch: int, max_epochs: int) -> float:
    """Step size of an epoch, counted from 0.

    Example:
        >>> step = OptimiserSpec(lr=0.5, schedule="step", drops=(0.8,))
        >>> [learning_rate(step, epoch, 10) for epoch in (0, 7, 8)]
        [0.5, 0.5, 0.05]
    """
    if optimiser.schedule == "step":
        dropped = sum(epoch >= round(part * max_epochs) for part in optimiser.drops)
        return optimiser.lr * optimiser.drop_factor**dropped
    if optimiser.schedule == "cosine":
        return optimiser.lr * 0.5 * (1.0 + math.cos(math.pi * min(epoch / max_epochs, 1.0)))
    return optimiser.lr


def steps_of(training: Training) -> int:
    """Steps at the cap."""
    stop = training.stop
    epoch = math.ceil(len(training.y) / training.optimiser.batch_size)
    most = stop.max_epochs * epoch
    return most if stop.max_steps is None else min(most, stop.max_steps)


def _threshold(stop: StopSpec) -> float:
    assert stop.threshold is not None
    return stop.threshold
