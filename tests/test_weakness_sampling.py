"""Random completions and volumes against closed forms and plain Monte Carlo."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from features_fixture import trained
from flatminima.measures.weakness import FeatureError, sample_completions, version_space_volume
from flatminima.measures.weakness.cone import Cone, uniform_ball
from flatminima.measures.weakness.frame import FeatureProblem

TRIANGLE = (np.array([[0.0, 0], [1, 0], [0, 1]]), [0, 1, 2], np.array([[0.5, 0.5], [2, 0], [-1, -1], [0.2, 0.2]]))


@pytest.fixture(scope="module")
def plain() -> tuple[float, np.ndarray, int]:
    """Share of directions, label frequencies and number of labelings of the triangle, by drawing weights at random."""
    problem = FeatureProblem.of(*TRIANGLE, 3)
    x, p = problem.whiten(problem.z_train), problem.whiten(problem.z_probes)
    weights = np.random.default_rng(0).normal(size=(400_000, 3, 3))
    inside = (np.einsum("bkd,nd->bnk", weights, x).argmax(2) == problem.labels).all(1)
    labels = np.einsum("bkd,nd->bnk", weights[inside], p).argmax(2)
    return float(inside.mean()), np.stack([(labels == k).mean(0) for k in range(3)], axis=1), len(labels)


def test_frequencies_are_those_of_random_weights(plain) -> None:
    _, frequencies, count = plain
    found = sample_completions(*TRIANGLE, classes=3, draws=400, seed=0)
    error = np.sqrt(frequencies * (1 - frequencies) * (1 / count + 4 / found.draws))
    assert (np.abs(found.frequencies - frequencies) <= 4 * error + 1e-3).all()
    assert found.frequencies[1, 0] == 0  # infeasible, so never met
    entropy = stats.entropy(frequencies, axis=1)
    assert (np.abs(found.entropies - entropy) < 5 * found.errors + 0.02).all()
    assert found.joint_entropy <= found.joint_entropy_bound
    assert found.converged
    assert found.distinct <= 22  # the exact number
    assert found.chao1 >= found.distinct


def test_volume_is_that_of_random_weights(plain) -> None:
    share = plain[0]
    found = version_space_volume(*TRIANGLE, classes=3, runs=6, seed=0)
    assert found.log_volume == pytest.approx(math.log(share), abs=4 * found.error + 0.02)
    assert len(found.runs) == 6
    assert found.levels == 3


def test_volume_of_two_points_is_an_angle() -> None:
    # w = (slope, bias) must be negative at one end and positive at the other of an interval.
    a, b = -1.0, 0.5
    mean, deviation = (a + b) / 2, abs(b - a) / 2
    u, v = np.array([(a - mean) / deviation, 1.0]), np.array([(b - mean) / deviation, 1.0])
    angle = math.pi - math.acos(-u @ v / np.linalg.norm(u) / np.linalg.norm(v))
    found = version_space_volume([[a], [b]], [0, 1], runs=8, seed=3)
    assert found.log_volume == pytest.approx(math.log(angle / (2 * math.pi)), abs=4 * found.error + 0.01)


def test_a_long_interval_of_a_thin_version_space() -> None:
    # Alternating labels cannot be closer: the volume falls with the gap, and is still measured. K = 2 in the plane: the
    # weights are a cone of three dimensions between 2 n planes; plain Monte Carlo needs the 4,000,000 draws below.
    rng = np.random.default_rng(0)
    points = rng.normal(size=(30, 2))
    labels = (points[:, 0] + 0.3 * points[:, 1] > 0.1).astype(int)
    problem = FeatureProblem.of(points, labels, points, 2)
    x = problem.whiten(problem.z_train)
    weights = rng.normal(size=(2_000_000, 3))
    sign = 2.0 * labels - 1.0
    inside = np.ones(len(weights), dtype=bool)
    for row, s in zip(x, sign, strict=True):
        inside &= s * (weights @ row) > 0
    share = inside.mean()
    found = version_space_volume(points, labels, runs=6, seed=1)
    tolerance = 4 * math.hypot(found.error, 1 / math.sqrt(inside.sum()))
    assert found.log_volume == pytest.approx(math.log(share), abs=tolerance + 0.02)


def test_walks_stay_inside_and_keep_the_uniform_distribution() -> None:
    cone = Cone(np.array([[1.0, 1.0], [-0.7, 1.0]]), np.array([1, 0]), 2)
    rng = np.random.default_rng(0)
    u = uniform_ball(200_000, cone.size, rng)
    inside = u[cone.margins(u).min((1, 2)) > 0][:4000]
    moved = inside
    for _ in range(3):
        moved, given_up = cone.walk(moved, 0.0, 1.3, np.diag([0.2, 1.5]), rng)
        assert given_up == 0
    assert cone.margins(moved).min() > -1e-9
    assert np.linalg.norm(moved, axis=1).max() <= 1 + 1e-9
    assert not np.allclose(moved, inside)
    for axis in range(cone.size):  # the same distribution as before
        assert stats.ks_2samp(inside[:, axis], moved[:, axis]).pvalue > 1e-4


def test_completions_do_not_depend_on_coordinates() -> None:
    a, b = np.array([[2.0, 1.0], [-1.0, 3.0]]), np.array([5.0, -4.0])
    base = sample_completions(*TRIANGLE, classes=3, seed=0)
    found = sample_completions(TRIANGLE[0] @ a.T + b, TRIANGLE[1], TRIANGLE[2] @ a.T + b, classes=3, seed=1)
    assert np.abs(found.frequencies - base.frequencies).max() < 0.06
    one, two = (version_space_volume(p, TRIANGLE[1], q, classes=3, seed=0) for p, q in
                ((TRIANGLE[0], TRIANGLE[2]), (TRIANGLE[0] @ a.T + b, TRIANGLE[2] @ a.T + b)))  # fmt: skip
    assert one.log_volume == pytest.approx(two.log_volume, abs=4 * math.hypot(one.error, two.error))


def test_equal_seeds_are_equal() -> None:
    one, two = (sample_completions(*TRIANGLE, classes=3, draws=20, seed=5) for _ in range(2))
    np.testing.assert_array_equal(one.frequencies, two.frequencies)
    assert version_space_volume(*TRIANGLE, classes=3, seed=5) == version_space_volume(*TRIANGLE, classes=3, seed=5)


def test_a_short_run_does_not_claim_to_have_converged() -> None:
    train, labels, probes, _ = trained("digits", 0, probes=12)
    found = sample_completions(train, labels, probes, classes=10, chains=4, draws=8)
    assert not found.converged
    assert found.distinct <= found.draws == 32
    assert found.chao1 > found.distinct  # most labelings were met once
    assert found.joint_entropy <= math.log(32)


@pytest.mark.slow
def test_a_trained_network_converges() -> None:
    train, labels, probes, _ = trained("digits", 0, probes=12)
    found = sample_completions(train, labels, probes, classes=10)
    assert found.converged
    assert found.given_up == 0
    again = sample_completions(train, labels, probes, classes=10, paths=4, seed=9)
    difference = abs(found.mean_entropy - again.mean_entropy)
    assert difference < 4 * math.hypot(found.mean_entropy_error, again.mean_entropy_error)
    one, three = (version_space_volume(train, labels, probes, classes=10, paths=paths, seed=paths) for paths in (1, 3))
    assert abs(one.log_volume - three.log_volume) < 4 * math.hypot(one.error, three.error)


def test_contradicting_labels() -> None:
    assert version_space_volume([[0.0], [0.0]], [0, 1]).log_volume == -math.inf
    with pytest.raises(FeatureError, match="no completion to draw: no linear layer gives"):
        sample_completions([[0.0], [0.0]], [0, 1], [[1.0]])


@pytest.mark.parametrize("options", [{"chains": 3}, {"draws": 3}, {"paths": 0}])
def test_bad_sampling(options) -> None:
    with pytest.raises(FeatureError, match="at least"):
        sample_completions(*TRIANGLE, classes=3, **options)


@pytest.mark.parametrize("options", [{"particles": 15}, {"paths": 0}, {"runs": 1}])
def test_bad_volume(options) -> None:
    with pytest.raises(FeatureError, match="expected particles >= 16"):
        version_space_volume(*TRIANGLE, classes=3, **options)
