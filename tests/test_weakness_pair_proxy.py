"""The pair proxy against cold linear programs, recorded vectors, symmetries, and everything that can be wrong with features."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from features_fixture import cold_status, trained
from flatminima.data import DataError
from flatminima.measures.weakness import Certificate, FeatureError, PairProxy, features, pair_proxy
from flatminima.measures.weakness import decisions as decisions_module
from flatminima.measures.weakness.simplex import DualSimplex

VECTORS = json.loads((Path(__file__).parent / "vectors" / "weakness_features.json").read_text())
RNG = np.random.default_rng(0)


def lists(result: PairProxy) -> list[list[int]]:
    return [np.flatnonzero(row == 1).tolist() for row in result.feasible]


def proved(result: PairProxy) -> PairProxy:
    """The result, after all of its proofs have been checked again without rounding."""
    found = result.verify(rational=True)
    assert found.ok, found
    assert found.limited == 0
    assert not result.undecided
    return result


# --- recorded vectors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["FC1", "FC2", "FC4"])
@pytest.mark.parametrize("search", [True, False])
def test_vectors(name: str, search: bool) -> None:
    case = VECTORS[name]
    found = proved(pair_proxy(case["train"], case["y"], case["probe"], classes=case["K"], search=search))
    assert lists(found) == case["ext"]
    assert found.value == found.upper == case["PP"]


def test_affine_vectors() -> None:
    case, mapped = VECTORS["FC1"], VECTORS["FC1_affine"]
    assert proved(pair_proxy(mapped["train"], case["y"], mapped["probe"])).value == mapped["PP"]
    case, mapped = VECTORS["FC2"], VECTORS["FC2_affine"]
    a, b = np.array(mapped["A"], float), np.array(mapped["b"], float)
    found = proved(
        pair_proxy(np.array(case["train"]) @ a.T + b, case["y"], np.array(case["probe"]) @ a.T + b, classes=3)
    )
    assert found.value == mapped["PP"]


@pytest.mark.parametrize("a", [10.0, 1.5, -0.25])
def test_networks_that_agree_everywhere_differ(a: float) -> None:
    case = VECTORS["FC3_same_function_different_PP"]
    net = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 2)).double()
    with torch.no_grad():
        net[0].weight.fill_(1.0)
        net[0].bias.copy_(torch.tensor([3.0, -a]))
        net[2].weight.copy_(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))  # the second unit is not read
    phi = [features(net, torch.tensor(case[key], dtype=torch.float64)[:, None]) for key in ("train_x", "probe_x")]
    assert proved(pair_proxy(phi[0], case["y"], phi[1])).value == case[f"a={a:g}"]["PP"]


# --- cold linear programs ------------------------------------------------------------------------------------------


def test_decisions_of_a_trained_network_equal_cold_linear_programs() -> None:
    train, labels, probes, truth = (
        part[:8] if i > 1 else part for i, part in enumerate(trained("digits", 0, probes=12))
    )
    found = proved(pair_proxy(train, labels, probes, classes=10, probe_labels=truth))
    status = cold_status(train, labels, probes, 10)
    assert set(np.unique(status)) == {0, 2}
    np.testing.assert_array_equal(found.feasible, status == 0)
    assert found.true_feasible == sum(found.feasible[j, c] for j, c in enumerate(truth))
    assert found.wrong_feasible == found.value - found.true_feasible
    alone = pair_proxy(train, labels, probes, classes=10, search=False)
    np.testing.assert_array_equal(alone.feasible, found.feasible)
    assert alone.cost["newton_steps"] == 0 < found.cost["newton_steps"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_decisions_of_twenty_networks_equal_cold_linear_programs(name: str, seed: int) -> None:
    try:
        train, labels, probes, _ = trained(name, seed)
    except DataError as error:
        pytest.skip(str(error))
    found = pair_proxy(train, labels, probes, classes=10)
    status = cold_status(train, labels, probes, 10)
    decided = (status == 0) | (status == 2)
    np.testing.assert_array_equal(found.feasible[decided], status[decided] == 0)
    assert not found.undecided  # where the cold program gave up, too
    assert all(certificate.proof == "exact" for certificate in found.certificates)
    assert found.verify().ok
    sample = found.verify(rational=True, sample=100, seed=seed)
    assert sample.ok
    assert sample.limited == 0


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_small_integer_problems_with_all_their_ties(seed: int) -> None:
    """Points on a grid coincide, are collinear, lie on faces: nothing may be undecided, and all proofs are exact."""
    rng = np.random.default_rng(seed)
    dimension, classes, size = rng.integers(1, 4), int(rng.integers(2, 5)), int(rng.integers(1, 3))
    points = rng.integers(-size, size + 1, (rng.integers(1, 11), dimension)).astype(float)
    weights = rng.integers(-3, 4, (classes, dimension + 1))
    scores = points @ weights[:, :-1].T + weights[:, -1]
    labels = scores.argmax(1) if rng.random() < 0.7 else rng.integers(0, classes, len(points))
    probes = rng.integers(-size - 1, size + 2, (rng.integers(1, 4), dimension)).astype(float)
    if rng.random() < 0.3:
        probes = (probes + points[rng.integers(0, len(points), len(probes))]) / 2
    found = proved(pair_proxy(points, labels, probes, classes=classes))
    if found.training_feasible:
        assert (found.extensions >= 1).all()  # some class wins everywhere
        np.testing.assert_array_equal(found.feasible == 1, cold_status(points, labels, probes, classes) == 0)
    else:
        assert found.value == 0
        assert found.conflict is not None


# --- symmetries ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, PairProxy]:
    train, labels, probes, _ = trained("digits", 0, probes=12)
    return train, labels, probes, pair_proxy(train, labels, probes, classes=10)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda z: z * 1e-3, id="times 1e-3"),
        pytest.param(lambda z: z * 1e3, id="times 1e3"),
        pytest.param(lambda z: z * 2.0**-800, id="times 2^-800"),
        pytest.param(lambda z: z * 10.0 ** np.linspace(-9, 9, z.shape[1]), id="per unit"),
        pytest.param(lambda z: z[:, ::-1], id="permuted"),
        pytest.param(lambda z: z + 1e6, id="far from zero"),
        pytest.param(lambda z: z @ np.random.default_rng(1).normal(size=(8, 8)) + 3.0, id="affine"),
        pytest.param(lambda z: np.hstack([z, z[:, :2], 2 * z[:, :1] - z[:, 1:2], 0 * z[:, :1]]), id="dependent units"),
    ],
)
def test_unchanged_by_affine_maps(digits, change) -> None:
    train, labels, probes, base = digits
    found = pair_proxy(change(train), labels, change(probes), classes=10)
    np.testing.assert_array_equal(found.feasible, base.feasible)
    assert found.verify().ok


def test_unchanged_by_rescaling_the_network_that_made_the_features() -> None:
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 3))
    x, probes = torch.randn(40, 4), torch.randn(8, 4)
    labels = net(x).argmax(1)
    base = pair_proxy(features(net, x), labels, features(net, probes), classes=3)
    scale = torch.tensor([0.05, 20.0, 1.0, 3.0, 0.5, 7.0])
    with torch.no_grad():
        net[2].weight.mul_(scale[:, None])
        net[2].bias.mul_(scale)
        net[4].weight.div_(scale)
    found = pair_proxy(features(net, x), labels, features(net, probes), classes=3)
    np.testing.assert_array_equal(found.feasible, base.feasible)


def test_equal_runs_are_equal(digits) -> None:
    train, labels, probes, base = digits
    again = pair_proxy(train, labels, probes, classes=10)
    assert again.to_dict() == base.to_dict()
    np.testing.assert_array_equal(np.stack(again.witnesses), np.stack(base.witnesses))


def test_probes_do_not_depend_on_their_company(digits) -> None:
    train, labels, probes, base = digits
    twice = np.concatenate([probes[:3], probes[::-1]])  # repeated, and in another order
    found = pair_proxy(train, labels, twice, classes=10)
    np.testing.assert_array_equal(found.feasible, np.concatenate([base.feasible[:3], base.feasible[::-1]]))
    assert found.verify().ok


# --- what the proofs say -------------------------------------------------------------------------------------------


def test_proofs_can_be_read(digits) -> None:
    train, labels, probes, base = digits
    j, c = next((j, c) for j, c in zip(*np.nonzero(base.feasible == 0), strict=True))
    certificate = base.why(j, c)
    assert isinstance(certificate, Certificate)
    assert (certificate.probe, certificate.target, certificate.proof) == (j, c, "exact")
    assert f"class {c} cannot win at probe {j}: " in certificate.explain()
    z = np.concatenate([train, probes[j : j + 1]])[certificate.points]  # -1 is the probe
    z = np.concatenate([z, np.ones((len(z), 1))], axis=1)
    sums = np.zeros((10, z.shape[1]))
    np.add.at(sums, certificate.winners, certificate.multipliers[:, None] * z)
    np.add.at(sums, certificate.losers, -certificate.multipliers[:, None] * z)
    assert np.abs(sums).max() < 1e-12 * np.abs(z).max()  # the Farkas equation, from the features as given
    here = certificate.points < 0
    np.testing.assert_array_equal(certificate.winners[~here], labels[certificate.points[~here]])
    np.testing.assert_array_equal(certificate.winners[here], c)
    j, c = next((j, c) for j, c in zip(*np.nonzero(base.feasible == 1), strict=True))
    weights = base.why(j, c)
    frame = base.problem.frame
    np.testing.assert_array_equal((frame(train) @ weights.T).argmax(1), labels)
    assert (frame(probes[j : j + 1]) @ weights.T).argmax() == c


def test_broken_proofs_are_found(digits) -> None:
    _, labels, _, base = digits
    assert base.verify(sample=5).pairs == 5
    with pytest.raises(ValueError, match="sample must be at least 1"):
        base.verify(sample=0)
    j, c = next((j, c) for j, c in zip(*np.nonzero(base.feasible == 1), strict=True))
    weights = base.witnesses[base.proof[j, c]]
    kept = weights.copy()
    weights[:] = weights[::-1]
    for rational in (False, True):
        assert (j, c) in base.verify(rational=rational).failed
    weights[:] = kept
    j, c = next((j, c) for j, c in zip(*np.nonzero(base.feasible == 0), strict=True))
    certificate = base.certificates[base.proof[j, c]]
    for name, index, value in (("points", 0, -2), ("winners", 0, 10), ("losers", -1, c)):
        array = getattr(certificate, name)
        before = array[index]
        array[index] = value if name != "points" else next(i for i in range(250) if labels[i] == labels[before])
        assert base.verify(rational=True).failed == ((j, c),), name
        array[index] = before
    proof = base.proof[j, c]
    base.proof[j, c] = (proof + 1) % len(base.certificates)  # a good certificate of another pair
    assert base.verify().failed == ((j, c),)
    base.proof[j, c] = proof
    assert base.verify().ok


def test_bounds_hold() -> None:
    found = pair_proxy([[-1.0], [1.0]], [0, 1], [[-0.5], [0.0], [2.0]])
    low, high = found.log_bounds
    assert (round(np.exp(low), 9), round(np.exp(high), 9)) == (6, 18)


# --- degenerate features -------------------------------------------------------------------------------------------


def test_contradicting_training_rows_are_named() -> None:
    train, labels, probes, _ = trained("digits", 0, probes=12)
    found = proved(
        pair_proxy(np.vstack([train, train[3]]), np.append(labels, (labels[3] + 1) % 10), probes, classes=10)
    )
    assert (found.value, found.training_feasible) == (0, False)
    assert sorted(found.conflict.points.tolist()) == [3, 250]
    assert "those of 2 training points (3, 250) contradict each other" in found.to_dict()["conflict"]
    assert found.why(0, 0) is found.conflict
    # Four corners of a square, labelled crosswise: no two rows contradict each other, all four do.
    square = proved(pair_proxy([[0, 0], [1, 1], [0, 1], [1, 0]], [0, 0, 1, 1], [[0.5, 0.2]]))
    assert square.value == 0
    assert sorted(set(square.conflict.points.tolist())) == [0, 1, 2, 3]


def test_probes_that_repeat_training_points_have_their_label_only() -> None:
    train, labels, _, _ = trained("digits", 0, probes=12)
    found = proved(pair_proxy(train, labels, train[:5], classes=10))
    assert lists(found) == [[int(y)] for y in labels[:5]]


def test_probes_between_points_of_one_class_have_their_label_only() -> None:
    points = np.array([[0.0, 0], [4, 0], [0, 4], [9, 9], [8, 9]])
    found = proved(pair_proxy(points, [0, 0, 0, 1, 2], [[1.0, 1], [2, 2], [2, 0]], classes=4))
    assert lists(found) == [[0], [0], [0]]  # inside the triangle, on an edge, on another


def test_more_units_than_points() -> None:
    rng = np.random.default_rng(0)
    found = proved(pair_proxy(rng.normal(size=(12, 30)), np.arange(12) % 3, rng.normal(size=(4, 30)), classes=3))
    assert found.value == 12


def test_a_class_without_training_points() -> None:
    train, labels, probes, _ = trained("digits", 0, probes=12)
    kept = labels != 9
    found = pair_proxy(train[kept], labels[kept], probes[:3], classes=10)
    assert found.feasible.shape == (3, 10)
    assert "no training point has class 9" in found.notes[0]
    assert found.verify().ok
    assert pair_proxy(train[kept], labels[kept], probes[:1]).feasible.shape == (
        1,
        9,
    )  # unless told, there is no such class


def test_constant_and_dead_units() -> None:
    found = proved(pair_proxy([[-1.0, 5, 0], [1, 5, 0]], [0, 1], [[-0.5, 5, 0], [0, 5, 0], [2, 5, 0]]))
    assert (found.value, found.rank) == (5, 1)
    assert "2 of 3 units are constant" in found.notes[0]
    nothing = proved(pair_proxy([[7.0], [7.0]], [1, 1], [[7.0]], classes=3))  # only biases are left
    assert (lists(nothing), nothing.rank) == ([[1]], 0)


def test_one_point_leaves_everything_open() -> None:
    found = proved(pair_proxy([[0.0, 0.0]], [1], [[1.0, 2.0]], classes=4))
    assert lists(found) == [[0, 1, 2, 3]]


def test_special_position_within_rounding_is_said() -> None:
    rng = np.random.default_rng(0)
    train, labels, _, _ = trained("digits", 0, probes=12)
    mixed = train @ rng.normal(size=(8, 8))
    one, two = np.flatnonzero(labels == 4)[:2]
    probes = mixed[one : one + 1] * 0.3 + mixed[two : two + 1] * 0.7  # on a segment, up to rounding
    found = pair_proxy(mixed, labels, probes, classes=10)
    assert lists(found) == [[4]]
    limited = [c for c in found.certificates if c.proof == "resolution"]
    assert limited
    assert max(c.resolution for c in limited) < 1e-12
    assert "by any margin above" in limited[0].explain()
    assert any("special position" in note for note in found.notes)
    check = found.verify(rational=True)
    assert check.ok
    assert check.limited >= 1  # and says that this is all it proves


def test_an_undecided_program_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    train, labels, probes, _ = trained("digits", 0, probes=12)
    whole = pair_proxy(train, labels, probes, classes=10)
    honest = DualSimplex.feasible

    def fails(self, probe=None, target=-1):
        return "HiGHS ended with 'Unknown'" if probe is not None else honest(self)

    monkeypatch.setattr(DualSimplex, "feasible", fails)
    rescued = pair_proxy(train, labels, probes, classes=10, search=False)
    assert rescued.cost["nearest_points"] > 0  # the second opinion decides alone
    np.testing.assert_array_equal(rescued.feasible, whole.feasible)
    monkeypatch.setattr(decisions_module, "nearest_point", lambda *_: None)
    found = pair_proxy(train, labels, probes, classes=10, search=False)
    open_pairs = found.feasible == -1
    assert open_pairs.any()
    assert found.undecided == {
        (j, c): "HiGHS ended with 'Unknown'" for j, c in zip(*np.nonzero(open_pairs), strict=True)
    }
    assert found.value == (found.feasible == 1).sum() < whole.value <= found.upper
    assert found.why(*next(iter(found.undecided))) == "HiGHS ended with 'Unknown'"
    assert f"{open_pairs.sum()} pairs are undecided" in found.notes[-1]
    monkeypatch.setattr(DualSimplex, "feasible", lambda *_: "HiGHS ended with 'Time limit reached'")
    nothing = pair_proxy(train, labels, probes[:2], classes=10, search=False)
    assert (nothing.training_feasible, nothing.value, nothing.upper) == (None, 0, 20)
    assert "Time limit" in nothing.undecided[0, 0]


# --- bad input -----------------------------------------------------------------------------------------------------

OK = ([[0.0], [1.0]], [0, 1], [[2.0]])


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (
            ([[0.0], [np.nan]], [0, 1], [[2.0]]),
            {},
            r"training features hold 1 values that are NaN .* row 1, unit 0 \(nan\)",
        ),
        (([[0.0], [1.0]], [0, 1], [[np.inf]]), {}, r"probe features hold 1 values .* row 0, unit 0 \(inf\)"),
        (([[0.0], [1.0]], [0, 1], [[2.0, 3.0]]), {}, "training features have 1 units, probe features 2"),
        (([0.0, 1.0], [0, 1], [[2.0]]), {}, r"training features must have shape \(rows, units\)"),
        ((np.empty((0, 1)), [], [[2.0]]), {}, "with at least one row"),
        ((OK[0], [0], OK[2]), {}, r"labels must have shape \(2,\)"),
        ((OK[0], [0.0, 1.0], OK[2]), {}, "labels must be integers"),
        ((OK[0], [0, -1], OK[2]), {}, r"labels\[1\] is -1"),
        (OK, {"classes": 1}, "classes must be at least 2"),
        ((OK[0], [0, 3], OK[2]), {"classes": 3}, r"labels\[1\] is 3: expected a class index of 0 to 2"),
        (OK, {"probe_labels": [2]}, r"probe_labels\[0\] is 2"),
        (([["a"]], [0], [["b"]]), {}, "training features must be real numbers"),
        (([[0.0], [1e200]], [0, 1], [[2.0]]), {}, "unit 0 reaches 1e[+]200"),
    ],
)
def test_bad_input_is_named(arguments, options, message) -> None:
    with pytest.raises(FeatureError, match=message):
        pair_proxy(*arguments, **options)
