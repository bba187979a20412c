"""The exact extension against recorded counts and against every labeling tried one by one."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from features_fixture import EPSILON, rows, trained
from flatminima.measures.weakness import FeatureError, exact_extension, pair_proxy

VECTORS = json.loads((Path(__file__).parent / "vectors" / "weakness_features.json").read_text())


@pytest.mark.parametrize("name", ["FC1", "FC2", "FC4"])
def test_vectors(name: str) -> None:
    case = VECTORS[name]
    found = exact_extension(case["train"], case["y"], case["probe"], classes=case["K"])
    assert found.size == case["Ext"]
    assert found.undecided == 0
    assert found.log_size == math.log(case["Ext"])
    assert len(found.labelings) == case.get("n_total", len(case.get("total_labelings", found.labelings)))
    if "total_labelings" in case:
        assert found.labelings.tolist() == case["total_labelings"]
    if "bounds" in case:
        assert list(found.bounds) == case["bounds"]


def test_affine_vectors() -> None:
    case, mapped = VECTORS["FC2"], VECTORS["FC2_affine"]
    a, b = np.array(mapped["A"], float), np.array(mapped["b"], float)
    found = exact_extension(np.array(case["train"]) @ a.T + b, case["y"], np.array(case["probe"]) @ a.T + b, classes=3)
    assert (found.size, len(found.labelings)) == (mapped["Ext"], mapped["n_total"])
    case, mapped = VECTORS["FC1"], VECTORS["FC1_affine"]
    assert exact_extension(mapped["train"], case["y"], mapped["probe"]).size == mapped["Ext"]


@pytest.mark.parametrize("a", [10.0, 1.5, -0.25])
def test_same_function_other_extension(a: float) -> None:
    case = VECTORS["FC3_same_function_different_PP"]
    phi = [
        np.stack([np.maximum(x + 3, 0), np.maximum(x - a, 0)], 1)
        for x in map(np.array, (case["train_x"], case["probe_x"]))
    ]
    found = exact_extension(phi[0], case["y"], phi[1])
    assert found.size == case[f"a={a:g}"]["Ext"]
    assert len(found.labelings) == case[f"a={a:g}"].get("n_total", len(found.labelings))


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_every_labeling_tried_one_by_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    classes, probes = 3, rng.normal(size=(3, 2))
    points = rng.normal(size=(5, 2))
    labels = (points @ rng.normal(size=(2, classes))).argmax(1)

    def feasible(labeling: tuple[int, ...]) -> bool:
        system = np.concatenate([rows(points, labels, classes), rows(probes, np.array(labeling), classes)])
        right = np.full(len(system), -EPSILON)
        return (
            linprog(np.zeros(system.shape[1]), A_ub=-system, b_ub=right, bounds=(None, None), method="highs").status
            == 0
        )

    expected = [labeling for labeling in itertools.product(range(classes), repeat=3) if feasible(labeling)]
    found = exact_extension(points, labels, probes, classes=classes)
    assert [tuple(row) for row in found.labelings] == expected
    size = sum(
        len({tuple(labeling[j] for j in subset) for labeling in expected})
        for count in range(4)
        for subset in itertools.combinations(range(3), count)
    )
    assert found.size == size
    low, high = found.bounds
    assert low <= size <= high
    proxy = pair_proxy(points, labels, probes, classes=classes)
    assert low == 1 + proxy.value
    np.testing.assert_array_equal(found.extensions, proxy.extensions)


def test_a_trained_network() -> None:
    train, labels, probes, _ = trained("digits", 0, probes=12)
    found = exact_extension(train, labels, probes[:2], classes=10)
    proxy = pair_proxy(train, labels, probes[:2], classes=10)
    assert found.undecided == 0
    assert found.bounds[0] == 1 + proxy.value <= found.size <= found.bounds[1]
    assert found.size == 1 + proxy.value + len(found.labelings)  # {}, one probe, or both


def test_contradicting_labels_leave_nothing() -> None:
    found = exact_extension([[0.0], [0.0]], [0, 1], [[1.0]])
    assert (found.size, len(found.labelings), found.log_size) == (0, 0, -math.inf)


def test_limits() -> None:
    with pytest.raises(FeatureError, match="13 probes are too many"):
        exact_extension([[0.0]], [0], np.zeros((13, 1)))
    with pytest.raises(FeatureError, match="more than 5 feasible labelings"):
        exact_extension([[0.0]], [0], [[1.0], [2.0]], classes=4, max_labelings=5)
    with pytest.raises(FeatureError, match="max_labelings must be at least 1"):
        exact_extension([[0.0]], [0], [[1.0]], max_labelings=0)
