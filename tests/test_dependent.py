"""Comparisons of dependent correlations and equivalence: vectors, statsmodels, and error rates on simulated data."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import ttost_ind, ttost_paired

from flatminima.study.dependent import difference_of_correlations, meng_z
from flatminima.study.equivalence import tost, tost_correlation, tost_paired, tost_welch
from flatminima.study.statistics import benjamini_hochberg, holm

VECTORS = json.loads((Path(__file__).parent / "vectors" / "statistics.json").read_text())


def trio(rng: np.random.Generator, n: int, r12: float, r13: float, r23: float) -> np.ndarray:
    """Outcome and two measures."""
    return np.linalg.cholesky([[1, r12, r13], [r12, 1, r23], [r13, r23, 1]]) @ rng.standard_normal((3, n))


def test_meng_vectors() -> None:
    v = VECTORS["meng"]
    for r23, expected in ((v["r23"], v), (0.0, v["r23=0"])):
        found = meng_z(v["r12"], v["r13"], r23, v["n"])
        assert (found.z, found.p) == (pytest.approx(expected["z"], rel=1e-9), pytest.approx(expected["p"], rel=1e-9))
    # A measure with the other sign is turned round.
    turned = meng_z(-v["r12"], v["r13"], -v["r23"], v["n"], absolute=True)
    assert turned.z == pytest.approx(v["z"], rel=1e-9)
    assert math.isnan(meng_z(1.0, 0.3, 0.3, 50).z)
    with pytest.raises(ValueError, match=r"r13 is 1\.2: expected a correlation"):
        meng_z(0.1, 1.2, 0.0, 50)
    with pytest.raises(ValueError, match="n is 3"):
        meng_z(0.1, 0.2, 0.0, 3)


def test_meng_errs_at_its_level_and_has_the_stated_power() -> None:
    def rejections(r12: float, r13: float, n: int, trials: int) -> float:
        hits = 0
        for trial in range(trials):
            ranks = stats.rankdata(trio(np.random.default_rng(trial), n, r12, r13, 0.35), axis=1)
            r = np.corrcoef(ranks)
            hits += meng_z(r[0, 1], r[0, 2], r[1, 2], n).p <= 0.05
        return hits / trials

    assert rejections(0.3, 0.3, 100, 2000) == pytest.approx(0.05, abs=0.02)
    # Specification, section 4, point 6: 29 % at n = 100 and 83 % at n = 425, for rank correlations 0.40 and 0.25.
    pearson = [2 * math.sin(math.pi * r / 6) for r in (0.40, 0.25)]
    assert rejections(*pearson, 100, 1500) == pytest.approx(0.29, abs=0.04)
    assert rejections(*pearson, 425, 1500) == pytest.approx(0.83, abs=0.04)


def test_difference_of_correlations_by_hand() -> None:
    outcome, first, second = trio(np.random.default_rng(0), 60, -0.5, 0.3, 0.2)
    found = difference_of_correlations(first, second, outcome, draws=500)
    sizes = [abs(stats.spearmanr(m, outcome).statistic) for m in (first, second)]
    assert found.value == pytest.approx(sizes[0] - sizes[1], rel=1e-9)
    kept = difference_of_correlations(first, second, outcome, share=0.7, draws=500)
    assert kept.value == pytest.approx(sizes[0] - 0.7 * sizes[1], rel=1e-9)
    back = difference_of_correlations(second, first, outcome, draws=500)
    assert (back.low, back.high) == (pytest.approx(-found.high), pytest.approx(-found.low))


@pytest.mark.slow
@pytest.mark.parametrize("pair", [(0.3, 0.3), (0.4, 0.25), (-0.4, 0.25)])
def test_intervals_of_the_difference_cover_95_percent(pair: tuple[float, float]) -> None:
    truth = abs(6 / math.pi * math.asin(pair[0] / 2)) - abs(6 / math.pi * math.asin(pair[1] / 2))
    hits = 0
    for trial in range(2000):
        outcome, first, second = trio(np.random.default_rng(trial), 100, *pair, 0.35 * math.copysign(1, pair[0]))
        found = difference_of_correlations(first, second, outcome, draws=1000, seed=trial)
        hits += found.low <= truth <= found.high
    assert hits / 2000 == pytest.approx(0.95, abs=0.02)


def test_difference_of_correlations_errs_at_its_level() -> None:
    hits = 0
    for trial in range(1000):
        outcome, first, second = trio(np.random.default_rng(trial), 100, 0.4, 0.4, 0.3)
        hits += difference_of_correlations(first, second, outcome, draws=400, seed=trial).p <= 0.05
    assert hits / 1000 == pytest.approx(0.05, abs=0.02)


def test_tost_vectors_and_statsmodels() -> None:
    v = VECTORS["tost_welch"]
    for margin in (0.001, 0.003):
        found = tost_welch(v["a"], v["b"], margin)
        assert found.difference == pytest.approx(v["d"], rel=1e-9)
        assert found.p == pytest.approx(v[f"margin_{margin}_p"], rel=1e-9)
        theirs = ttost_ind(np.array(v["b"]), np.array(v["a"]), -margin, margin, usevar="unequal")
        assert found.p == pytest.approx(theirs[0], rel=1e-9)
        paired = tost_paired([b - a for a, b in zip(v["a"], v["b"], strict=True)], margin)
        assert paired.p == pytest.approx(ttost_paired(np.array(v["b"]), np.array(v["a"]), -margin, margin)[0], rel=1e-9)


def test_tost_is_the_90_percent_interval_inside_the_margin() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        differences = rng.normal(0.05, 0.3, 12)
        low, high = stats.t.interval(0.9, 11, differences.mean(), stats.sem(differences))
        assert (tost_paired(list(differences), 0.2).p <= 0.05) == (low > -0.2 and high < 0.2)


def test_tost_errs_at_its_level_at_the_margin() -> None:
    rng = np.random.default_rng(1)
    paired = np.mean([tost_paired(list(rng.normal(0.5, 1, 50)), 0.5).p <= 0.05 for _ in range(4000)])
    welch = np.mean(
        [tost_welch(list(rng.normal(0, 1, 40)), list(rng.normal(0.8, 2, 80)), 0.8).p <= 0.05 for _ in range(4000)]
    )
    rho = 2 * math.sin(math.pi * 0.1 / 6)
    factor = np.linalg.cholesky([[1, rho], [rho, 1]])
    ranks = stats.rankdata(factor @ rng.standard_normal((2000, 2, 850)), axis=2)
    ranks -= ranks.mean(2, keepdims=True)
    found = (ranks[:, 0] * ranks[:, 1]).sum(1) / np.sqrt((ranks**2).sum(2).prod(1))
    correlations = np.mean([tost_correlation(float(r), 850, 0.1).p <= 0.05 for r in found])
    for share in (paired, welch, correlations):
        assert share == pytest.approx(0.05, abs=0.02)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tost(0.0, 1.0, 0.0), "margin is 0.0: expected more than 0"),
        (lambda: tost(0.0, -1.0, 1.0), "se is -1.0"),
        (lambda: tost(0.0, math.nan, 1.0), "se is nan"),
        (lambda: tost_welch([1.0], [1.0, 2.0], 1.0), "at least 2 values in each group, got 1 and 2"),
        (lambda: tost_paired([1.0], 1.0), "at least 2 differences, got 1"),
        (lambda: tost_correlation(1.0, 50, 0.1), "expected sizes below 1"),
        (lambda: tost_correlation(0.0, 3, 0.1), "at least 4 observations"),
    ],
)
def test_bad_input_of_tost(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_values_without_spread() -> None:
    assert tost_paired([0.0, 0.0], 0.1).p == 0
    assert tost_welch([0.5, 0.5], [0.5, 0.5], 0.1).p == 0
    assert tost_paired([0.2, 0.2], 0.1).p == 1


def test_corrections_are_those_of_statsmodels() -> None:
    rng = np.random.default_rng(2)
    for size in (1, 3, 10):
        p = list(rng.uniform(size=size) ** 2)
        assert holm(p) == pytest.approx(list(multipletests(p, method="holm")[1]))
        assert benjamini_hochberg(p) == pytest.approx(list(multipletests(p, method="fdr_bh")[1]))
    assert benjamini_hochberg([]) == []


def test_the_false_discovery_rate_is_kept() -> None:
    rng = np.random.default_rng(3)
    shares = []
    for _ in range(2000):
        p = np.concatenate([rng.uniform(size=15), stats.norm.sf(rng.normal(3, 1, 5))])
        found = np.array(benjamini_hochberg(list(p))) <= 0.05
        shares.append(found[:15].sum() / max(found.sum(), 1))
    assert np.mean(shares) == pytest.approx(0.05 * 15 / 20, abs=0.01)
