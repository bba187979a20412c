"""Claim: an averaging update costs little more than the arithmetic itself, one foreach lerp over lists made beforehand.

    make bench      # or: python benchmarks/averaging.py

One thread, the variants interleaved within a round, medians over rounds of CPU time, as ratios to the lerp. Before timing,
every variant's average is compared with a float64 mean. What the averages hold in memory is in memory.py.
"""

from __future__ import annotations

import itertools
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_swa_multi_avg_fn

from flatminima.averaging import EMA, LAWA, SWA, SWAD, TailAverage

ROUNDS = 41


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(layer for _ in range(50) for layer in (nn.Linear(64, 64), nn.ReLU())))


def convnet() -> nn.Module:
    torch.manual_seed(0)
    widths = [3, 64, 128, 128, 256, 256, 256, 512]
    convs = [nn.Conv2d(a, b, 3) for a, b in itertools.pairwise(widths)]
    return nn.Sequential(*(layer for conv in convs for layer in (conv, nn.BatchNorm2d(conv.out_channels))))


class CachedLerp:
    """The floor: lists made once, nothing checked, nothing counted but n."""

    def __init__(self, model: nn.Module) -> None:
        self.live = [p.detach() for p in model.parameters()]
        self.mean = [torch.zeros_like(p) for p in self.live]
        self.n = 0

    def update(self) -> None:
        self.n += 1
        torch._foreach_lerp_(self.mean, self.live, 1 / self.n)

    def tensors(self) -> list[Tensor]:
        return self.mean


class Averaged:
    """torch.optim.swa_utils.AveragedModel as its documentation has it."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        self.model, self.average = model, AveragedModel(model, **options)

    def update(self) -> None:
        self.average.update_parameters(self.model)

    def tensors(self) -> list[Tensor]:
        return [p.detach() for p in self.average.module.parameters()]


def variants(model: nn.Module) -> dict[str, Any]:
    return {
        "foreach lerp, cached lists": CachedLerp(model),
        "SWA": SWA(model),
        "EMA": EMA(model, 1000.0),
        "TailAverage": TailAverage(model, 1.0),
        "SWAD.update": SWAD(model),
        "LAWA (a copy)": LAWA(model, 2, every=1),
        "AveragedModel": Averaged(model),
        "AveragedModel, multi_avg_fn": Averaged(model, multi_avg_fn=get_swa_multi_avg_fn()),
    }


def check(make: Callable[[], nn.Module]) -> None:
    model = make()
    kept = {name: v for name, v in variants(model).items() if not name.startswith(("EMA", "LAWA", "SWAD"))}
    exact = [torch.zeros_like(p, dtype=torch.float64) for p in model.parameters()]
    for _ in range(20):
        with torch.no_grad():
            for parameter, total in zip(model.parameters(), exact, strict=True):
                parameter.add_(0.01 * torch.randn_like(parameter))
                total.add_(parameter.double() / 20)
        for variant in kept.values():
            variant.update()
    for name, variant in kept.items():
        pairs = list(zip(variant.tensors(), exact, strict=True))
        error = sum(float((t.double() - e).square().sum()) for t, e in pairs) / sum(
            float(e.square().sum()) for e in exact
        )
        assert error**0.5 < 1e-6, f"{name} differs from the mean by {error**0.5}"


def seconds(call: Callable[[], object], repeats: int) -> float:
    start = time.process_time()
    for _ in range(repeats):
        call()
    return (time.process_time() - start) / repeats


def main() -> None:
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {platform.machine()}, one thread, medians of {ROUNDS} interleaved rounds\n")
    cases = {"MLP of 100 tensors, 0.2 M": (mlp, 20), "ConvNet of 28 tensors, 2.7 M": (convnet, 4)}
    table: dict[str, list[str]] = {}
    for make, repeats in cases.values():
        check(make)
        kept = variants(make())
        times: dict[str, list[float]] = {name: [] for name in kept}
        for variant in kept.values():
            seconds(variant.update, 2)
        for _ in range(ROUNDS):
            for name, variant in kept.items():
                times[name].append(seconds(variant.update, repeats))
        floor = times["foreach lerp, cached lists"]
        for name, found in times.items():
            # The ratio within a round: what else the machine does then slows both sides.
            ratio = statistics.median(a / b for a, b in zip(found, floor, strict=True))
            table.setdefault(name, []).append(f"{ratio:.2f} ({1e6 * statistics.median(found):.0f} µs)")
    print(f"| update | {' | '.join(cases)} |\n| --- | --- | --- |")
    for name, cells in table.items():
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
