r"""Region-class vocabulary: a network seen through the sign patterns of one hidden layer.

The regions are the sign patterns that a ReLU layer takes on the training and the unseen inputs; a program says "region
r gets class c". With R regions and K classes the language has :math:`(K+1)^R` statements, and the policy that gives
each region holding a training point its majority label has weakness :math:`(K+1)^{k}`, k the number of *free* regions,
those that no training point falls into. Only the logarithm is computed.

The vocabulary treats regions as independent. It is exact where each region holds one point, and ignores that one last
layer serves all regions; :func:`flatminima.measures.weakness.pair_proxy` does not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from flatminima.measures.weakness.features import ArrayLike, FeatureError, class_labels, matrix


@dataclass(frozen=True)
class RegionWeakness:
    """Counts of sign patterns, and the weakness they give.

    Attributes:
        train_regions: distinct patterns on the training inputs.
        unseen_regions: distinct patterns on the unseen inputs.
        free_regions: patterns of unseen inputs on which no training input falls.
        mixed_regions: training patterns that hold more than one label (``None`` without labels); there the policy of
            majority labels contradicts some of them.
        log_weakness: ``free_regions * log(classes + 1)``, in nats.
        log_language: ``log |L| = (train_regions + free_regions) * log(classes + 1)``.
    """

    train_regions: int
    unseen_regions: int
    free_regions: int
    mixed_regions: int | None
    log_weakness: float
    log_language: float


def patterns(activations: ArrayLike) -> set[bytes]:
    """Distinct sign patterns ``activations > 0`` of the rows, eight units a byte.

    Pre-activations and their ReLU give the same patterns.

    Example:
        >>> len(patterns([[1.0, -2.0], [3.0, 0.0], [-1.0, 1.0]]))
        2
    """
    return {row.tobytes() for row in np.packbits(matrix(activations, "activations") > 0, axis=1)}


def region_weakness(
    train: ArrayLike, unseen: ArrayLike, classes: int, *, labels: ArrayLike | None = None
) -> RegionWeakness:
    r"""Log-weakness of the training-label policy in the region-class vocabulary, :math:`\log w = k \log(K + 1)`.

    Args:
        train: activations of the training inputs, ``(n, units)``: of a ReLU layer or before it, e.g. from
            :func:`flatminima.measures.weakness.features`.
        unseen: the same of unseen inputs.
        classes: K.
        labels: of the training inputs; only to count mixed regions.

    Raises:
        FeatureError: shapes that do not fit, NaN or infinity, fewer than one class.

    Cost: O(rows * units) after the forward passes.

    Example:
        >>> found = region_weakness([[1.0, 0.0], [2.0, 0.0]], [[0.5, 0.0], [0.0, 1.0], [1.0, 1.0]], classes=2)
        >>> found.free_regions, round(found.log_weakness, 6)                # two new regions: log 9
        (2, 2.197225)
    """
    if classes < 1:
        raise FeatureError(f"classes must be at least 1, got {classes}")
    seen, met = matrix(train, "training activations"), matrix(unseen, "unseen activations")
    if seen.shape[1] != met.shape[1]:
        raise FeatureError(
            f"training activations have {seen.shape[1]} units, unseen ones {met.shape[1]}: expected the same"
        )
    known, other = patterns(seen), patterns(met)
    free = len(other - known)
    mixed = None
    if labels is not None:
        given = class_labels(labels, "labels", len(seen), classes)
        pairs = {(row.tobytes(), int(label)) for row, label in zip(np.packbits(seen > 0, axis=1), given, strict=True)}
        per_region: dict[bytes, int] = {}
        for pattern, _ in pairs:
            per_region[pattern] = per_region.get(pattern, 0) + 1
        mixed = sum(count > 1 for count in per_region.values())
    unit = math.log(classes + 1)
    return RegionWeakness(len(known), len(other), free, mixed, free * unit, (len(known) + free) * unit)
