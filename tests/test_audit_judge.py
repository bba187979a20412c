"""How changes are judged against what is declared and against their errors; the random-orbit test."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from flatminima import random_orbit_test
from flatminima.audit.judge import MEANING, MOVED, Change, judge, spread, worst
from flatminima.audit.repair import ALONG_THE_WEIGHTS, repair_of, with_repairs
from flatminima.measures import MEASURES, Measurement
from flatminima.measures.invariance import Invariance
from flatminima.symmetries import KINDS

DECLARED: tuple[Invariance, ...] = ("invariant", "almost", "changes", "unknown")


def made(value: float, error: float | None = 0.0, kind: str = "standard error") -> Measurement:
    return Measurement("trace", value, error, kind, True)


def judged(base: Measurement, members: list[Measurement], declared: Invariance = "changes") -> Change:
    return judge("trace", "relu-unit-rescaling", declared, base, members)


@pytest.mark.parametrize(
    ("base", "moved", "ratio", "significant"),
    [
        (made(10, 1), [made(12, 1)], 1.2, False),  # 2 against 3 * sqrt(2)
        (made(10, 0.1), [made(12, 0.1)], 1.2, True),
        (made(10), [made(5), made(30), made(10)], 3.0, True),
        (made(10), [made(2), made(20)], 5.0, True),
        (made(10), [made(10 * (1 + 1e-7))], 1 + 1e-7, False),
        (made(10), [made(10 * (1 + 1e-5))], 1 + 1e-5, True),
        (made(10, 5, "lower bound, spread of starts"), [made(11, 5, "lower bound, spread of starts")], 1.1, False),
        (made(10, None), [made(11, None)], 1.1, True),
        (made(1.0), [made(-1.0)], math.inf, True),
        (made(1.0), [made(0.0)], math.inf, True),
        (made(0.0), [made(1.0)], math.inf, True),
        (made(0.0), [made(0.0)], 1.0, False),
        (made(math.inf), [made(math.inf)], 1.0, False),
        (made(1.0), [made(math.inf)], math.inf, True),
        (made(-2.0), [made(-4.0)], 2.0, True),
        (made(1.0), [made(math.nan, None, "not applicable")], math.inf, True),
    ],
)
def test_a_change_counts_beyond_three_combined_errors(
    base: Measurement, moved: list[Measurement], ratio: float, significant: bool
) -> None:
    change = judged(base, moved)
    assert change.max_ratio == pytest.approx(ratio)
    assert change.significant == significant
    assert [v for v in change.values if v == v] == [m.value for m in moved if m.applies]


def test_a_theorem_is_contradicted_only_beyond_five_errors() -> None:
    base, moved = made(10.0, 0.1), [made(10.55, 0.1)]  # 3.9 combined errors
    assert judged(base, moved, "changes").status == "changes"
    assert judged(base, moved, "invariant").status == "invariant"
    assert judged(base, [made(11.0, 0.1)], "invariant").status == "broken"


@pytest.mark.parametrize("declared", DECLARED)
def test_an_error_that_hides_a_large_change_decides_nothing(declared: Invariance) -> None:
    for found in (
        judged(made(1.0, 3.0), [made(7.0, 3.0)], declared),
        judged(made(1.0, 3.0), [made(1.0, 3.0)], declared),
    ):
        assert found.status == "undecided"
        assert not found.significant
        assert found.resolution >= 1


def test_statuses_by_what_is_declared() -> None:
    base, same, tenth, double = made(10.0), [made(10.0)], [made(10.9)], [made(20.0)]
    expected = {
        "invariant": ("invariant", "broken", "broken"), "almost": ("nearly", "nearly", "found to change"),
        "changes": ("survived", "changes", "changes"), "unknown": ("survived", "found to change", "found to change"),
    }  # fmt: skip
    for declared in DECLARED:
        assert tuple(judged(base, m, declared).status for m in (same, tenth, double)) == expected[declared]


def test_the_worst_status_is_the_verdict() -> None:
    order = list(MEANING)
    for a, b in itertools.combinations(order, 2):
        changes = [Change("trace", "x", "changes", s, (), 1.0, None, 0.0) for s in (a, b)]
        assert worst(changes) == b == worst(reversed(changes))
    assert worst([]) is None
    assert {"changes", "found to change", "broken"} == MOVED


def test_the_spread_is_geometric() -> None:
    assert spread([2.0, 8.0]) == pytest.approx(2.0)
    assert spread([-2.0, -8.0]) == pytest.approx(2.0)
    for none in ([0.0, 1.0], [math.inf, 1.0], [math.nan], [-1.0, 1.0]):
        assert spread(none) is None


# ----- repairs --------------------------------------------------------------------------------------------------------


def test_a_repair_is_invariant_where_the_measure_is_not() -> None:
    every = [kind.name for kind in KINDS.values() if kind.preserves == "outputs"]
    for name, kinds in itertools.product(MEASURES, ([k] for k in every)):
        found = repair_of(name, kinds, {}, list(MEASURES))
        if found is not None and not found.moves_under:
            assert MEASURES[found.name].invariance(kinds[0]) in ("invariant", "almost")
        elif found is not None:
            raise AssertionError(f"{found.name} moves under the one kind there is, {kinds[0]}: no repair of {name}")


def test_a_repair_that_is_not_defined_here_is_not_proposed() -> None:
    found = repair_of("trace", ["relu-unit-rescaling"], {}, ["adaptive_trace", "w_hessian_w"])
    assert found is not None
    assert (found.name, found.measurement) == ("adaptive_trace", None)
    found = repair_of("trace", ["relu-unit-rescaling"], {}, ["w_hessian_w"])
    assert found is not None
    assert (found.name, found.same_intention) == ("w_hessian_w", False)
    assert repair_of("trace", ["relu-unit-rescaling"], {}, []) is None
    assert repair_of("parameter_norm", ["relu-unit-rescaling"], {}, ["w_hessian_w"]) is None  # that is no norm


def test_repairs_come_along_in_the_order_of_the_tables() -> None:
    names = with_repairs(["trace"])
    assert {"trace", "orbit_minimal_trace", "adaptive_trace", *ALONG_THE_WEIGHTS} <= set(names)
    assert names == [name for name in MEASURES if name in names]


# ----- the random-orbit test ------------------------------------------------------------------------------------------


def test_what_rests_on_the_function_stays_and_what_rests_on_coordinates_goes() -> None:
    g = np.random.default_rng(0)
    accuracy = g.normal(size=60)
    invariant = accuracy + 0.5 * g.normal(size=60)
    scales = 20 ** g.uniform(-1, 1, size=60)
    kept = random_orbit_test(invariant, invariant, accuracy)
    gone = random_orbit_test(np.exp(0.3 * invariant), np.exp(0.3 * invariant) * scales**4, accuracy)
    assert kept.retained == (1.0, 1.0, 1.0)
    assert kept.before is not None
    assert kept.before == kept.after
    assert kept.before[0] == pytest.approx(float(stats.spearmanr(invariant, accuracy).statistic))
    assert gone.before == pytest.approx(kept.before)
    assert gone.after is not None
    assert abs(gone.after[0]) < 0.5 * kept.before[0]
    assert gone.after[1] < gone.after[0] < gone.after[2]
    assert abs(gone.retained[0]) < 0.4


def test_the_interval_of_the_correlation_covers() -> None:
    g = np.random.default_rng(1)
    inside, trials, rho = 0, 400, 0.5
    truth = 6 / math.pi * math.asin(rho / 2)  # Spearman's of a bivariate normal
    for _ in range(trials):
        a, b = g.multivariate_normal([0, 0], [[1, rho], [rho, 1]], size=40).T
        _, low, high = random_orbit_test(a, b).retained
        inside += low <= truth <= high
    assert inside / trials == pytest.approx(0.95, abs=0.03)


@pytest.mark.parametrize(
    ("before", "after", "outcome", "message"),
    [
        ([1, 2, 3], [1, 2, 3], None, "before has 3 values: expected as many as before .3., at least 4"),
        ([1, 2, 3, 4], [1, 2, 3], None, "after has 3 values: expected as many as before"),
        ([1, 2, 3, 4], [1, 2, math.nan, 4], None, "after has no number for network 2: leave it out of all lists"),
        ([1, 2, 3, 4], [1, 2, 3, 4], [7, 7, 7, 7], "outcome is 7 for all 4 networks: there is no order among them"),
    ],
)
def test_bad_lists_are_refused(
    before: list[float], after: list[float], outcome: list[float] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        random_orbit_test(before, after, outcome)
