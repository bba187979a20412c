"""Tests and intervals for cells that are not independent: targets that share sources, seeds that share domains."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flatminima.study.statistics import LEVEL, interval

EXACT = 20  # differences up to which all sign patterns are visited: a million


@dataclass(frozen=True)
class SignFlip:
    """A two-sided sign-flip test.

    Attributes:
        statistic: mean difference; with strata, the mean of their means.
        p: share of the sign patterns whose statistic is at least as far from zero.
        smallest: smallest p that so many differences can give, ``2 / 2**n``: a p above the level may mean nothing more.
        n: differences.
        exact: whether all patterns were visited.
    """

    statistic: float
    p: float
    smallest: float
    n: int
    exact: bool


def sign_flip(
    differences: Sequence[float] | Mapping[str, Sequence[float]], *, draws: int = 100_000, seed: int = 0
) -> SignFlip:
    r"""Are paired differences centred at zero? Exact under the hypothesis that each is as likely as its negative.

    .. math:: p = \frac{\#\{s \in \{-1, 1\}^n : |T(s \cdot d)| \ge |T(d)|\}}{2^n}, \qquad
        T(d) = \frac{1}{K} \sum_{k=1}^{K} \frac{1}{n_k} \sum_{i \in k} d_i

    with *K* strata (one, unless a mapping is given). No assumption on the distribution beyond symmetry. With n = 4 differences
    p is at least 0.125, so nothing can be significant at 5 %; 6 reach 0.031.

    Args:
        differences: one per independent unit (say the target domain), or stratum -> differences (say per data set).
        draws: random patterns, where there are more than 20 differences; p is then an estimate that counts the observed one.
        seed: of these.

    Raises:
        ValueError: no difference, an empty stratum, or one that is not finite.

    Source: Fisher, "The Design of Experiments", 1935, section 21.

    Example:
        >>> sign_flip([0.4, 0.1, 0.7, 0.2])
        SignFlip(statistic=0.35, p=0.125, smallest=0.125, n=4, exact=True)
    """
    strata = list(differences.values()) if isinstance(differences, Mapping) else [differences]
    if not strata or any(len(stratum) == 0 for stratum in strata):
        raise ValueError("a sign-flip test needs at least one difference in every stratum")
    weighted = np.array([d / (len(stratum) * len(strata)) for stratum in strata for d in stratum])
    if not np.isfinite(weighted).all():
        raise ValueError("a difference is NaN or infinite: leave its cell out, and say so")
    n, observed = len(weighted), math.fsum(weighted)
    # Sums that are equal in exact arithmetic differ in their last bits.
    bound = abs(observed) - 1e-12 * float(np.abs(weighted).sum())
    if n <= EXACT:
        sums = np.zeros(1)
        for value in weighted:
            sums = np.concatenate([sums + value, sums - value])
        p = float((np.abs(sums) >= bound).mean())
    else:
        signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(draws, n))
        p = (1 + int((np.abs(signs @ weighted) >= bound).sum())) / (draws + 1)
    return SignFlip(observed, p, 2.0 / 2.0**n, n, n <= EXACT)


def two_way_bootstrap(
    cells: NDArray[np.float64], *, draws: int = 10_000, seed: int = 0, level: float = LEVEL
) -> tuple[float, float]:
    """Percentile interval of the mean over a table of cells, rows (targets) and columns (seeds) resampled independently.

    Resampling cells as if they were independent would be too narrow: a row shares its target, a column its data.

    Args:
        cells: ``(rows, columns)``; NaN marks a cell that does not exist.
        draws: resampled tables.
        seed: of the resampling.
        level: of the interval.

    Returns:
        (low, high); both NaN for fewer than two rows with a cell.

    With few rows the interval is somewhat too narrow: in simulations a nominal 95 % covered about 90 % for 4 rows of 6 cells or
    6 rows of 3. Read it beside the sign-flip test.

    Source: Owen, "The pigeonhole bootstrap", Annals of Applied Statistics 1(2), 2007.

    Example:
        >>> low, high = two_way_bootstrap(np.array([[1.0, 1.2], [0.8, 1.0], [1.1, 0.9]]))
        >>> low < 1.0 < high
        True
    """
    cells = np.asarray(cells, dtype=np.float64)
    there = np.isfinite(cells)
    cells = cells[there.any(1)][:, there.any(0)]  # a target or seed without any run is no unit to draw
    rows, columns = cells.shape
    if rows < 2:
        return math.nan, math.nan
    rng = np.random.default_rng(seed)
    picked_rows = rng.integers(rows, size=(draws, rows))
    picked_columns = rng.integers(columns, size=(draws, columns))
    tables = cells[picked_rows[:, :, None], picked_columns[:, None, :]]
    # The mean of row means: a row with fewer cells counts as much as another.
    with np.errstate(invalid="ignore", divide="ignore"):
        known_cells = np.isfinite(tables)
        row_means = np.where(known_cells, tables, 0.0).sum(2) / known_cells.sum(2)
        known = np.isfinite(row_means)
        means = np.where(known, row_means, 0.0).sum(1) / known.sum(1)
    tail = (1 - level) / 2
    low, high = np.nanquantile(means, [tail, 1 - tail])
    return float(low), float(high)


def nested_interval(cells: NDArray[np.float64]) -> dict[str, float | int | None]:
    r"""Mean and 95 % interval of cells in which columns are nested in rows: draws of shots within base networks, say.

    .. math:: \bar x = \frac{1}{n} \sum_i \bar x_i \pm t_{n-1, 0.975}\, s_{\bar x_i} / \sqrt n

    over the row means. Their scatter holds both variances, :math:`\sigma_{rows}^2 + \sigma_{draws}^2 / D`, so this is the
    interval for new rows with new draws. Pooling all cells as if they were independent is too narrow, and an interval over
    the draws of one row says nothing about another row.

    Args:
        cells: ``(rows, draws)``; NaN marks a cell that does not exist.

    Returns:
        ``mean``, ``low`` and ``high`` (``None`` for fewer than two rows), ``n`` rows, ``cells`` in all, and the components:
        ``sd_draws`` within rows, and ``sd_rows``, what remains of the scatter of row means without it (0 at least).

    Source: Searle, Casella and McCulloch, "Variance Components", 1992, section 3.

    Example:
        >>> found = nested_interval(np.array([[1.0, 3.0], [4.0, 6.0], [7.0, 9.0]]))
        >>> found["mean"], round(found["low"], 2), round(found["high"], 2), round(found["sd_draws"], 3)
        (5.0, -2.45, 12.45, 1.414)
    """
    rows = [row[np.isfinite(row)] for row in np.asarray(cells, dtype=np.float64)]
    rows = [row for row in rows if len(row)]
    found = interval([float(row.mean()) for row in rows])
    freedom = sum(len(row) - 1 for row in rows)
    within = sum(float(((row - row.mean()) ** 2).sum()) for row in rows) / freedom if freedom else None
    between = None
    if found["sd"] is not None:
        share = 0.0 if within is None else within * sum(1 / len(row) for row in rows) / len(rows)
        between = math.sqrt(max(float(found["sd"]) ** 2 - share, 0.0))
    return {
        "mean": found["mean"], "low": found["low"], "high": found["high"], "n": len(rows), "cells": sum(map(len, rows)),
        "sd_rows": between, "sd_draws": None if within is None else math.sqrt(within),
    }  # fmt: skip
