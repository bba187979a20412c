"""Benign dead zones: closed-form risk against sampling, and where SA-GD goes."""

from __future__ import annotations

import math

import pytest
import torch

from convex_fixture import VECTORS, random_point
from flatminima.problems.convex import DeadZoneRegression, RadialDeadZone, gd, optimization_bound, sagd, sam

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("d", "rho"), [(2, 0.1), (3, 0.0), (7, 0.3), (40, 0.05)])
def test_the_population_risk_is_that_of_fresh_examples(d: int, rho: float) -> None:
    f = DeadZoneRegression(5, d, rho, smoothness=2.0)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(200_000, d, generator=generator, dtype=torch.float64)
    x /= x.norm(dim=1, keepdim=True)
    for seed in range(3):
        w = random_point(d, seed)
        sampled = (x @ (w - f.centre)).abs().sub(rho).clamp(min=0).square()  # beta / 2 is 1
        error = float(sampled.std()) / math.sqrt(len(sampled))
        assert abs(f.population_risk(w).value - float(sampled.mean())) < 4 * error + 1e-15
    inside = f.centre + 0.9 * rho * random_point(d, 0) / random_point(d, 0).norm()
    assert f.population_risk(inside).value == pytest.approx(0.0, abs=1e-17)


def test_leave_one_out_is_each_sample_without_each_example() -> None:
    f = DeadZoneRegression(6, 4, 0.05, samples=3, seed=2)
    twin = f.leave_one_out()
    w = torch.stack([random_point(4, seed) for seed in range(21)]).reshape(3, 7, 4)
    values, gradients = twin.value_and_gradient(w)
    for s in range(3):
        for k in range(7):
            one = DeadZoneRegression(6, 4, 0.05)
            one.x = f.x[s]
            losses = one.losses(w[s, k])
            keep = torch.ones(6, dtype=torch.float64)
            if k:
                keep[k - 1] = 0.0
            assert float(values[s, k]) == pytest.approx(float((losses * keep).sum()) / 6, rel=1e-13)
            leaf = w[s, k].clone().requires_grad_()
            (slope,) = torch.autograd.grad((one.losses(leaf) * keep).sum() / 6, leaf)
            torch.testing.assert_close(gradients[s, k], slope)
    with pytest.raises(ValueError, match="several samples at once"):
        f.objective()


def test_several_samples_run_at_once_from_their_own_start() -> None:
    f = DeadZoneRegression(6, 4, 0.05, samples=3, seed=2)
    assert f.start.shape == (3, 4)
    assert f.leave_one_out().start.shape == (3, 7, 4)
    assert DeadZoneRegression(6, 4, 0.05).leave_one_out().start.shape == (7, 4)
    together = sam(f, lr=0.2, radius=0.1, steps=5)
    for s in range(3):
        one = DeadZoneRegression(6, 4, 0.05)
        one.x = f.x[s]
        torch.testing.assert_close(together.last[s], sam(one, lr=0.2, radius=0.1, steps=5).last)
    one_start = torch.full((4,), 0.1, dtype=torch.float64)
    torch.testing.assert_close(
        gd(f, lr=0.2, steps=5, start=one_start).last, gd(f, lr=0.2, steps=5, start=one_start.expand(3, 4)).last
    )
    assert f.population_risk() == DeadZoneRegression(6, 4, 0.05).population_risk()
    for call in (
        f.empirical_risk,
        f.gradient,
        lambda: f.sharpness(0.1),
        f.objective,
        f.data,
        f.leave_one_out().gradient,
    ):
        with pytest.raises(ValueError, match="several samples at once"):
            call()
    with pytest.raises(ValueError, match=r"start: expected points that fit \(3, 4\).*shape \(2, 4\)"):
        gd(f, lr=0.2, steps=5, start=torch.zeros(2, 4))


