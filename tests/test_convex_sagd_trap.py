"""Theorem 3: SA-GD ends in a bad flat minimum, if its ties are broken for the worst."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convex_fixture import VECTORS, mean_over_everything, random_point, sagd_loss, sample_of, vector
from flatminima.problems.convex import SAGDTrap, Sample, gd, sagd, sam
from flatminima.problems.convex_sagd_trap import FLOOR

pytestmark = pytest.mark.usefixtures("one_thread")


def test_evaluation_as_recorded() -> None:
    case = VECTORS["sagd_trap_eval_n2_T2"]
    f, w = SAGDTrap(2, 2, case["rho"], sample=sample_of(case)), vector(case["w"])
    assert f.losses(w).tolist() == pytest.approx(case["loss_per_sample"], abs=case["tol"])
    assert f.empirical_risk(w) == pytest.approx(case["empirical_loss"], abs=case["tol"])
    assert f.gradient(w).tolist() == pytest.approx(case["gradient"], abs=case["tol"])
    assert f.population_risk(w).value == pytest.approx(case["population_loss"], abs=case["tol"])
    assert f.population_risk(w).value == pytest.approx(mean_over_everything(sagd_loss(2, case["rho"]), w, 4), rel=1e-13)
    assert list(f.sample.ones) == case["spurious_columns"]["plus"]
    assert list(f.sample.zeros) == case["spurious_columns"]["minus"]


def test_the_adversarial_run_as_recorded() -> None:
    case = VECTORS["sagd_iterates_n2_T4"]
    f = SAGDTrap(case["n"], case["T"], case["rho"])
    assert f.d == case["d"]
    run = sagd(f, lr=case["eta"], radius=case["r"], steps=case["T"], tie_break="adversarial")
    for t, block in enumerate(case["block_I_iterates"], start=1):
        blocks, auxiliary = f.split(run.iterate(t))
        assert blocks[case["spurious_column"]].tolist() == pytest.approx(block, abs=case["tol"])
        assert float(auxiliary) == 0.0
        assert int((blocks != 0).any(1).sum()) == (t > 1)
    assert run.perturbed_risks.tolist() == pytest.approx(case["saer_along_path"], abs=case["tol"])
    for tau in range(1, case["T"] + 1):
        w = run.suffix_average(tau)
        assert f.population_risk(w).value == pytest.approx(case["suffix_population"][tau - 1], abs=case["tol"])
        assert f.empirical_risk(w) == case["suffix_empirical"][tau - 1]
        sharpness = f.sharpness(case["r"], w)
        assert sharpness.exact
        assert sharpness.lower == pytest.approx(case["suffix_saer"], abs=case["tol"])


@pytest.mark.parametrize("row", VECTORS["sagd_closed_form"]["rows"], ids=lambda row: f"n{row['n']}T{row['T']}")
def test_the_closed_form_as_recorded(row: dict[str, float]) -> None:
    tolerance = VECTORS["sagd_closed_form"]["tol"]
    f = SAGDTrap(int(row["n"]), int(row["T"]), row["rho"], sample="spurious")
    for tau, risk in row["F"].items():  # type: ignore[attr-defined]
        assert f.suffix_risk(int(tau), lr=row["eta"], radius=row["r"]) == pytest.approx(risk, abs=tolerance)
    assert f.event_probability == pytest.approx(row["event_probability"], abs=tolerance)
    certificate = f.certify(row["eta"], row["r"])
    assert certificate.covered
    assert certificate["3 rho < lr (r - rho) sqrt T"].value == 3 * row["rho"]
    assert row["rho"] < row["condition_rho_max"]


@pytest.mark.parametrize("sample", ["dense", "classes", "spurious", "drawn"])
@pytest.mark.parametrize(("lr", "rho", "radius"), [(0.25, 0.1, 0.6), (0.25, 0.0, 0.5), (1.0, 0.1, 0.225)])
def test_real_gradients_follow_the_closed_form(sample: str, lr: float, rho: float, radius: float) -> None:
    f = SAGDTrap(6, 64, rho, sample=Sample.draw(6, 5, "some", bit=1) if sample == "drawn" else sample)  # type: ignore[arg-type]
    run = sagd(f, lr=lr, radius=radius, steps=64, tie_break="adversarial")
    for tau in (1, 2, 32, 63, 64):
        w = run.suffix_average(tau)
        assert f.population_risk(w).value == pytest.approx(f.suffix_risk(tau, lr=lr, radius=radius), rel=1e-12)
        assert f.empirical_risk(w) == 0.0
        assert f.sharpness(radius, w).lower == pytest.approx(0.5 * (radius - rho) ** 2, rel=1e-12)
    assert float(run.last.norm()) < 1.0


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(2, 200), st.floats(0.01, 1.0), st.floats(0.01, 1.0), st.floats(0.0, 0.99))
def test_the_floor_holds_for_all_admissible_parameters(steps: int, lr: float, saturation: float, share: float) -> None:
    """``saturation`` of lr (r - rho) <= 1 / sqrt T, ``share`` of 3 rho < lr (r - rho) sqrt T."""
    rise = saturation / math.sqrt(steps)
    rho = share * rise * math.sqrt(steps) / 3
    f, radius = SAGDTrap(40, steps, rho, sample="spurious"), rho + rise / lr
    risks = [f.suffix_risk(tau, lr=lr, radius=radius) for tau in range(1, steps + 1)]
    assert risks == sorted(risks)
    assert risks[0] >= f.floor(lr=lr, radius=radius) * (1 - 1e-9)
    assert f.certify(lr, radius).covered


def test_the_floor_is_attained_in_the_limit() -> None:
    rise = 1 / math.sqrt(2)
    rho = rise * math.sqrt(2) / 3 * (1 - 1e-12)
    f = SAGDTrap(5, 2, rho, sample="spurious")
    assert f.suffix_risk(1, lr=1.0, radius=rho + rise) == pytest.approx(FLOOR, rel=1e-4)


def test_gradient_descent_and_sam_stay_at_the_good_start() -> None:
    f = SAGDTrap(6, 16, 0.1)
    for run in (gd(f, lr=0.25, steps=16), sam(f, lr=0.25, radius=1.1, steps=16)):
        assert len(run.moved) == 0
        assert f.population_risk(run.last).value == 0.0


def test_tie_breaking_decides() -> None:
    """One sample, one start, the same maxima: the adversary's run is bad, the others generalise."""
    f = SAGDTrap(6, 64, 0.1, sample=Sample.draw(6, 0, "some", bit=1))
    run = {
        rule: sagd(f, lr=0.25, radius=0.6, steps=64, tie_break=rule) for rule in ("adversarial", "auxiliary", "uniform")
    }
    risks = {rule: [f.population_risk(r.suffix_average(tau)).value for tau in (1, 32, 64)] for rule, r in run.items()}
    assert risks["adversarial"] == pytest.approx([0.0553613814, 0.1243638451, 0.1989859129], abs=1e-9)
    assert risks["auxiliary"] == [0.0, 0.0, 0.0]
    assert max(risks["uniform"]) < 2e-3
    for r in run.values():
        assert float(r.perturbed_risks[0]) == pytest.approx(0.125, rel=1e-12)  # all of them maximise
    for rule in ("auxiliary", "uniform"):
        assert float(run[rule].perturbed_risks[-1]) == pytest.approx(0.1632653, rel=1e-5)
    amplitude = 0.25 * 0.5 / (2 - 0.25)
    assert abs(float(run["auxiliary"].last[-1])) == pytest.approx(amplitude, rel=1e-4)


