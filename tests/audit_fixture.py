"""Networks, options and audits that the tests of the audit share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from flatminima import MeasureOptions

QUICK = MeasureOptions(max_products=40, max_probes=20, rtol=0.05, ascent_steps=10, ascent_starts=1, draws=16)


def mlp(activation: Callable[[], nn.Module] = nn.ReLU, seed: int = 0) -> nn.Sequential:
    """4-6-5-3, in float32 as users have it."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), activation(), nn.Linear(6, 5), activation(), nn.Linear(5, 3))


def rows(count: int = 40, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Inputs and classes."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, generator=g), torch.randint(0, 3, (count,), generator=g)


def fitted(model: nn.Module, x: Tensor, y: Tensor, steps: int = 150, lr: float = 0.5) -> nn.Module:
    """The model after so many steps of gradient descent."""
    optimiser = torch.optim.SGD(model.parameters(), lr=lr)
    for _ in range(steps):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimiser.step()
    return model
