"""Claim: a Hessian-vector product costs less than with `torch.func.jvp` of `grad`, rebuilt at every product (the usual advice).

    make bench      # or: python benchmarks/products.py

One thread, process CPU time, the variants interleaved within a round, medians over rounds, in units of one gradient of the same
model. "kept" is `Objective.hvp` on data that fit one micro-batch, "rebuilt" is the first product after the parameters moved.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.func import functional_call, grad, jvp
from torch.nn.functional import cross_entropy

from flatminima import Objective
from flatminima.models import build

ROUNDS = 15


def cases() -> dict[str, tuple[nn.Module, torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    return {
        "mlp 784-128-10, 2000 rows": (
            build("mlp", (784,), 10, seed=0, hidden=(128,)),
            torch.randn(2000, 784),
            labels(2000),
        ),
        "convnet with BatchNorm, 32x32x3, 256 rows": (
            build("convnet", (3, 32, 32), 10, seed=0, norm="batch").eval(),
            torch.randn(256, 3, 32, 32),
            labels(256),
        ),
    }


def labels(rows: int) -> torch.Tensor:
    return torch.randint(0, 10, (rows,))


def cpu_seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def main() -> None:
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {platform.machine()}, one thread, medians of {ROUNDS} interleaved rounds\n")
    print("| model | gradient, ms | kept | rebuilt | jvp of grad |\n| --- | --- | --- | --- | --- |")
    for name, (model, x, y) in cases().items():
        objective = Objective(model, cross_entropy, (x, y), micro_batch=None)
        vector = torch.randn(objective.n)
        parameters, tangent = {k: p.detach() for k, p in model.named_parameters()}, objective.split(vector)

        def forward_over_reverse(
            model: nn.Module = model, x: torch.Tensor = x, y: torch.Tensor = y, parameters=parameters, tangent=tangent
        ) -> torch.Tensor:
            def loss(values: dict[str, torch.Tensor]) -> torch.Tensor:
                return cross_entropy(functional_call(model, values, (x,)), y)

            return torch.cat([t.flatten() for t in jvp(grad(loss), (parameters,), (tangent,))[1].values()])

        ours = objective.hvp(vector)
        error = float((ours - forward_over_reverse()).norm() / ours.norm())
        assert error < 1e-4, f"the two products differ by {error}"
        times: dict[str, list[float]] = {"gradient": [], "rebuilt": [], "kept": [], "jvp": []}
        for _ in range(ROUNDS):
            times["gradient"].append(cpu_seconds(objective.gradient))
            objective.release()
            times["rebuilt"].append(cpu_seconds(lambda o=objective, v=vector: o.hvp(v)))
            times["kept"].append(cpu_seconds(lambda o=objective, v=vector: o.hvp(v)))
            times["jvp"].append(cpu_seconds(forward_over_reverse))
        unit = statistics.median(times["gradient"])
        kept, rebuilt, forward = (statistics.median(times[k]) / unit for k in ("kept", "rebuilt", "jvp"))
        print(f"| {name} | {1e3 * unit:.1f} | {kept:.2f} | {rebuilt:.2f} | {forward:.2f} |")


if __name__ == "__main__":
    main()
