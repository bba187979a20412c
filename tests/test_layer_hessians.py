"""A pitfall of torch: its vmapped double backward through LayerNorm and batch statistics is wrong; ours must not be.

For every kind of layer the Hessian from the library's products is symmetric to 1e-8, and is that of central differences of the
gradient in float64, which take no second derivative. `torch.func.hessian` (and every composition of jacfwd and jacrev) fails
both for `nn.LayerNorm` and for `nn.BatchNorm1d` with batch statistics in torch 2.13, by a tenth or two, without a warning.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import flatminima
from flatminima.objective import Objective
from symmetry_models import Attention, generic, inputs

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    # name: (the layer between two others, shape of its input, mode)
    "Linear": (lambda: nn.Linear(4, 4), (6, 4), "eval"),
    "Bilinear": (lambda: Twice(nn.Bilinear(4, 4, 4)), (6, 4), "eval"),
    "Conv1d": (lambda: nn.Conv1d(3, 3, 2), (5, 3, 4), "eval"),
    "Conv2d": (lambda: nn.Conv2d(2, 3, 2), (5, 2, 3, 3), "eval"),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(2, 2, 2), (4, 2, 2, 2), "eval"),
    "depthwise Conv2d": (lambda: nn.Conv2d(4, 4, 2, groups=4), (4, 4, 3, 3), "eval"),
    "LayerNorm": (lambda: nn.LayerNorm(4), (6, 4), "eval"),
    "RMSNorm": (lambda: nn.RMSNorm(4, eps=1e-6), (6, 4), "eval"),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), (5, 4, 3), "eval"),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(3, affine=True), (4, 3, 4), "eval"),
    "BatchNorm1d, batch statistics": (lambda: nn.BatchNorm1d(4), (8, 4), "train"),
    "BatchNorm1d, running statistics": (lambda: nn.BatchNorm1d(4), (8, 4), "eval"),
    "BatchNorm2d, batch statistics": (lambda: nn.BatchNorm2d(3), (4, 3, 2, 2), "train"),
    "Embedding": (lambda: nn.Embedding(5, 4), (6,), "eval"),
    "MultiheadAttention": (lambda: SelfAttention(), (3, 3, 4), "eval"),
    "scaled_dot_product_attention": (lambda: Attention(4, 2, "sdpa"), (3, 3, 4), "eval"),
    "RNN": (lambda: First(nn.RNN(4, 3, batch_first=True)), (3, 2, 4), "eval"),
    "LSTM": (lambda: First(nn.LSTM(4, 2, batch_first=True)), (3, 2, 4), "eval"),
    "GRU": (lambda: First(nn.GRU(4, 2, batch_first=True)), (3, 2, 4), "eval"),
    "GLU": (lambda: nn.GLU(), (6, 4), "eval"),
    "PReLU": (lambda: nn.PReLU(4), (6, 4), "eval"),
    **{kind.__name__: (lambda kind=kind: kind(), (6, 4), "eval") for kind in (
        nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.ELU, nn.Mish, nn.Softmax, nn.LogSigmoid)},
}  # fmt: skip


class Twice(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x)


class First(Twice):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x, x)[0]


class Around(nn.Module):
    """A layer between something that depends on parameters and a head."""

    def __init__(self, layer: nn.Module, example: Tensor) -> None:
        super().__init__()
        self.layer = layer
        if isinstance(layer, nn.Softmax):
            layer.dim = -1
        self.shift = nn.Parameter(torch.zeros(example.shape[1:])) if example.is_floating_point() else None
        self.head = nn.Linear(self.flat(example.float()).shape[1] if self.shift is not None else 4, 3)

    def flat(self, x: Tensor) -> Tensor:
        y = torch.tanh(x + self.shift) if self.shift is not None else x
        return self.layer(y).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.flat(x))


def problem(name: str) -> tuple[nn.Module, Tensor, Tensor, str]:
    make, shape, mode = LAYERS[name]
    x = torch.arange(shape[0]) % 5 if len(shape) == 1 else inputs(*shape)
    model = generic(Around(make(), x))
    return model.train(mode == "train"), x, torch.arange(shape[0]) % 3, mode


def gradient(model: nn.Module, x: Tensor, y: Tensor, theta: Tensor) -> Tensor:
    named = [(name, p.shape) for name, p in model.named_parameters()]
    leaf = theta.clone().requires_grad_()
    pieces = leaf.split([math.prod(shape) for _, shape in named])
    values = {n: piece.reshape(shape) for (n, shape), piece in zip(named, pieces, strict=True)}
    state = {n: b.clone() for n, b in model.named_buffers()} | values
    with sdpa_kernel(SDPBackend.MATH):
        loss = F.cross_entropy(functional_call(model, state, (x,)), y)
        (found,) = torch.autograd.grad(loss, leaf)
    return found


@pytest.mark.parametrize("name", LAYERS)
def test_the_hessian_of_every_layer_is_symmetric_and_that_of_central_differences(name: str) -> None:
    model, x, y, mode = problem(name)
    f = Objective(model, F.cross_entropy, (x, y), mode=mode)
    hessian = f.hvp(torch.eye(f.n, dtype=torch.float64))
    assert float((hessian - hessian.T).abs().max()) < 1e-8 * float(hessian.norm())
    theta, step = torch.cat([p.detach().reshape(-1) for p in model.parameters()]), 1e-3
    for seed in range(3):  # fourth-order differences along random directions
        v = torch.randn(f.n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        v /= v.norm()
        near, far = (
            (gradient(model, x, y, theta + h * v) - gradient(model, x, y, theta - h * v)) / (2 * h)
            for h in (step, 2 * step)
        )
        torch.testing.assert_close(f.hvp(v), (4 * near - far) / 3, rtol=1e-6, atol=1e-8 * float(hessian.norm()))


@pytest.mark.parametrize("name", ["LayerNorm", "BatchNorm1d, batch statistics"])
def test_where_torch_func_goes_wrong_the_library_does_not(name: str) -> None:
    """If a later torch mends it, both agree; what may never be is that the library shares the error."""
    model, x, y, mode = problem(name)
    named = [(n, p.shape) for n, p in model.named_parameters()]
    buffers = {n: b.clone() for n, b in model.named_buffers()}

    def loss(theta: Tensor) -> Tensor:
        pieces = theta.split([math.prod(shape) for _, shape in named])
        values = {n: piece.reshape(shape) for (n, shape), piece in zip(named, pieces, strict=True)}
        logits = functional_call(model, {n: b.clone() for n, b in buffers.items()} | values, (x,))
        return F.cross_entropy(logits, y)

    theta = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    f = Objective(model, F.cross_entropy, (x, y), mode=mode)
    ours = f.hvp(torch.eye(f.n, dtype=torch.float64))
    reference = torch.autograd.functional.hessian(loss, theta)  # one double backward for each row, no vmap
    torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-11)
    theirs = torch.func.hessian(loss)(theta)
    error, asymmetry = float((theirs - reference).abs().max()), float((theirs - theirs.T).abs().max())
    assert (error > 1e-6) == (asymmetry > 1e-6)  # the error shows as an asymmetry, which is how to look for it


def test_the_library_never_composes_vmapped_derivatives() -> None:
    pattern = re.compile(r"\b(jacfwd|jacrev|func\.hessian|func\.jacobian)\b")
    source = Path(flatminima.__file__).parent
    assert [p.name for p in source.rglob("*.py") if pattern.search(p.read_text(encoding="utf-8"))] == []
