"""The settings of a comparison, checked before any work is spent."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from flatminima.data import DATASETS
from flatminima.models import MODELS
from flatminima.names import unknown
from flatminima.study.methods import METHODS, expand, parse


class SettingsError(ValueError):
    """A setting that cannot be used; the message names it, its value and what is expected."""


@dataclass(frozen=True)
class CompareSettings:
    """What ``flatminima compare`` does; equal settings give equal results.

    Attributes:
        data: data set name.
        model: reference network name.
        methods: what is compared, by the names of :mod:`flatminima.study.methods`; ``"all"`` stands for every single method
            that the model allows. The first is the one the others are compared to.
        seeds: runs per method, with seeds 0 .. seeds-1. A seed fixes initial weights and data order, the same for all methods.
        epochs: passes of SGD over the training set; exclusive with ``steps``.
        steps: optimiser steps of SGD; exclusive with ``epochs``.
        budget: ``"gradients"`` gives every method the same number of gradient evaluations (SAM then takes half the steps),
            ``"steps"`` the same number of steps. A gradient evaluation is one of all rows of a step.
        batch_size: rows a step.
        lr: learning rate of every method but bSAM, which brings its own (:mod:`flatminima.study.steps`).
        momentum: of SGD.
        weight_decay: of SGD.
        schedule: ``"constant"`` (what SWAD assumes) or ``"cosine"`` to zero, for all methods, over the budget spent.
        rho: radius of SAM and its variants; ASAM takes ten times of it, its customary ratio, and bSAM its own.
        tolerance: of SWAD, the relative rise of the validation loss that ends the valley.
        train_size: rows of the training split to keep; ``None`` keeps all.
        data_seed: of the split; the same for all runs.
        monitor_rows: validation rows behind the loss that SWAD watches, evaluated 50 times a run; ``None`` takes 2,000.
        measure_rows: training rows the measures see.
        audit_rows: training rows the audit sees.
        audit_members: random reparameterisations per symmetry; 0 leaves the audit out.
        device: where to compute.
    """

    data: str = "digits"
    model: str = "mlp"
    methods: tuple[str, ...] = ("sgd", "sam", "swad", "sam+swad")
    seeds: int = 5
    epochs: int | None = None
    steps: int | None = None
    budget: str = "gradients"
    batch_size: int = 64
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "constant"
    rho: float = 0.05
    tolerance: float = 0.3
    train_size: int | None = None
    data_seed: int = 0
    monitor_rows: int | None = None
    measure_rows: int = 1000
    audit_rows: int = 128
    audit_members: int = 5
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.data not in DATASETS:
            raise SettingsError(unknown("data set", self.data, DATASETS))
        if self.model not in MODELS:
            raise SettingsError(unknown("model", self.model, MODELS))
        if not self.methods:
            raise SettingsError("--methods is empty: name at least one of " + ", ".join(METHODS) + ", or all")
        try:
            object.__setattr__(self, "methods", expand(self.methods, self.model))
        except ValueError as error:
            raise SettingsError(str(error)) from None
        if len(set(self.methods)) < len(self.methods):
            raise SettingsError(f"--methods names a method twice: {', '.join(self.methods)}")
        if self.epochs is not None and self.steps is not None:
            raise SettingsError(f"--epochs {self.epochs} and --steps {self.steps} were both given; give one")
        for name, allowed in (("budget", ("gradients", "steps")), ("schedule", ("constant", "cosine"))):
            if getattr(self, name) not in allowed:
                raise SettingsError(unknown(f"--{name}", getattr(self, name), allowed))
        for name, least in (
            ("seeds", 1), ("epochs", 1), ("steps", 2), ("batch_size", 1), ("train_size", 1),
            ("data_seed", 0), ("monitor_rows", 1), ("measure_rows", 1), ("audit_rows", 1), ("audit_members", 0),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < least:
                raise SettingsError(f"{_flag(name)} must be at least {least}, got {value}")
        for name, positive in (
            ("lr", True),
            ("momentum", False),
            ("weight_decay", False),
            ("rho", False),
            ("tolerance", False),
        ):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0 or (positive and value == 0):
                raise SettingsError(f"{_flag(name)} must be finite and {'> 0' if positive else '>= 0'}, got {value}")
        if self.lr > 1e30:
            raise SettingsError(f"--lr {self.lr} is beyond single precision; expected at most 1e30")
        if self.momentum >= 1:
            raise SettingsError(f"--momentum must be below 1, got {self.momentum}")

    def to_dict(self) -> dict[str, Any]:
        """For JSON; :meth:`from_dict` reads it back."""
        return {**asdict(self), "methods": list(self.methods)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CompareSettings:
        """Inverse of :meth:`to_dict`."""
        return cls(**{**values, "methods": tuple(values["methods"])})

    def sgd_steps(self, train_rows: int) -> int:
        """Optimiser steps of a method with one gradient a step, and the gradient evaluations of the budget; even."""
        if self.steps is not None:
            total = self.steps
        else:
            epochs = DEFAULT_EPOCHS if self.epochs is None else self.epochs
            total = epochs * math.ceil(train_rows / self.batch_size)
        return total + total % 2

    def method_steps(self, method: str, train_rows: int) -> int:
        """Optimiser steps of a method under the budget; the expected ones where a variant decides from step to step."""
        steps = self.sgd_steps(train_rows)
        return int(steps / parse(method).usual_cost) if self.budget == "gradients" else steps

    def command(self) -> str:
        """The command line that makes these results."""
        default = CompareSettings()
        words = ["flatminima compare"]
        everything = expand(["all"], self.model)
        count = len(everything)
        methods = ["all", *self.methods[count:]] if self.methods[:count] == everything else list(self.methods)
        for name, value in {**self.to_dict(), "methods": methods}.items():
            if name in ("data", "model", "methods", "seeds") or value != default.to_dict()[name]:
                words.append(f"{_flag(name)} {','.join(value) if isinstance(value, list) else value}")
        return " ".join(words)


DEFAULT_EPOCHS = 60


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
