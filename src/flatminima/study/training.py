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
from flatminima.averaging import SWAD, reestimate_batchnorm
from flatminima.data import Splits, TensorSplit
from flatminima.optim import SAM
from flatminima.study.settings import CompareSettings, gradients_per_step

EVALUATIONS = 50  # of the validation loss in a run: the SWAD specification asks for one every 1-2 % of the steps
MONITOR_ROWS = 2000  # of the validation split, for those evaluations
_CHUNK = 1024
_SWAD_FIELDS = ("start_step", "end_step", "n", "converged", "threshold", "detected_at", "stopped_at")


@dataclass
class TrainingRecord:
    """What happened in a training; plain numbers, for JSON."""

    steps: int = 0
    gradient_evaluations: int = 0
    history: dict[str, list[float]] = field(
        default_factory=lambda: {"step": [], "train_loss": [], "validation_loss": [], "validation_accuracy": []}
    )
    swad: dict[str, Any] | None = None
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
    validation loss is evaluated every 1/50 of the run; SWAD reads it, nothing else does. A NaN or infinite loss ends the run:
    the record then holds the step and the reason.

    Returns:
        The model in eval mode, on the settings' device (SWAD: with its average, BatchNorm re-estimated), and the record.
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
            logits = model(x.to(device))
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
    total = settings.method_steps(method, len(splits.train))
    every = max(1, total // EVALUATIONS)
    base = torch.optim.SGD(
        model.parameters(), lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
    )
    parts = method.split("+")
    optimizer = SAM(base, settings.rho, model=model) if "sam" in parts else base
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(base, total) if settings.schedule == "cosine" else None
    swad = SWAD(model, tolerance=settings.tolerance) if "swad" in parts else None
    monitor = TensorSplit(splits.validation.x[:MONITOR_ROWS], splits.validation.y[:MONITOR_ROWS])
    torch.manual_seed(seed)
    model.train()
    window: list[float] = []
    for step, (x, y) in zip(range(total), _batches(splits.train, settings.batch_size, seed), strict=False):
        x, y = x.to(device), y.to(device)

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        loss = float(optimizer.step(closure).detach())
        record.steps, record.gradient_evaluations = step + 1, (step + 1) * gradients_per_step(method)
        if not math.isfinite(loss):
            raise _Diverged(step, f"the training loss became {loss}")
        if isinstance(optimizer, SAM) and optimizer.skipped:
            raise _Diverged(step, "a gradient became NaN or infinite")
        if schedule is not None:
            schedule.step()
        window.append(loss)
        if swad is not None:
            swad.update()
        if step % every == 0 or step == total - 1:
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
            progress((step + 1) / total)
            if swad is not None and swad.evaluate(value).dead:
                break
    if swad is not None:
        result = swad.finalize()
        record.swad = {name: getattr(result, name) for name in _SWAD_FIELDS} | {"notes": list(result.notes)}
        swad.copy_to(model)
        parts_of_train = math.ceil(len(splits.train) / _CHUNK)
        # Parts of nearly equal size: a last part of one row has no variance.
        chunks = zip(
            splits.train.x.tensor_split(parts_of_train), splits.train.y.tensor_split(parts_of_train), strict=True
        )
        reestimate_batchnorm(model, chunks)


def _batches(split: TensorSplit, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(split), generator=generator).split(size):
            if len(rows) == 1 and len(split) > 1 and size > 1:
                continue  # batch statistics of one row do not exist; every method skips it alike
            yield split.x[rows], split.y[rows]
