"""Rank correlations and their bootstrap: vectors, SciPy, statsmodels, plain formulas, simulated data with known truth."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import statsmodels.api as statsmodels
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from flatminima.study.bootstrap import Resampling, bootstrap, replicates
from flatminima.study.correlation import (
    across_clusters,
    corrected,
    kendall,
    permutation_p,
    repeatability,
    spearman,
    spearman_brown,
)
from flatminima.study.dependent import difference_of_sizes
from flatminima.study.rank_table import RankTable, partial_of

VECTORS = json.loads((Path(__file__).parent / "vectors" / "statistics.json").read_text())
SMALL = st.integers(-3, 3).map(float)


def repeated(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """A resample written out."""
    return np.repeat(values, counts.astype(int))


# --- values --------------------------------------------------------------------------------------------------------


def test_vectors() -> None:
    v = VECTORS["spearman"]
    assert spearman(v["x"], v["y"], draws=100).value == pytest.approx(v["rho"], rel=1e-9)
    assert kendall(v["x"], v["y"], draws=100).value == pytest.approx(v["tau"], rel=1e-9)
    assert spearman(v["x"], v["y"], given=[v["z"]], draws=100).value == pytest.approx(
        v["partial_rho_given_z"], rel=1e-9
    )
    ranks = [stats.rankdata(v[name]) - 4.5 for name in "xy"]
    exact = np.abs(np.array(list(itertools.permutations(ranks[1]))) @ ranks[0])
    p = float(np.mean(exact >= abs(ranks[0] @ ranks[1]) - 1e-9))
    assert permutation_p(v["x"], v["y"], draws=200_000) == pytest.approx(p, abs=0.005)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(SMALL, SMALL, SMALL, st.integers(0, 3)), min_size=4, max_size=12))
def test_weighted_correlations_are_those_of_the_sample_written_out(rows: list[tuple[float, float, float, int]]) -> None:
    x, y, z, counts = np.array(rows).T
    covariances = RankTable([x, y, z]).covariances(counts[None])
    a, b, c = (repeated(column, counts) for column in (x, y, z))
    if len(a) < 4 or min(np.ptp(a), np.ptp(b)) == 0:
        return
    assert partial_of(covariances, 0, 1, ())[0] == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-9)
    residuals = []
    for column in (a, b):
        design = np.column_stack([np.ones(len(a)), stats.rankdata(c)])
        ranks = stats.rankdata(column)
        residuals.append(ranks - design @ np.linalg.lstsq(design, ranks, rcond=None)[0])
    if min(np.ptp(r) for r in residuals) < 1e-6:
        assert math.isnan(partial_of(covariances, 0, 1, (2,))[0])
    else:
        expected = np.corrcoef(*residuals)[0, 1]
        assert partial_of(covariances, 0, 1, (2,))[0] == pytest.approx(expected, abs=1e-8)


def test_partial_correlation_is_that_of_statsmodels() -> None:
    rng = np.random.default_rng(0)
    columns = rng.normal(size=(5, 5)) @ rng.normal(size=(5, 60))
    ranks = stats.rankdata(columns, axis=1)
    design = np.column_stack([np.ones(60), ranks[2:].T])
    residuals = [statsmodels.OLS(r, design).fit().resid for r in ranks[:2]]
    expected = stats.pearsonr(*residuals).statistic
    assert spearman(*columns[:2], given=columns[2:], draws=100).value == pytest.approx(expected, rel=1e-9)


def test_tau_is_that_of_scipy_and_its_resamples_too() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.integers(0, 4, (2, 30)).astype(float)
    assert kendall(x, y, draws=100).value == pytest.approx(stats.kendalltau(x, y).statistic, rel=1e-12)
    drawn = list(np.concatenate(list(Resampling(30).counts(draws=300, seed=5))))
    taus = [stats.kendalltau(repeated(x, c), repeated(y, c)).statistic for c in drawn]
    assert kendall(x, y, draws=300, seed=5).se == pytest.approx(np.std(taus, ddof=1), rel=1e-9)


def test_within_cells_only_differences_inside_cells_speak() -> None:
    rng = np.random.default_rng(2)
    cells = np.repeat([0, 1], 100)
    x, y = rng.normal(size=(2, 200)) + 10.0 * cells
    assert spearman(x, y, draws=100).value > 0.7
    inside = spearman(x, y, cells=cells.tolist(), draws=1000)
    assert inside.low < 0 < inside.high
    halves = [stats.spearmanr(x[cells == c], y[cells == c]).statistic for c in (0, 1)]
    assert inside.value == pytest.approx(np.mean(halves), rel=1e-9)  # equal cells have equal weight
    one_each = spearman(x[:4], y[:4], cells=[0, 1, 2, 3], draws=100)
    assert math.isnan(one_each.value)
    assert one_each.note == "not defined: a column is constant"


def test_a_covariate_that_explains_everything_leaves_no_correlation() -> None:
    x = np.arange(20.0)
    y = np.random.default_rng(0).normal(size=20)
    assert math.isnan(spearman(x, y, given=[x], draws=100).value)
    assert math.isnan(permutation_p(x, y, given=[x], draws=100))
    constant = spearman(x, y, given=[np.ones(20)], draws=200)
    assert constant.value == pytest.approx(stats.spearmanr(x, y).statistic)
    # A covariate given twice counts once.
    z = np.random.default_rng(1).normal(size=20)
    assert spearman(x, y, given=[z, z], draws=200).value == pytest.approx(spearman(x, y, given=[z], draws=200).value)


def test_reliability() -> None:
    rng = np.random.default_rng(3)
    truth = rng.normal(size=5000)
    outcome = 0.5 * truth + math.sqrt(0.75) * rng.normal(size=5000)
    noisy = truth[:, None] + rng.normal(size=(5000, 2))  # reliability 0.5
    halves = outcome[:, None] + math.sqrt(2) * rng.normal(size=(5000, 2))  # their mean has reliability 0.5
    raw = stats.spearmanr(noisy[:, 0], halves.mean(1)).statistic
    rel_x = repeatability(noisy)
    rel_y = float(spearman_brown(stats.spearmanr(*halves.T).statistic))
    assert (rel_x, rel_y) == (pytest.approx(0.48, abs=0.03), pytest.approx(0.49, abs=0.04))
    assert raw == pytest.approx(0.24, abs=0.03)
    assert float(corrected(raw, rel_x, rel_y)) == pytest.approx(0.49, abs=0.06)
    assert math.isnan(float(corrected(raw, 0.0, 0.5)))
    assert math.isnan(float(spearman_brown(-0.1)))
    with pytest.raises(ValueError, match="at least 2 repetitions, got 1"):
        repeatability(noisy[:, :1])


# --- the bootstrap -------------------------------------------------------------------------------------------------


def test_bca_is_that_of_scipy() -> None:
    rng = np.random.default_rng(4)
    x = rng.exponential(size=40)
    (found,) = bootstrap(lambda counts: counts @ x / counts.sum(1), 40, draws=100_000)
    expected = stats.bootstrap((x,), np.mean, n_resamples=100_000, rng=rng).confidence_interval
    assert (found.low, found.high) == (pytest.approx(expected.low, abs=0.01), pytest.approx(expected.high, abs=0.01))
    y = x + rng.normal(size=40)
    ours = spearman(x, y, draws=20_000)
    theirs = stats.bootstrap(
        (x, y), lambda a, b: stats.spearmanr(a, b)[0], paired=True, vectorized=False, n_resamples=3000, rng=rng
    ).confidence_interval
    assert (ours.low, ours.high) == (pytest.approx(theirs.low, abs=0.03), pytest.approx(theirs.high, abs=0.02))


def test_p_is_where_the_interval_begins() -> None:
    rng = np.random.default_rng(5)
    x = rng.exponential(size=30) - 0.7
    (found,) = bootstrap(lambda counts: counts @ x / counts.sum(1), 30, draws=50_000)
    (edge,) = bootstrap(lambda counts: counts @ x / counts.sum(1), 30, draws=50_000, level=1 - found.p)
    assert 0.001 < found.p < 0.5
    assert min(abs(edge.low), abs(edge.high)) < 0.005


def test_whole_clusters_are_drawn_and_strata_keep_their_size() -> None:
    clusters, strata = [0, 0, 1, 1, 2, 3], ["a", "a", "a", "a", "b", "b"]
    (counts,) = Resampling(6, clusters=clusters, strata=strata).counts(draws=2000, seed=1)
    assert (counts[:, 0] == counts[:, 1]).all()
    assert (counts[:, :4].sum(1) == 4).all()
    assert (counts[:, 4:].sum(1) == 2).all()
    assert counts.mean(0) == pytest.approx(np.ones(6), abs=0.1)
    (left_out,) = Resampling(6, clusters=clusters).without_one()
    assert left_out.tolist()[0] == [0, 0, 1, 1, 1, 1]
    with pytest.raises(ValueError, match="a cluster lies in two strata"):
        Resampling(2, clusters=[0, 0], strata=[0, 1])
    with pytest.raises(ValueError, match="clusters has 1 labels for 2 observations"):
        Resampling(2, clusters=[0])


def test_statistics_of_one_bootstrap_can_be_combined() -> None:
    x = np.random.default_rng(6).normal(1.0, 1.0, size=(2, 50))
    both = replicates(lambda counts: counts @ x.T / counts.sum(1)[:, None], Resampling(50), draws=500)
    (difference,) = difference_of_sizes(both.column(0), both.column(1)).estimates()
    (alone,) = bootstrap(lambda counts: counts @ (x[0] - x[1]) / counts.sum(1), 50, draws=500)
    assert difference.low == pytest.approx(alone.low, rel=1e-9)
    assert difference.p == pytest.approx(alone.p, rel=1e-6)


def test_same_seed_same_bits() -> None:
    x, y = np.random.default_rng(7).normal(size=(2, 30))
    assert spearman(x, y, draws=500, seed=3) == spearman(x, y, draws=500, seed=3)
    assert spearman(x, y, draws=500, seed=3) != spearman(x, y, draws=500, seed=4)


def test_perfect_and_constant_columns_have_no_interval_and_say_why() -> None:
    x = np.arange(10.0)
    perfect = spearman(x, x, draws=200)
    assert perfect.value == 1
    assert "at its bound in every resample" in perfect.note
    assert math.isnan(spearman(x, np.ones(10), draws=200).value)
    rare = np.zeros(10)
    rare[0] = 1
    assert "of the resamples have no value" in spearman(x, rare, draws=200).note
    assert perfect.to_dict()["low"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 2], [1, 2]), "at least 3 observations, got 2"),
        (([1, 2, 3], [1, 2]), r"expected columns of one length, got \(3,\), \(2,\)"),
        (([1, 2, math.nan], [1, 2, 3]), "observation 2 of column 0 is nan"),
    ],
)
def test_bad_columns_are_refused(arguments: Any, message: str) -> None:
    for function in (spearman, kendall, permutation_p):
        with pytest.raises(ValueError, match=message):
            function(*arguments)
    with pytest.raises(ValueError, match="draws is 5: expected at least 100"):
        spearman([1, 2, 3], [1, 3, 2], draws=5)
    with pytest.raises(ValueError, match="at least 2 units to draw, got 1"):
        spearman([1, 2, 3], [1, 3, 2], clusters=[0, 0, 0])


# --- simulated data with known truth -------------------------------------------------------------------------------


def normal_rho(rho: float) -> float:
    """Spearman's correlation of two normal variables."""
    return 6 / math.pi * math.asin(rho / 2)


