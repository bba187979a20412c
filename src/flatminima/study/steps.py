"""The optimiser side of one training: steps that count the gradients they evaluate and end with the budget.

Every variant has the defaults of its own documentation, and nothing is tuned. What the settings decide for all of
them are learning rate, momentum, weight decay and the radius ``rho``, with two exceptions:

- ASAM's ball is measured in units of the weights' own sizes. Its radius is ten times the setting: the customary pair is 0.05
  for SAM and 0.5 for ASAM (Kwon et al., 2021);
- bSAM makes its own update. It has the values that its authors publish for CIFAR (Möllenhoff and Khan, 2023, and their code):
  learning rate 0.5, betas 0.9 and 0.999, prior precision 10, radius 0.01, damping 0.1. They go with their warm-up and a
  decaying rate; here it shares the schedule of the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flatminima.optim import BSAM, SAM
from flatminima.study.methods import ASCENT, Method
from flatminima.study.settings import CompareSettings

ASAM_RATIO = 10.0
#: Perturbations per step of m-SAM and bSAM. Our choice for batches of 64; bSAM's authors cut batches of 200 in 8.
MICRO_BATCHES = 4
BSAM_DEFAULTS: dict[str, Any] = {
    "lr": 0.5,
    "betas": (0.9, 0.999),
    "rho": 0.01,
    "damping": 0.1,
    "initial_precision": 1.0,
}
BSAM_PRIOR_PRECISION = 10.0


def build(method: Method, settings: CompareSettings, model: nn.Module, rows: int, seed: int) -> torch.optim.Optimizer:
    """The optimiser of a method, for training on so many rows."""
    if method.optimizer == "bsam":
        return BSAM(
            model.parameters(), rows, weight_decay=BSAM_PRIOR_PRECISION / rows, model=model, seed=seed, **BSAM_DEFAULTS
        )
    base = torch.optim.SGD(
        model.parameters(), lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
    )
    if method.optimizer == "sgd":
        return base
    rho = settings.rho * (ASAM_RATIO if method.optimizer == "asam" else 1.0)
    options: dict[str, Any] = {"steps": ASCENT} if method.optimizer == "sa-gd" else {}
    if method.optimizer in ("probability", "random"):
        options = {"seed": seed}
    return SAM(base, rho, variant=method.optimizer, model=model, **options)


class Steps:
    """Optimiser steps under a budget.

    A gradient evaluation is counted when it happens, in rows: a forward and backward pass of the step's whole batch is one, and
    of a part of it the part. Where what is left of the budget cannot pay for the dearest step of a variant, it is spent on
    steps of the base optimiser, so that every method spends the budget to the last evaluation. The learning rate follows
    the share of the budget that is spent.

    Args:
        method: what to do.
        settings: learning rate, budget and the like.
        model: its parameters are trained, on the device they are on.
        rows: of the training set.
        seed: of random perturbations.

    Attributes:
        taken: optimiser steps.
        spent: gradient evaluations.
        budget: of gradient evaluations, or of steps where the settings say so.
    """

    def __init__(self, method: Method, settings: CompareSettings, model: nn.Module, rows: int, seed: int) -> None:
        self.taken = 0
        self.spent = 0
        self.budget = settings.sgd_steps(rows)
        self._method = method
        self._model = model
        self._in_gradients = settings.budget == "gradients"
        self._cosine = settings.schedule == "cosine"
        self._optimizer = build(method, settings, model, rows, seed)
        self._rows = 0

    @property
    def done(self) -> float:
        """Share of the budget that is spent."""
        return self._progress / self.budget

    @property
    def skipped(self) -> bool:
        """Whether a gradient was not finite, so that a step was left out."""
        return bool(getattr(self._optimizer, "skipped", 0))

    @property
    def _progress(self) -> int:
        return self.spent if self._in_gradients else self.taken

    def step(self, x: Tensor, y: Tensor) -> float:
        """One step on a batch; the loss that the optimiser reports, at the weights where it looked first."""
        before, self._rows = self._progress, 0
        base = getattr(self._optimizer, "base", None)
        if self._in_gradients and base is not None and self.budget - self.spent < self._method.most_cost:
            loss = base.step(self._closure(x, y))
        elif self._method.optimizer in ("m-sam", "bsam"):
            loss = self._split_step(x, y)
        else:
            loss = self._optimizer.step(self._closure(x, y))  # type: ignore[arg-type]
        evaluations, rest = divmod(self._rows, len(y))
        assert rest == 0, f"{self._rows} rows were passed on a batch of {len(y)}"
        self.taken += 1
        self.spent += evaluations
        if self._cosine:
            self._decay(before, self._progress)
        return float(loss.detach())

    def _closure(self, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            self._optimizer.zero_grad()
            loss = F.cross_entropy(self._model(x), y)
            loss.backward()
            self._rows += len(y)
            return loss

        return closure

    def _split_step(self, x: Tensor, y: Tensor) -> Tensor:
        # No piece of one row: it has no batch statistics.
        pieces = max(1, min(MICRO_BATCHES, len(y) // 2))
        parts = list(zip(x.tensor_split(pieces), y.tensor_split(pieces), strict=True))
        step: Any = self._optimizer.step
        loss: Tensor = step([self._closure(*part) for part in parts], weights=[len(part[1]) / len(y) for part in parts])
        return loss

    def _decay(self, before: int, now: int) -> None:
        """From one point of the cosine to the next, as ``CosineAnnealingLR`` does."""
        factor = (1 + math.cos(math.pi * now / self.budget)) / (1 + math.cos(math.pi * before / self.budget))
        for group in self._optimizer.param_groups:
            group["lr"] = factor * group["lr"]
