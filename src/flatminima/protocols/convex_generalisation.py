"""What stability still guarantees: every upper bound on every experiment, and where it is vacuous.

The dead-zone regression is retrained with each example left out in turn. A bound larger than the largest loss of any example in
the unit ball says nothing; the row says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from flatminima.problems.convex import (
    ColumnProblem,
    ConvexProblem,
    DeadZoneRegression,
    RadialDeadZone,
    SAGDTrap,
    Sample,
    SAMTrap,
    Trajectory,
    gap_bound,
    gd,
    optimization_bound,
    risk_bound,
    sagd,
    sam,
    stability_bound,
)
from flatminima.protocols.claims import DERIVED, PAPER, Claim

KINDS: tuple[Literal["tight", "paper"], ...] = ("tight", "paper")


@dataclass(frozen=True)
class Case:
    """One row: the method, the sizes, and the theorem that speaks of it."""

    method: Literal["GD", "SAM", "SA-GD"]
    n: int
    steps: int
    lr: float
    radius: float
    rho: float
    samples: int = 40


DEAD_ZONES = (
    Case("GD", 20, 20, 0.25, 0.0, 0.0), Case("SAM", 20, 20, 0.25, 0.05, 0.05), Case("SA-GD", 20, 20, 0.25, 0.05, 0.05, 8),
    Case("SAM", 20, 20, 0.25, 0.2, 0.05), Case("SAM", 20, 80, 0.25, 0.2, 0.05), Case("SA-GD", 20, 80, 0.25, 0.2, 0.05, 8),
    Case("SAM", 80, 80, 0.25, 0.01, 0.05, 20), Case("SAM", 80, 80, 0.05, 0.3, 0.0, 20),
)  # fmt: skip


def _run(problem: ConvexProblem, case: Case, start: torch.Tensor | None, tie_break: str = "power") -> Trajectory:
    settings: dict[str, Any] = {"lr": case.lr, "steps": case.steps, "start": start}
    if case.method == "GD":
        return gd(problem, **settings)
    if case.method == "SAM":
        return sam(problem, radius=case.radius, **settings)
    return sagd(problem, radius=case.radius, tie_break=tie_break, iterations=20, **settings)


def generalisation(progress: Callable[[float], None] | None = None) -> tuple[list[dict[str, Any]], list[Claim]]:
    """Every experiment as a row (quantity, measured, bound, vacuous) and as a claim."""
    rows: list[dict[str, Any]] = []
    claims: list[Claim] = []
    for at, case in enumerate(DEAD_ZONES):
        row, claim = _dead_zone(case)
        rows.append(row)
        claims.append(claim)
        if progress is not None:
            progress((at + 1) / (len(DEAD_ZONES) + 1))
    for trap in (_sagd_trap(), _sam_trap()):
        rows.append(trap[0])
        claims.append(trap[1])
    return rows, [*claims, *radial(), refusal()]


def _dead_zone(case: Case) -> tuple[dict[str, Any], Claim]:
    f = DeadZoneRegression(case.n, 40, case.rho, samples=case.samples)
    run = _run(f.leave_one_out(), case, torch.zeros(case.samples, case.n + 1, 40, dtype=torch.float64))
    mean = run.suffix_average(1)
    risks, population = f.value_and_gradient(mean[:, 0])[0], f.population_risks(mean[:, 0])
    measured = {
        "regret": float(run.perturbed_risks.mean(0)[:, 0].max()),
        "empirical risk": float(risks.max()),
        "stability": float((mean[:, 1:] - mean[:, :1]).square().sum(-1).mean(-1).max()),
        "population risk": float(population.mean()),
        "gap": float((population - risks).mean()),
    }
    errors = {
        "population risk": _error(population), "gap": _error(population - risks),
    }  # fmt: skip
    if case.method == "SA-GD":
        v = f.maximiser(mean[:, 0], case.radius, "power", 1, torch.Generator().manual_seed(1))
        measured["sharpness-aware risk"] = float(f.value_and_gradient(mean[:, 0] + v)[0].max())
    parameters = {"problem": "dead-zone regression, d = 40", "samples": case.samples}
    row, claim = _judged(case, f, 1.0, measured, errors, parameters)
    # Lemma 4 is about means over samples: it says nothing about one sample on which a rare event holds.
    moved = float((mean[:, 1:] - mean[:, :1]).square().sum(-1).mean())
    combined = 4 * float(risks.mean()) + 3 * f.smoothness * moved
    claim.at_most(
        "population risk, against 4 F_S + 3β · measured stability (Lemma 4)", combined, float(population.mean())
    )
    return row, claim


def _error(values: torch.Tensor) -> float:
    return float(values.std()) / math.sqrt(len(values))


def _judged(
    case: Case, f: ConvexProblem, distance: float, measured: dict[str, float], errors: dict[str, float],
    parameters: dict[str, Any],
) -> tuple[dict[str, Any], Claim]:  # fmt: skip
    known: dict[str, Any] = {
        "smoothness": f.smoothness, "lr": case.lr, "radius": case.radius, "flatness_radius": f.flatness_radius,
        "steps": case.steps, "distance": distance,
    }  # fmt: skip
    first = optimization_bound(**known)
    bounds: dict[str, dict[str, float]] = {}
    for kind in KINDS:
        more = {**known, "n": case.n, "kind": kind}
        bounds[kind] = {
            "regret": first, "empirical risk": first, "sharpness-aware risk": first, "stability": stability_bound(**more),
            "population risk": risk_bound(**more), "gap": gap_bound(**more),
        }  # fmt: skip
    ceiling = {"stability": 4.0}  # two points of the unit ball are no further apart
    theorem = {"GD": "Lemma 5 and 4 at r = 0", "SAM": "Theorems 5 and 8", "SA-GD": "Theorems 2 and 4"}[case.method]
    claim = Claim(
        f"{theorem}: {case.method} stays below every bound",
        {**parameters, "n": case.n, "T": case.steps, "η": round(case.lr, 6), "r": case.radius, "ρ": f.flatness_radius},
        PAPER,
    )
    cells = []
    for name, value in measured.items():
        for kind in KINDS if name in ("stability", "population risk", "gap") else KINDS[1:]:
            bound = bounds[kind][name]
            vacuous = bound >= ceiling.get(name, f.largest_loss)
            whose = "our" if kind == "tight" else "the paper's"
            claim.at_most(f"{name}, {whose} constants{' (vacuous)' if vacuous else ''}", bound, value)
            cells.append({"quantity": name, "kind": kind, "measured": value, "error": errors.get(name), "bound": bound,
                          "vacuous": vacuous})  # fmt: skip
    row = {
        "method": case.method, "n": case.n, "steps": case.steps, "lr": case.lr, "radius": case.radius,
        "flatness_radius": f.flatness_radius, "largest_loss": f.largest_loss, "problem": type(f).__name__,
        "samples": parameters.get("samples"), "start_risk": f.population_risk().value, "cells": cells,
    }  # fmt: skip
    return row, claim


def _of_trap(case: Case, f: ColumnProblem, distance: float, tie_break: str) -> tuple[dict[str, Any], Claim]:
    run = _run(f, case, None, tie_break)
    mean = run.suffix_average(1)
    # The example that is left out may have been all that kept another column from being unanimous; the adversary sticks
    # to the one it has.
    moved = [_run(f.on(f.sample.without(i)), case, None, tie_break).suffix_average(1) - mean for i in range(f.n)]
    population = f.population_risk(mean).value
    measured = {
        "regret": float(run.perturbed_risks.mean()),
        "empirical risk": f.empirical_risk(mean),
        "stability": sum(float(step.square().sum()) for step in moved) / f.n,
        "population risk": population,
        "gap": population - f.empirical_risk(mean),
    }
    if case.method == "SA-GD":
        measured["sharpness-aware risk"] = f.empirical_risk(mean) + f.sharpness(case.radius, mean).lower
    parameters = {"problem": f"{type(f).__name__}, given the event"}
    return _judged(case, f, distance, measured, {}, parameters)


def _sagd_trap() -> tuple[dict[str, Any], Claim]:
    f = SAGDTrap(8, 64, 0.1, sample=Sample.draw(8, 0, "some", bit=1))
    return _of_trap(Case("SA-GD", 8, 64, 0.25, 0.6, 0.1), f, 0.0, "adversarial")


def _sam_trap() -> tuple[dict[str, Any], Claim]:
    f = SAMTrap(8, 64, 1 / 24, 1.5, sample=Sample.draw(8, 0, "one"))
    return _of_trap(Case("SAM", 8, 64, 1 / 24, 1.5, 0.0), f, 0.5 * f.constants.lam, "power")


#: rho, r, lr, and where |w_t| goes.
RADIAL = ((0.1, 0.3, 0.25), (0.3, 0.2, 0.25), (0.1, 0.6, 0.1))


def radial() -> list[Claim]:
    """Theorem 2 in one dimension, exactly: SA-GD goes to an r-flat point, or to a cycle of two points."""
    claims = []
    for rho, radius, lr in RADIAL:
        f = RadialDeadZone(rho)
        run = sagd(f, lr=lr, radius=radius, steps=400, tie_break="plus")
        claim = Claim("Theorem 2 in one dimension: an r-flat point for r ≤ ρ, a cycle of size η(r − ρ)/(2 − η) beyond",
                      {"ρ": rho, "r": radius, "η": lr, "T": 400}, DERIVED)  # fmt: skip
        claim.close("|w_T|", f.amplitude(lr=lr, radius=radius), abs(float(run.last)), rtol=1e-9)
        bound = optimization_bound(smoothness=1.0, lr=lr, radius=radius, flatness_radius=rho, steps=400, distance=0.9)
        claim.at_most("mean of F_S at w_t + v_t", bound, float(run.perturbed_risks.mean()))
        w = run.suffix_average(1)
        claim.at_most("sharpness-aware risk of ŵ₁", bound, f.empirical_risk(w) + f.sharpness(radius, w).lower)
        claims.append(claim)
    return claims


def refusal() -> Claim:
    """The functions refuse to bound what nothing is proved about."""
    claim = Claim("the bounds refuse what the theorems do not assume", {}, DERIVED)
    valid: dict[str, Any] = {
        "smoothness": 1.0, "lr": 0.25, "radius": 0.1, "flatness_radius": 0.1, "steps": 20, "n": 20, "distance": 1.0,
    }  # fmt: skip
    for name, value in (("optimum", 0.1), ("lr", 0.3)):
        refused = False
        try:
            risk_bound(**{**valid, name: value})
        except ValueError:
            refused = True
        claim.same(f"refused: {'F* = 0.1' if name == 'optimum' else 'η above 1/(4β)'}", True, refused)
    return claim