def coverage(trials: int, interval: Any, truth: float) -> float:
    hits = 0
    for trial in range(trials):
        found = interval(np.random.default_rng(trial))
        hits += found.low <= truth <= found.high
    return hits / trials


def correlated(rng: np.random.Generator, n: int, rho: float) -> np.ndarray:
    return np.linalg.cholesky([[1, rho], [rho, 1]]) @ rng.standard_normal((2, n))


_CASES = [(100, 0.0), (100, 0.4), (50, 0.25), (300, 0.8)]


@pytest.mark.slow
@pytest.mark.parametrize(("n", "rho"), _CASES)
def test_intervals_of_spearman_cover_95_percent(n: int, rho: float) -> None:
    def of_ranks(rng: np.random.Generator) -> Any:  # which no monotone function changes
        return spearman(*np.exp(correlated(rng, n, rho)), draws=1000, seed=int(rng.integers(9999)))

    ours = coverage(2000, of_ranks, normal_rho(rho))
    assert ours == pytest.approx(0.95, abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "rho"), _CASES)
def test_intervals_of_kendall_cover_95_percent(n: int, rho: float) -> None:
    def of_pairs(rng: np.random.Generator) -> Any:
        return kendall(*correlated(rng, n, rho), draws=1000, seed=int(rng.integers(9999)))

    tau = coverage(2000, of_pairs, 2 / math.pi * math.asin(rho))
    assert tau == pytest.approx(0.95, abs=0.02)


