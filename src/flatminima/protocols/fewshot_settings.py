"""What decides the result of an incremental few-shot run, and the named protocols: small, the paper's, the released code's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from types import MappingProxyType
from typing import Any, get_args

from flatminima.models import MODELS
from flatminima.names import unknown
from flatminima.optim.flat_region_noise import Noise
from flatminima.protocols.fewshot_split import ORDERS
from flatminima.study.settings import SettingsError

PROTOCOLS: Mapping[str, str] = MappingProxyType(
    {
        "small": "reduced networks and schedules; what a CPU can do",
        "paper": "networks, schedules and box of the paper's experiments, without the released code's defects",
        "released": "what the authors' code does, its known defects included, for comparison",
    }
)
AUGMENTATIONS = ("none", "shift-flip", "resized-crop")
REPLAY = ("none", "novel", "all")
DISTANCES = ("euclidean", "cosine")
JOINT = ("scratch", "base")
BATCHNORM = ("reestimate", "running")


@dataclass(frozen=True)
class FewShotSettings:
    """Everything that decides the result of a run, except method, seed and draw.

    Attributes:
        data: name of a data set, or path of a folder.
        protocol: the preset these settings began with.
        split: JSON file with a split to use; ``None``: made from the seed.
        validate: use base images alone: some base classes play the new ones, and train images held out are the test images.
            To choose settings on.
        base, way, shot, sessions: base classes, new classes of a session, images of each, sessions after the base.
        order: class order, ``random`` by seed or ``sorted``.
        base_images, test_images: of each class, at most; ``None``: all.
        held_out: part of the base images that validates; SWAD needs some.
        model, model_options: a reference network that ends in a linear layer.
        size: pixels a side of stored pictures, for pictures in files.
        crop: pixels a side that the network sees; ``None``: all.
        pool: average blocks of so many pixels a side.
        augment: in training: ``none``, ``shift-flip`` (pad 4, crop, flip) or ``resized-crop``.
        iterations: optimiser steps of base training.
        batch_classes, batch_images: a batch has so many images of each of so many classes.
        lr, classifier_lr: of the features and of the base classifier (``None``: the same).
        momentum, weight_decay: of SGD, in base training and in the sessions.
        milestones, gamma: parts of the base training after which the learning rate is multiplied by gamma.
        batchnorm: after base training, ``reestimate`` statistics on clean weights, or keep the ``running`` ones.
        layers: so many last convolutions (3x3 or larger) get noise, and are all that the sessions train.
        layer_names: patterns of parameter names instead.
        bound: half width b of the box; ``relative``: as a part of each tensor's root mean square.
        clamp_bound: half width that the sessions are clamped to, if not b.
        noise, draws, antithetic: distribution, and M draws a step.
        prototype_weight, std_weight: of prototype fixing, and of the standard deviation over draws (not in the paper).
        detach_clean: no gradient through the prototypes of the clean network.
        constant_prototypes, swap_weights, grid_step: defects of the released code; see :data:`DEFECTS`.
        rho: of SAM.
        average_start, average_lr: part of base training after which SWA averages, at a constant learning rate.
        every: steps between the evaluations of SWAD.
        session_steps, session_lr: full-batch steps of a session, and their learning rate.
        session_augment: augment the shots in them.
        distance, temperature: of the metric loss: logits are ``temperature`` times minus the distance.
        replay: images of earlier classes that the sessions see: ``none``, ``novel`` (their shots) or ``all`` (exemplars of base
            classes as well).
        joint: train joint networks from ``scratch``, or go on from the ``base`` network.
        joint_iterations: of joint training a session.
        rebalance_epochs, rebalance_lr, rebalance_images: of cRT's classifier: epochs, learning rate, images a class in a batch.
        exemplars: of every base class, for iCaRL, Rebalance and replay of all; of new classes all shots are kept.
        exemplar_epochs, exemplar_lr: of these methods.
        less_forget, margin, margin_classes: of Rebalance.
        fsll_threshold, fsll_epochs, fsll_lr, fsll_penalty: tensors with a largest weight up to the threshold are trained.
        probe_rows: images that flatness is measured on; 0: not measured.
        probe_draws, probe_steps: random points of the box, and ascent steps to its worst.
        device: where to compute.
    """

    data: str = "digits"
    protocol: str = "small"
    split: str | None = None
    validate: bool = False
    base: int = 6
    way: int = 1
    shot: int = 5
    sessions: int | None = None
    order: str = "random"
    base_images: int | None = None
    test_images: int | None = None
    held_out: float = 0.1
    model: str = "resnet20"
    model_options: Mapping[str, Any] = field(default_factory=dict)
    size: int | None = None
    crop: int | None = None
    pool: int = 1
    augment: str = "none"
    iterations: int = 300
    batch_classes: int = 16
    batch_images: int = 16
    lr: float = 0.1
    classifier_lr: float | None = None
    momentum: float = 0.9
    weight_decay: float = 5e-4
    milestones: tuple[float, ...] = (0.5, 0.75)
    gamma: float = 0.1
    batchnorm: str = "reestimate"
    layers: int = 4
    layer_names: tuple[str, ...] = ()
    bound: float = 0.005
    relative: bool = False
    clamp_bound: float | None = None
    noise: Noise = "uniform"
    draws: int = 2
    antithetic: bool = False
    prototype_weight: float = 1.0
    std_weight: float = 0.0
    detach_clean: bool = False
    constant_prototypes: bool = False
    swap_weights: bool = False
    grid_step: bool = False
    rho: float = 0.05
    average_start: float = 0.75
    average_lr: float = 0.05
    every: int = 25
    session_steps: int = 6
    session_lr: float = 0.01
    session_augment: bool = True
    distance: str = "euclidean"
    temperature: float = 1.0
    replay: str = "novel"
    joint: str = "scratch"
    joint_iterations: int = 300
    rebalance_epochs: int = 16
    rebalance_lr: float = 0.1
    rebalance_images: int = 4
    exemplars: int = 2
    exemplar_epochs: int = 90
    exemplar_lr: float = 0.01
    less_forget: float = 4.0
    margin: float = 0.5
    margin_classes: int = 2
    fsll_threshold: float = 0.4
    fsll_epochs: int = 15
    fsll_lr: float = 1e-3
    fsll_penalty: float = 5.0
    probe_rows: int = 500
    probe_draws: int = 20
    probe_steps: int = 10
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name, choices in (
            ("protocol", PROTOCOLS), ("order", ORDERS), ("model", MODELS), ("augment", AUGMENTATIONS), ("replay", REPLAY),
            ("distance", DISTANCES), ("joint", JOINT), ("batchnorm", BATCHNORM), ("noise", get_args(Noise)),
        ):  # fmt: skip
            if getattr(self, name) not in choices:
                raise SettingsError(unknown(name, getattr(self, name), choices))
        for name, least in (
            ("base", 2), ("way", 1), ("shot", 1), ("sessions", 1), ("base_images", 2), ("test_images", 1), ("size", 1),
            ("crop", 1), ("pool", 1), ("iterations", 1), ("batch_classes", 2), ("batch_images", 1), ("layers", 1),
            ("draws", 1), ("every", 1), ("session_steps", 1), ("joint_iterations", 0), ("rebalance_epochs", 1),
            ("rebalance_images", 1), ("exemplars", 1), ("exemplar_epochs", 1), ("margin_classes", 1), ("fsll_epochs", 1),
            ("probe_rows", 0), ("probe_draws", 2), ("probe_steps", 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < least:
                raise SettingsError(f"{flag(name)} must be at least {least}, got {value}")
        for name in (
            "lr", "classifier_lr", "bound", "clamp_bound", "session_lr", "temperature", "rebalance_lr", "exemplar_lr",
            "fsll_lr", "fsll_threshold", "average_lr",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise SettingsError(f"{flag(name)} must be finite and > 0, got {value}")
        for name in (
            "weight_decay",
            "prototype_weight",
            "std_weight",
            "rho",
            "less_forget",
            "margin",
            "fsll_penalty",
            "gamma",
        ):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise SettingsError(f"{flag(name)} must be finite and >= 0, got {value}")
        for name in ("held_out", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise SettingsError(f"{flag(name)} must lie between 0 and 1, got {getattr(self, name)}")
        if not 0 < self.average_start < 1 or any(not 0 < part < 1 for part in self.milestones):
            raise SettingsError("average_start and milestones are parts of base training: give numbers between 0 and 1")
        if self.std_weight and self.draws < 2:
            raise SettingsError(f"--std-weight {self.std_weight:g} needs at least 2 --draws-per-step, got {self.draws}")
        if self.antithetic and self.noise == "beta_grid_released":
            raise SettingsError(
                "beta_grid_released is not symmetric: leave out --antithetic, or choose another --noise"
            )
        if self.antithetic and self.draws % 2:
            raise SettingsError(f"antithetic noise comes in pairs: --draws-per-step must be even, got {self.draws}")
        if self.crop is not None and self.size is not None and self.crop > self.size:
            raise SettingsError(f"crop {self.crop} is larger than the stored {self.size} pixels")

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        content = asdict(self)
        for name in ("milestones", "layer_names"):
            content[name] = list(content[name])
        return {**content, "model_options": dict(self.model_options)}


def flag(name: str) -> str:
    """The option of the command line that sets a field."""
    return {"draws": "--draws-per-step", "base": "--base-classes", "sessions": "--sessions"}.get(
        name, "--" + name.replace("_", "-")
    )


def preset(data: str, protocol: str = "small", **changes: Any) -> FewShotSettings:
    """The settings of a named protocol for a data set, with changes; ``None`` leaves a field as the protocol has it.

    Raises:
        SettingsError: an unknown protocol or setting, or a value that cannot be used.

    Example:
        >>> settings = preset("cifar100", "paper")
        >>> settings.base, settings.way, settings.bound, settings.layers, settings.iterations
        (60, 5, 0.005, 4, 30003)
    """
    if protocol not in PROTOCOLS:
        raise SettingsError(unknown("protocol", protocol, PROTOCOLS))
    given = {name: value for name, value in changes.items() if value is not None}
    known = {f.name for f in fields(FewShotSettings)}
    for name in given:
        if name not in known:
            raise SettingsError(unknown("setting", name, sorted(known)))
    if "split" in given and (decided := [flag(name) for name in _OF_SPLIT if name in given]):
        raise SettingsError(f"--split decides {', '.join(decided)}: leave them out")
    chosen = _small(data) if protocol == "small" else _paper(data)
    if protocol == "released":
        chosen |= RELEASED
    if given.get("model", chosen.get("model", "resnet20")) != chosen.get("model", "resnet20"):
        chosen.pop("model_options", None)
    if "size" in given and "crop" in chosen:  # the same margin around the crop
        chosen["crop"] = max(1, round(given["size"] * chosen["crop"] / chosen["size"]))
    return FewShotSettings(**{"data": data, "protocol": protocol, **chosen, **given})


#: What a file with a split says itself.
_OF_SPLIT = ("base", "way", "shot", "sessions", "order", "base_images", "test_images", "held_out")
_CIFAR = {"base": 60, "way": 5, "shot": 5, "augment": "shift-flip", "model": "resnet20", "layers": 4, "bound": 0.005}


def _small(data: str) -> dict[str, Any]:
    if data == "digits":
        return {
            "model_options": {"blocks": 1, "width": 8}, "iterations": 150, "batch_images": 8, "layers": 2, "session_lr": 0.02,
            "joint_iterations": 60, "joint": "base", "exemplar_epochs": 20, "probe_rows": 200, "every": 10,
        }  # fmt: skip
    if data == "fashion-mnist":
        return {
            "model_options": {"blocks": 1, "width": 16}, "pool": 2, "base_images": 500, "test_images": 200, "iterations": 300,
            "session_lr": 0.02, "session_augment": False, "joint_iterations": 60, "joint": "base", "exemplar_epochs": 30,
            "every": 15,
        }  # fmt: skip
    if data == "cifar100":
        return {
            **_CIFAR, "iterations": 3000, "batch_images": 8, "joint": "base", "joint_iterations": 0, "exemplar_epochs": 20,
            "every": 100,
        }  # fmt: skip
    return {
        "base": 60, "way": 5, "augment": "resized-crop", "model": "resnet20", "size": 36, "crop": 32, "layers": 4,
        "iterations": 2000, "batch_images": 8, "joint": "base", "joint_iterations": 20, "exemplar_epochs": 20, "every": 100,
    }  # fmt: skip


def _paper(data: str) -> dict[str, Any]:
    if data in ("digits", "fashion-mnist"):
        raise SettingsError(f"the paper has no experiment on {data}: use --protocol small")
    if data == "cifar100":
        return {
            **_CIFAR, "iterations": 30_003, "milestones": (0.5,), "gamma": 0.01, "joint_iterations": 30_003, "exemplar_lr": 0.1,
            "probe_rows": 1000, "probe_draws": 100, "every": 300,
        }  # fmt: skip
    pictures = {
        "model": "resnet18", "model_options": {"stem": "imagenet"}, "augment": "resized-crop", "layers": 8, "probe_rows": 1000,
        "probe_draws": 100, "shot": 5,
    }  # fmt: skip
    if data == "cub-200":
        return {
            **pictures, "base": 100, "way": 10, "size": 256, "crop": 224, "iterations": 3603, "batch_classes": 32,
            "batch_images": 8, "lr": 1e-3, "classifier_lr": 1e-2, "milestones": (0.5, 0.75), "bound": 1e-4, "less_forget": 5.0,
            "joint_iterations": 3603, "fsll_threshold": 0.15, "fsll_lr": 5e-4, "fsll_epochs": 10, "every": 60,
        }  # fmt: skip
    return {
        **pictures, "base": 60, "way": 5, "size": 92, "crop": 84, "iterations": 28_503,
        "milestones": (15 / 28.503, 21 / 28.503), "bound": 0.008,
        "distance": "cosine", "temperature": 16.0, "less_forget": 3.0, "joint_iterations": 28_503,
        "fsll_threshold": 0.16, "every": 300,
    }  # fmt: skip


#: What the released code does differently from the formulas.
RELEASED: Mapping[str, Any] = {
    "noise": "beta_grid_released", "std_weight": 2.0, "constant_prototypes": True, "swap_weights": True, "grid_step": True,
    "batchnorm": "running", "order": "sorted", "held_out": 0.0,
}  # fmt: skip

#: Defects of the released code: setting -> what it does. Those marked with "-" are not copied by any preset.
DEFECTS: Mapping[str, str] = MappingProxyType(
    {
        "constant_prototypes": "the prototype loss is a Python number: prototype fixing has no gradient",
        "std_weight": "2.0 times the standard deviation over the draws is added, hard-coded and not in the paper",
        "noise": "five-level noise whose level -b/2 is binned again to b: mean 0.235 b instead of 0",
        "swap_weights": "weights are swapped back before the backward pass: layers below get gradients of the clean weights",
        "grid_step": "the fine-tuning step is rounded to multiples of b/2: small gradients move nothing",
        "batchnorm": "running statistics are a mixture of noisy and clean passes",
        "- classifier": "only F2M normalises prototypes; here every method is read with both classifiers",
        "- checkpoint": "the base checkpoint is chosen on test images of the base classes; here it is the last one",
        "- upper bound": "trained on one draw of shots only; here on the draws of all methods",
        "- regulariser": "FSLL's penalty on the change of weights is a Python number too; here it has its gradient",
        "- index files": "the lists of shots are not shipped; here they are in splits/",
        "- temperature": "cosine logits without temperature (miniImageNet), so that nothing moves",
    }
)