def test_a_risk_is_not_negative_at_the_edge_of_the_dead_zone() -> None:
    f = DeadZoneRegression(5, 2, 0.5)
    for excess in (5e-10, 1e-9, 1e-8, 1e-7):
        w = torch.tensor([1.5 + excess, 0.0], dtype=torch.float64)
        assert 0.0 <= f.population_risk(w).value < 1e-14


def test_one_dimension_as_recorded() -> None:
    case = VECTORS["radial_deadzone_sagd"]
    for row in case["rows"]:
        f = RadialDeadZone(row["rho"], start=row["w1"])
        run = sagd(f, lr=row["eta"], radius=row["r"], steps=row["T"], tie_break="plus")
        assert run.values[:4, 0].tolist() == pytest.approx(row["first_4"], abs=case["tol"])
        assert abs(float(run.last)) == pytest.approx(row["last_abs"], abs=case["tol"])
        assert f.amplitude(lr=row["eta"], radius=row["r"]) == pytest.approx(row["limit_abs"], abs=case["tol"])
        assert float(run.perturbed_risks.mean()) == pytest.approx(row["mean_saer_along_path"], abs=case["tol"])
        w = run.suffix_average(1)
        reached = f.empirical_risk(w) + f.sharpness(row["r"], w).lower
        assert reached == pytest.approx(row["saer_of_average"], abs=case["tol"])
        bound = optimization_bound(
            smoothness=1, lr=row["eta"], radius=row["r"], flatness_radius=row["rho"], steps=row["T"], distance=row["w1"]
        )
        assert bound == pytest.approx(row["bound"], abs=case["tol"])
        assert max(reached, row["mean_saer_along_path"]) <= bound


def test_the_tie_at_zero_is_broken_as_asked() -> None:
    f = RadialDeadZone(0.1, start=0.0)
    for rule, sign in (("plus", -1), ("minus", 1)):
        run = sagd(f, lr=0.25, radius=0.3, steps=2, tie_break=rule)
        assert float(run.last) == pytest.approx(sign * 0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "n must be an integer >= 1"),
        ({"n": 3, "d": 1}, "d must be an integer >= 2"),
        ({"n": 3, "samples": 0}, "samples must be an integer >= 1"),
        ({"n": 3, "flatness_radius": -0.1}, "flatness_radius"),
    ],
)
def test_bad_input(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeadZoneRegression(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(("rho", "radius", "lr", "start"), [(0.1, 0.3, 1.9, 0.9), (0.1, 0.3, 1.5, 0.0), (0.5, 0.2, 1.0, 0.9),
                                                           (0.5, 0.2, 0.3, -0.1), (0.5, 0.5, 0.3, 0.4)])  # fmt: skip
def test_where_sagd_goes(rho: float, radius: float, lr: float, start: float) -> None:
    f = RadialDeadZone(rho, start=start)
    run = sagd(f, lr=lr, radius=radius, steps=400, tie_break="plus")
    assert abs(float(run.last)) == pytest.approx(f.amplitude(lr=lr, radius=radius), abs=1e-12)


@pytest.mark.parametrize(
    ("rho", "radius", "lr", "message"),
    [
        (0.1, 0.3, 2.0, "lr smoothness must be below 2, got 2: SA-GD does not settle"),
        (0.1, 0.3, 10.0, "lr smoothness must be below 2, got 10"),
        (0.5, 0.2, 1.5, "lr smoothness must be at most 1 where r <= rho, got 1.5: .* depends on the start"),
        (0.5, 0.2, -1.0, "lr must be finite and > 0"),
        (0.5, math.nan, 1.0, "radius must be finite and >= 0"),
    ],
)
def test_a_step_size_without_a_known_amplitude_is_refused(rho: float, radius: float, lr: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RadialDeadZone(rho).amplitude(lr=lr, radius=radius)


def test_a_start_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="start must be finite, got nan"):
        RadialDeadZone(0.1, start=math.nan)
    with pytest.raises(ValueError, match="start must be finite, got 'no'"):
        RadialDeadZone(0.1, start="no")  # type: ignore[arg-type]
