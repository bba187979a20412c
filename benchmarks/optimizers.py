"""Claim: SAM costs two gradients and little else, LookSAM-5 and MSAM cost what they say.

    make bench      # or: python benchmarks/optimizers.py

One thread, process CPU time, everything interleaved within a round. A ratio is the median over rounds of the ratios within a
round: what else the machine does then slows both sides. The units are written by hand with `torch._foreach_*` on buffers that
persist; their perturbations are compared with ours first. Unlike those, our step checks that the second gradient is finite.

glibc decides as it goes whether a large block is returned to the system when it is freed, which lets whole steps differ by 4 %
for no reason of their own; here it is told to keep them.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import platform
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from optimizer_peers import TwoStep, installed
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from flatminima import SAM

RHO, ETA = 0.05, 0.01
Call = Callable[[], object]


def mlp() -> tuple[nn.Module, Tensor]:
    """100 tensors, 0.2 million parameters."""
    layers = [part for _ in range(49) for part in (nn.Linear(63, 63), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(63, 10)), torch.randn(256, 63)


def convnet() -> tuple[nn.Module, Tensor]:
    """56 tensors, 3.5 million parameters."""
    widths = [3] + [64] * 6 + [128] * 6 + [256] * 4 + [128] * 2
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(pairwise(widths)):
        layers += [
            nn.Conv2d(a, b, 3, stride=2 if i in (0, 6, 12) else 1, padding=1, bias=False),
            nn.BatchNorm2d(b),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)), torch.randn(8, 3, 32, 32)


# ----- written by hand ------------------------------------------------------------------------------------------------


class ByHand:
    """SAM's arithmetic with persistent buffers and one call per operation."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self.parameters = parameters
        self.clean = [torch.empty_like(p, requires_grad=False) for p in parameters]

    def direction(self) -> list[Tensor]:
        return [p.grad for p in self.parameters]  # type: ignore[misc]

    @torch.no_grad()
    def ascend(self) -> None:
        direction = self.direction()
        norm = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(direction))))
        torch._foreach_copy_(self.clean, self.parameters)
        torch._foreach_add_(self.parameters, direction, alpha=RHO / norm)

    @torch.no_grad()
    def restore(self) -> None:
        torch._foreach_copy_(self.parameters, self.clean)


class ByHandMomentum(ByHand):
    """MSAM's: the same, against the momentum of the base."""

    def __init__(self, parameters: list[Tensor], base: torch.optim.Optimizer) -> None:
        super().__init__(parameters)
        self.base = base

    def direction(self) -> list[Tensor]:
        return [self.base.state[p]["momentum_buffer"] for p in self.parameters]


class ByHandAdaptive(ByHand):
    """ASAM's, as the authors have it: T = |w| + eta on weights, 1 on biases. Two buffers more."""

    def __init__(self, parameters: list[Tensor]) -> None:
        super().__init__(parameters)
        self.weights = [p for p in parameters if p.dim() >= 2]
        self.others = [p for p in parameters if p.dim() < 2]
        self.scale, self.scaled = ([torch.empty_like(p, requires_grad=False) for p in self.weights] for _ in range(2))

    @torch.no_grad()
    def ascend(self) -> None:
        torch._foreach_copy_(self.scale, self.weights)
        torch._foreach_abs_(self.scale)
        torch._foreach_add_(self.scale, ETA)
        torch._foreach_copy_(self.scaled, [p.grad for p in self.weights])  # type: ignore[arg-type]
        torch._foreach_mul_(self.scaled, self.scale)
        rest = [p.grad for p in self.others]
        norm = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm([*self.scaled, *rest]))))
        torch._foreach_copy_(self.clean, self.parameters)
        torch._foreach_addcmul_(self.weights, self.scaled, self.scale, value=RHO / norm)
        torch._foreach_add_(self.others, rest, alpha=RHO / norm)


# ----- measuring ------------------------------------------------------------------------------------------------------


def keep_freed_memory() -> None:
    with contextlib.suppress(OSError, AttributeError):  # where there is no glibc
        for option in (-1, -3):  # the thresholds of trimming and of mapping
            ctypes.CDLL(None).mallopt(option, 2**30)


def seconds(call: Call, repeat: int) -> float:
    start = time.process_time()
    for _ in range(repeat):
        call()
    return (time.process_time() - start) / repeat


def timed(calls: dict[str, Call], rounds: int, repeat: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 3):
        for name, call in calls.items():
            taken = seconds(call, repeat)
            if i >= 3:
                times[name].append(taken)
    return times


def ratio(times: dict[str, list[float]], name: str, unit: str) -> float:
    return statistics.median(a / b for a, b in zip(times[name], times[unit], strict=True))


# ----- arithmetic alone -----------------------------------------------------------------------------------------------


def with_gradients(build: Callable[[], tuple[nn.Module, Tensor]]) -> nn.Module:
    torch.manual_seed(0)
    model, x = build()
    cross_entropy(model(x), torch.randint(0, 10, (len(x),))).backward()
    return model


def both(first: Call, second: Call) -> Call:
    def call() -> None:
        first()
        second()

    return call


