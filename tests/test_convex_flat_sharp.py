"""Theorem 1: a flat minimum that generalises badly beside a sharp one that generalises perfectly."""

from __future__ import annotations

import math

import pytest
import torch

from convex_fixture import VECTORS, flat_sharp_loss, mean_over_everything, random_point, sample_of, vector
from flatminima.problems.convex import FlatSharpERM, Sample

pytestmark = pytest.mark.usefixtures("one_thread")


def test_evaluation_as_recorded() -> None:
    case = VECTORS["saerm_eval_n2"]
    f, w = FlatSharpERM(2, case["rho"], sample=sample_of(case)), vector(case["w"])
    assert f.losses(w).tolist() == pytest.approx(case["loss_per_sample"], abs=case["tol"])
    assert f.empirical_risk(w) == pytest.approx(case["empirical_loss"], abs=case["tol"])
    assert f.gradient(w).tolist() == pytest.approx(case["gradient"], abs=case["tol"])
    assert f.population_risk(w).value == pytest.approx(case["population_loss"], abs=case["tol"])
    assert f.population_risk(w).exact
    assert list(f.sample.zeros) == case["spurious_columns"]
    everything = mean_over_everything(flat_sharp_loss(case["rho"]), w, 4)
    assert f.population_risk(w).value == pytest.approx(everything, rel=1e-13)


@pytest.mark.parametrize("sample", ["dense", "classes", "spurious", "drawn"])
def test_minimisers_as_recorded(sample: str) -> None:
    case = VECTORS["saerm_certificates"]
    for row in case["rows"]:
        f = FlatSharpERM(6, row["rho"], sample=Sample.draw(6, 1, "some") if sample == "drawn" else sample)  # type: ignore[arg-type]
        for name, w in f.minimisers.items():
            sharpness, risk = f.sharpness(row["r"], w), f.population_risk(w)
            assert f.empirical_risk(w) == row["empirical_all"] == 0.0
            assert sharpness.exact
            assert sharpness.lower == pytest.approx(row[f"saer_{name}"], abs=case["tol"])
            assert risk.exact
            assert risk.value == pytest.approx(row[f"population_{name}"], abs=case["tol"])
        assert f.population_risk(f.minimisers["flat"]).value >= 1 / 16 - 1e-15
        assert f.certify().covered


@pytest.mark.parametrize("c", [0.0, 0.6])
@pytest.mark.parametrize("s", [-0.7, 0.0, 0.1, 0.5])
def test_sharpness_on_the_plane_of_the_two_minimisers(c: float, s: float) -> None:
    f, radius = FlatSharpERM(4, 0.25, sample=Sample.draw(4, 1, "some")), 0.4
    w = c * f.unit(f.sample.zeros[0]) + s * f.auxiliary_unit()
    assert f.empirical_risk(w) == pytest.approx(0.5 * max(0.0, abs(s) - 0.25) ** 2, abs=1e-15)
    found = f.sharpness(radius, w)
    assert found.exact
    assert found.lower + f.empirical_risk(w) == pytest.approx(0.5 * max(0.0, abs(s) + radius - 0.25) ** 2, abs=1e-15)
    expected = 0.25 * max(0.0, math.hypot(c, s) - 0.25) ** 2 + 0.25 * max(0.0, abs(s) - 0.25) ** 2
    assert f.population_risk(w).value == pytest.approx(expected, abs=1e-15)


def test_no_point_has_a_smaller_sharpness_aware_risk_than_the_flat_minimiser() -> None:
    f, radius = FlatSharpERM(5, 0.1), 0.3
    least = f.sharpness(radius, f.minimisers["flat"]).lower
    for seed in range(20):
        w = random_point(f.d, seed, 0.1)
        assert f.empirical_risk(w) + f.sharpness(radius, w).lower >= least * (1 - 1e-9)


def test_all_maximisers_are_maximisers() -> None:
    f, radius = FlatSharpERM(5, 0.1, sample=Sample.draw(5, 3, "either", bit=1)), 0.3
    generator = torch.Generator().manual_seed(0)
    for w in (f.start, 0.3 * f.auxiliary_unit()):
        best = 0.5 * (float(w.norm()) + radius - 0.1) ** 2
        for rule in ("auxiliary", "uniform"):
            v = f.maximiser(w, radius, rule, 1, generator)
            assert float(v.norm()) == pytest.approx(radius)
            assert f.empirical_risk(w + v) == pytest.approx(best)
    with pytest.raises(ValueError, match="use 'power'"):
        f.maximiser(random_point(f.d, 0), radius, "auxiliary", 1, generator)


def test_without_the_event_there_is_no_flat_minimiser_by_name() -> None:
    seed = next(seed for seed in range(50) if not Sample.draw(5, seed).zeros)
    f = FlatSharpERM(5, 0.1, sample=Sample.draw(5, seed))
    assert "flat" not in f.minimisers
    assert not f.certify().ok
    assert f.certify().failed == ("a column of zeros (0, limit 1)",)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 6, "flatness_radius": 0.6}, "at most 1/2, got 0.6"),
        ({"n": 6, "flatness_radius": -0.1}, "flatness_radius must be finite and >= 0"),
        ({"n": 6, "smoothness": 0.0}, "smoothness must be finite and > 0, got 0.0"),
        ({"n": 6, "smoothness": math.nan}, "smoothness must be finite"),
        ({"n": 17}, "17 examples have"),
        ({"n": 6, "sample": "sparse"}, "unknown representation of the canonical sample 'sparse'"),
        ({"n": 6, "sample": "lazy"}, "unknown representation of the canonical sample 'lazy'"),
        ({"n": 6, "dtype": torch.int64}, "dtype must be a floating one"),
        ({"n": 400, "sample": "classes", "dtype": torch.float32}, "too many for torch.float32"),
    ],
)
def test_bad_input(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlatSharpERM(**arguments)  # type: ignore[arg-type]
