"""Who falls into which trap: every optimiser and every average of this library on the four convex problems.

All runs are deterministic but for their seeds, full batch, and have the constants of the theorem: its step size, its radius
as ``rho``, its start and its number of iterates. A cell is *covered* where a theorem or a short argument decides it, and a
*measurement* elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flatminima.averaging import EMA, LAWA, SWA, SWAD, TailAverage
from flatminima.optim import BSAM, SAM, FlatRegion
from flatminima.problems.convex import (
    ConvexProblem,
    FlatSharpERM,
    SAGDTrap,
    Sample,
    SAMTrap,
    SharpSAM1D,
    mean_loss,
    sagd,
    sam,
)

#: In the trap from half of its depth on, out of it below a hundredth. Where the empirical risk is more than a tenth of the
#: population risk, the method is at no minimum of the sample, and what it shows is not bad generalisation.
IN, PARTLY, OUT, LOST = "in the trap", "partly", "out", "at no minimum"
MEASURED = "measurement"
VALIDATION = 200  # fresh examples that SWAD looks at
EVERY = 8  # steps between its evaluations


@dataclass(frozen=True)
class Trap:
    """One problem with the constants of its theorem.

    Attributes:
        name, title: short and in words.
        problem: the instance.
        lr, radius, steps: of every method.
        start: the point it runs from.
        quantity: what is measured at the end.
        depth: of the trap: that quantity where the theorem's own run ends.
        rules: tie-breaking rules of exact SA-GD.
    """

    name: str
    title: str
    problem: ConvexProblem
    lr: float
    radius: float
    steps: int
    start: Tensor
    quantity: str
    depth: float
    rules: tuple[str, ...]

    def measure(self, w: Tensor) -> float:
        """The quantity at a point: the population risk, or how far the sharpness-aware risk is above the least one."""
        if self.quantity == "sharpness":
            return self.problem.empirical_risk(w) + self.problem.sharpness(self.radius, w).lower
        return self.problem.population_risk(w).value


def traps() -> tuple[Trap, ...]:
    """The four problems: drawn samples of six examples on which the event of the theorem holds.

    Example:
        >>> [f"{trap.name}: {trap.depth:.4f}" for trap in traps()]
        ['theorem 1: 0.0949', 'theorem 3: 0.0554', 'theorem 6: 0.0450', 'theorem 7: 0.0161']
    """
    flat = FlatSharpERM(6, 0.25, sample=Sample.draw(6, 0, "some"))
    start = math.sqrt(0.75) * flat.unit(flat.sample.zeros[0]) + 0.5 * flat.auxiliary_unit()
    descent = SAGDTrap(6, 64, 0.1, sample=Sample.draw(6, 0, "some", bit=1))
    sharp = SharpSAM1D(0.3)
    ascent = SAMTrap(6, 64, 1 / 24, 1.5, sample=Sample.draw(6, 0, "one"))
    reached = sam(ascent, lr=ascent.lr, radius=ascent.radius, steps=64).suffix_average(1)
    return (
        Trap("theorem 1", "a flat minimum that generalises badly", flat, 0.25, 0.25, 64, start, "risk",
             flat.population_risk(start - 0.5 * flat.auxiliary_unit()).value, ("auxiliary", "uniform")),
        Trap("theorem 3", "the trap of SA-GD", descent, 0.25, 0.6, 64, descent.start, "risk",
             descent.suffix_risk(1, lr=0.25, radius=0.6), ("adversarial", "auxiliary", "uniform", "power")),
        Trap("theorem 6", "the sharpest minimum", sharp, 0.25, 0.4, 64, sharp.start, "sharpness",
             sharp.floor(lr=0.25, radius=0.4), ("unique",)),
        Trap("theorem 7", "the trap of SAM", ascent, ascent.lr, ascent.radius, 64, ascent.start, "risk",
             ascent.population_risk(reached).value, ()),
    )  # fmt: skip


Step = Callable[[], object]
#: From a problem, its model and its data: what makes one step.
Maker = Callable[[Trap, nn.Module, Tensor, Tensor], Step]


@dataclass(frozen=True)
class Method:
    """One row: a label, and a way to make a step; ``average`` names what is averaged over its iterates."""

    label: str
    make: Maker
    average: str = ""


def _loss(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    return lambda: mean_loss(model(x), y)


def _plain(make: Callable[[Trap, list[Tensor]], torch.optim.Optimizer]) -> Maker:
    def maker(trap: Trap, model: nn.Module, x: Tensor, y: Tensor) -> Step:
        optimiser = make(trap, list(model.parameters()))

        def step() -> None:
            optimiser.zero_grad()
            _loss(model, x, y)().backward()
            optimiser.step()

        return step

    return maker


def _one_by_one(trap: Trap, model: nn.Module, x: Tensor, y: Tensor) -> Step:
    optimiser = torch.optim.SGD(model.parameters(), lr=trap.lr)
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        row = torch.randint(len(x), (1,), generator=generator)
        optimiser.zero_grad()
        _loss(model, x[row], y[row])().backward()
        optimiser.step()

    return step


def _sharpness_aware(variant: str, momentum: float = 0.0, **options: Any) -> Maker:
    def maker(trap: Trap, model: nn.Module, x: Tensor, y: Tensor) -> Step:
        base = torch.optim.SGD(model.parameters(), lr=trap.lr, momentum=momentum)
        optimiser = SAM(base, rho=trap.radius, variant=variant, model=model, **options)
        rows = [_loss(model, x[i : i + 1], y[i : i + 1]) for i in range(len(x))]
        closure = rows if variant == "m-sam" else _loss(model, x, y)
        return lambda: optimiser.step(closure)

    return maker


def _bsam(trap: Trap, model: nn.Module, x: Tensor, y: Tensor) -> Step:
    optimiser = BSAM(model.parameters(), rows=len(x), lr=trap.lr, rho=trap.radius, weight_decay=0.0, model=model)
    return lambda: optimiser.step(_loss(model, x, y))


def _f2m(trap: Trap, model: nn.Module, x: Tensor, y: Tensor) -> Step:
    count = sum(p.numel() for p in model.parameters())
    region = FlatRegion(
        model, bound=trap.radius * math.sqrt(3.0 / count)
    )  # uniform noise whose mean square is radius^2
    optimiser = torch.optim.SGD(model.parameters(), lr=trap.lr)

    def step() -> None:
        optimiser.zero_grad()
        region.loss(model, x, y, mean_loss, draws=2).value.backward()
        optimiser.step()

    return step


_SGD = _plain(lambda trap, p: torch.optim.SGD(p, lr=trap.lr))
_SAM = _sharpness_aware("sam")
METHODS: tuple[Method, ...] = (
    Method("gradient descent", _SGD),
    Method("single-example SGD", _one_by_one),
    Method("momentum 0.9", _plain(lambda trap, p: torch.optim.SGD(p, lr=trap.lr, momentum=0.9))),
    Method("Adam", _plain(lambda trap, p: torch.optim.Adam(p, lr=trap.lr))),
    Method("SAM", _SAM),
    Method("ASAM", _sharpness_aware("asam")),
    Method("GSAM", _sharpness_aware("gsam")),
    Method("WSAM", _sharpness_aware("wsam")),
    Method("Friendly-SAM", _sharpness_aware("friendly-sam")),
    Method("LookSAM", _sharpness_aware("looksam")),
    Method("AE-SAM", _sharpness_aware("ae-sam")),
    Method("SAM every 2 steps", _sharpness_aware("every-k", k=2)),
    Method("SAM with probability 1/2", _sharpness_aware("probability", p=0.5)),
    Method("MSAM, momentum 0.9", _sharpness_aware("msam", 0.9)),
    Method("m-SAM, one example each", _sharpness_aware("m-sam")),
    Method("random perturbation", _sharpness_aware("random")),
    Method("SA-GD, projected ascent", _sharpness_aware("sa-gd", steps=20)),
    Method("bSAM", _bsam),
    Method("F2M, noise in a box", _f2m),
    Method("SWA of gradient descent", _SGD, "swa"),
    Method("SWA of SAM", _SAM, "swa"),
    Method("EMA of SAM", _SAM, "ema"),
    Method("LAWA of SAM", _SAM, "lawa"),
    Method("tail average of SAM", _SAM, "tail"),
    Method("SWAD of SAM, with fresh examples", _SAM, "swad"),
)


def zoo(progress: Callable[[float], None] | None = None) -> dict[str, Any]:
    """Run everything.

    Args:
        progress: called with the fraction done.

    Returns:
        JSON-ready: ``traps``, and per method ``label`` and one cell for each trap with ``value``, ``share`` of the depth,
        ``verdict``, ``moved`` (the distance from the start), ``risk``, ``empirical_risk``, ``why`` (what decides the cell, or
        "measurement") and ``expected`` (the verdict that follows); ``None`` where a method does not apply.
    """
    found = traps()
    rows: list[dict[str, Any]] = []
    for at, method in enumerate(METHODS):
        cells: list[dict[str, Any] | None] = [_cell(trap, method.label, _output(trap, method)) for trap in found]
        rows.append({"label": method.label, "cells": cells})
        if progress is not None:
            progress((at + 1) / (len(METHODS) + 1))
    for rule in dict.fromkeys(rule for trap in found for rule in trap.rules):
        label = f"SA-GD, exact maximum, ties: {rule}"
        cells = [_cell(trap, label, _exact(trap, rule)) if rule in trap.rules else None for trap in found]
        rows.append({"label": label, "cells": cells})
    return {
        "traps": [
            {
                "name": trap.name, "title": trap.title, "quantity": trap.quantity, "depth": trap.depth, "lr": trap.lr,
                "radius": trap.radius, "steps": trap.steps, "n": trap.problem.n, "parameters": trap.problem.d,
            }
            for trap in found
        ],
        "rows": rows,
    }  # fmt: skip


def _exact(trap: Trap, rule: str) -> Tensor:
    problem, settings = trap.problem, {"lr": trap.lr, "radius": trap.radius, "steps": trap.steps}
    return sagd(problem, tie_break=rule, start=trap.start, **settings).last  # type: ignore[arg-type]


def _output(trap: Trap, method: Method) -> Tensor:
    objective = trap.problem.objective(trap.start, check=False)
    model, (x, y) = objective.model, trap.problem.data()
    step = method.make(trap, model, x, y)
    average = _average(method.average, model, trap.steps)
    new = trap.problem.fresh(VALIDATION, seed=1)
    for t in range(trap.steps - 1):
        step()
        if average is not None:
            average.update()
        if isinstance(average, SWAD) and (t + 1) % EVERY == 0:
            with torch.no_grad():
                average.evaluate(float(_loss(model, *new)()))
    if average is not None:
        average.copy_to(model)
    return objective.point()


def _average(kind: str, model: nn.Module, steps: int) -> SWA | EMA | LAWA | TailAverage | SWAD | None:
    if kind == "swad":
        return SWAD(model, tolerance=0.0, tolerance_mode="absolute")
    if kind == "ema":
        return EMA(model, timescale=steps / 10)
    if kind == "lawa":
        return LAWA(model, k=5, every=5)
    return {"swa": SWA, "tail": TailAverage}[kind](model) if kind else None


def _cell(trap: Trap, label: str, w: Tensor) -> dict[str, Any]:
    value = trap.measure(w)
    why, expected = covered(trap.name, label)
    share, risk, empirical = value / trap.depth, trap.problem.population_risk(w), trap.problem.empirical_risk(w)
    verdict = IN if share >= 0.5 else OUT if share < 0.01 else PARTLY
    if verdict != OUT and trap.quantity == "risk" and empirical > 0.1 * risk.value:
        verdict = LOST
    return {
        "value": value,
        "share": share,
        "verdict": verdict,
        "moved": float((w - trap.start).norm()),
        "risk": risk.value,
        "risk_error": risk.error,
        "empirical_risk": empirical,
        "why": why,
        "expected": expected,
    }


def covered(trap: str, label: str) -> tuple[str, str | None]:
    """What decides a cell before it is run (a theorem, or an argument of one line), and the verdict that follows."""
    rule = label.rsplit(" ", 1)[-1] if label.startswith("SA-GD, exact") else ""
    if trap == "theorem 1":
        return "no gradient of the sample's losses has a component along the hidden column", IN
    if trap == "theorem 3":
        known = {"adversarial": ("Theorem 3", IN), "auxiliary": ("a recursion on the auxiliary axis", OUT)}
        if rule:
            return known.get(rule, (MEASURED, None))
        noisy = ("random perturbation", "bSAM", "F2M")
        return (MEASURED, None) if label.startswith(noisy) else ("the gradient at the start is zero", OUT)
    if trap == "theorem 6":
        known = {
            "SAM": ("w ← (1 − η) w − η r, frozen at the first w ≤ 0", IN),
            "gradient descent": ("w ← (1 − η) w", IN),
        }
        return ("w ← w − η (w + r)", OUT) if rule else known.get(label, (MEASURED, None))
    known = {
        "SAM": ("Theorem 7", IN),
        "SWA of SAM": ("Theorem 7, the mean of iterates 2 to T", IN),
        "gradient descent": ("the trigger alone has a gradient, below 1e-8", OUT),
        "SWA of gradient descent": ("the trigger alone has a gradient, below 1e-8", OUT),
    }
    return known.get(label, (MEASURED, None))


def counted(rows: Sequence[dict[str, Any]], trap: int, verdict: str) -> list[str]:
    """The labels of the rows with that verdict in that column."""
    return [row["label"] for row in rows if row["cells"][trap] is not None and row["cells"][trap]["verdict"] == verdict]