def test_nobody_chose_and_it_is_bad_all_the_same_without_the_auxiliary_ties() -> None:
    """Power iteration from random starts, 400 steps each: harmless with weight 1, in the trap below."""
    risks = {}
    for weight in (1.0, 0.9):
        f = SAGDTrap(6, 16, 0.1, auxiliary_weight=weight, sample=Sample.draw(6, 0, "some", bit=1))
        run = sagd(f, lr=0.25, radius=1.1, steps=16, tie_break="power")
        risks[weight] = f.population_risk(run.suffix_average(1)).value
    assert risks[1.0] < 0.005
    assert risks[0.9] > 0.02


def test_rules_return_maximisers_of_the_whole_ball() -> None:
    f, radius = SAGDTrap(5, 4, 0.1, sample=Sample.draw(5, 2, "some", bit=1)), 0.5
    generator = torch.Generator().manual_seed(0)
    column = f.sample.ones[0]
    for w in (
        f.start,
        -0.2 * f.unit(column, 1),
        0.3 * f.auxiliary_unit(),
        0.2 * f.unit(column, 2) - 0.1 * f.auxiliary_unit(),
    ):
        best = f.empirical_risk(w) + f.sharpness(radius, w).lower
        found = f._ascend(w, radius, f._random_starts(w, radius, 20, generator))
        assert f.empirical_risk(w + found) <= best * (1 + 1e-12)
        for rule in ("adversarial", "auxiliary", "uniform"):
            v = f.maximiser(w, radius, rule, 3, generator)
            assert float(v.norm()) == pytest.approx(radius)
            assert f.empirical_risk(w + v) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_a_smaller_auxiliary_weight_has_other_maximisers(weight: float) -> None:
    f, radius = SAGDTrap(5, 4, 0.1, auxiliary_weight=weight, sample=Sample.draw(5, 2, "some", bit=1)), 0.5
    assert "auxiliary" not in f.tie_breaks
    assert f.sharpness(radius).lower == pytest.approx(0.5 * 0.4**2)
    assert f.sharpness(radius).exact
    assert f.empirical_risk(f.sharpness(radius).direction) == pytest.approx(0.5 * 0.4**2)
    assert not f.sharpness(radius, 0.3 * f.auxiliary_unit()).exact
    along = radius * f.auxiliary_unit()
    assert f.empirical_risk(along) < 0.5 * 0.4**2


