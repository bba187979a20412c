"""Upper bounds against recorded values, and against runs with every example left out in turn."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from convex_fixture import VECTORS
from flatminima.problems.convex import (
    ConvexProblem,
    DeadZoneRegression,
    SAGDTrap,
    Sample,
    SAMTrap,
    gap_bound,
    gd,
    optimization_bound,
    risk_bound,
    sagd,
    sam,
    stability_bound,
)

pytestmark = pytest.mark.usefixtures("one_thread")

ARGUMENTS: dict[str, Any] = {
    "smoothness": 1.0, "lr": 0.25, "radius": 0.1, "flatness_radius": 0.1, "steps": 20, "n": 20, "distance": 1.0,
}  # fmt: skip


def test_bounds_as_recorded() -> None:
    case = VECTORS["upper_bounds"]
    for row in case["rows"]:
        arguments: dict[str, Any] = {
            "smoothness": row["beta"], "lr": row["eta"], "radius": row["r"], "flatness_radius": row["rho"],
            "steps": row["T"], "distance": math.sqrt(row["D2"]),
        }  # fmt: skip
        optimization = optimization_bound(**arguments)
        assert optimization == pytest.approx(row["optimization"], rel=case["tol_rel"])
        for kind in ("paper", "tight"):
            stability = stability_bound(**arguments, n=row["n"], kind=kind)  # type: ignore[arg-type]
            assert stability == pytest.approx(row[f"stability_{kind}"], rel=case["tol_rel"])
            risk = risk_bound(**arguments, n=row["n"], kind=kind)  # type: ignore[arg-type]
            assert risk == pytest.approx(row[f"population_{kind}"], rel=case["tol_rel"])
            assert gap_bound(**arguments, n=row["n"], kind=kind) == pytest.approx(risk - optimization, rel=1e-12)  # type: ignore[arg-type]


def test_the_expanded_form() -> None:
    """4 D^2 / (lr T) + 16 b (r - rho)^2 + 72 lr b^2 r^2 T + 288 b^2 lr T D^2 / n^2 + 2304 b^3 lr^2 T^2 (r - rho)^2 / n^2."""
    b, lr, r, rho, t, n, d = 2.0, 0.05, 0.3, 0.1, 40, 30, 1.5
    expected = (
        4 * d**2 / (lr * t) + 16 * b * (r - rho) ** 2 + 72 * lr * b**2 * r**2 * t
        + 288 * b**2 * lr * t * d**2 / n**2 + 2304 * b**3 * lr**2 * t**2 * (r - rho) ** 2 / n**2
    )  # fmt: skip
    found = risk_bound(smoothness=b, lr=lr, radius=r, flatness_radius=rho, steps=t, n=n, distance=d)
    assert found == pytest.approx(expected, rel=1e-14)


def test_numbers_of_numpy_are_worked_with_in_double_precision() -> None:
    single = {name: np.int32(v) if name in ("steps", "n") else np.float32(v) for name, v in ARGUMENTS.items()}
    double = {name: value.item() for name, value in single.items()}
    for kind in ("paper", "tight"):
        assert risk_bound(**single, kind=kind) == risk_bound(**double, kind=kind)  # type: ignore[arg-type]
        assert type(gap_bound(**single, kind=kind)) is float  # type: ignore[arg-type]


def test_bounds_scale_with_the_smoothness() -> None:
    """beta f at eta / beta has the same iterates; risks are beta times as large, the movement of points is the same."""
    scaled = ARGUMENTS | {"smoothness": 3.0, "lr": 0.25 / 3}
    assert risk_bound(**scaled) == pytest.approx(3 * risk_bound(**ARGUMENTS))
    assert stability_bound(**scaled) == pytest.approx(stability_bound(**ARGUMENTS))
    assert stability_bound(**scaled, kind="tight") == pytest.approx(stability_bound(**ARGUMENTS, kind="tight"))


@pytest.mark.parametrize("changed", ["radius", "distance", "steps"])
def test_bounds_on_stability_grow(changed: str) -> None:
    for kind in ("paper", "tight"):
        larger = ARGUMENTS | {changed: 2 * ARGUMENTS[changed]}
        assert stability_bound(**larger, kind=kind) > stability_bound(**ARGUMENTS, kind=kind)  # type: ignore[arg-type]
        assert stability_bound(**ARGUMENTS, kind=kind) <= stability_bound(**ARGUMENTS)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "n", "steps", "lr", "radius", "rho"),
    [
        ("gd", 20, 20, 0.25, 0.0, 0.0), ("sam", 20, 20, 0.25, 0.05, 0.05), ("sam", 20, 80, 0.25, 0.2, 0.05),
        ("sagd", 10, 10, 0.25, 0.05, 0.05), ("sam", 40, 40, 0.25, 0.01, 0.05),
    ],
)  # fmt: skip
def test_every_bound_holds_on_the_dead_zone(
    method: str, n: int, steps: int, lr: float, radius: float, rho: float
) -> None:
    samples = 3 if method == "sagd" else 12
    f = DeadZoneRegression(n, 40, rho, samples=samples)
    twin = f.leave_one_out()
    start = torch.zeros(samples, n + 1, 40, dtype=torch.float64)
    if method == "gd":
        run = gd(twin, lr=lr, steps=steps, start=start)
    elif method == "sam":
        run = sam(twin, lr=lr, radius=radius, steps=steps, start=start)
    else:
        run = sagd(twin, lr=lr, radius=radius, steps=steps, tie_break="power", start=start)
    arguments = {"smoothness": 1.0, "lr": lr, "radius": radius, "flatness_radius": rho, "steps": steps, "distance": 1.0}
    mean = run.suffix_average(1)
    assert float(run.perturbed_risks.mean(0)[:, 0].max()) <= optimization_bound(**arguments)  # type: ignore[arg-type]
    risks = f.value_and_gradient(mean[:, 0])[0]
    assert float(risks.max()) <= optimization_bound(**arguments)  # type: ignore[arg-type]
    moved = (mean[:, 1:] - mean[:, :1]).square().sum(-1).mean(-1)
    population = f.population_risks(mean[:, 0])
    for kind in ("paper", "tight"):
        assert float(moved.max()) <= stability_bound(**arguments, n=n, kind=kind)  # type: ignore[arg-type]
        assert float(population.mean()) <= risk_bound(**arguments, n=n, kind=kind)  # type: ignore[arg-type]
        assert float((population - risks).mean()) <= gap_bound(**arguments, n=n, kind=kind)  # type: ignore[arg-type]
    # Lemma 4, for these runs.
    assert float(population.mean()) <= 4 * float(risks.mean()) + 3 * float(moved.mean())


def test_without_the_distance_the_printed_bound_is_violated() -> None:
    """E6: gradient descent from far away moves more than 96 beta lr T / n^2 when an example is left out."""
    n = steps = 20
    f = DeadZoneRegression(n, 40, samples=4)
    f.centre *= 100.0
    twin = f.leave_one_out()
    twin.centre *= 100.0
    start = torch.zeros(4, n + 1, 40, dtype=torch.float64)
    mean = gd(twin, lr=0.25, steps=steps, start=start).suffix_average(1)
    moved = float((mean[:, 1:] - mean[:, :1]).square().sum(-1).mean())
    arguments: dict[str, Any] = {
        "smoothness": 1.0, "lr": 0.25, "radius": 0.0, "flatness_radius": 0.0, "steps": steps, "n": n,
    }  # fmt: skip
    assert moved > stability_bound(**arguments, distance=1.0) == pytest.approx(1.2)
    assert moved < stability_bound(**arguments, distance=100.0, kind="tight")


def test_the_bounds_hold_in_the_traps_and_are_vacuous_there() -> None:
    lr = 1 / 24
    traps: list[tuple[ConvexProblem, Any, float, float]] = []
    a = SAGDTrap(6, 16, 0.1, sample=Sample.draw(6, 0, "some", bit=1))
    traps.append((a, sagd(a, lr=0.25, radius=1.1, steps=16, tie_break="adversarial"), 1.1, 0.0))
    b = SAMTrap(6, 16, lr, 3.0, sample=Sample.draw(6, 0, "one"))
    traps.append((b, sam(b, lr=lr, radius=3.0, steps=16), 3.0, 0.5 * b.constants.lam))
    for f, run, radius, distance in traps:
        arguments: dict[str, Any] = {
            "smoothness": f.smoothness, "lr": 0.25 / f.smoothness, "radius": radius, "steps": 16,
            "flatness_radius": f.flatness_radius, "distance": distance,
        }  # fmt: skip
        assert float(run.perturbed_risks.mean()) <= optimization_bound(**arguments)
        mean = run.suffix_average(1)
        assert f.population_risk(mean).value - f.empirical_risk(mean) <= gap_bound(**arguments, n=f.n, kind="tight")
        assert risk_bound(**arguments, n=f.n, kind="tight") > f.largest_loss


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lr": 0.26}, r"lr = 0\.26 is above 1 / \(4 smoothness\) = 0\.25"),
        ({"lr": 0.0}, "lr must be finite and > 0"),
        ({"optimum": 0.1}, r"optimum = 0\.1: the bounds need a common minimiser.*F\* = 0"),
        ({"radius": -1.0}, "radius must be finite and >= 0"),
        ({"flatness_radius": math.nan}, "flatness_radius must be finite"),
        ({"distance": math.inf}, "distance must be finite"),
        ({"steps": 0}, "steps must be an integer >= 1, got 0"),
        ({"n": 2.5}, "n must be an integer >= 1, got 2.5"),
        ({"kind": "loose"}, "unknown kind of bound 'loose'"),
    ],
)
def test_what_is_not_proved_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        risk_bound(**ARGUMENTS | changed)
