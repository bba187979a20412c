"""Ranks and their covariances for many resamples at once: what every rank correlation of a study is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Array: TypeAlias = "NDArray[np.float64]"


class _Ranks:
    """Mid-ranks of one column under counts; sorted once."""

    def __init__(self, values: Array) -> None:
        self._order = np.argsort(values, kind="stable")
        self._back = np.argsort(self._order, kind="stable")
        ordered = values[self._order]
        first = np.concatenate([[True], ordered[1:] != ordered[:-1]])
        self._ties = None if first.all() else np.cumsum(first) - 1
        self._last = np.flatnonzero(np.concatenate([first[1:], [True]]))

    def __call__(self, counts: Array) -> Array:
        # An observation drawn w times, after c - w others, takes the ranks c - w + 1 to c: c - (w - 1) / 2 on average.
        ordered = counts[:, self._order]
        ends = np.cumsum(ordered, axis=1)
        if self._ties is not None:
            ends = ends[:, self._last]
            ordered = np.diff(ends, axis=1, prepend=0.0)
        ranks: Array = ends - (ordered - 1.0) / 2.0
        return ranks[:, self._back if self._ties is None else self._ties[self._back]]


class RankTable:
    r"""Columns of numbers, and the covariances of their ranks under resampling counts.

    Args:
        columns: each ``(n,)``.
        cells: a label for each observation; ranks are then taken within cells, divided by the number of observations there
            and centred there, so that only differences inside cells speak. One cell by default.
        normal_scores: replace rank r of n by the normal quantile :math:`\Phi^{-1}(r / (n + 1))`.

    Raises:
        ValueError: no column, columns of different lengths, fewer than 3 observations, or a value that is not finite.

    Example:
        >>> table = RankTable([[3, 1, 2, 5], [1, 2, 3, 9]])
        >>> table.covariances(np.ones((1, 4)))[0].tolist()
        [[5.0, 2.0], [2.0, 5.0]]
    """

    def __init__(
        self, columns: Sequence[ArrayLike], cells: Sequence[Any] | None = None, *, normal_scores: bool = False
    ) -> None:
        arrays = [np.asarray(column, dtype=np.float64) for column in columns]
        if not arrays or any(array.ndim != 1 or len(array) != len(arrays[0]) for array in arrays):
            shapes = ", ".join(str(array.shape) for array in arrays) or "none"
            raise ValueError(f"expected columns of one length, got {shapes}")
        self.n = len(arrays[0])
        if self.n < 3:
            raise ValueError(f"a rank correlation needs at least 3 observations, got {self.n}")
        for position, array in enumerate(arrays):
            bad = np.flatnonzero(~np.isfinite(array))
            if len(bad):
                raise ValueError(
                    f"observation {bad[0]} of column {position} is {array[bad[0]]}: leave it out, and say so"
                )
        if cells is not None and len(cells) != self.n:
            raise ValueError(f"cells has {len(cells)} labels for {self.n} observations: expected one each")
        self.k = len(arrays)
        self._scaled = cells is not None and not normal_scores
        self._normal = normal_scores
        members: dict[Any, list[int]] = {}
        for row in range(self.n):
            members.setdefault(None if cells is None else cells[row], []).append(row)
        self._cells = [
            (np.array(rows), [_Ranks(array[rows]) for array in arrays]) for rows in members.values() if len(rows) > 1
        ]

    def covariances(self, counts: Array) -> Array:
        """Sums of products of centred ranks, ``(b, k, k)``, for counts ``(b, n)``."""
        total = np.zeros((len(counts), self.k, self.k))
        for rows, columns in self._cells:
            drawn = counts if len(rows) == self.n else counts[:, rows]
            size = drawn.sum(1)
            ranks = np.empty((len(counts), self.k, len(rows)))
            for position, column in enumerate(columns):
                ranks[:, position] = column(drawn)
            self._score(ranks, drawn, size)
            total += (ranks * drawn[:, None, :]) @ ranks.transpose(0, 2, 1)
        return total

    def scores(self) -> Array:
        """Centred ranks or scores ``(k, n)`` of the data themselves; 0 in cells of one observation."""
        found = np.zeros((self.k, self.n))
        for rows, columns in self._cells:
            once = np.ones((1, len(rows)))
            ranks = np.stack([column(once) for column in columns], axis=1)
            self._score(ranks, once, np.array([float(len(rows))]))
            found[:, rows] = ranks[0]
        return found

    def _score(self, ranks: Array, drawn: Array, size: Array) -> None:
        """Turn ranks ``(b, k, m)`` into centred scores, in place."""
        if self._normal:
            if (size == size[0]).all():  # ranks are multiples of a half: look their quantiles up
                quantiles = stats.norm.ppf(np.arange(1, 2 * int(size[0]) + 2) / (2 * (size[0] + 1)))
                ranks[:] = quantiles[np.maximum((2 * ranks).astype(np.intp) - 1, 0)]
            else:
                ranks[:] = stats.norm.ppf(np.clip(ranks, 0.5, None) / (np.maximum(size, 1.0) + 1)[:, None, None])
            ranks -= ranks @ (drawn / np.maximum(size, 1.0)[:, None])[:, :, None]
            return
        ranks -= (size[:, None, None] + 1.0) / 2.0  # the mean rank is known
        if self._scaled:
            ranks /= np.maximum(size, 1.0)[:, None, None]


def correlation_of(covariances: Array, i: int, j: int) -> Array:
    """Correlation of columns i and j from covariances ``(b, k, k)``; NaN where one is constant."""
    scale = covariances[:, i, i] * covariances[:, j, j]
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Array = np.where(scale > 0, covariances[:, i, j] / np.sqrt(scale), np.nan)
    return np.clip(found, -1.0, 1.0)


def partial_of(covariances: Array, i: int, j: int, given: Sequence[int]) -> Array:
    r"""Partial correlation of columns i and j given others, from covariances ``(b, k, k)``.

    The correlation of what is left of both ranks after least-squares regression on the ranks of the others:
    :math:`S = C_{AA} - C_{AZ} C_{ZZ}^{+} C_{ZA}` with A = (i, j). A constant covariate counts for nothing; NaN where nothing is
    left of i or j.
    """
    if not given:
        return correlation_of(covariances, i, j)
    pair, others = [i, j], list(given)
    own = covariances[:, pair][:, :, pair]
    across = covariances[:, pair][:, :, others]
    between = covariances[:, others][:, :, others]
    scale = np.sqrt(np.maximum(np.diagonal(between, axis1=1, axis2=2), 0.0))
    scale[scale == 0] = 1.0
    # Scaled to correlations, so that one cut-off tells a covariate that repeats another from one that does not.
    inverse = np.linalg.pinv(between / (scale[:, :, None] * scale[:, None, :]), rcond=1e-10, hermitian=True)
    across = across / scale[:, None, :]
    left = own - across @ inverse @ across.transpose(0, 2, 1)
    total = np.diagonal(own, axis1=1, axis2=2)
    rest = np.diagonal(left, axis1=1, axis2=2)
    explained = (rest <= 1e-10 * total).any(1)
    return np.where(explained, np.nan, correlation_of(left, 0, 1))
