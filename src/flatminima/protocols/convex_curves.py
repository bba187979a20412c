"""The curves behind the plots of the convex reproduction, rounded to five digits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from flatminima.problems.convex import (
    ColumnProblem,
    FlatSharpERM,
    RadialDeadZone,
    SAGDTrap,
    Sample,
    SAMTrap,
    SharpSAM1D,
    Trajectory,
    gd,
    sagd,
    sam,
)

STEPS = 64


def rounded(values: Sequence[float]) -> list[float]:
    """Five significant digits, and what is smaller than 1e-30 is zero."""
    return [float(f"{value:.5g}") if abs(value) > 1e-30 else 0.0 for value in values]


def planes() -> dict[str, Any]:
    """Empirical, sharpness-aware and population risk over the plane of the hidden column and the auxiliary axis."""
    f, radius = FlatSharpERM(6, 0.25, sample=Sample.draw(6, 0, "some")), 0.25
    x, y = torch.linspace(-1.4, 1.4, 57, dtype=torch.float64), torch.linspace(-0.8, 0.8, 33, dtype=torch.float64)
    hidden, seen = f.unit(f.sample.zeros[0]), f.auxiliary_unit()
    empirical, aware, population = [], [], []
    for s in y.tolist():
        points = [c * hidden + s * seen for c in x.tolist()]
        empirical.append(rounded(f.value_and_gradient(torch.stack(points))[0].tolist()))
        aware.append(rounded([f.empirical_risk(w) + f.sharpness(radius, w).lower for w in points]))
        population.append(rounded([f.population_risk(w).value for w in points]))
    marks = {"flat": [1.0, 0.0], "sharp": [0.0, 0.25], "origin": [0.0, 0.0]}
    return {
        "x": rounded(x.tolist()), "y": rounded(y.tolist()), "radius": radius, "flatness_radius": 0.25,
        "empirical": empirical, "aware": aware, "population": population, "points": marks,
    }  # fmt: skip


def suffixes() -> list[dict[str, Any]]:
    """Risk of every suffix average, at every step: of SA-GD in its trap, of SAM in its, and of those that stay out."""
    descent = SAGDTrap(6, STEPS, 0.1, sample=Sample.draw(6, 0, "some", bit=1))
    ascent = SAMTrap(6, STEPS, 1 / 24, 1.5, sample=Sample.draw(6, 0, "one"))
    known: dict[str, Any] = {"lr": 0.25, "steps": STEPS}
    printed = SAMTrap(8, STEPS, 0.25, 0.25, variant="paper", sample=Sample.draw(8, 0, "one"))
    runs: list[tuple[str, str, ColumnProblem, Trajectory]] = [
        ("sagd", "SA-GD, adversarial ties", descent, sagd(descent, radius=0.6, tie_break="adversarial", **known)),
        ("sagd", "SA-GD, uniform ties", descent, sagd(descent, radius=0.6, tie_break="uniform", **known)),
        ("sagd", "SA-GD, auxiliary ties", descent, sagd(descent, radius=0.6, tie_break="auxiliary", **known)),
        ("sam", "SAM", ascent, sam(ascent, lr=1 / 24, radius=1.5, steps=STEPS)),
        ("sam", "SAM, printed constants, n = 8", printed, sam(printed, lr=0.25, radius=0.25, steps=STEPS)),
        ("sam", "gradient descent", ascent, gd(ascent, lr=1 / 24, steps=STEPS)),
    ]
    found = []
    for problem, label, f, run in runs:
        scale = 0.25 if problem == "sam" else 1.0  # eta^2 r^2 T
        whole = [[_risk(f, run.suffix_average(tau, t)) for tau in range(1, t + 1)] for t in range(1, STEPS + 1)]
        found.append(
            {
                "problem": problem, "label": label, "scale": scale,
                "suffix": rounded(whole[-1]),
                "last": rounded([row[-1] for row in whole]),
                "mean": rounded([row[0] for row in whole]),
                "empirical": rounded(run.risks.tolist()),
                "every": [rounded(row) for row in whole] if label in ("SA-GD, adversarial ties", "SAM") else None,
            }
        )  # fmt: skip
    return found


def _risk(f: ColumnProblem, w: torch.Tensor) -> float:
    return f.population_risk(w, draws=2000).value


def oscillation() -> list[dict[str, Any]]:
    """SA-GD on an axis: to an r-flat point, or to a cycle; and the auxiliary axis of the trap."""
    found = []
    for rho, radius, lr in ((0.3, 0.2, 0.25), (0.1, 0.3, 0.25)):
        f = RadialDeadZone(rho)
        run = sagd(f, lr=lr, radius=radius, steps=40, tie_break="plus")
        found.append({"label": f"radial dead zone, ρ = {rho:g}, r = {radius:g}", "w": rounded(_axis(run, 0)),
                      "amplitude": f.amplitude(lr=lr, radius=radius), "flatness_radius": rho})  # fmt: skip
    trap = SAGDTrap(6, STEPS, 0.1, sample=Sample.draw(6, 0, "some", bit=1))
    run = sagd(trap, lr=0.25, radius=0.6, steps=40, tie_break="auxiliary")
    found.append({"label": "trap of SA-GD, auxiliary axis, ρ = 0.1, r = 0.6", "w": rounded(_axis(run, trap.d - 1)),
                  "amplitude": 0.25 * 0.5 / 1.75, "flatness_radius": 0.1})  # fmt: skip
    return found


def _axis(run: Trajectory, coordinate: int) -> list[float]:
    return [float(run.iterate(t)[coordinate]) for t in range(1, run.steps + 1)]


def one_dimension() -> list[dict[str, Any]]:
    """Theorem 6: where gradient descent, SAM and SA-GD go from the same start."""
    f, known = SharpSAM1D(0.3), {"lr": 0.25, "steps": 30}
    runs = {
        "gradient descent": gd(f, **known),  # type: ignore[arg-type]
        "SAM": sam(f, radius=0.4, **known),  # type: ignore[arg-type]
        "SA-GD": sagd(f, radius=0.4, tie_break="unique", **known),  # type: ignore[arg-type]
    }
    return [
        {
            "label": label, "w": rounded(_axis(run, 0)),
            "excess": rounded([0.5 * max(0.0, w + 0.4) ** 2 for w in _axis(run, 0)]),
        }
        for label, run in runs.items()
    ]  # fmt: skip


def chain_picture() -> dict[str, Any]:
    """The block of the hidden column along SAM's run, in units of eta r: each step fills one slot."""
    steps = 12
    f = SAMTrap(6, steps, 1 / 24, 12 / math.sqrt(steps), sample=Sample.draw(6, 0, "one"))
    run = sam(f, lr=f.lr, radius=f.radius, steps=steps)
    column = f.sample.zeros[0]
    rows = [(f.split(run.iterate(t))[0][column] / (f.lr * f.radius)).tolist() for t in range(1, steps + 1)]
    return {"steps": steps, "slots": [rounded(row) for row in rows]}