def test_without_a_free_slot_a_smaller_weight_has_no_closed_form() -> None:
    """Every slot of both unanimous columns is on the side that no example sees: there is nothing left to fill."""
    f = SAGDTrap(4, 2, 0.0, auxiliary_weight=0.5)
    w = torch.zeros(f.d, dtype=torch.float64)
    for column, side in ((f.sample.ones[0], -0.3), (f.sample.zeros[0], 0.3)):
        for slot in (1, 2):
            w = w + side * f.unit(column, slot)
    found = f.sharpness(0.5, w)
    assert not found.exact
    assert f.empirical_risk(w + found.direction) == pytest.approx(found.lower)
    assert found.lower == pytest.approx(0.09375)  # what the search of another implementation found
    assert found.lower <= found.upper
    with pytest.raises(ValueError, match="no slot of a unanimous column is free"):
        sagd(f, lr=0.25, radius=0.5, steps=2, tie_break="uniform", start=w)
    assert f.sharpness(0.5, w - 2 * w[-2] * f.unit(f.sample.ones[0], 1)).exact  # seen: it is longest along itself


def test_the_floor_is_below_the_risk_wherever_it_is_not_zero() -> None:
    f = SAGDTrap(6, 64, 0.1)
    assert f.suffix_risk(1, lr=0.25, radius=0.05) == f.floor(lr=0.25, radius=0.05) == 0.0
    for radius in (0.0, 0.11, 0.15, 0.2, 0.25, 0.3, 0.6, 2.0):
        assert f.floor(lr=0.25, radius=radius) <= f.suffix_risk(1, lr=0.25, radius=radius)
    assert (
        SAGDTrap(6, 1, 0.0).floor(lr=0.25, radius=1.0) == SAGDTrap(6, 1, 0.0).suffix_risk(1, lr=0.25, radius=1.0) == 0
    )


