"""The arithmetic of proofs: exact integers, certificates repaired and refused, witnesses decided at the last bit."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flatminima.measures.weakness.frame import FeatureProblem
from flatminima.measures.weakness.margin import nearest_point
from flatminima.measures.weakness.proofs import Certificate, check_certificate, check_witnesses, exact_certificate, wins
from flatminima.measures.weakness.rational import exact_margins_positive, exact_multipliers, integers
from flatminima.measures.weakness.simplex import DualSimplex, Ray

floats = st.floats(allow_nan=False, allow_infinity=False)


@given(st.lists(floats, min_size=1, max_size=6))
def test_integers_are_the_floats(values: list[float]) -> None:
    numbers, exponent = integers(np.array(values))
    assert [Fraction(int(n)) * Fraction(2) ** exponent for n in numbers] == [Fraction(v) for v in values]


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1))
def test_margins_in_exact_arithmetic(seed: int) -> None:
    rng = np.random.default_rng(seed)
    phi = rng.normal(size=(3, 2)) * 10.0 ** rng.integers(-20, 20)
    phi[0, 0] = 0.0
    problem = FeatureProblem.of(phi + rng.integers(0, 2) * 1e9, [0, 1, 2], phi[:1], 3)
    frame, weights, labels = problem.frame, rng.normal(size=(3, problem.frame.dimension)), rng.integers(0, 3, 3)
    expected = True
    for row, label in zip(problem.train, labels, strict=True):
        scores = []
        for w in weights:
            total = Fraction(w[-1])
            for j, unit in enumerate(frame.units):
                total += (
                    Fraction(w[j])
                    * (Fraction(row[unit]) - Fraction(frame.shift[j]))
                    / Fraction(2) ** int(frame.exponent[j])
                )
            scores.append(total)
        expected &= all(scores[label] > s for k, s in enumerate(scores) if k != label)
    assert exact_margins_positive(weights, frame, problem.train, labels) == expected


def test_a_witness_is_decided_at_the_last_bit() -> None:
    # Class 1 against class 0 at x: f(x) = x - (1 + 2^-52); positive, zero and negative within one rounding of 1.
    threshold = 1.0 + 2.0**-52
    x = np.array([[0.0], [threshold], [threshold + 2.0**-52], [1.0]])
    problem = FeatureProblem.of(x, [0, 0, 1, 0], x, 2)
    scale = 2.0 ** int(problem.frame.exponent[0])
    weights = np.array([[0.0, 0.0], [scale, -threshold]])
    assert [*wins(problem, weights, np.arange(4), np.full(4, 1))] == [False, False, True, False]
    assert [*wins(problem, weights, np.arange(4), np.full(4, 0))] == [True, False, False, True]
    assert check_witnesses(problem, weights[None]).tolist() == [False]  # a tie at the second point is no win


def ray_of(problem: FeatureProblem, probe: int, target: int) -> Certificate:
    x = problem.whiten(problem.z_train)
    found = DualSimplex(x, problem.labels, problem.classes).feasible(problem.whiten(problem.z_probes)[probe], target)
    assert isinstance(found, Ray)
    return Certificate(probe, target, found.points, found.winners, found.losers, found.multipliers)


@pytest.fixture
def infeasible() -> tuple[FeatureProblem, Certificate]:
    """A class excluded by a mixture of rivals, on points in general position."""
    rng = np.random.default_rng(0)
    points = rng.normal(size=(60, 3))
    labels = (points @ rng.normal(size=(3, 4))).argmax(1)
    probes = rng.normal(size=(40, 3)) * 0.3
    problem = FeatureProblem.of(points, labels, probes, 4)
    x = problem.whiten(problem.z_train)
    simplex = DualSimplex(x, labels, 4)
    for j, probe in enumerate(problem.whiten(problem.z_probes)):
        for c in range(4):
            if isinstance(simplex.feasible(probe, c), Ray):
                return problem, ray_of(problem, j, c)
    raise AssertionError


def test_a_rounded_certificate_is_repaired(infeasible) -> None:
    problem, raw = infeasible
    noisy = Certificate(raw.probe, raw.target, raw.points, raw.winners, raw.losers, raw.multipliers * (1.0 + 1e-4))
    noisy.multipliers[0] *= 1.001
    checked = check_certificate(problem, noisy)
    assert checked is not None
    assert (checked.proof, checked.resolution) == ("exact", 0.0)
    exact = exact_certificate(problem, checked)
    assert exact is not None
    assert all(value >= 0 for value in exact)
    np.testing.assert_allclose([float(v) for v in exact], checked.multipliers, rtol=1e-12)
    for unit in [*problem.frame.units.tolist(), None]:  # Farkas's equation itself, in fractions
        totals = [Fraction(0)] * problem.classes
        for point, winner, loser, value in zip(checked.points, checked.winners, checked.losers, exact, strict=True):
            row = problem.probes[checked.probe] if point < 0 else problem.train[point]
            coordinate = Fraction(1) if unit is None else Fraction(float(row[unit]))
            totals[winner] += value * coordinate
            totals[loser] -= value * coordinate
        assert totals == [0] * problem.classes


def test_a_certificate_that_proves_nothing_is_refused(infeasible) -> None:
    problem, raw = infeasible
    without = np.arange(len(raw.points)) > 0
    short = Certificate(
        raw.probe, raw.target, *(a[without] for a in (raw.points, raw.winners, raw.losers, raw.multipliers))
    )
    assert check_certificate(problem, short) is None
    assert exact_certificate(problem, short) is None
    nothing = Certificate(raw.probe, raw.target, raw.points, raw.winners, raw.losers, 0.0 * raw.multipliers)
    assert check_certificate(problem, nothing) is None
    broken = Certificate(raw.probe, raw.target, raw.points, raw.winners, raw.losers, np.nan * raw.multipliers)
    assert check_certificate(problem, broken) is None


def test_no_certificate_excludes_what_is_feasible() -> None:
    """A million attempts would not: a certificate for a feasible pair does not exist, so a claimed one must fail."""
    rng = np.random.default_rng(0)
    points = rng.normal(size=(20, 3))
    labels = (points @ rng.normal(size=(3, 3))).argmax(1)
    problem = FeatureProblem.of(points, labels, rng.normal(size=(1, 3)), 3)
    for _ in range(200):
        count = rng.integers(2, 20)
        where = np.append(rng.integers(0, 20, count), -1)
        winners = np.append(labels[where[:-1]], 0)
        losers = (winners + rng.integers(1, 3, len(winners))) % 3
        claimed = Certificate(None, None, where[:-1], winners[:-1], losers[:-1], rng.random(count))
        assert check_certificate(problem, claimed) is None  # the training rows are feasible


def test_exact_multipliers_by_hand() -> None:
    # 1/3 of a point at 0 and 2/3 of one at 3, against a probe at 2.
    points = np.array([[0.0, 1.0], [3.0, 1.0], [2.0, 1.0]])
    found = exact_multipliers(points, np.array([1, 1, 0]), np.array([0, 0, 1]), np.array([0.3, 0.7, 1.0]))
    assert found is not None
    assert [value / found[2] for value in found] == [Fraction(1, 3), Fraction(2, 3), 1]
    outside = np.array([[0.0, 1.0], [3.0, 1.0], [4.0, 1.0]])
    assert exact_multipliers(outside, np.array([1, 1, 0]), np.array([0, 0, 1]), np.array([0.1, 1.2, 1.0])) is None


@pytest.mark.parametrize("probe", [None, 0])
def test_the_second_opinion_agrees_with_the_linear_program(probe) -> None:
    rng = np.random.default_rng(1)
    points = rng.normal(size=(40, 3))
    labels = (points @ rng.normal(size=(3, 4))).argmax(1)
    if probe is None:
        labels[:6] = (labels[:6] + 1) % 4  # contradictions
    problem = FeatureProblem.of(points, labels, rng.normal(size=(6, 3)), 4)
    x, p = problem.whiten(problem.z_train), problem.whiten(problem.z_probes)
    simplex = DualSimplex(x, labels, 4)
    for j in range(6) if probe is not None else [None]:
        for c in range(4) if j is not None else [-1]:
            one = simplex.feasible(None if j is None else p[j], c)
            weights, ray = nearest_point(x, labels, 4, None if j is None else p[j], c)
            certificate = Certificate(j, c, ray.points, ray.winners, ray.losers, ray.multipliers)
            if isinstance(one, Ray):
                assert check_certificate(problem, certificate).proof == "exact"
            else:
                assert check_certificate(problem, certificate) is None
                assert check_witnesses(problem, problem.to_frame(weights)[None]).all()
                assert wins(problem, problem.to_frame(weights), np.array([j]), np.array([c])).all()


def test_the_frame_is_exact() -> None:
    phi = np.array([[1e9 + 1, 0.0, 5.0, 1e-310], [1e9, 3.0, 5.0, 1.0], [1e9 - 2, 1.0, 5.0, 0.5]])
    problem = FeatureProblem.of(phi, [0, 1, 0], phi[:1], 2)
    frame = problem.frame
    assert frame.units.tolist() == [0, 1, 3]  # the third is constant
    assert frame.shift[0] != 0  # far from zero
    assert frame.shift[1] == frame.shift[2] == 0
    z = frame(phi)
    assert z[0, 1] == 0  # zeros stay zeros, which the proofs count
    assert z[0, 2] != 0  # and what underflows does not become one
    for row, point in zip(z, phi, strict=True):
        for j, unit in enumerate(frame.units):
            true = (Fraction(point[unit]) - Fraction(frame.shift[j])) / Fraction(2) ** int(frame.exponent[j])
            assert abs(Fraction(row[j]) - true) <= abs(true) / 2**53 + Fraction(5e-324)
