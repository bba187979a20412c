"""What one training yields: checkpoints chosen by a rule, and averages of its iterates. All read the same trajectory.

A reader sees every iterate and every evaluation and changes nothing, so methods that differ in their reader alone are paired to
the last bit. What an evaluation holds comes from the source domains; only the oracle is given the target, by the name of it.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from torch import Tensor, nn

from flatminima.averaging import EMA, SWA, SWAD, WeightAverage
from flatminima.protocols.domains_settings import DomainSettings

READERS: Mapping[str, str] = MappingProxyType(
    {
        "selected": "the checkpoint with the best source validation accuracy",
        "last": "the last iterate",
        "lowest": "the checkpoint with the lowest source validation loss",
        "oracle": "the checkpoint with the best accuracy on held-out rows of the target: sees the target, never a result",
        "swa": "sparse average (SWA): one iterate per evaluation over the last part of the run",
        "tail": "dense tail average: every iterate over the last part of the run",
        "ema": "exponential moving average",
        "swad": "SWAD: every iterate of the valley of the source validation loss",
        "swad-released": "SWAD as its code does it",
        "swad-2f": "SWAD with every second evaluation",
        "swad-4f": "SWAD with every fourth evaluation",
    }
)


@dataclass(frozen=True)
class Evaluation:
    """The live iterate on the held-out rows of the source domains, in the order of the domains.

    Attributes:
        step: after which; the first is 0.
        losses, accuracies: one per source domain.
    """

    step: int
    losses: tuple[float, ...]
    accuracies: tuple[float, ...]

    @property
    def loss(self) -> float:
        """Mean over domains, not over rows."""
        return math.fsum(self.losses) / len(self.losses)

    @property
    def accuracy(self) -> float:
        """Mean over domains, not over rows."""
        return math.fsum(self.accuracies) / len(self.accuracies)


class Reader(ABC):
    """Follows a training and ends with weights."""

    averages = False  # whether BatchNorm's statistics belong to other weights and have to be re-estimated

    def after_step(self) -> None:  # noqa: B027  # most readers wait for one of the two events
        """An optimiser step was made."""

    def after_evaluation(self, evaluation: Evaluation) -> None:  # noqa: B027
        """An evaluation was made, after the step it names."""

    @abstractmethod
    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The weights in the model inside the block, its own afterwards. Called after the training."""

    def facts(self) -> dict[str, Any]:
        """How the weights came about, for the record."""
        return {}


