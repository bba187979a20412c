"""Claim: an audit of a network of 100,000 parameters, all symmetries found and proved, takes less than a minute on one core.

    make bench      # or: python benchmarks/audit.py

A multilayer perceptron trained on scikit-learn's digits; every kind of symmetry that it has, five members of each. Once with
the default measures and what would be used instead of them, once with every measure that is not expensive. The bar of 60 s is
held against the CPU seconds of one thread, which are the time on one idle core; the clock stands beside them.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import platform
import time
from itertools import pairwise

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from flatminima import MEASURES, audit
from flatminima.data import load

ROWS, WIDTHS, STEPS, MEMBERS = 1000, (300, 256), 300, 5
BAR = 60.0


def trained() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    splits = load("digits")
    x, y = splits.train.x.flatten(1)[:ROWS], splits.train.y[:ROWS]
    torch.manual_seed(0)
    sizes = (x.shape[1], *WIDTHS, 10)
    layers = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
    model = nn.Sequential(*layers[:-1])
    opt = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(STEPS):
        opt.zero_grad()
        cross_entropy(model(x), y).backward()
        opt.step()
    return model, x, y


def main() -> None:
    torch.set_num_threads(1)
    model, x, y = trained()
    n = sum(p.numel() for p in model.parameters())
    print(
        f"torch {torch.__version__}, {platform.machine()}, one thread; MLP {x.shape[1]}-{WIDTHS[0]}-{WIDTHS[1]}-10, ",
        end="",
    )
    print(f"{n:,} parameters, {len(y)} rows of digits, {MEMBERS} members a kind\n")
    print(
        "| measures | number | kinds | members | CPU, s | bar, s | wall, s | gradients | network | symmetries | members | law |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    cheap = [name for name, m in MEASURES.items() if m.cost_class != "expensive"]
    for label, names in (("default and repairs", None), ("all but expensive", cheap)):
        wall, cpu = time.perf_counter(), time.process_time()
        report = audit(model, cross_entropy, (x, y), measures=names, members=MEMBERS)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        assert not report.by_verdict("broken"), report.by_verdict("broken")
        assert all(law.agrees for law in report.laws)
        shares = [report.times[part] / sum(report.times.values()) for part in report.times]
        tested = [name for name, verdict in report.verdicts.items() if verdict != "not applicable"]
        met = "met" if cpu < BAR else "MISSED"
        counts = (len(tested), len(report.orbits), sum(orbit.members for orbit in report.orbits))
        cells = [label, *map(str, counts), f"{cpu:.0f}", f"{BAR:.0f} {met}", f"{wall:.0f}", f"{report.cost:.0f}"]
        cells += [f"{100 * share:.0f} %" for share in shares]
        print("|", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
