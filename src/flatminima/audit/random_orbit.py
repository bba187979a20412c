"""How much of a ranking of networks rests on their coordinates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

_LEAST = 4  # networks; with fewer there is no interval


@dataclass(frozen=True)
class RandomOrbitTest:
    """Result of :func:`random_orbit_test`; correlations are Spearman's, each as ``(value, low, high)`` with a 95 % interval.

    Attributes:
        n: networks.
        retained: correlation of the measure before and after: 1 for an invariant one, about 0 for one of coordinates alone.
        before: correlation of the measure with the outcome, as measured; ``None`` without an outcome.
        after: the same once every network is in other coordinates.
    """

    n: int
    retained: tuple[float, float, float]
    before: tuple[float, float, float] | None
    after: tuple[float, float, float] | None


def random_orbit_test(
    before: Sequence[float], after: Sequence[float], outcome: Sequence[float] | None = None
) -> RandomOrbitTest:
    r"""Rank correlation of a measure over a population of networks before and after reparameterising each independently.

    A correlation between a measure and, say, test accuracy may rest on the coordinates in which training left the networks. If
    each network is replaced by a random member of its own orbit, which predicts the same, what rests on the function stays and
    what rests on coordinates goes.

    Args:
        before: the measure at each network ``(n,)``.
        after: at a random member of each network's orbit, in the same order; see :meth:`Orbit.member`.
        outcome: of each network, test accuracy for instance.

    Returns:
        Spearman's :math:`\rho` with Fisher intervals of variance :math:`(1 + \rho^2/2)/(n-3)` (Bonett and Wright, 2000).

    Raises:
        ValueError: fewer than four networks, lengths that differ, NaN, or values that are all the same.

    Cost: none; measuring is up to you.

    Example:
        >>> found = random_orbit_test([1, 2, 3, 4, 5], [10, 20, 30, 40, 50], outcome=[5, 4, 3, 2, 1])
        >>> found.retained[0], found.before[0], found.after[0]
        (1.0, -1.0, -1.0)
    """
    given = {"before": before, "after": after} | ({} if outcome is None else {"outcome": outcome})
    n = len(before)
    for name, values in given.items():
        array = np.asarray(values, dtype=float)
        if len(values) != n or n < _LEAST:
            raise ValueError(f"{name} has {len(values)} values: expected as many as before ({n}), at least {_LEAST}")
        if np.isnan(array).any():
            raise ValueError(
                f"{name} has no number for network {int(np.isnan(array).argmax())}: leave it out of all lists"
            )
        if np.ptp(array) == 0:
            raise ValueError(f"{name} is {array[0]:g} for all {n} networks: there is no order among them")
    return RandomOrbitTest(
        n,
        _spearman(before, after),
        None if outcome is None else _spearman(before, outcome),
        None if outcome is None else _spearman(after, outcome),
    )


def _spearman(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    rho = round(float(stats.spearmanr(a, b).statistic), 12)
    if abs(rho) == 1:
        return rho, rho, rho
    half = float(stats.norm.ppf(0.975)) * math.sqrt((1 + rho**2 / 2) / (len(a) - 3))
    return rho, math.tanh(math.atanh(rho) - half), math.tanh(math.atanh(rho) + half)
