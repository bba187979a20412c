"""DomainBed's random search: draw 0 is the defaults, the others are drawn from its ranges by its own streams."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from flatminima.data.domain_splits import seed_hash
from flatminima.protocols.domains_settings import DomainSettings

Draw = Callable[[np.random.RandomState], Any]


def _log(base: float, low: float, high: float) -> Draw:
    return lambda rng: base ** rng.uniform(low, high)


def _ranges(settings: DomainSettings, algorithm: str) -> dict[str, tuple[str, Draw]]:
    """Field -> (DomainBed's name, which keys the stream; the distribution)."""
    fine_tuning = settings.model == "resnet50"
    ranges: dict[str, tuple[str, Draw]] = {}
    if fine_tuning:
        widest = 5.0 if settings.data == "domainnet" else 5.5
        ranges["lr"] = ("lr", _log(10, -5, -3.5))
        ranges["weight_decay"] = ("weight_decay", _log(10, -6, -2))
        ranges["dropout"] = ("resnet_dropout", lambda rng: float(rng.choice([0.0, 0.1, 0.5])))
        ranges["batch"] = ("batch_size", lambda rng: int(2 ** rng.uniform(3, widest)))
    else:
        ranges["lr"] = ("lr", _log(10, -4.5, -2.5))
        ranges["batch"] = ("batch_size", lambda rng: int(2 ** rng.uniform(3, 9)))
    if algorithm == "coral":
        ranges["coral"] = ("mmd_gamma", _log(10, -1, 1))
    if algorithm == "mixup":
        ranges["mixup"] = ("mixup_alpha", _log(10, -1, 1))
    return ranges


def hyperparameters(settings: DomainSettings, algorithm: str, draw: int) -> dict[str, Any]:
    """The hyper-parameters of a draw, those of the settings for draw 0.

    Every value comes from ``RandomState(seed_hash(draw, name))`` with DomainBed's name and range, so a draw has the values
    it has there: small images for networks from scratch, large ones for ResNet-50.

    Source: Gulrajani and Lopez-Paz, "In Search of Lost Domain Generalization", ICLR 2021, appendix D.

    Example:
        >>> from flatminima.protocols.domains_settings import preset
        >>> hyperparameters(preset("rotated-mnist"), "erm", 0)
        {'lr': 0.001, 'batch': 16}
    """
    ranges = _ranges(settings, algorithm)
    if draw == 0:
        return {field: getattr(settings, field) for field in ranges}
    return {field: value(np.random.RandomState(seed_hash(draw, name))) for field, (name, value) in ranges.items()}
