"""The losses of the convex problems written out coin by coin, and the recorded numbers."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flatminima.problems.convex import Constants, Sample

VECTORS: dict[str, Any] = {
    case["id"]: case for case in json.loads((Path(__file__).parent / "vectors" / "convex.json").read_text())
}
Loss = Callable[[Sequence[float], Sequence[int]], float]


def vector(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_point(d: int, seed: int, scale: float = 0.5) -> Tensor:
    return scale * torch.randn(d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sample_of(case: dict[str, Any]) -> Sample:
    return Sample.from_bits(torch.tensor(case["bits"]))


def relu(x: float) -> float:
    return max(x, 0.0)


def flat_sharp_loss(rho: float) -> Loss:
    def loss(w: Sequence[float], z: Sequence[int]) -> float:
        q = math.sqrt(sum(bit * x * x for bit, x in zip(z, w, strict=False)) + w[-1] ** 2)
        return 0.5 * relu(q - rho) ** 2

    return loss


def sagd_loss(steps: int, rho: float, weight: float = 1.0) -> Loss:
    def loss(w: Sequence[float], z: Sequence[int]) -> float:
        q2 = (weight * w[-1]) ** 2
        for i, bit in enumerate(z):
            sign = 2 * bit - 1
            q2 += sum(relu(sign * w[i * steps + j]) ** 2 for j in range(steps))
        return 0.5 * relu(math.sqrt(q2) - rho) ** 2

    return loss


def sam_loss(steps: int, k: Constants) -> Loss:
    def loss(w: Sequence[float], z: Sequence[int]) -> float:
        total, trigger = 0.0, w[-1] + k.delta_1
        for i, bit in enumerate(z):
            block = w[i * steps : (i + 1) * steps]
            for j in range(1, steps):  # slot j + 1
                shift = k.lam if j == 1 else 0.0
                total += 0.5 * bit * block[j] ** 2
                total += 0.5 * relu(block[j] - k.chain[j - 1] * (block[j - 1] + shift)) ** 2
            trigger += block[0] * (1.0 if bit else -k.epsilon)
        return total + 0.5 * k.gamma * relu(trigger) ** 2

    return loss


def mean_over_everything(loss: Loss, w: Tensor, columns: int) -> float:
    """The population risk by enumeration of all examples."""
    values = [loss(w.tolist(), z) for z in itertools.product((0, 1), repeat=columns)]
    return math.fsum(values) / len(values)
