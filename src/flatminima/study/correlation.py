"""Rank correlations with bootstrap intervals and permutation p-values: raw, within cells, given covariates, corrected."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from flatminima.study.bootstrap import DRAWS, Array, Estimate, bootstrap
from flatminima.study.rank_table import RankTable, correlation_of, partial_of
from flatminima.study.statistics import LEVEL


def spearman(
    x: ArrayLike,
    y: ArrayLike,
    *,
    given: Sequence[ArrayLike] = (),
    cells: Sequence[Any] | None = None,
    normal_scores: bool = False,
    clusters: Sequence[Any] | None = None,
    strata: Sequence[Any] | None = None,
    draws: int = DRAWS,
    seed: int = 0,
    level: float = LEVEL,
) -> Estimate:
    r"""Spearman's rank correlation with its BCa interval; partial where covariates are given, within cells where these are.

    .. math:: \rho = \operatorname{corr}(R_x - \hat R_x(Z),\; R_y - \hat R_y(Z))

    where :math:`\hat R(Z)` is the least-squares regression of ranks on the ranks of the covariates. Within cells, ranks are
    taken and centred cell by cell and then pooled: a correlation that only says that cells differ (Simpson) is 0 there.

    Regression of ranks on ranks does not remove all of a confounder: where covariates add up and explain nearly all of x and
    y, as in :math:`x, y = 2 z_1 + 2 z_2 + \text{noise}`, a partial correlation of 0.25 is left though x and y are independent
    given z. Normal scores remove it as n grows, wherever monotone transformations of the columns make all jointly normal.

    Args:
        x, y: ``(n,)``.
        given: covariates, each ``(n,)``.
        cells: a label for each observation; also the strata of the resampling unless others are named.
        normal_scores: correlate normal scores instead of ranks.
        clusters, strata: as for :class:`~flatminima.study.bootstrap.Resampling`.
        draws: resamples.
        seed: of the resampling.
        level: of the interval.

    Raises:
        ValueError: fewer than 3 observations, different lengths, or a value that is not finite.

    Cost: about a second for 10,000 resamples of n = 850.

    Source: weakness specification, 5.2. Interval: Efron, JASA 82, 1987.

    Example:
        >>> x, y = [3, 1, 4, 1.5, 5, 9, 2, 6], [2, 7, 1, 8, 2.8, 1.8, 2.81, 8.2]
        >>> round(spearman(x, y).value, 4), round(spearman(x, y, given=[[1, 4, 2, 3, 6, 5, 8, 7]]).value, 4)
        (-0.3333, -0.511)
    """
    table = RankTable([x, y, *given], cells, normal_scores=normal_scores)
    others = range(2, table.k)
    resampled_within = cells if strata is None and clusters is None else strata
    (found,) = bootstrap(
        lambda counts: partial_of(table.covariances(counts), 0, 1, others),
        table.n, clusters=clusters, strata=resampled_within, draws=draws, seed=seed, level=level,
    )  # fmt: skip
    return found


def kendall(
    x: ArrayLike,
    y: ArrayLike,
    *,
    clusters: Sequence[Any] | None = None,
    strata: Sequence[Any] | None = None,
    draws: int = DRAWS,
    seed: int = 0,
    level: float = LEVEL,
) -> Estimate:
    r"""Kendall's :math:`\tau_b` with its BCa interval.

    .. math:: \tau_b = \frac{\sum_{i<j} \operatorname{sgn}(x_i - x_j) \operatorname{sgn}(y_i - y_j)}
        {\sqrt{\#\{i<j : x_i \ne x_j\}\, \#\{i<j : y_i \ne y_j\}}}

    Arguments, errors and source as for :func:`spearman`. Cost: a product of matrices (draws, n) and (n, n).

    Example:
        >>> round(kendall([3, 1, 4, 1.5, 5, 9, 2, 6], [2, 7, 1, 8, 2.8, 1.8, 2.81, 8.2]).value, 4)
        -0.2857
    """
    table = RankTable([x, y])  # checks both
    a, b = (np.asarray(column, dtype=np.float64) for column in (x, y))
    # Signs and counts are small integers: exact in float32.
    signs = (np.sign(a[:, None] - a) * np.sign(b[:, None] - b)).astype(np.float32)
    groups = [np.unique(column, return_inverse=True)[1] for column in (a, b)]

    def statistic(counts: Array) -> Array:
        size = counts.sum(1)
        concordance = np.einsum("bi,bi->b", (counts.astype(np.float32) @ signs).astype(np.float64), counts)
        untied = np.ones(len(counts))
        for group in groups:
            totals = _grouped(counts, group)
            untied *= size**2 - (totals**2).sum(1)
        with np.errstate(invalid="ignore", divide="ignore"):
            found: Array = np.where(untied > 0, concordance / np.sqrt(untied), np.nan)
        return found

    (found,) = bootstrap(statistic, table.n, clusters=clusters, strata=strata, draws=draws, seed=seed, level=level)
    return found


def _grouped(counts: Array, group: Any) -> Array:
    if len(group) == group.max() + 1:
        return counts
    order = np.argsort(group, kind="stable")
    starts = np.concatenate([[0], np.flatnonzero(np.diff(group[order])) + 1])
    return np.asarray(np.add.reduceat(counts[:, order], starts, axis=1))


def permutation_p(
    x: ArrayLike,
    y: ArrayLike,
    *,
    given: Sequence[ArrayLike] = (),
    cells: Sequence[Any] | None = None,
    normal_scores: bool = False,
    strata: Sequence[Any] | None = None,
    blocks: Sequence[Any] | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> float:
    r"""Two-sided permutation p-value of :func:`spearman`'s correlation.

    .. math:: p = \frac{1 + \#\{\pi : |\rho(x, \pi y)| \ge |\rho(x, y)|\}}{1 + \mathrm{draws}}

    Exact for independent x and y whatever their distribution, ties included. With covariates, what is left of the ranks of y
    is permuted and regressed again (Freedman and Lane): exact as n grows.

    Args:
        x, y, given, cells, normal_scores: as for :func:`spearman`.
        strata: values are exchanged only within them; the cells by default. Observations that share something random, such as
            a training subset, may only be exchanged with each other.
        blocks: a label for each observation; blocks, such as seeds, are exchanged as a whole, each value with that of the same
            stratum. Every block has one observation in every stratum.
        draws: permutations.
        seed: of the permutations.

    Returns:
        p; NaN where the correlation is not defined.

    Raises:
        ValueError: a block that lacks a stratum or has it twice; otherwise as for :func:`spearman`.

    Source: Freedman and Lane, "A nonstochastic interpretation of reported significance levels", 1983; Phipson and Smyth,
    "Permutation p-values should never be zero", 2010.

    Example:
        >>> round(permutation_p([3, 1, 4, 1.5, 5, 9, 2, 6], [2, 7, 1, 8, 2.8, 1.8, 2.81, 8.2]), 2)
        0.43
    """
    table = RankTable([x, y, *given], cells, normal_scores=normal_scores)
    ranks = table.scores()
    basis = np.linalg.svd(ranks[2:], full_matrices=False)
    used = basis[1] > 1e-10 * max(float(np.abs(ranks[2:]).max(initial=0.0)), 1.0) * table.n
    directions = basis[2][used]
    left_x, left_y = (r - directions.T @ (directions @ r) for r in ranks[:2])
    total = float(left_x @ left_x)
    if min(total, float(left_y @ left_y)) <= 1e-10 * max(float(ranks[0] @ ranks[0]), float(ranks[1] @ ranks[1])):
        return math.nan
    groups = strata if strata is not None else cells if cells is not None else [None] * table.n
    squares = _exchanged(groups, blocks)
    rng = np.random.default_rng(seed)
    observed = abs(float(left_x @ left_y)) / math.sqrt(total * float(left_y @ left_y))
    extreme, most = 0, max(1, 1_000_000 // table.n)
    for start in range(0, draws, most):
        rows = min(most, draws - start)
        permuted = np.empty((rows, table.n))
        for places in squares:  # (exchanged, that move together)
            order = rng.permuted(np.broadcast_to(np.arange(len(places)), (rows, len(places))), axis=1)
            permuted[:, places] = left_y[places[order]]
        rest = (permuted**2).sum(1) - ((permuted @ directions.T) ** 2).sum(1)
        with np.errstate(invalid="ignore", divide="ignore"):
            extreme += int((np.abs(permuted @ left_x) / np.sqrt(total * rest) >= observed - 1e-12).sum())
    return (1 + extreme) / (1 + draws)


def _exchanged(strata: Sequence[Any], blocks: Sequence[Any] | None) -> list[NDArray[np.intp]]:
    """Places ``(exchanged, that move together)``: one array for each stratum, or one in all where there are blocks."""
    members: dict[Any, dict[Any, int]] = {}
    for place, stratum in enumerate(strata):
        line = members.setdefault(stratum, {})
        label = place if blocks is None else blocks[place]
        if label in line:
            raise ValueError(f"block {label!r} has two observations in stratum {stratum!r}: expected one in each")
        line[label] = place
    if blocks is None:
        return [np.array(list(line.values()))[:, None] for line in members.values()]
    first = next(iter(members.values()))
    for stratum, line in members.items():
        missing = set(first) ^ set(line)
        if missing:
            raise ValueError(f"block {next(iter(missing))!r} is not in every stratum ({stratum!r} differs)")
    return [np.array([[line[label] for line in members.values()] for label in first])]


def repeatability(repeats: ArrayLike) -> float:
    """Test-retest reliability: mean Spearman correlation over all pairs of repetitions, columns of ``(n, r)``.

    Raises:
        ValueError: fewer than two repetitions, or as for :func:`spearman`.

    Example:
        >>> repeatability([[1, 1], [2, 2], [3, 4], [4, 3]])
        0.8
    """
    columns = np.asarray(repeats, dtype=np.float64).T
    if len(columns) < 2:
        raise ValueError(f"reliability needs at least 2 repetitions, got {len(columns)}")
    covariances = RankTable(list(columns)).covariances(np.ones((1, columns.shape[1])))
    pairs = [correlation_of(covariances, i, j)[0] for i in range(len(columns)) for j in range(i)]
    return float(np.mean(pairs))


def spearman_brown(half: ArrayLike) -> Array:
    """Reliability of a mean of two halves from their correlation: 2r / (1 + r); NaN where r is not above 0.

    Source: Spearman; Brown (both 1910).

    Example:
        >>> float(spearman_brown(0.5)).__round__(4)
        0.6667
    """
    r = np.asarray(half, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(r > 0, 2 * r / (1 + r), np.nan)


def corrected(rho: ArrayLike, reliability_x: ArrayLike, reliability_y: ArrayLike) -> Array:
    r"""What the correlation of two quantities would be if both were measured without error.

    .. math:: \rho / \sqrt{r_x r_y}

    NaN where a reliability is not above 0: nothing was measured then. For ranks it is an approximation. Values beyond 1 are
    kept: they say that the reliabilities are too low to correct with.

    Source: Spearman, "The proof and measurement of association between two things", 1904.

    Example:
        >>> float(corrected(0.3, 0.9, 0.4)).__round__(4)
        0.5
    """
    x, y = np.asarray(reliability_x, dtype=np.float64), np.asarray(reliability_y, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where((x > 0) & (y > 0), np.asarray(rho) / np.sqrt(x * y), np.nan)


def across_clusters(values: Sequence[float], sizes: Sequence[int], *, level: float = LEVEL) -> Estimate:
    r"""Interval of a correlation over few clusters: t over the clusters' own Fisher-transformed correlations.

    .. math:: \tanh\bigl(\bar z \pm t_{G-1}\, s_z / \sqrt G\bigr), \qquad z_g = \operatorname{artanh} \rho_g

    With three training subsets a bootstrap of subsets has three things to draw and covers far too rarely; this interval is
    wide, and right.

    Args:
        values: correlation within each cluster; those of fewer than 4 observations are left out.
        sizes: observations in each.
        level: of the interval.

    Source: Ibragimov and Müller, "t-statistic based correlation and heterogeneity robust inference", JBES 28(4), 2010.

    Example:
        >>> found = across_clusters([0.3, 0.35, 0.4], [100, 100, 100])
        >>> round(found.value, 3), round(found.low, 3), round(found.high, 3)
        (0.351, 0.221, 0.468)
    """
    kept = [(v, n) for v, n in zip(values, sizes, strict=True) if n >= 4 and math.isfinite(v) and abs(v) < 1]
    z = np.arctanh([v for v, _ in kept])
    n, groups = sum(size for _, size in kept), len(kept)
    if groups < 2:
        mean = float(np.tanh(z.mean())) if groups else math.nan
        nothing = math.nan
        return Estimate(mean, nothing, nothing, nothing, nothing, n, groups, "no interval: fewer than two clusters")
    mean, se = float(z.mean()), float(z.std(ddof=1)) / math.sqrt(groups)
    half = float(stats.t.ppf((1 + level) / 2, groups - 1)) * se
    p = float(2 * stats.t.sf(abs(mean) / se, groups - 1)) if se > 0 else math.nan
    return Estimate(math.tanh(mean), math.tanh(mean - half), math.tanh(mean + half), p, se, n, groups)