@pytest.mark.slow
def test_intervals_of_partial_correlations_cover_95_percent() -> None:
    def partial(rng: np.random.Generator) -> Any:
        z = rng.standard_normal((2, 100))
        noise = correlated(rng, 100, 0.4)
        return spearman(*(z.sum(0) + 2 * noise), given=z, draws=1000, seed=int(rng.integers(9999)))

    z = np.random.default_rng(0).standard_normal((2, 200_000))
    big = z.sum(0) + 2 * correlated(np.random.default_rng(1), 200_000, 0.4)
    table = RankTable([*big, *z])
    truth = float(partial_of(table.covariances(np.ones((1, 200_000))), 0, 1, (2, 3))[0])
    assert coverage(2000, partial, truth) == pytest.approx(0.95, abs=0.02)


@pytest.mark.slow
def test_intervals_of_within_cell_correlations_cover_95_percent() -> None:
    def within(rng: np.random.Generator) -> Any:
        cells = np.repeat(np.arange(5), 20)
        return spearman(
            *(correlated(rng, 100, 0.4) + 5 * rng.standard_normal(5)[cells]), cells=cells.tolist(),
            draws=1000, seed=int(rng.integers(9999)),
        )  # fmt: skip

    # Ranks among 20: the expectation of a sample's Spearman correlation is smaller than that of the population.
    expected = normal_rho(0.4) + 3 / 21 * (2 / math.pi * math.asin(0.4) - normal_rho(0.4))
    assert coverage(2000, within, expected) == pytest.approx(0.95, abs=0.02)


