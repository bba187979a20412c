"""What decides the result of one domain-generalisation run, and the named protocols: SWAD's, DomainBed's, and a small one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from types import MappingProxyType
from typing import Any

from flatminima.data.mnist_domains import INTERPOLATIONS
from flatminima.models import MODELS
from flatminima.names import unknown
from flatminima.study.settings import SettingsError

_MNIST = ("rotated-mnist", "colored-mnist")
NO_WEIGHTS = "none"

PROTOCOLS: Mapping[str, str] = MappingProxyType(
    {
        "scratch": "small networks from random weights; what a CPU can do",
        "swad-2021": "what SWAD's published numbers were made with: DomainBed of early 2021, statistics of BatchNorm frozen",
        "domainbed": "DomainBed today",
    }
)


@dataclass(frozen=True)
class DomainSettings:
    """Everything that decides the result of a run, except algorithm, target, seed and hyper-parameter draw.

    Attributes:
        data: name of a data set, or path of a folder.
        protocol: the preset these settings began with.
        model: a reference network, or ``resnet50``.
        model_options: of it.
        weights: of ``resnet50``; see :func:`~flatminima.models.resnet50`. ``"none"``: random ones.
        freeze_batchnorm: of ``resnet50``: keep BatchNorm's statistics.
        dropout: before the classifier of ``resnet50``.
        size: pixels a side, for pictures.
        pool: average blocks of so many pixels a side, for MNIST.
        augment: crop, flip, jitter and grey in training.
        augment_validation: also in validation, as DomainBed does.
        interpolation: of RotatedMNIST.
        data_seed: of MNIST's environments and of ``rows``; the same for all methods.
        rows: images of each domain to keep; ``None``: all.
        held_out: part of every domain that validates.
        steps: T; ``floor(T / f) * f + 1`` optimiser steps are taken, so that the last one is evaluated.
        every: f, steps between evaluations; the first comes after the first step.
        extra_last: DomainBed's evaluation at the last step too, where T is no multiple of f: T + 1 steps are taken.
        batch: images of every source domain in a batch.
        lr: of Adam; constant.
        weight_decay: of Adam.
        n_converge, n_tolerance, tolerance: of SWAD.
        tail: last part of the steps that the tail averages take.
        ema_decay: of EMA, a step.
        rho: of SAM.
        coral: weight of CORAL's penalty.
        mixup: both parameters of Mixup's beta distribution.
        oracle_at_any: whether the oracle chooses among all evaluations, or sees the last alone.
        fixed_seed: a seed changes only how domains are split, as in SWAD's code; else also initial weights and batches.
        radii: distances of local flatness.
        pairs: of directions for it; 0: none is measured.
        flatness_rows: images of the sources together, and of the target, that flatness and loss plane see.
        plane: grid lines a side of the loss plane of seed 0; 0: none.
        device: where to compute.
    """

    data: str = "rotated-mnist"
    protocol: str = "scratch"
    model: str = "mnist-cnn"
    model_options: Mapping[str, Any] = field(default_factory=dict)
    weights: str = NO_WEIGHTS
    freeze_batchnorm: bool = False
    dropout: float = 0.0
    size: int | None = None
    pool: int = 1
    augment: bool = False
    augment_validation: bool = False
    interpolation: str = "bilinear"
    data_seed: int = 0
    rows: int | None = None
    held_out: float = 0.2
    steps: int = 800
    every: int = 25
    extra_last: bool = False
    batch: int = 16
    lr: float = 1e-3
    weight_decay: float = 0.0
    n_converge: int = 3
    n_tolerance: int = 6
    tolerance: float = 0.3
    tail: float = 0.2
    ema_decay: float = 0.99
    rho: float = 0.05
    coral: float = 1.0
    mixup: float = 0.2
    oracle_at_any: bool = True
    fixed_seed: bool = False
    radii: tuple[float, ...] = (1.0, 2.0, 5.0)
    pairs: int = 10
    flatness_rows: int = 500
    plane: int = 17
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise SettingsError(unknown("protocol", self.protocol, PROTOCOLS))
        if self.model not in MODELS and self.model != "resnet50":
            raise SettingsError(unknown("model", self.model, [*MODELS, "resnet50"]))
        if self.interpolation not in INTERPOLATIONS:
            raise SettingsError(unknown("interpolation", self.interpolation, INTERPOLATIONS))
        if self.model != "resnet50" and (self.weights != NO_WEIGHTS or self.dropout or self.freeze_batchnorm):
            raise SettingsError(
                f"weights, dropout and freeze_batchnorm are of model 'resnet50'; the model is {self.model!r}"
            )
        for name, least in (
            ("steps", 2), ("every", 1), ("batch", 1), ("pool", 1), ("data_seed", 0), ("n_converge", 1), ("n_tolerance", 1),
            ("pairs", 0), ("flatness_rows", 1), ("plane", 0), ("size", 1), ("rows", 2),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < least:
                raise SettingsError(f"{flag(name)} must be at least {least}, got {value}")
        if self.pairs == 1 or self.plane == 1:
            raise SettingsError(
                f"pairs {self.pairs} and plane {self.plane}: one has no spread and spans no grid; give 0 or more than 1"
            )
        if self.every > self.steps:
            raise SettingsError(
                f"--every {self.every} is more than --steps {self.steps}: nothing but the first step would be evaluated"
            )
        for name in ("lr", "coral", "mixup", "rho", "weight_decay", "tolerance"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0 or (name in ("lr", "mixup") and value == 0):
                raise SettingsError(
                    f"{flag(name)} must be finite and {'> 0' if name in ('lr', 'mixup') else '>= 0'}, got {value}"
                )
        for name, low, high in (("held_out", 0, 1), ("tail", 0, 1), ("ema_decay", 0, 1), ("dropout", -1e-9, 1)):
            if not low < getattr(self, name) < high:
                raise SettingsError(
                    f"{flag(name)} must lie between {max(low, 0):g} and {high}, got {getattr(self, name)}"
                )
        if not self.radii or not all(math.isfinite(radius) and radius > 0 for radius in self.radii):
            raise SettingsError(f"radii must be positive and finite, got {list(self.radii)}")

    @property
    def run_steps(self) -> int:
        """Optimiser steps a run takes."""
        return self.steps + 1 if self.extra_last else self.steps // self.every * self.every + 1

    def evaluated(self, step: int) -> bool:
        """Whether an evaluation follows this step; the first is step 0."""
        return step % self.every == 0 or step == self.run_steps - 1

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "model_options": dict(self.model_options), "radii": list(self.radii)}


def flag(name: str) -> str:
    """The option of the command line that sets a field."""
    return "--" + name.replace("_", "-")


def preset(data: str, protocol: str = "scratch", **changes: Any) -> DomainSettings:
    """The settings of a named protocol for a data set, with changes; ``None`` leaves a field as the protocol has it.

    Raises:
        SettingsError: an unknown protocol or a value that cannot be used; pretrained weights that the protocol asks for
            and nobody named.

    Example:
        >>> settings = preset("vlcs", "swad-2021", weights="torchvision:IMAGENET1K_V1")
        >>> settings.every, settings.tolerance, settings.run_steps, settings.freeze_batchnorm
        (50, 0.2, 5001, True)
    """
    if protocol not in PROTOCOLS:
        raise SettingsError(unknown("protocol", protocol, PROTOCOLS))
    given = {name: value for name, value in changes.items() if value is not None}
    known = {f.name for f in fields(DomainSettings)}
    for name in given:
        if name not in known:
            raise SettingsError(unknown("setting", name, sorted(known)))
    chosen = {"data": data, "protocol": protocol, **_PRESETS[protocol](data)}
    if given.get("model", chosen["model"]) != chosen["model"]:
        narrow = {"width": 16} if given["model"] == "resnet18" else {}  # what a CPU can train
        chosen |= {"model_options": narrow, "weights": NO_WEIGHTS, "freeze_batchnorm": False}
    chosen |= given
    if chosen["model"] == "resnet50" and "weights" not in chosen:
        advice = {
            "swad-2021": "--weights torchvision:IMAGENET1K_V1, or the file of those weights",
            "domainbed": "--weights FILE with those of timm's resnet50.ram_in1k",
        }.get(protocol, "--weights FILE")
        raise SettingsError(
            f"protocol {protocol} fine-tunes a ResNet-50: give {advice}; or --weights none for random ones"
        )
    return DomainSettings(**chosen)


def _scratch(data: str) -> dict[str, Any]:
    if data == "rotated-mnist":
        return {"model": "mnist-cnn", "model_options": {"width": 16}, "pool": 2, "steps": 800, "every": 25, "batch": 16}
    if data == "colored-mnist":
        return {"model": "mnist-cnn", "model_options": {"width": 16}, "pool": 2, "steps": 400, "every": 10, "batch": 32}
    return {
        "model": "resnet-gn", "model_options": {"width": 16, "stem_stride": 2}, "size": 64, "augment": True, "batch": 32,
        "steps": 1000, "every": 25, "flatness_rows": 240,
    }  # fmt: skip


def _mnist(interpolation: str) -> dict[str, Any]:
    cnn: dict[str, Any] = {"model": "mnist-cnn", "model_options": {"width": 64}, "batch": 64, "lr": 1e-3}
    return {**cnn, "interpolation": interpolation, "steps": 5000, "every": 100, "flatness_rows": 1000, "pairs": 50}


def _fine_tuning(data: str) -> dict[str, Any]:
    return {
        "model": "resnet50", "size": 224, "augment": True, "batch": 32, "lr": 5e-5, "pairs": 50, "flatness_rows": 1000,
        "tolerance": 0.2 if data == "vlcs" else 0.3, "radii": (5.0, 10.0, 20.0, 40.0, 60.0),
    }  # fmt: skip


def _swad_2021(data: str) -> dict[str, Any]:
    if data in _MNIST:
        return {**_mnist("bicubic"), "fixed_seed": True}
    steps, every = {"domainnet": (15_000, 500), "vlcs": (5000, 50)}.get(data, (5000, 100))
    return {**_fine_tuning(data), "freeze_batchnorm": True, "steps": steps, "every": every, "fixed_seed": True}


def _domainbed(data: str) -> dict[str, Any]:
    today = {"extra_last": True, "oracle_at_any": False}
    if data in _MNIST:
        return {**_mnist("bilinear"), **today}
    every = 1000 if data == "domainnet" else 300
    return {**_fine_tuning(data), **today, "steps": 5000, "every": every, "augment_validation": True}


_PRESETS = {"scratch": _scratch, "swad-2021": _swad_2021, "domainbed": _domainbed}

_MEANINGS = {
    "freeze_batchnorm": "BatchNorm's running statistics are frozen; scale and shift are trained",
    "augment_validation": "validation images are augmented like training images",
    "interpolation": "of RotatedMNIST",
    "steps": "optimiser steps, one more is taken",
    "every": "steps between evaluations",
    "extra_last": "one more evaluation at the last step, where it is no multiple of the period",
    "oracle_at_any": "the oracle row chooses among all evaluations, not the last one alone",
    "fixed_seed": "a seed changes the split alone; else also initial weights and batches",
    "weights": "where fine-tuning begins",
}
_WEIGHTS = {"swad-2021": "torchvision IMAGENET1K_V1", "domainbed": "timm resnet50.ram_in1k (trained with AugMix)"}


def differences(data: str, first: str = "swad-2021", second: str = "domainbed") -> list[tuple[str, str, str, str]]:
    """What two named protocols do differently on a data set: (setting, first value, second value, meaning).

    Example:
        >>> [row[:3] for row in differences("rotated-mnist")][0]
        ('interpolation', 'bicubic', 'bilinear')
    """
    a, b = (preset(data, name, weights=NO_WEIGHTS).to_dict() for name in (first, second))
    rows = [
        (name, str(a[name]), str(b[name]), _MEANINGS.get(name, ""))
        for name in a
        if a[name] != b[name] and name != "protocol"
    ]
    if a["model"] == b["model"] == "resnet50" and {first, second} <= _WEIGHTS.keys():
        rows.insert(0, ("weights", _WEIGHTS[first], _WEIGHTS[second], _MEANINGS["weights"]))
    return rows
