"""Measures that look at unlabelled inputs, the probes: what the features leave open there.

They are numbers about the features that the last linear layer reads, at training rows with labels and at probes without; the
workbench carries the probes. What they are not is said in ``docs/weakness.md``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flatminima.measures.base import Measurement, NotApplicableError, Workbench, register
from flatminima.measures.invariance import ALL, NEARLY
from flatminima.measures.outputs import last_layer, why_no_last_layer
from flatminima.measures.weakness import FeatureError, features, patterns
from flatminima.measures.weakness.pair_proxy import pair_proxy as decide_pairs
from flatminima.objective import Objective

#: All of them.
NAMES = ("probe_patterns", "free_patterns", "pair_proxy")

_NO_PROBES = "it needs probes, unlabelled inputs: give probes=..., or let FUNCTION return them as a fourth value"

#: Signs of features stay, or all those of a unit turn at once; what mixes units, or shifts them, makes other patterns.
_KEEPS_SIGNS = frozenset(
    {
        "relu-layer-rescaling", "relu-unit-rescaling", "norm-gain-rescaling", "unit-permutation", "head-permutation",
        "sign-flip", "sigmoid-flip", "query-key", "query-key-diagonal", "key-bias-shift", "layernorm-shift", "softmax-shift",
        "temperature", "duplicate-unit",
    }
)  # fmt: skip


@dataclass(frozen=True)
class _Features:
    train: Tensor
    labels: Tensor
    probes: Tensor
    classes: int
    layer: str


def _why_no_classes(objective: Objective) -> str | None:
    reason = why_no_last_layer(objective)
    if reason is not None:
        return reason
    targets = objective._pieces.first().targets
    if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.dim() != 1:
        return "the targets are not one class for each row"
    return None


@register(
    "probe_patterns",
    "activation patterns on probes",
    "Distinct sign patterns of the features that the last layer reads, over the probes.",
    flatter_when=None,
    invariant_under=_KEEPS_SIGNS,
    almost_under=NEARLY,
    changes_under=frozenset({"dead-unit", "residual-stream"}),
    cost_class="cheap",
    applies=_why_no_classes,
)
def probe_patterns(bench: Workbench) -> Measurement:
    """Number of distinct rows of ``features > 0`` over the probes. Exact. Cost: 1/3 gradient, shared with the others here."""
    found = _features(bench)
    note = f"of {len(found.probes)} probes, {found.probes.shape[1]} features of layer {found.layer!r}"
    return Measurement("probe_patterns", float(len(patterns(found.probes))), 0.0, "exact", True, note=note)


@register(
    "free_patterns",
    "free activation patterns",
    "Sign patterns of the features on the probes that no training row has.",
    flatter_when=None,
    invariant_under=_KEEPS_SIGNS,
    almost_under=NEARLY,
    changes_under=frozenset({"dead-unit", "residual-stream"}),
    cost_class="cheap",
    applies=_why_no_classes,
)
def free_patterns(bench: Workbench) -> Measurement:
    r"""Patterns of probes without a training row, *k*; the region-class weakness of the training labels is :math:`(K+1)^k`.

    Exact. Source: Bennett (2026). Cost: 1/3 gradient, shared with the others here.
    """
    found = _features(bench)
    free = len(patterns(found.probes) - patterns(found.train))
    note = f"log weakness {free} log {found.classes + 1}"
    return Measurement("free_patterns", float(free), 0.0, "exact", True, note=note)


@register(
    "pair_proxy",
    "pair proxy",
    "Pairs of probe and class that a last layer on these features can still realise beside all training labels.",
    flatter_when=None,
    invariant_under=ALL - NEARLY - {"dead-unit"},
    almost_under=NEARLY,
    changes_under=frozenset({"dead-unit"}),
    cost_class="expensive",
    applies=_why_no_classes,
)
def pair_proxy(bench: Workbench) -> Measurement:
    """Feasible (probe, class) pairs, each decision with a proof (:func:`flatminima.measures.weakness.pair_proxy`).

    Invariant under invertible affine maps of the features, not a property of the function: what a unit that nothing reads
    computes matters. The error is the number of undecided pairs. Cost: no gradient; linear programs, about cubic in
    features times classes.
    """
    found = _features(bench)
    decided = decide_pairs(found.train, found.labels, found.probes, classes=found.classes)
    undecided = float(decided.upper - decided.value)
    kind = "undecided pairs" if undecided else "exact"
    note = "; ".join((f"of {decided.feasible.size} pairs", *decided.notes))
    return Measurement("pair_proxy", float(decided.value), undecided, kind, not undecided, note=note)


def _features(bench: Workbench) -> _Features:
    """Features of the training rows and of the probes, in double precision."""

    def make() -> _Features:
        objective = bench.objective
        layer = last_layer(objective).name
        train, labels = [], []
        try:
            for _, piece, _ in objective._shares():
                train.append(features(objective.model, piece.inputs, layer))
                labels.append(piece.targets.cpu())
            probes = features(objective.model, bench.probes, layer)
        except FeatureError as error:
            raise NotApplicableError(str(error)) from error
        classes = objective.model.get_submodule(layer).out_features
        return _Features(torch.cat(train), torch.cat(labels), probes, int(str(classes)), layer)

    if bench.probes is None:
        raise NotApplicableError(_NO_PROBES)
    return bench.shared("features of the last layer", make)
