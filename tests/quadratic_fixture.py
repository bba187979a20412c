"""Quadratic objectives: every measure, eigenvalue and trace of theirs is known in closed form."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from flatminima import Objective
from flatminima.operators import Operator


class Point(nn.Module):
    """A single parameter vector ``w``, given back for every row."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(start.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.w.expand(len(x), -1)


def quadratic(
    hessian: Tensor, start: Tensor | None = None, slope: Tensor | None = None, *, rows: int = 1, check: bool = False
) -> Objective:
    """``L(w) = w'Aw/2 + b'w`` at ``w = start`` (zero by default), with ``b = slope`` (zero by default)."""
    zero = torch.zeros(len(hessian), dtype=hessian.dtype)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        bend = ((output @ hessian) * output).sum(1) / 2
        return (bend + output @ (zero if slope is None else slope)).mean()

    model = Point(zero if start is None else start)
    return Objective(model, loss, (torch.zeros(rows, 1), torch.zeros(rows)), check=check)


def highest_in_ball(hessian: Tensor, gradient: Tensor, radius: float) -> float:
    """max g'd + d'Hd/2 over |d| <= radius for H >= 0: on the sphere, (mu - H) d = g with mu found by bisection."""
    values, vectors = torch.linalg.eigh(hessian)
    g = vectors.T @ gradient
    low, high = float(values[-1]), float(values[-1]) + float(g.norm()) / radius + 1e-9
    for _ in range(200):
        mu = (low + high) / 2
        low, high = (mu, high) if float((g / (mu - values)).norm()) > radius else (low, mu)
    d = g / (high - values)
    return float(g @ d + (values * d**2).sum() / 2)


def rotation(n: int, seed: int) -> Tensor:
    """A random orthogonal matrix, float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))[0]


def with_spectrum(values: Tensor, seed: int = 0) -> Tensor:
    """A random symmetric matrix with these eigenvalues."""
    q = rotation(len(values), seed)
    matrix = q @ torch.diag(values.double()) @ q.T
    return (matrix + matrix.T) / 2


class Products(Operator):
    """Products that a function of a block ``(n, k)`` forms; nothing is checked."""

    def __init__(self, n: int, product: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float64) -> None:
        self.n, self.dtype, self.device, self.product = n, dtype, torch.device("cpu"), product

    def _apply(self, block: Tensor) -> Tensor:
        return self.product(block)
