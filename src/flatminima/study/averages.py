"""The averaging side of one training: which iterates enter, and what becomes of the mean.

The averages have the recipes of their own documentation, in units of the run, because runs differ in length: SWA from three
quarters of the budget on, one iterate an epoch; EMA with a memory of a tenth of the run; LAWA over the five latest epochs; the
tail average over the last quarter. An epoch is as many optimiser steps as there are batches in one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from flatminima.averaging import EMA, LAWA, SWA, SWAD, TailAverage, WeightAverage, reestimate_batchnorm
from flatminima.study.methods import Method
from flatminima.study.settings import CompareSettings

SWA_START = 0.75
EMA_SHARE = 0.1
LAWA_CHECKPOINTS = 5
TAIL_FRACTION = 0.25
_SWAD_FIELDS = ("start_step", "end_step", "n", "converged", "threshold", "detected_at", "stopped_at")


class Averaging:
    """The average of a run; of a method without one it does nothing.

    Args:
        method: whose ``average`` says which.
        settings: of the run.
        model: whose weights are averaged.
        rows: of the training set.
    """

    def __init__(self, method: Method, settings: CompareSettings, model: nn.Module, rows: int) -> None:
        steps = settings.method_steps(method.name, rows)
        epoch = math.ceil(rows / settings.batch_size)
        self._model = model
        self._from = SWA_START if method.average == "swa" else 0.0
        self._average: WeightAverage | None = None
        self._swad: SWAD | None = None
        self.options: dict[str, Any] = {}
        if method.average == "swa":
            self.options = {"every": epoch}
            self._average = SWA(model, **self.options)
        elif method.average == "ema":
            self.options = {"timescale": max(1.0, EMA_SHARE * steps)}
            self._average = EMA(model, **self.options)
        elif method.average == "lawa":
            # However a variant decides, it makes so many steps: the average is never empty.
            surely = max(1, settings.sgd_steps(rows) // method.most_cost)
            self.options = {"k": LAWA_CHECKPOINTS, "every": epoch, "start": min(epoch, surely) - 1}
            self._average = LAWA(model, **self.options)
        elif method.average == "tail":
            self.options = {"fraction": TAIL_FRACTION}
            self._average = TailAverage(model, **self.options)
        elif method.average is not None:
            variant: Any = "released" if method.average == "swad-released" else "paper"
            self._swad = SWAD(model, tolerance=settings.tolerance, variant=variant)

    def after_step(self, done: float) -> None:
        """Take in an iterate; ``done`` is the share of the budget that is spent."""
        if self._swad is not None:
            self._swad.update()
        elif self._average is not None and done >= self._from:
            self._average.update()

    def after_evaluation(self, loss: float) -> bool:
        """Take in a validation loss; whether the training may end."""
        return self._swad is not None and self._swad.evaluate(loss).dead

    def finish(self, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """Put the average into the model, with BatchNorm statistics of ``batches``.

        Returns:
            What SWAD found, and what any other average was; each for the run's record, or ``None``.
        """
        found: tuple[dict[str, Any] | None, dict[str, Any] | None] = (None, None)
        if self._swad is not None:
            result = self._swad.finalize()
            found = ({name: getattr(result, name) for name in _SWAD_FIELDS} | {"notes": list(result.notes)}, None)
            self._swad.copy_to(self._model)
        elif self._average is not None:
            found = (None, {"n": self._average.n, **self.options})
            self._average.copy_to(self._model)
        else:
            return found
        reestimate_batchnorm(self._model, batches)
        return found