def test_the_closed_form_with_an_example_left_out() -> None:
    """Its gradients are shorter by its share, and the adversary's run by as much."""
    whole = SAGDTrap(4, 8, 0.05)
    f, settings = whole.on(whole.sample.without(1)), {"lr": 0.4, "radius": 0.7}
    run = sagd(f, **settings, steps=8, tie_break="adversarial")  # type: ignore[arg-type]
    for tau in (1, 4, 8):
        risk = f.suffix_risk(tau, **settings)
        assert f.population_risk(run.suffix_average(tau)).value == pytest.approx(risk, rel=1e-12)
        assert 0 < f.floor(**settings) < risk < whole.suffix_risk(tau, **settings)
    assert f.certify(**settings)["lr (r - rho) <= 1 / sqrt T"].value == pytest.approx(0.75 * 0.4 * 0.65)


def test_the_adversary_needs_a_free_slot_and_a_column() -> None:
    f = SAGDTrap(5, 4, 0.1)
    with pytest.raises(ValueError, match="slot 5 of the spurious block is not free"):
        sagd(f, lr=0.25, radius=1.0, steps=5, tie_break="adversarial")
    with pytest.raises(ValueError, match="no closed form here"):
        sagd(f, lr=0.25, radius=1.0, steps=4, tie_break="adversarial", start=random_point(f.d, 0))
    seed = next(s for s in range(50) if not Sample.draw(4, s).ones and not Sample.draw(4, s).zeros)
    g = SAGDTrap(4, 4, 0.1, sample=Sample.draw(4, seed))
    with pytest.raises(ValueError, match="nothing for an adversary to choose"):
        sagd(g, lr=0.25, radius=1.0, steps=4, tie_break="adversarial")
    assert not g.certify(0.25, 1.0).ok


def test_a_column_of_minus_ones_serves_as_well() -> None:
    f = SAGDTrap(30, 16, 0.1, sample=Sample.spurious(30, zeros=1, ones=0))
    run = sagd(f, lr=0.25, radius=1.1, steps=16, tie_break="adversarial")
    assert f.population_risk(run.last).value == pytest.approx(f.suffix_risk(16, lr=0.25, radius=1.1), rel=1e-12)
    assert not f.certify(0.25, 1.1).ok  # the theorem's event is a column of +1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"flatness_radius": 1.0}, "flatness_radius must be below 1"),
        ({"auxiliary_weight": 1.5}, "auxiliary_weight at most 1, got 0.1 and 1.5"),
        ({"auxiliary_weight": -1.0}, "auxiliary_weight must be finite and >= 0"),
        ({"steps": 0}, "steps must be an integer >= 1, got 0"),
        ({"steps": 2.5}, "steps must be an integer >= 1, got 2.5"),
    ],
)
def test_bad_input(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SAGDTrap(**{"n": 4, "steps": 4, "flatness_radius": 0.1} | arguments)  # type: ignore[arg-type]


def test_bad_suffixes_and_radii_are_refused() -> None:
    f = SAGDTrap(4, 4)
    with pytest.raises(ValueError, match=r"one of 1 \.\.\. 4, got 5"):
        f.suffix_risk(5, lr=0.25, radius=1.0)
    assert [c.name for c in f.certify(0.25, 0.05).checks if not c.holds] == ["3 rho < lr (r - rho) sqrt T"]
    assert [c.name for c in f.certify(0.25, 9.0).checks if not c.holds] == ["lr (r - rho) <= 1 / sqrt T"]
    with pytest.raises(ValueError, match="lr must be finite and > 0"):
        f.certify(0.0, 1.0)
    for bad in ({"lr": -1.0, "radius": 0.6}, {"lr": math.nan, "radius": 0.6}, {"lr": 0.25, "radius": -0.1}):
        with pytest.raises(ValueError, match="must be finite and >"):
            f.floor(**bad)
        with pytest.raises(ValueError, match="must be finite and >"):
            f.suffix_risk(1, **bad)
