"""Bias-corrected and accelerated (BCa) bootstrap intervals, of whole clusters, within strata, thousands at once.

A resample is a row of counts: how often each observation was drawn. A statistic that can be computed from counts (a mean, a
weighted rank correlation) is then computed for hundreds of resamples in one go, and the jackknife is a few rows more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from flatminima.study.statistics import LEVEL

Array: TypeAlias = "NDArray[np.float64]"
Statistic: TypeAlias = "Callable[[Array], Array]"
"""Counts ``(b, n)`` -> values ``(b,)`` or ``(b, m)``; NaN where a resample has no value."""

DRAWS = 10_000
_BLOCK = 250_000  # counts held at once: arrays of this size stay in the cache
_MOST_UNDEFINED = 0.05


@dataclass(frozen=True)
class Estimate:
    """A statistic with its interval.

    Attributes:
        value: of the statistic on the data.
        low, high: of the interval; NaN where there is none, and ``note`` says why.
        p: two-sided, against 0: one minus the level at which the interval would begin or end there.
        se: standard deviation over the resamples.
        n: observations.
        units: what was resampled: clusters, or observations.
        note: why there is no interval, or what to know about it.
    """

    value: float
    low: float
    high: float
    p: float
    se: float
    n: int
    units: int
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; NaN becomes ``None``."""
        plain = {name: getattr(self, name) for name in ("value", "low", "high", "p", "se")}
        found: dict[str, Any] = {name: value if math.isfinite(value) else None for name, value in plain.items()}
        return found | {"n": self.n, "units": self.units, "note": self.note}


