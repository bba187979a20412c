"""Small networks in float64 in which each kind of symmetry is known by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def generic(model: nn.Module, seed: int = 0) -> nn.Module:
    """Float64, all parameters and running statistics drawn anew, away from zero and one, so that a forgotten one is seen."""
    g = torch.Generator().manual_seed(seed)
    model = model.double()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and "inv_freq" not in name:
            noise = 1.2 * (torch.rand(tensor.shape, generator=g, dtype=torch.float64) - 0.5)
            is_gain = tensor.ndim == 1 and name.endswith("weight")
            tensor.data.copy_(noise + 1.0 if is_gain or "running_var" in name else noise)
    return model


def inputs(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mlp(activation: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), activation(), nn.Linear(4, 3))


class ConvNorm(nn.Module):
    """Convolution, batch normalisation, ReLU, twice, and a head."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, 3, 3, bias=bias), nn.BatchNorm2d(3)
        self.conv2, self.bn2 = nn.Conv2d(3, 4, 2, bias=bias), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.head(x.mean((2, 3)))


class GroupNormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.conv(x))).mean((2, 3)))


class Stream(nn.Module):
    """A residual stream that nothing normalises: written twice, read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up = nn.Linear(6, 4, bias=False), nn.Linear(4, 5)
        self.down, self.head = nn.Linear(5, 4, bias=False), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(x + self.down(torch.tanh(self.up(x))))


class Attention(nn.Module):
    """Attention written by hand, in the ways that people write it."""

    def __init__(self, dim: int, heads: int, style: str, bias: bool = True) -> None:
        super().__init__()
        self.heads, self.style = heads, style
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        rows, tokens, dim = x.shape
        if self.style == "einsum":
            q, k, v = (part.view(rows, tokens, self.heads, -1) for part in self.qkv(x).chunk(3, -1))
            scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])
            mixed = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).flatten(2)
            return self.out(mixed)
        q, k, v = self.qkv(x).view(rows, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if self.style == "sdpa":
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            mask = torch.ones(tokens, tokens).triu(1).bool()
            scores = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).masked_fill(mask, float("-inf"))
            mixed = F.dropout(scores.softmax(-1), 0.1, self.training) @ v
        return self.out(mixed.transpose(1, 2).reshape(rows, tokens, dim))


class Transformer(nn.Module):
    """One pre-norm block on vectors, with learned positions."""

    def __init__(
        self, style: str = "sdpa", norm: Callable[[int], nn.Module] = nn.LayerNorm, bias: bool = True, dim: int = 4
    ) -> None:
        super().__init__()
        self.embed, self.position = nn.Linear(6, dim, bias=bias), nn.Parameter(torch.zeros(4, dim))
        self.norm1, self.attention = norm(dim), Attention(dim, 2, style, bias)
        self.norm2, self.up, self.down = norm(dim), nn.Linear(dim, 5, bias=bias), nn.Linear(5, dim, bias=bias)
        self.norm, self.head = norm(dim), nn.Linear(dim, 3, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.position[: x.shape[1]]
        x = x + self.attention(self.norm1(x))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(self.norm(x).mean(1))


class RMSNorm(nn.Module):
    """As Llama spells it, with its cast."""

    def __init__(self, dim: int, eps: float = 1e-6, cast: bool = True) -> None:
        super().__init__()
        self.weight, self.eps, self.cast = nn.Parameter(torch.ones(dim)), eps, cast

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32) if self.cast else x
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def rotated(x: Tensor) -> Tensor:
    """Rotary positions on (rows, heads, tokens, d)."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2])[:, None] * 0.7 ** torch.arange(half)
    cos, sin = (torch.cat([f(angle), f(angle)], -1).to(x.dtype) for f in (torch.cos, torch.sin))
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


class Llama(nn.Module):
    """RMS normalisation, rotary positions, grouped queries, SwiGLU, no biases."""

    def __init__(self, dim: int = 8, heads: int = 4, key_heads: int = 2, cast: bool = True) -> None:
        super().__init__()
        width = dim // heads
        self.heads, self.key_heads = heads, key_heads
        self.embed = nn.Embedding(11, dim)
        self.norm1, self.norm2, self.norm = (RMSNorm(dim, cast=cast) for _ in range(3))
        self.q, self.o = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.k = nn.Linear(dim, key_heads * width, bias=False)
        self.v = nn.Linear(dim, key_heads * width, bias=False)
        self.gate, self.up, self.down = (
            nn.Linear(dim, 5, bias=False), nn.Linear(dim, 5, bias=False), nn.Linear(5, dim, bias=False),
        )  # fmt: skip
        self.head = nn.Linear(dim, 11, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        h = self.norm1(x)
        q, k, v = (
            part.unflatten(-1, (n, -1)).transpose(1, 2)
            for part, n in ((self.q(h), self.heads), (self.k(h), self.key_heads), (self.v(h), self.key_heads))
        )
        repeat = self.heads // self.key_heads
        k, v = (part[:, :, None].expand(-1, -1, repeat, -1, -1).flatten(1, 2) for part in (rotated(k), v))
        mixed = F.scaled_dot_product_attention(rotated(q), k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        x = x + self.down(F.silu(self.gate(h)) * self.up(h))
        return self.head(self.norm(x))


def tokens(rows: int = 6, length: int = 4, vocabulary: int = 11) -> Tensor:
    return torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(2))


class WithUnits(nn.Module):
    """Hidden unit 1 is read by nobody, units 2 and 3 are the same."""

    def __init__(self, activation: Callable[[Tensor], Tensor] = F.gelu) -> None:
        super().__init__()
        self.fc, self.head, self.activation = nn.Linear(3, 5), nn.Linear(5, 3), activation

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.activation(self.fc(x)))


def with_units() -> nn.Module:
    model = generic(WithUnits())
    with torch.no_grad():
        model.head.weight[:, 1] = 0
        model.fc.weight[3], model.fc.bias[3] = model.fc.weight[2], model.fc.bias[2]
    return model


Case = tuple[Callable[[], nn.Module], Callable[[], Any], dict[str, tuple[str, ...]]]

TRANSFORMER_KINDS = (
    "norm-gain-rescaling", "layernorm-shift", "query-key", "query-key-diagonal", "key-bias-shift", "value-output",
    "value-output-diagonal", "value-bias-shift", "residual-stream", "unit-permutation", "head-permutation", "softmax-shift",
    "temperature",
)  # fmt: skip
