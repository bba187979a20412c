"""Measures that only a study can take, because they look at all unseen rows or repeat what a source did.

Those of :mod:`flatminima.measures` see an objective and probes; these see the network and the rows of its study.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flatminima.curvature.trace import trace as hessian_trace
from flatminima.measures.weakness import features, patterns
from flatminima.objective import Objective
from flatminima.study.run_spec import MeasureSpec
from flatminima.study.subsets import Subset


@dataclass(frozen=True, eq=False)
class Network:
    """A trained network and its rows.

    Attributes:
        model: in single precision, as it was trained.
        precise: the same in double precision.
        data: its rows.
    """

    model: nn.Module
    precise: nn.Module
    data: Subset

    @property
    def hidden(self) -> list[str]:
        """Names of the activations of the hidden layers, first to last."""
        return hidden_layers(self.model)


def hidden_layers(model: nn.Module) -> list[str]:
    """Names of the activations of the hidden layers, first to last."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.ReLU)]


@dataclass(frozen=True)
class StudyMeasure:
    """A measure of a :class:`Network`.

    Attributes:
        label: for tables.
        meaning: one sentence.
        options: with their defaults.
        compute: of the network, the options and a seed.
        random: whether it depends on the seed.
    """

    label: str
    meaning: str
    options: Mapping[str, int]
    compute: Callable[[Network, Mapping[str, int], int], float]
    random: bool = False


def unseen_patterns(network: Network, options: Mapping[str, int], seed: int) -> float:
    """Distinct activation patterns of hidden layer ``layer`` (1 is the first, 0 the last) over all unseen rows."""
    return float(len(_patterns(network, options["layer"])))


def unseen_free_patterns(network: Network, options: Mapping[str, int], seed: int) -> float:
    """Those of :func:`unseen_patterns` that no training row has."""
    layer = options["layer"]
    return float(len(_patterns(network, layer) - patterns(_hidden(network, network.data.x, layer))))


def train_patterns(network: Network, options: Mapping[str, int], seed: int) -> float:
    """Distinct activation patterns of hidden layer ``layer`` over the training rows."""
    return float(len(patterns(_hidden(network, network.data.x, options["layer"]))))


def free_parameters(network: Network, options: Mapping[str, int], seed: int) -> float:
    r""":math:`\sum_r \max(0, K d + K - n_r)` over the activation patterns of the last hidden layer that training rows have.

    *d* features, *K* classes, *n_r* training rows in the region. Source: Bennett (2026), experiment on model selection.
    """
    seen = _hidden(network, network.data.x, 0)
    _, counts = np.unique(np.packbits(seen.numpy() > 0, axis=1), axis=0, return_counts=True)
    own = network.data.classes * (seen.shape[1] + 1)
    return float(np.maximum(0, own - counts).sum())


def source_trace(network: Network, options: Mapping[str, int], seed: int) -> float:
    """The Hessian trace as the source estimates it: ``probes`` sign vectors in single precision.

    On all training rows, or, where there are more than ``subset``, on that many drawn afresh at every call: the noise of the
    draw is then part of the number.
    """
    x, y = network.data.x, network.data.y
    if len(y) > options["subset"]:
        drawn = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))[: options["subset"]]
        x, y = x[drawn], y[drawn]
    objective = Objective(network.model, F.cross_entropy, (x, y))
    return hessian_trace(objective, rtol=1e-12, method="hutchinson", max_products=options["probes"], seed=seed).value


_LAYER: Mapping[str, int] = MappingProxyType({"layer": 0})

STUDY_MEASURES: Mapping[str, StudyMeasure] = MappingProxyType(
    {
        "unseen_patterns": StudyMeasure(
            "activation patterns on unseen rows", "Distinct sign patterns of a hidden layer over everything unseen.", _LAYER,
            unseen_patterns,
        ),
        "unseen_free_patterns": StudyMeasure(
            "free activation patterns on unseen rows", "Sign patterns on unseen rows that no training row has.", _LAYER,
            unseen_free_patterns,
        ),
        "train_patterns": StudyMeasure(
            "activation patterns on training rows", "Distinct sign patterns of a hidden layer over the training rows.", _LAYER,
            train_patterns,
        ),
        "free_parameters": StudyMeasure(
            "free parameters", "Parameters of a linear layer in each region beyond its training rows, summed.", {},
            free_parameters,
        ),
        "source_trace": StudyMeasure(
            "Hessian trace as the source estimates it", "Hutchinson's estimate, single precision, on a random subset.",
            {"probes": 50, "subset": 2048}, source_trace, random=True,
        ),
    }
)  # fmt: skip
"""Names that a study file may use beside those of :data:`flatminima.measures.MEASURES`."""


def wrong_options(measure: MeasureSpec) -> tuple[str, str] | None:
    """The first option that a measure of a study does not take, or cannot, and why; ``None`` if all is well.

    Example:
        >>> wrong_options(MeasureSpec("source_trace", (("probs", 30),)))
        ('probs', "unknown option 'probs' of source_trace: expected one of probes, subset")
    """
    known = STUDY_MEASURES[measure.name].options
    for name, value in measure.options:
        if name not in known:
            expected = f"expected one of {', '.join(known)}" if known else "it takes none"
            return name, f"unknown option {name!r} of {measure.name}: {expected}"
        least = 0 if name == "layer" else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            return name, f"{name} is {value!r}: expected a whole number of at least {least}"
    return None


def study_value(network: Network, measure: MeasureSpec, seed: int) -> float:
    """The number of one of :data:`STUDY_MEASURES`.

    Raises:
        ValueError: a layer that the network does not have.
    """
    entry = STUDY_MEASURES[measure.name]
    given: dict[str, Any] = dict(measure.options)
    return entry.compute(network, {**entry.options, **given}, seed)


def _patterns(network: Network, layer: int) -> set[bytes]:
    found: set[bytes] = set()
    for x, _ in network.data.unseen():
        found |= patterns(_hidden(network, x, layer))
    return found


def _hidden(network: Network, x: Tensor, layer: int) -> Tensor:
    names = network.hidden
    if not 0 <= layer <= len(names):
        raise ValueError(f"layer is {layer}: the network has {len(names)} hidden layers with ReLU")
    return features(network.precise, x.double(), layer=names[layer - 1])
