"""Tiny networks that together admit every kind of symmetry, in double precision, away from special values."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatminima import Objective

ROWS, CLASSES, PROBES = 8, 3, 60


class Residual(nn.Module):
    """A stream without normalisation: any invertible matrix can be slipped in."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.down, self.head = (
            nn.Linear(4, 3),
            nn.Linear(3, 4),
            nn.Linear(4, 3),
            nn.Linear(3, CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        return self.head(h + self.down(torch.relu(self.up(h))))


class Transformer(nn.Module):
    """One block before its layer norms: attention with two heads, a gated feed-forward part, a last norm and a head."""

    def __init__(self, width: int = 4, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Linear(2, width)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(width, 2), nn.Linear(width, 2), nn.Linear(2, width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        a = self.norm1(h)
        q, k, v = (
            part(a).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        a = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        h = h + self.out(a)
        m = self.norm2(h)
        h = h + self.down(F.silu(self.gate(m)) * self.up(m))
        return self.head(self.norm3(h).mean(1))


def _perceptron(activation: type[nn.Module]) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), activation(), nn.Linear(5, 4), activation(), nn.Linear(4, CLASSES))


def _convolutional() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv1d(1, 3, 2), nn.BatchNorm1d(3), nn.ReLU(), nn.Conv1d(3, 2, 2), nn.BatchNorm1d(2), nn.ReLU(), nn.Flatten(),
        nn.Linear(4, CLASSES),
    )  # fmt: skip


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP": (lambda: _perceptron(nn.ReLU), (4,)),
    "MLP, tanh": (lambda: _perceptron(nn.Tanh), (4,)),
    "MLP, sigmoid": (lambda: _perceptron(nn.Sigmoid), (4,)),
    "CNN + BN": (_convolutional, (1, 4)),
    "residual": (Residual, (4,)),
    "transformer": (Transformer, (3, 2)),
}


def build(name: str) -> nn.Module:
    """The last hidden layer of the perceptrons has a dead unit, which is off and which nothing reads, and two equal ones."""
    torch.manual_seed(0)
    make, _ = NETS[name]
    model = make().double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
    _fit(name, model)
    with torch.no_grad():
        if isinstance(model, nn.Sequential) and isinstance(model[0], nn.Linear):
            model[2].weight[0], model[2].bias[0], model[4].weight[:, 0] = 0.0, -0.5, 0.0
            model[2].weight[3], model[2].bias[3] = model[2].weight[2], model[2].bias[2]
            model[2].bias[2:] += 1.0  # on for most data
    return model


def _fit(name: str, model: nn.Module) -> None:
    """Towards a minimum, where the curvature is mostly positive and changes of it stand out."""
    x, y = data(name)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(70):
        optimiser.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimiser.step()


def data(name: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    _, shape = NETS[name]
    return torch.randn(ROWS, *shape, generator=generator, dtype=torch.float64), torch.arange(ROWS) % CLASSES


def probes(name: str) -> Tensor:
    """Unlabelled inputs, for measures that look at some."""
    _, shape = NETS[name]
    return torch.randn(PROBES, *shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def objective(name: str, model: nn.Module) -> Objective:
    return Objective(model, F.cross_entropy, data(name), check=False)