def arithmetic(build: Callable[[], tuple[nn.Module, Tensor]], adaptive: bool) -> dict[str, Call]:
    """Ascent and restore, gradients fixed, the base's step left out."""
    model, mine, wrapped = (with_gradients(build) for _ in range(3))
    hand = (ByHandAdaptive if adaptive else ByHand)(list(model.parameters()))
    ours = SAM(torch.optim.SGD(mine.parameters(), lr=0.0), RHO, variant="asam" if adaptive else "sam")
    hand.ascend()
    ours.ascend()
    for p, q in zip(model.parameters(), mine.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-7), "not the same perturbation"
    hand.restore()
    ours.restore()
    calls = {"by hand": both(hand.ascend, hand.restore), "ours": both(ours.ascend, ours.restore)}
    wrapper = TwoStep(wrapped.parameters(), torch.optim.SGD, RHO, adaptive=adaptive, lr=0.0)
    wrapper.base.step = lambda: None
    calls["davda54 style"] = both(wrapper.first_step, wrapper.second_step)
    peer = installed()
    for foreach in (False, True) if peer is not None else ():
        parameters = with_gradients(build).parameters()
        theirs = peer(parameters, torch.optim.SGD, rho=RHO, adaptive=adaptive, lr=0.0, foreach=foreach)
        theirs.base_optimizer.step = lambda: None
        calls["pytorch_optimizer, foreach" if foreach else "pytorch_optimizer"] = both(
            theirs.first_step, theirs.second_step
        )
    return calls


# ----- whole steps ----------------------------------------------------------------------------------------------------


class Whole:
    """Training steps of one kind, on a model of their own."""

    def __init__(self, start: nn.Module, x: Tensor, y: Tensor) -> None:
        self.model, self.x, self.y = copy.deepcopy(start), x, y
        self.base = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)

    def evaluate(self) -> Tensor:
        loss = cross_entropy(self.model(self.x), self.y)
        loss.backward()
        return loss

    def plain(self, passes: int) -> Call:
        def call() -> None:
            for _ in range(passes):
                self.base.zero_grad()
                self.evaluate()
            self.base.step()

        return call

    def by_hand(self) -> Call:
        hand = ByHand(list(self.model.parameters()))

        def call() -> None:
            self.base.zero_grad()
            self.evaluate()
            hand.ascend()
            self.base.zero_grad()
            self.evaluate()
            hand.restore()
            self.base.step()

        return call

    def momentum_by_hand(self) -> Call:
        self.plain(1)()
        hand = ByHandMomentum(list(self.model.parameters()), self.base)

        def call() -> None:
            self.base.zero_grad()
            hand.ascend()
            self.evaluate()
            hand.restore()
            self.base.step()

        return call

    def ours(self, variant: str) -> Call:
        opt = SAM(self.base, RHO, variant=variant)

        def closure() -> Tensor:
            opt.zero_grad()
            return self.evaluate()

        return lambda: opt.step(closure)

    def two_step(self) -> Call:
        opt = TwoStep(self.model.parameters(), torch.optim.SGD, RHO, lr=1e-3, momentum=0.9)

        def call() -> None:
            self.evaluate()
            opt.first_step(zero_grad=True)
            self.evaluate()
            opt.second_step(zero_grad=True)

        return call


def whole(build: Callable[[], tuple[nn.Module, Tensor]]) -> dict[str, Call]:
    torch.manual_seed(0)
    start, x = build()
    case: tuple[Any, ...] = (start, x, torch.randint(0, 10, (len(x),)))
    calls = {"base": Whole(*case).plain(1), "two evaluations and base": Whole(*case).plain(2)}
    calls["SAM by hand"] = Whole(*case).by_hand()
    for variant in ("sam", "asam", "gsam", "friendly-sam", "looksam", "ae-sam", "every-k", "msam"):
        calls[variant] = Whole(*case).ours(variant)
    calls["MSAM by hand"] = Whole(*case).momentum_by_hand()
    calls["davda54 style"] = Whole(*case).two_step()
    return calls


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=41)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    keep_freed_memory()
    print(f"torch {torch.__version__}, {platform.machine()}, one thread, medians of {rounds} interleaved rounds")
    cases = {"MLP, 100 tensors": mlp, "ConvNet, 56 tensors": convnet}
    columns: dict[str, list[str]] = {}
    for adaptive in (False, True):
        title = "ASAM" if adaptive else "SAM"
        for build in cases.values():
            times = timed(arithmetic(build, adaptive), rounds, repeat=5)
            for way in times:
                unit = f" ({1e3 * statistics.median(times[way]):.2f} ms)" if way == "by hand" else ""
                columns.setdefault(f"{title}: {way}", []).append(f"{ratio(times, way, 'by hand'):.2f}{unit}")
    print(f"\n| ascent and restore, / by hand | {' | '.join(cases)} |\n| --- | --- | --- |")
    for way, cells in columns.items():
        print(f"| {way} | {' | '.join(cells)} |")
    columns = {}
    for build in cases.values():
        # LookSAM-5 evaluates twice in one step of five: only five steps are a unit.
        times = timed(whole(build), rounds, repeat=5)
        for way in times:
            columns.setdefault(way, []).append(
                f"{ratio(times, way, 'base'):.2f} | {ratio(times, way, 'two evaluations and base'):.3f}"
            )
    print(f"\n| training step | {' | '.join(f'{name}: / base | / two evaluations and base' for name in cases)} |")
    print("| --- | --- | --- | --- | --- |")
    for way, cells in columns.items():
        print(f"| {way} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
