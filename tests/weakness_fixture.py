"""The two-layer ReLU network of the vectors, at all its points."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatminima import Objective

VECTORS: dict[str, Any] = json.loads((Path(__file__).parent / "vectors" / "weakness_relu.json").read_text())
POINTS: dict[str, dict[str, Any]] = VECTORS["points"]
LAYER_SCALES = {"base": 1.0, "layer_alpha=0.1": 0.1, "layer_alpha=2.0": 2.0, "layer_alpha=10.0": 10.0}


def network(point: str = "base") -> nn.Sequential:
    w1, b1, w2, b2 = (
        torch.tensor(VECTORS["setup"]["params"][k], dtype=torch.float64) for k in ("W1", "b1", "W2", "b2")
    )
    scales = [0.5, 2.0, 4.0] if point == "neuron_D=[0.5,2,4]" else [LAYER_SCALES.get(point, 1.0)] * 3
    units = torch.tensor(scales, dtype=torch.float64)
    heat = 3.0 if point == "temperature_x3" else 1.0
    return with_parameters(units[:, None] * w1, units * b1, heat * w2 / units, heat * b2)


def with_parameters(w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> nn.Sequential:
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    with torch.no_grad():
        for p, value in zip(net.parameters(), (w1, b1, w2, b2), strict=True):
            p.copy_(value)
    return net


def data() -> tuple[Tensor, Tensor]:
    return torch.tensor(VECTORS["setup"]["X"], dtype=torch.float64), torch.tensor(VECTORS["setup"]["y"])


def objective(point: str = "base") -> Objective:
    return Objective(network(point), F.cross_entropy, data())


def dense_hessian(f: Objective) -> Tensor:
    return f.hvp(torch.eye(f.n, dtype=f.dtype))
