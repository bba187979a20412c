r"""Leverage: how far probes lie from the training features, in the metric of those features.

A smooth rival of the pair proxy, not a substitute for it: it follows the pair proxy (rank correlation about 0.5 to 0.7
in a pilot over trained networks) and knows neither labels nor classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flatminima.measures.weakness.features import ArrayLike, FeatureError, FloatArray, matrix

# Singular values of the standardised training features below this, relative to the largest, are directions they do not span.
_RANK = 1e-10


@dataclass(frozen=True, eq=False)
class Leverage:
    """Leverages of the probes.

    Attributes:
        total: ``sum(log(1 + h))``.
        values: h of every probe.
        rank: dimension of the affine span of the training features, plus one.
        outside: probes that leave that span. Their h counts only the part inside, and total is then not invariant under
            affine maps.
    """

    total: float
    values: FloatArray
    rank: int
    outside: int


def leverage(train: ArrayLike, probes: ArrayLike) -> Leverage:
    r""":math:`W = \sum_x \log(1 + h(x))` over the probes, with their leverages

    .. math:: h(x) = [\phi(x), 1]\,(F^\top F)^{+}\,[\phi(x), 1]^\top, \qquad F = [\phi_{train}, 1].

    Unchanged by invertible affine maps of feature space, as long as the training features span it. Computed from the
    singular values of the centred features (h = 1/n + squared Mahalanobis distance / n), which keeps the condition
    number instead of squaring it.

    Args:
        train: features of the training inputs, ``(n, d)``.
        probes: features of the probes, ``(m, d)``.

    Raises:
        FeatureError: shapes that do not fit, NaN or infinity.

    Cost: O(n d^2 + m d^2).

    Example:
        >>> found = leverage([[-1.0], [1.0]], [[0.0], [1.0], [3.0]])        # h = 1/2 + x^2/2
        >>> found.values.round(12).tolist(), found.rank
        ([0.5, 1.0, 5.0], 2)
    """
    given, asked = matrix(train, "training features"), matrix(probes, "probe features")
    if given.shape[1] != asked.shape[1]:
        raise FeatureError(f"training features have {given.shape[1]} units, probes {asked.shape[1]}: expected the same")
    mean = given.mean(0)
    scale = np.abs(given - mean).max(0, initial=0.0)
    # A unit that is constant in training spans nothing there; its scale is arbitrary and only tells probes outside.
    scale = np.where(scale > 0, scale, np.abs(asked - mean).max(0, initial=0.0))
    scale[scale == 0] = 1.0
    centred, away = (given - mean) / scale, (asked - mean) / scale
    _, singular, right = np.linalg.svd(centred, full_matrices=False)
    kept = singular > _RANK * max(float(singular.max(initial=0.0)), 1e-300)
    inside = away @ right[kept].T
    left = np.linalg.norm(away - inside @ right[kept], axis=1)
    values = 1.0 / len(given) + ((inside / singular[kept]) ** 2).sum(1)
    outside = int((left > 1e-8 * np.linalg.norm(away, axis=1).clip(min=1e-300)).sum())
    return Leverage(float(np.log1p(values).sum()), values, int(kept.sum()) + 1, outside)