@pytest.mark.slow
def test_intervals_of_clusters_cover_95_percent_and_ignoring_them_does_not() -> None:
    clusters = np.repeat(np.arange(40), 5)

    def sample(rng: np.random.Generator) -> np.ndarray:
        return correlated(rng, 40, 0.6)[:, clusters] + correlated(rng, 200, 0.0)

    truth = normal_rho(0.3)
    honest = coverage(2000, lambda rng: spearman(*sample(rng), clusters=clusters.tolist(), draws=1000, seed=1), truth)
    naive = coverage(500, lambda rng: spearman(*sample(rng), draws=1000, seed=1), truth)
    assert honest == pytest.approx(0.95, abs=0.02)
    assert naive < 0.85


def test_few_clusters_are_covered_by_the_t_interval() -> None:
    def few(rng: np.random.Generator) -> Any:
        shifts = 0.3 + 0.1 * rng.standard_normal(3)
        values = [float(stats.spearmanr(*correlated(rng, 100, r)).statistic) for r in shifts]
        return across_clusters(values, [100] * 3)

    assert coverage(1000, few, normal_rho(0.3)) == pytest.approx(0.95, abs=0.02)
    assert "fewer than two clusters" in across_clusters([0.3], [50]).note
    assert math.isnan(across_clusters([], []).value)


