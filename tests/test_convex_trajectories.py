"""The theory's algorithms against their update rules written out; averages; what they refuse."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch

import flatminima as fm
from convex_fixture import random_point
from flatminima.problems.convex import (
    DeadZoneRegression,
    EpsilonWarning,
    FlatSharpERM,
    RadialDeadZone,
    SAGDTrap,
    Sample,
    SAMTrap,
    SharpSAM1D,
    gd,
    mean_loss,
    sagd,
    sam,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("epsilon", [0.0, 0.05])
def test_updates_are_the_formulas(epsilon: float) -> None:
    f, lr, radius, steps = DeadZoneRegression(8, 5, 0.02), 0.2, 0.1, 12
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EpsilonWarning)
        runs = {
            "gd": gd(f, lr=lr, steps=steps),
            "sam": sam(f, lr=lr, radius=radius, steps=steps, epsilon=epsilon),
        }
    for name, run in runs.items():
        w = torch.zeros(5, dtype=torch.float64)
        for t in range(1, steps + 1):
            torch.testing.assert_close(run.iterate(t), w, rtol=1e-12, atol=1e-15)
            g = f.gradient(w)
            v = radius * g / (g.norm() + epsilon) if name == "sam" else torch.zeros_like(w)
            assert float(run.risks[t - 1]) == pytest.approx(f.empirical_risk(w))
            assert float(run.perturbed_risks[t - 1]) == pytest.approx(f.empirical_risk(w + v))
            assert float(run.gradient_norms[t - 1]) == pytest.approx(float(f.gradient(w + v).norm()))
            w = w - lr * f.gradient(w + v)


def test_a_zero_gradient_stays() -> None:
    run = sam(SharpSAM1D(), lr=0.25, radius=0.4, steps=5)
    assert [float(run.iterate(t)) for t in range(1, 6)] == [0.0] * 5
    assert run.perturbed_risks.tolist() == [0.0] * 5


def test_averages_are_means_of_iterates() -> None:
    f = SAGDTrap(5, 6, 0.0, sample=Sample.draw(5, 0))
    run = sagd(f, lr=0.25, radius=0.5, steps=6, tie_break="power", start=random_point(f.d, 0))
    iterates = torch.stack([run.iterate(t) for t in range(1, 7)])
    for tau in range(1, 7):
        torch.testing.assert_close(run.suffix_average(tau), iterates[tau - 1 :].mean(0))
        for until in range(tau, 7):
            torch.testing.assert_close(run.suffix_average(tau, until), iterates[tau - 1 : until].mean(0))
    assert torch.equal(run.suffix_average(6), run.last)
    for bad in ((0, None), (7, None), (3, 2), (2, 7)):
        with pytest.raises(ValueError, match="must satisfy"):
            run.suffix_average(*bad)
    with pytest.raises(ValueError, match=r"t must be one of 1 \.\.\. 6, got 0"):
        run.iterate(0)


def test_only_what_moved_is_kept() -> None:
    f = SAGDTrap(6, 16, 0.1)
    run = sagd(f, lr=0.25, radius=1.1, steps=16, tie_break="adversarial")
    assert run.values.shape == (16, 15)
    assert run.moved.tolist() == [63 * 16 + slot for slot in range(15)]
    assert run.steps == 16


def test_several_starts_run_at_once() -> None:
    f = SAMTrap(4, 5, 0.25, 0.4, sample=Sample.draw(4, 0))
    starts = torch.stack([random_point(f.d, seed) for seed in range(3)])
    together = sam(f, lr=0.25, radius=0.4, steps=5, start=starts)
    for i, start in enumerate(starts):
        alone = sam(f, lr=0.25, radius=0.4, steps=5, start=start)
        torch.testing.assert_close(together.last[i], alone.last, rtol=1e-12, atol=1e-14)
        assert float(together.risks[2, i]) == pytest.approx(float(alone.risks[2]))


def test_an_oracle_of_ones_own() -> None:
    f = RadialDeadZone(0.1, start=0.05)
    seen = []

    def oracle(w: torch.Tensor, radius: float, step: int) -> torch.Tensor:
        seen.append(step)
        return -torch.full_like(w, radius)

    run = sagd(f, lr=0.25, radius=0.3, steps=3, tie_break=oracle)
    assert seen == [1, 2, 3]
    assert float(run.iterate(2)) == pytest.approx(0.05 + 0.25 * 0.15)
    with pytest.raises(ValueError, match=r"step 1: the oracle must return .* length at most 0\.3, got .* length 0\.6"):
        sagd(f, lr=0.25, radius=0.3, steps=3, tie_break=lambda w, radius, step: torch.full_like(w, 0.6))
    with pytest.raises(ValueError, match=r"shape \(1,\) .* got shape \(2,\)"):
        sagd(f, lr=0.25, radius=0.3, steps=3, tie_break=lambda w, radius, step: torch.zeros(2))


def test_seeds_decide_the_rules_that_draw() -> None:
    f = SAGDTrap(5, 8, 0.1, sample=Sample.draw(5, 0, "some", bit=1))
    a, b, c = (sagd(f, lr=0.25, radius=0.8, steps=8, tie_break="uniform", seed=s).last for s in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.parametrize("name", ["flat sharp", "sagd", "dead zone", "sam"])
def test_the_librarys_optimisers_are_the_theorys(name: str) -> None:
    problems: dict[str, Any] = {
        "flat sharp": FlatSharpERM(5, 0.1, sample=Sample.draw(5, 0)),
        "sagd": SAGDTrap(5, 4, 0.1, sample=Sample.draw(5, 0)),
        "dead zone": DeadZoneRegression(10, 6, 0.02),
        "sam": SAMTrap(5, 4, 0.25, 0.4, sample=Sample.draw(5, 0)),
    }
    f = problems[name]
    start = random_point(f.d, 1, 0.6)
    x, y = f.data()
    for radius in (0.0, 0.1):
        objective = f.objective(start)
        base = torch.optim.SGD(objective.model.parameters(), lr=0.2)
        optimiser = fm.SAM(base, rho=radius) if radius else base

        def closure(model: torch.nn.Module = objective.model, base: torch.optim.Optimizer = base) -> torch.Tensor:
            base.zero_grad()
            loss = mean_loss(model(x), y)
            loss.backward()
            return loss

        for _ in range(7):
            optimiser.step(closure)
        run = sam(f, lr=0.2, radius=radius, steps=8, start=start) if radius else gd(f, lr=0.2, steps=8, start=start)
        torch.testing.assert_close(objective.point(), run.last, rtol=1e-10, atol=1e-13)


def test_the_librarys_projected_ascent_is_no_better_than_the_maximum() -> None:
    f = SAGDTrap(5, 4, 0.1, sample=Sample.draw(5, 2, "some", bit=1))
    start = 0.3 * f.unit(f.sample.ones[0], 1)
    objective = f.objective(start)
    x, y = f.data()
    optimiser = fm.SAM(torch.optim.SGD(objective.model.parameters(), lr=0.25), rho=0.4, variant="sa-gd", steps=20)
    optimiser.step(lambda: mean_loss(objective.model(x), y))
    best = f.empirical_risk(start) + f.sharpness(0.4, start).lower
    assert optimiser.maximum == pytest.approx(best, rel=1e-6)
    exact = sagd(f, lr=0.25, radius=0.4, steps=2, tie_break="uniform", start=start)
    torch.testing.assert_close(objective.point(), exact.last, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: gd(f, lr=0.0, steps=3), "lr must be finite and > 0, got 0.0"),
        (lambda f: gd(f, lr=math.nan, steps=3), "lr must be finite"),
        (lambda f: gd(f, lr=0.1, steps=0), "steps must be an integer >= 1, got 0"),
        (lambda f: gd(f, lr=0.1, steps=2.0), "got 2.0"),
        (lambda f: gd(f, lr=0.1, steps=3, start=torch.zeros(4)), r"expected points \(\.\.\., 6\)"),
        (lambda f: gd(f, lr=0.1, steps=3, start=torch.full((6,), math.nan)), "step 1: the risk or its gradient is NaN"),
        (lambda f: gd(f, lr=1e140, steps=9), "step 3: the risk or its gradient is NaN or infinite"),
        (lambda f: sam(f, lr=0.1, radius=-1.0, steps=3), "radius must be finite and >= 0"),
        (lambda f: sam(f, lr=0.1, radius=0.1, steps=3, epsilon=-1e-12), "epsilon must be finite and >= 0"),
        (
            lambda f: sagd(f, lr=0.1, radius=0.1, steps=3, tie_break="adversarial"),
            "unknown tie-breaking rule of DeadZone",
        ),
        (
            lambda f: sagd(f, lr=0.1, radius=0.1, steps=3, tie_break=None),
            r"tie_break must be one of power, or a function \(w, radius, step\) -> v, got None",
        ),
        (
            lambda f: sagd(f, lr=0.1, radius=0.1, steps=3, tie_break=lambda w, radius, step: w.numpy()),
            "step 1: the oracle's displacement must be a tensor, got a ndarray",
        ),
        (lambda f: gd(f, lr=0.1, steps=3, start=[0.0] * 6), "start must be a tensor, got a list: convert it"),
        (lambda f: gd(f, lr=0.1, steps=3, start=1j * torch.ones(6)), "start must be real, got torch.complex64"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(DeadZoneRegression(5, 6))


def test_numbers_of_numpy_are_worked_with_in_double_precision() -> None:
    f, start = DeadZoneRegression(5, 6), random_point(6, 0)
    for run in (gd, sam, sagd):
        single: dict[str, Any] = {"lr": np.float32(0.1), "radius": np.float32(0.3), "steps": np.int64(4)}
        extra: dict[str, Any] = {"tie_break": "power", "iterations": np.int64(3)} if run is sagd else {}
        if run is gd:
            del single["radius"]
        double = {name: value.item() for name, value in single.items()}
        found, expected = (run(f, **chosen, **extra, start=start).values for chosen in (single, double))  # type: ignore[operator]
        assert torch.equal(found, expected)


def test_there_is_no_default_for_the_ties() -> None:
    with pytest.raises(TypeError, match="tie_break"):
        sagd(RadialDeadZone(0.1), lr=0.25, radius=0.3, steps=3)  # type: ignore[call-arg]


def test_an_epsilon_that_does_nothing_is_not_warned_about() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sam(DeadZoneRegression(5, 6), lr=0.1, radius=0.1, steps=5, epsilon=1e-12)