class Resampling:
    """How to draw again: whole clusters with replacement, within each stratum as many as it has.

    Args:
        n: observations.
        clusters: label of each observation's cluster; every observation is its own by default. Observations that share
            something random (a training subset, an initial seed) belong together: resampled one by one they would
            pretend to be more than they are.
        strata: label of each observation's stratum; one by default. Strata are what would be the same if the study were done
            again, such as the cells of a grid. A cluster lies in one of them.

    Raises:
        ValueError: labels of another length than n, or a cluster in two strata.

    Example:
        >>> counts = next(Resampling(4, clusters=[0, 0, 1, 1]).counts(draws=3, seed=0))
        >>> counts.shape, bool((counts[:, 0] == counts[:, 1]).all()), counts.sum(1).tolist()
        ((3, 4), True, [4.0, 4.0, 4.0])
    """

    def __init__(self, n: int, *, clusters: Sequence[Any] | None = None, strata: Sequence[Any] | None = None) -> None:
        own = np.arange(n) if clusters is None else _codes(clusters, n, "clusters")
        where = np.zeros(n, dtype=np.intp) if strata is None else _codes(strata, n, "strata")
        self.n = n
        self.units = int(own.max()) + 1 if n else 0
        self._unit_of = own
        stratum = np.full(self.units, -1)
        stratum[own] = where
        if (stratum[own] != where).any():
            raise ValueError("a cluster lies in two strata: expected every cluster inside one")
        self._strata = [np.flatnonzero(stratum == s) for s in range(int(where.max()) + 1 if n else 0)]

    def counts(self, *, draws: int, seed: int) -> Iterator[Array]:
        """Counts ``(b, n)`` of successive resamples, ``draws`` rows in all, in blocks that fit into memory."""
        rng = np.random.default_rng(seed)
        block = max(1, _BLOCK // max(self.n, 1))
        for start in range(0, draws, block):
            rows = min(block, draws - start)
            units = np.empty((rows, self.units))
            for members in self._strata:
                size = len(members)
                drawn = rng.integers(size, size=(rows, size)) + size * np.arange(rows)[:, None]
                units[:, members] = np.bincount(drawn.ravel(), minlength=rows * size).reshape(rows, size)
            yield units[:, self._unit_of]

    def without_one(self) -> Iterator[Array]:
        """Counts of the jackknife: one row for each unit, that leaves it out."""
        block = max(1, _BLOCK // max(self.n, 1))
        for start in range(0, self.units, block):
            left_out = np.arange(start, min(start + block, self.units))
            yield (self._unit_of[None, :] != left_out[:, None]).astype(np.float64)

    def acceleration(self, jackknife: Array) -> Array:
        r"""The BCa constant of each statistic, from its jackknife values ``(units, m)``.

        .. math:: a = \tfrac16 \sum_s \sum_{i \in s} (l_{si} / n_s)^3 \Big/
            \Bigl(\sum_s \sum_{i \in s} (l_{si} / n_s)^2\Bigr)^{3/2}, \qquad
            l_{si} = (n_s - 1)(\bar\theta_{s} - \theta_{(-si)})
        """
        squares = np.zeros(jackknife.shape[1])
        cubes = np.zeros(jackknife.shape[1])
        for members in self._strata:
            size = len(members)
            if size < 2:
                continue
            influence = (size - 1) / size * (jackknife[members].mean(0) - jackknife[members])
            squares += (influence**2).sum(0)
            cubes += (influence**3).sum(0)
        with np.errstate(invalid="ignore", divide="ignore"):
            found: Array = np.where(squares > 0, cubes / (6.0 * squares**1.5), 0.0)
        return found


@dataclass(frozen=True)
class Replicates:
    """Values of m statistics: on the data ``(m,)``, on the resamples ``(draws, m)``, and the BCa constants.

    Statistics that share their resamples can be combined: the replicates of a difference are the differences.
    """

    value: Array
    resampled: Array
    jackknife: Array
    resampling: Resampling

    def column(self, i: int) -> Replicates:
        """One of the statistics."""
        return Replicates(self.value[[i]], self.resampled[:, [i]], self.jackknife[:, [i]], self.resampling)

    def estimates(self, *, level: float = LEVEL) -> list[Estimate]:
        """Every statistic with its BCa interval."""
        acceleration = self.resampling.acceleration(self.jackknife)
        return [
            _estimate(float(value), self.resampled[:, i], float(acceleration[i]), self.resampling, level)
            for i, value in enumerate(self.value)
        ]


def replicates(statistic: Statistic, resampling: Resampling, *, draws: int = DRAWS, seed: int = 0) -> Replicates:
    """Compute statistics on the data, on ``draws`` resamples, and without each unit.

    Args:
        statistic: counts ``(b, n)`` -> ``(b,)`` or ``(b, m)``.
        resampling: what is drawn.
        draws: resamples.
        seed: of the draw; the same seed gives the same bits.

    Raises:
        ValueError: fewer than two units, or fewer than 100 draws.
    """
    if resampling.units < 2:
        raise ValueError(f"a bootstrap needs at least 2 units to draw, got {resampling.units}")
    if draws < 100:
        raise ValueError(f"draws is {draws}: expected at least 100")
    return Replicates(
        _columns(statistic(np.ones((1, resampling.n))))[0],
        np.concatenate([_columns(statistic(counts)) for counts in resampling.counts(draws=draws, seed=seed)]),
        np.concatenate([_columns(statistic(counts)) for counts in resampling.without_one()]),
        resampling,
    )


def bootstrap(
    statistic: Statistic,
    n: int,
    *,
    clusters: Sequence[Any] | None = None,
    strata: Sequence[Any] | None = None,
    draws: int = DRAWS,
    seed: int = 0,
    level: float = LEVEL,
) -> list[Estimate]:
    r"""BCa bootstrap intervals.

    .. math:: \Bigl[\hat G^{-1}\Bigl(\Phi\Bigl(z_0 + \frac{z_0 + z_{\alpha}}{1 - a (z_0 + z_{\alpha})}\Bigr)\Bigr)\Bigr]_{
        \alpha = (1 \mp \mathrm{level}) / 2}, \qquad z_0 = \Phi^{-1}(\hat G(\hat\theta))

    with the distribution :math:`\hat G` of the resampled values. Second-order accurate and unchanged by monotone
    transformations of the statistic: no Fisher transformation is needed.

    Args:
        statistic: counts ``(b, n)`` -> ``(b,)`` or ``(b, m)``.
        n: observations.
        clusters, strata: as for :class:`Resampling`.
        draws: resamples.
        seed: of the draw.
        level: of the intervals.

    Returns:
        One :class:`Estimate` for each statistic.

    Source: Efron, "Better bootstrap confidence intervals", JASA 82, 1987; strata: Davison and Hinkley, "Bootstrap Methods and
    their Application", 1997, section 5.3.

    Example:
        >>> x = np.arange(20.0)
        >>> mean, = bootstrap(lambda counts: counts @ x / counts.sum(1), 20)
        >>> round(mean.value, 2), round(mean.low, 1), round(mean.high, 1)
        (9.5, 7.0, 11.9)
    """
    resampling = Resampling(n, clusters=clusters, strata=strata)
    return replicates(statistic, resampling, draws=draws, seed=seed).estimates(level=level)


def _estimate(value: float, resampled: Array, a: float, resampling: Resampling, level: float) -> Estimate:
    def without(note: str) -> Estimate:
        return Estimate(value, math.nan, math.nan, math.nan, math.nan, resampling.n, resampling.units, note)

    if not math.isfinite(value):
        return without("not defined: a column is constant")
    sample = np.sort(resampled[np.isfinite(resampled)])
    if len(sample) < (1 - _MOST_UNDEFINED) * len(resampled):
        return without(f"no interval: {1 - len(sample) / len(resampled):.0%} of the resamples have no value")
    if sample[0] == sample[-1] or not math.isfinite(a):
        return without("no interval: the statistic is at its bound in every resample")
    bias = _normal(_below(sample, value))
    tail = stats.norm.ppf((1 - level) / 2)
    ends = np.quantile(sample, [_adjusted(bias, a, z) for z in (tail, -tail)])
    # The level whose interval ends at 0 solves the same equation for the quantile.
    shift = _normal(_below(sample, 0.0)) - bias
    one_sided = float(stats.norm.cdf(shift / (1 + a * shift) - bias)) if 1 + a * shift > 0 else 0.0
    p = min(1.0, max(2 * min(one_sided, 1 - one_sided), 1 / len(sample)))
    return Estimate(value, float(ends[0]), float(ends[1]), p, float(sample.std(ddof=1)), resampling.n, resampling.units)


def _below(sample: Array, value: float) -> float:
    """Share of the sample below the value, ties counted half; never 0 or 1."""
    near = 1e-12 * (abs(value) + 1.0)
    share = np.searchsorted(sample, value - near) + np.searchsorted(sample, value + near)
    half = 0.5 / len(sample)
    return float(np.clip(share / (2 * len(sample)), half, 1 - half))


def _normal(share: float) -> float:
    return float(stats.norm.ppf(share))


def _adjusted(bias: float, a: float, z: float) -> float:
    denominator = 1 - a * (bias + z)
    if denominator <= 0:  # an extreme acceleration: the interval reaches the end of the sample
        return 1.0 if z > 0 else 0.0
    return float(stats.norm.cdf(bias + (bias + z) / denominator))


def _columns(values: ArrayLike) -> Array:
    found = np.asarray(values, dtype=np.float64)
    return found[:, None] if found.ndim == 1 else found


def _codes(labels: Sequence[Any], n: int, name: str) -> NDArray[np.intp]:
    if len(labels) != n:
        raise ValueError(f"{name} has {len(labels)} labels for {n} observations: expected one each")
    seen: dict[Any, int] = {}
    return np.array([seen.setdefault(label, len(seen)) for label in labels], dtype=np.intp)
