"""One training of the comparison: same initial weights and same data order for every method of a seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flatminima import models
from flatminima.data import Splits, TensorSplit
from flatminima.study.averages import Averaging
from flatminima.study.methods import parse
from flatminima.study.settings import CompareSettings
from flatminima.study.steps import Steps

EVALUATIONS = 50  # of the validation loss in a run: the SWAD specification asks for one every 1-2 % of the steps
MONITOR_ROWS = 2000  # of the validation split, for those evaluations, unless the settings say otherwise
_CHUNK = 1024
_PIECE = 256  # rows of a forward pass: activations that stay in the cache, twice as fast as a whole chunk for pictures


@dataclass
class TrainingRecord:
    """What happened in a training; plain numbers, for JSON."""

    steps: int = 0
    gradient_evaluations: int = 0
    history: dict[str, list[float]] = field(
        default_factory=lambda: {"step": [], "train_loss": [], "validation_loss": [], "validation_accuracy": []}
    )
    swad: dict[str, Any] | None = None
    average: dict[str, Any] | None = None
    failure: dict[str, Any] | None = None


class _Diverged(Exception):
    def __init__(self, step: int, reason: str) -> None:
        super().__init__(reason)
        self.step, self.reason = step, reason


def train(
    settings: CompareSettings,
    method: str,
    seed: int,
    splits: Splits,
    progress: Callable[[float], None] = lambda fraction: None,
) -> tuple[nn.Module, TrainingRecord]:
    """Train one network.

    Initial weights and the order of the training rows depend on ``seed`` alone, so the methods of a seed are paired. The
    validation loss is evaluated every 1/50 of the run; SWAD reads it, nothing else does. A NaN or infinite loss or gradient
    ends the run: the record then holds the step and the reason.

    Returns:
        The model in eval mode, on the settings' device (with its average, BatchNorm re-estimated, where the method has one),
        and the record.
    """
    device = torch.device(settings.device)
    model = models.build(settings.model, splits.input_shape, splits.classes, seed=seed).to(device)
    record = TrainingRecord()
    try:
        _run(settings, method, seed, model, splits, record, progress)
    except _Diverged as diverged:
        record.failure = {"step": diverged.step, "reason": diverged.reason}
    return model.eval(), record


def evaluate(model: nn.Module, split: TensorSplit, device: torch.device) -> tuple[float, float]:
    """Mean cross-entropy and accuracy over a split, in eval mode; sums in double precision."""
    was_training = model.training
    model.eval()
    loss, correct = 0.0, 0
    with torch.no_grad():
        for x, y in zip(split.x.split(_CHUNK), split.y.split(_CHUNK), strict=True):
            logits = torch.cat([model(piece.to(device)) for piece in x.split(_PIECE)])
            loss += float(F.cross_entropy(logits.double(), y.to(device), reduction="sum"))
            correct += int((logits.argmax(1) == y.to(device)).sum())
    model.train(was_training)
    return loss / len(split), correct / len(split)


def _run(
    settings: CompareSettings,
    method: str,
    seed: int,
    model: nn.Module,
    splits: Splits,
    record: TrainingRecord,
    progress: Callable[[float], None],
) -> None:
    device = torch.device(settings.device)
    rows = len(splits.train)
    every = max(1, settings.method_steps(method, rows) // EVALUATIONS)
    steps = Steps(parse(method), settings, model, rows, seed)
    average = Averaging(parse(method), settings, model, rows)
    seen = slice(0, settings.monitor_rows or MONITOR_ROWS)
    monitor = TensorSplit(splits.validation.x[seen], splits.validation.y[seen])
    torch.manual_seed(seed)
    model.train()
    window: list[float] = []
    for step, (x, y) in enumerate(_batches(splits.train, settings.batch_size, seed)):
        loss = steps.step(x.to(device), y.to(device))
        record.steps, record.gradient_evaluations = steps.taken, steps.spent
        if not math.isfinite(loss):
            raise _Diverged(step, f"the training loss became {loss}")
        if steps.skipped:
            raise _Diverged(step, "a gradient became NaN or infinite")
        window.append(loss)
        average.after_step(steps.done)
        if step % every == 0 or steps.done >= 1:
            value, accuracy = evaluate(model, monitor, device)
            if not math.isfinite(value):
                raise _Diverged(step, f"the validation loss became {value}")
            for name, entry in (
                ("step", step),
                ("train_loss", sum(window) / len(window)),
                ("validation_loss", value),
                ("validation_accuracy", accuracy),
            ):
                record.history[name].append(entry)
            window.clear()
            progress(steps.done)
            if average.after_evaluation(value) or steps.done >= 1:
                break
    record.swad, record.average = average.finish(_chunks(splits.train))


def _chunks(split: TensorSplit) -> Iterator[tuple[Tensor, Tensor]]:
    """Parts of nearly equal size: a last part of one row has no variance."""
    parts = math.ceil(len(split) / _CHUNK)
    return zip(split.x.tensor_split(parts), split.y.tensor_split(parts), strict=True)


def _batches(split: TensorSplit, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(split), generator=generator).split(size):
            if len(rows) == 1 and len(split) > 1 and size > 1:
                continue  # batch statistics of one row do not exist; every method skips it alike
            yield split.x[rows], split.y[rows]
