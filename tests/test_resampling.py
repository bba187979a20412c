from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flatminima.study.resampling import sign_flip, two_way_bootstrap

NUMBERS = st.floats(-10, 10).map(lambda v: round(v, 2))


def enumerated(strata: list[list[float]]) -> float:
    """p by writing out every pattern."""
    flat = [(value, len(stratum)) for stratum in strata for value in stratum]

    def statistic(signs: tuple[int, ...]) -> float:
        return abs(math.fsum(s * v / n for s, (v, n) in zip(signs, flat, strict=True)) / len(strata))

    observed = statistic((1,) * len(flat))
    patterns = list(itertools.product((1, -1), repeat=len(flat)))
    return sum(statistic(signs) >= observed - 1e-9 for signs in patterns) / len(patterns)


@given(st.lists(NUMBERS, min_size=1, max_size=9))
def test_p_is_the_share_of_patterns(differences: list[float]) -> None:
    found = sign_flip(differences)
    assert found.p == pytest.approx(enumerated([differences]))
    assert found.exact
    assert found.n == len(differences)
    assert found.smallest == 2 / 2**found.n
    assert found.statistic == pytest.approx(sum(differences) / len(differences))
    assert sign_flip([-d for d in differences]).p == pytest.approx(found.p)


@given(st.lists(st.lists(NUMBERS, min_size=1, max_size=4), min_size=1, max_size=3))
def test_strata_are_weighted_equally(strata: list[list[float]]) -> None:
    found = sign_flip({str(i): stratum for i, stratum in enumerate(strata)})
    assert found.p == pytest.approx(enumerated(strata))
    assert found.statistic == pytest.approx(np.mean([np.mean(stratum) for stratum in strata]))


def test_four_differences_can_never_be_significant() -> None:
    for differences in ([3.0, 3.0, 3.0, 3.0], [0.1, 9.0, 4.0, 2.2], [1.0, 1.0, 1.0, 1.1]):
        assert sign_flip(differences).p == 0.125
    assert sign_flip([1.0, -0.1, 1.0, 1.0]).p == 0.25
    assert [sign_flip([1.0] * n).smallest for n in (6, 10, 13)] == [2 / 64, 2 / 1024, 2 / 8192]
    assert sign_flip({"rotated": [1.0] * 6, "pacs": [2.0] * 4}).p == 2 / 1024
    assert sign_flip([0.0, 0.0, 0.0]).p == 1.0


def test_many_differences_are_sampled_and_agree_with_the_normal_limit() -> None:
    differences = list(np.random.default_rng(0).normal(0.1, 1.0, 300))
    found = sign_flip(differences)
    assert not found.exact
    z = abs(sum(differences)) / math.sqrt(sum(d * d for d in differences))
    assert found.p == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.06)
    assert found == sign_flip(differences)
    assert sign_flip([1.0] * 30).p == 1 / 100_001


def test_the_level_is_kept_for_symmetric_differences() -> None:
    rng = np.random.default_rng(1)
    rejected = sum(sign_flip(list(rng.standard_t(2, 7))).p <= 0.05 for _ in range(2000))
    assert rejected / 2000 == pytest.approx(6 / 128, abs=0.015)  # the largest attainable level below 5 %


@pytest.mark.parametrize("bad", [[], {"a": [1.0], "b": []}, [1.0, math.nan], [math.inf]])
def test_a_test_without_numbers_is_refused(bad: object) -> None:
    with pytest.raises(ValueError, match="difference"):
        sign_flip(bad)  # type: ignore[arg-type]


def test_the_bootstrap_resamples_rows_and_columns() -> None:
    rng = np.random.default_rng(2)
    table = rng.normal(size=(5, 4))
    low, high = two_way_bootstrap(table, draws=4000, seed=3)
    draws = np.random.default_rng(9)
    means = [table[np.ix_(draws.integers(5, size=5), draws.integers(4, size=4))].mean() for _ in range(4000)]
    assert (low, high) == (
        pytest.approx(np.quantile(means, 0.025), abs=0.06),
        pytest.approx(np.quantile(means, 0.975), abs=0.06),
    )
    assert two_way_bootstrap(table, seed=3) == two_way_bootstrap(table, seed=3)
    constant = np.repeat(np.array([[1.0], [3.0]]), 3, axis=1)
    assert two_way_bootstrap(constant) == (1.0, 3.0)  # rows differ, columns do not: only rows matter
    holes = np.array([[1.0, math.nan], [1.0, 1.0], [math.nan, 1.0]])
    assert two_way_bootstrap(holes) == (1.0, 1.0)
    assert all(math.isnan(end) for end in two_way_bootstrap(np.array([[1.0, 2.0]])))


def test_the_coverage_with_few_targets_is_what_the_docstring_says() -> None:
    rng = np.random.default_rng(4)
    hits = 0
    for _ in range(300):
        cells = rng.normal(0, 0.6, (4, 1)) + rng.normal(0, 0.25, (1, 6)) + rng.normal(0, 0.5, (4, 6))
        low, high = two_way_bootstrap(cells, draws=400, seed=int(rng.integers(1 << 30)))
        hits += low <= 0 <= high
    assert 0.82 < hits / 300 < 0.97