class Last(Reader):
    """The last iterate."""

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The model holds it already."""
        yield


class Checkpoint(Reader):
    """The iterate with the highest score at an evaluation; the earliest of equals.

    Args:
        model: followed.
        value: score of an evaluation.
    """

    def __init__(self, model: nn.Module, value: Callable[[Evaluation], float]) -> None:
        self._model = model
        self._value = value
        self._best = -math.inf
        self._step = -1
        self._state: dict[str, Tensor] = {}

    def after_evaluation(self, evaluation: Evaluation) -> None:
        """Keep a copy of the weights and buffers if they are better."""
        value = self._value(evaluation)
        if value > self._best or self._step < 0:
            self._best, self._step = value, evaluation.step
            self._state = {name: tensor.clone() for name, tensor in self._model.state_dict().items()}

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """See :class:`Reader`."""
        own = {name: tensor.clone() for name, tensor in self._model.state_dict().items()}
        self._model.load_state_dict(self._state)
        try:
            yield
        finally:
            self._model.load_state_dict(own)

    def facts(self) -> dict[str, Any]:
        """The step that was chosen."""
        return {"step": self._step}


class Averaged(Reader):
    """An average that looks at nothing but the steps."""

    averages = True

    def __init__(self, average: WeightAverage) -> None:
        self._average = average

    def after_step(self) -> None:
        """See :class:`Reader`."""
        self._average.update()

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """See :class:`Reader`."""
        with self._average.swapped():
            yield

    def facts(self) -> dict[str, Any]:
        """What was averaged."""
        return {"start_step": self._average.start, "every": self._average.every, "n": self._average.n}


class Valley(Reader):
    """SWAD; training goes on after the end of the valley, for the other readers.

    Args:
        swad: the rule.
        thinning: every how many evaluations it is told.
    """

    averages = True
    _FIELDS = ("start_step", "end_step", "n", "converged", "threshold", "detected_at", "stopped_at")

    def __init__(self, swad: SWAD, thinning: int = 1) -> None:
        self._swad = swad
        self._thinning = thinning
        self._count = 0
        self._seen: list[tuple[int, float]] = []

    def after_step(self) -> None:
        """See :class:`Reader`."""
        self._swad.update()

    def after_evaluation(self, evaluation: Evaluation) -> None:
        """See :class:`Reader`."""
        if self._count % self._thinning == 0:
            self._swad.evaluate(evaluation.loss)
            self._seen.append((evaluation.step, evaluation.loss))
        self._count += 1

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """See :class:`Reader`."""
        with self._swad.swapped():
            yield

    def facts(self) -> dict[str, Any]:
        """The valley and what it was judged by.

        ``final_ratio``: last loss over the loss at the start (below one: the loss still fell when the start was declared).
        ``highest_ratio``: largest loss after the detection over the threshold (the end needs several in a row above one).
        """
        result = self._swad.finalize()
        found: dict[str, Any] = {name: getattr(result, name) for name in self._FIELDS}
        found["notes"] = list(result.notes)
        found["votes"] = None if result.votes is None else [list(vote) for vote in result.votes]
        found["evaluations"] = len(self._seen)
        losses, start = dict(self._seen), self._swad.status.start_step
        found["final_ratio"] = None if start is None else self._seen[-1][1] / losses[start]
        after = [loss for step, loss in self._seen if result.detected_at is not None and step > result.detected_at]
        found["highest_ratio"] = max(after) / result.threshold if after and result.threshold else None
        return found


def make_readers(
    settings: DomainSettings, model: nn.Module, target_accuracy: Callable[[], float] | None
) -> dict[str, Reader]:
    """All readers of one training; without ``target_accuracy`` (of the live model) there is no oracle."""
    last = settings.run_steps - 1
    start = _tail_start(settings)

    def swad(variant: Literal["paper", "released"] = "paper") -> SWAD:
        return SWAD(
            model, n_converge=settings.n_converge, n_tolerance=settings.n_tolerance, tolerance=settings.tolerance,
            variant=variant,
        )  # fmt: skip

    readers: dict[str, Reader] = {
        "selected": Checkpoint(model, lambda evaluation: evaluation.accuracy),
        "last": Last(),
        "lowest": Checkpoint(model, lambda evaluation: -evaluation.loss),
    }
    if target_accuracy is not None:
        score = target_accuracy
        readers["oracle"] = Checkpoint(
            model, lambda evaluation: score() if settings.oracle_at_any or evaluation.step == last else -math.inf
        )
    return readers | {
        "swa": Averaged(SWA(model, start=start, every=settings.every)),
        "tail": Averaged(SWA(model, start=start)),
        "ema": Averaged(EMA(model, timescale=-1 / math.log(settings.ema_decay))),
        "swad": Valley(swad()),
        "swad-released": Valley(swad("released")),
        "swad-2f": Valley(swad(), 2),
        "swad-4f": Valley(swad(), 4),
    }


def _tail_start(settings: DomainSettings) -> int:
    """The first evaluated step of the last part of the run, so that sparse and dense average cover the same steps."""
    wanted = (1 - settings.tail) * (settings.run_steps - 1)
    return min(math.ceil(wanted / settings.every - 1e-9) * settings.every, settings.run_steps - 1)


def digest(model: nn.Module) -> str:
    """A short name for the exact bits of the trainable parameters."""
    hasher = hashlib.sha256()
    for parameter in model.parameters():
        hasher.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    return hasher.hexdigest()[:16]
