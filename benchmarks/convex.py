"""Claim: the convex traps cost what their structure costs, not what their 2^n columns cost.

    make bench      # or: python benchmarks/convex.py [ROUNDS]

One thread, process CPU time, the variants interleaved within a round, medians over rounds; every cell is a whole run of T
iterates, with the problem set up. SAM on its trap: all columns ("dense"), columns grouped by their number of ones
("classes"), the library's own ``SAM`` through autograd on the ``Objective`` (dense where it fits), and the closed form of all
T suffix averages. SA-GD on its trap, adversarial ties: dense and the unanimous columns alone ("spurious"). The risks at the
end have to agree to 1e-6 with the closed form, which leaves out the trigger, before anything is timed.
"""

from __future__ import annotations

import math
import platform
import statistics
import sys
import time
from collections.abc import Callable

import torch

import flatminima as fm
from flatminima.problems import SAGDTrap, SAMTrap
from flatminima.problems.convex import mean_loss, sagd, sam

LR = 1 / 24
SIZES = (
    (6, 16),
    (6, 64),
    (8, 64),
    (10, 64),
    (12, 16),
    (12, 64),
    (14, 64),
    (100, 64),
    (400, 16),
    (400, 64),
    (400, 256),
    (400, 1024),
)
DENSE = 14  # n beyond which the columns are not held


def radius(steps: int) -> float:
    return 1 / (2 * LR * math.sqrt(steps))


def sam_run(n: int, steps: int, kind: str) -> float:
    f = SAMTrap(n, steps, LR, radius(steps), sample=kind)  # type: ignore[arg-type]
    return f.population_risk(sam(f, lr=LR, radius=f.radius, steps=steps).last).value


def closed(n: int, steps: int) -> float:
    form = SAMTrap(n, steps, LR, radius(steps), sample="classes").closed_form()
    return [form.suffix_risk(tau) for tau in range(1, steps + 1)][-1]


def library(n: int, steps: int) -> float:
    f = SAMTrap(n, steps, LR, radius(steps), sample="dense" if n <= DENSE else "classes")
    objective = f.objective(check=False)
    model, (x, y) = objective.model, f.data()
    optimiser = fm.SAM(torch.optim.SGD(model.parameters(), lr=LR), rho=f.radius)
    for _ in range(steps - 1):
        optimiser.step(lambda: mean_loss(model(x), y))
    return f.population_risk(objective.point()).value


def sagd_run(n: int, steps: int, kind: str) -> float:
    f = SAGDTrap(n, steps, 0.1, sample=kind)  # type: ignore[arg-type]
    r = 0.1 + 4 / math.sqrt(steps)
    return f.population_risk(sagd(f, lr=0.25, radius=r, steps=steps, tie_break="adversarial").last).value


def cpu_seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def row(n: int, steps: int, rounds: int) -> str:
    few = n <= DENSE
    calls: dict[str, Callable[[], float]] = {
        "dense": lambda: sam_run(n, steps, "dense"),
        "classes": lambda: sam_run(n, steps, "classes"),
        "library": lambda: library(n, steps),
        "closed": lambda: closed(n, steps),
        "sagd dense": lambda: sagd_run(n, steps, "dense"),
        "sagd spurious": lambda: sagd_run(n, steps, "spurious"),
    }
    if not few:
        calls = {name: call for name, call in calls.items() if "dense" not in name}
    expected = {name: closed(n, steps) for name in calls if "sagd" not in name}
    last = SAGDTrap(n, steps, 0.1, sample="spurious").suffix_risk(steps, lr=0.25, radius=0.1 + 4 / math.sqrt(steps))
    for name, call in calls.items():
        found, truth = call(), expected.get(name, last)
        if abs(found / truth - 1) > 1e-6:
            sys.exit(f"n = {n}, T = {steps}, {name}: {found!r}, closed form {truth!r}")
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(cpu_seconds(call))
    t = {name: statistics.median(found) for name, found in times.items()}

    def shown(name: str) -> str:
        return f"{1e3 * t[name]:.1f}" if name in t else ""

    def ratio(over: str, under: str) -> str:
        return f"{t[over] / t[under]:.1f}" if over in t and under in t else ""

    cells = [
        f"{n}, {steps}", f"{2**n * steps + 1}" if few else f"{steps} · 2^{n}", f"{(n + 1) * steps + 1}", shown("classes"),
        ratio("dense", "classes"), ratio("library", "dense" if few else "classes"), ratio("classes", "closed"),
        shown("sagd spurious"), ratio("sagd dense", "sagd spurious"),
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    torch.set_num_threads(1)
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    print(f"torch {torch.__version__}, {platform.machine()}, one thread, medians of {rounds} interleaved rounds\n")
    header = (
        "n, T",
        "parameters, dense",
        "classes",
        "SAM, classes, ms",
        "dense, x classes",
        "`fm.SAM` by autograd, x the loop on the same sample",
        "classes, x closed form",
        "SA-GD, spurious, ms",
        "dense, x spurious",
    )
    print("| " + " | ".join(header) + " |\n|" + " --- |" * len(header))
    for n, steps in SIZES:
        print(row(n, steps, rounds), flush=True)


if __name__ == "__main__":
    main()
