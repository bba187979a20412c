from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from flatminima.study.statistics import holm, interval, paired, paired_p

NUMBERS = st.floats(-1e6, 1e6)


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=2, max_size=20))
def test_paired_interval_is_that_of_the_paired_t_test(pairs: list[tuple[float, float]]) -> None:
    a, b = np.array(pairs).T
    spread = np.std(a - b)
    # Differences without spread, or within the rounding of the values they come from, have no p-value: tested below.
    assume(spread > 1e-6 * np.abs(a - b).max() and spread > 1e-9 * np.abs([a, b]).max())
    expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    found = paired(dict(enumerate(a.tolist())), dict(enumerate(b.tolist())))
    assert found["n"] == len(pairs)
    assert found["difference"] == pytest.approx((a - b).mean(), rel=1e-9, abs=1e-9)
    p = paired_p(dict(enumerate(a.tolist())), dict(enumerate(b.tolist())))
    assert p == pytest.approx(stats.ttest_rel(a, b).pvalue, rel=1e-6)
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high), rel=1e-6, abs=1e-6)


@given(st.lists(NUMBERS, min_size=2, max_size=20))
def test_interval_is_that_of_students_t(values: list[float]) -> None:
    assume(np.std(values) > 1e-6 * np.abs(values).max())
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    found = interval(values)
    assert (found["low"], found["high"]) == pytest.approx((low, high), rel=1e-6, abs=1e-6)
    assert found["sd"] == pytest.approx(np.std(values, ddof=1), rel=1e-6)
    assert found["mean"] == pytest.approx(np.mean(values), rel=1e-9, abs=1e-6)


def test_one_seed_has_a_mean_and_no_interval_and_none_has_nothing() -> None:
    assert interval([]) == {"mean": None, "sd": None, "low": None, "high": None, "n": 0}
    assert interval([2.5]) == {"mean": 2.5, "sd": None, "low": None, "high": None, "n": 1}
    assert paired({0: 1.0}, {1: 2.0}) == {"difference": None, "low": None, "high": None, "n": 0}
    assert paired({0: 1.0, 3: 5.0}, {3: 2.0}) == {"difference": 3.0, "low": None, "high": None, "n": 1}


def test_pairs_are_made_by_seed_and_not_by_position() -> None:
    first = {4: 10.0, 0: 1.0, 7: math.pi}
    second = {0: 0.5, 9: 100.0, 4: 8.0}
    assert paired(first, second)["difference"] == (2.0 + 0.5) / 2
    assert paired(first, second)["n"] == 2


def test_the_interval_covers_the_mean_nineteen_times_in_twenty() -> None:
    rng = np.random.default_rng(0)
    trials = [interval((3.0 + rng.standard_normal(4)).tolist()) for _ in range(2000)]
    covered = sum(t["low"] <= 3.0 <= t["high"] for t in trials)
    assert abs(covered - 1900) < 5 * math.sqrt(2000 * 0.95 * 0.05)


def test_differences_without_spread_have_no_p_value() -> None:
    assert paired_p({0: 1.0}, {0: 2.0}) is None
    assert paired_p({0: 1.0, 1: 3.0}, {2: 2.0}) is None
    assert paired_p({0: 0.5, 1: 0.25}, {0: 0.5, 1: 0.25}) == 1.0
    # 1/360 apart in every seed, to rounding: accuracies on 360 rows.
    assert paired_p({s: (300 + s) / 360 for s in range(5)}, {s: (299 + s) / 360 for s in range(5)}) is None


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_rejects_what_its_stepwise_procedure_rejects(p_values: list[float]) -> None:
    corrected = holm(p_values)
    assert all(p <= c <= 1 for p, c in zip(p_values, corrected, strict=True))
    for alpha in (0.01, 0.05, 0.3):
        rejected = set()
        for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
            if p_values[i] * (len(p_values) - rank) > alpha:
                break
            rejected.add(i)
        assert {i for i, c in enumerate(corrected) if c <= alpha} == rejected


def test_holm_errs_at_most_once_in_twenty_when_nothing_differs() -> None:
    rng = np.random.default_rng(0)
    reference, others = rng.standard_normal((2000, 1, 5)), rng.standard_normal((2000, 6, 5))
    families = stats.ttest_rel(others, np.broadcast_to(reference, others.shape), axis=2).pvalue
    false = sum(min(holm(family)) <= 0.05 for family in families.tolist())
    assert 0 < false <= 100 + 3 * math.sqrt(100)