@pytest.mark.parametrize("kind", ["ties", "partial", "cells", "blocks"])
def test_permutation_p_errs_at_its_level(kind: str) -> None:
    rejected, trials = 0, 1000
    for trial in range(trials):
        rng = np.random.default_rng(trial)
        options: dict[str, Any] = {}
        x, y = rng.standard_normal((2, 40))
        if kind == "ties":
            x, y = np.round(x), np.round(np.exp(y))
        elif kind == "partial":
            z = rng.standard_normal((2, 40))
            x, y, options = x + 0.7 * z.sum(0), y + 0.7 * z.sum(0), {"given": z}
        elif kind == "blocks":  # seeds that differ, each in every cell
            cells, seeds = np.repeat(np.arange(4), 10).tolist(), np.tile(np.arange(10), 4).tolist()
            x, y = (column + 2 * rng.standard_normal(10)[seeds] for column in (x, y))
            options = {"cells": cells, "blocks": seeds}
        else:
            cells = np.repeat(np.arange(4), 10)
            x, y, options = x + 5 * cells, y + 5 * cells, {"cells": cells.tolist()}
        rejected += permutation_p(x, y, draws=199, seed=trial, **options) <= 0.05
    assert rejected / trials == pytest.approx(0.05, abs=0.02)


def test_blocks_move_as_a_whole() -> None:
    rng = np.random.default_rng(0)
    seeds, cells = [0, 1, 2, 3] * 2, ["a"] * 4 + ["b"] * 4
    x, y = rng.normal(size=(2, 8))
    ranks = RankTable([x, y], cells).scores()
    both = ranks[1].reshape(2, 4)
    exact = np.abs([ranks[0] @ both[:, order].ravel() for order in itertools.permutations(range(4))])
    expected = float((exact >= abs(ranks[0] @ ranks[1]) - 1e-12).mean())
    assert permutation_p(x, y, cells=cells, blocks=seeds, draws=50_000) == pytest.approx(expected, abs=0.01)
    with pytest.raises(ValueError, match="block 3 is not in every stratum"):
        permutation_p(x[:7], y[:7], cells=cells[:7], blocks=seeds[:7])
    with pytest.raises(ValueError, match="block 0 has two observations"):
        permutation_p(x, y, blocks=seeds)


def test_what_ranks_leave_of_a_strong_confounder_normal_scores_remove() -> None:
    rng = np.random.default_rng(0)
    z, noise = rng.standard_normal((2, 2, 4000))
    columns = np.exp(2 * z.sum(0) + noise)
    assert spearman(*columns, given=z, draws=100).value == pytest.approx(0.25, abs=0.05)
    scores = spearman(*columns, given=z, normal_scores=True, draws=1000)
    assert scores.low < 0 < scores.high
    assert abs(scores.value) < 0.05


def test_normal_scores_are_quantiles_of_ranks() -> None:
    rng = np.random.default_rng(1)
    x, y = np.round(rng.normal(size=(2, 40)), 1)
    a, b = (stats.norm.ppf(stats.rankdata(column) / 41) for column in (x, y))
    assert spearman(x, y, normal_scores=True, draws=100).value == pytest.approx(np.corrcoef(a, b)[0, 1], rel=1e-9)
    cells = np.repeat([0, 1], 20).tolist()
    # Clusters that are drawn make cells of different sizes.
    clusters = np.tile(np.arange(10), 4).tolist()
    within = spearman(x, y, cells=cells, clusters=clusters, normal_scores=True, draws=300)
    assert within.low < within.value < within.high
    counts = next(Resampling(40, clusters=list(range(40))).counts(draws=100, seed=0))
    by_rows = RankTable([x, y], cells, normal_scores=True).covariances(counts)
    for row in (0, 5):
        total = np.zeros((2, 2))
        for cell in (0, 1):
            w = counts[row] * (np.array(cells) == cell)
            drawn = [repeated(column, w) for column in (x, y)]
            scores = np.array([stats.norm.ppf(stats.rankdata(d) / (len(d) + 1)) for d in drawn])
            scores -= scores.mean(1, keepdims=True)
            total += scores @ scores.T
        np.testing.assert_allclose(by_rows[row], total, rtol=1e-9, atol=1e-9)


def test_power_of_the_permutation_test() -> None:
    x, y = correlated(np.random.default_rng(0), 100, 0.5)
    assert permutation_p(x, y, draws=999) == 1 / 1000


def test_p_of_the_bootstrap_errs_at_its_level() -> None:
    rejected = 0
    for trial in range(1000):
        rng = np.random.default_rng(trial)
        rejected += spearman(*rng.standard_normal((2, 80)), draws=500, seed=trial).p <= 0.05
    assert rejected / 1000 == pytest.approx(0.05, abs=0.02)
