"""Tiny vision transformer (Dosovitskiy et al., 2021, arXiv:2010.11929)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from flatminima.models.shapes import image_shape, positive

MOST_TOKENS = 64


class SelfAttention(nn.Module):
    """Multi-head self-attention, `softmax(q k' / sqrt(d)) v` per head, on `(rows, tokens, dim)`."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Shape in equals shape out."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        # Of the kernels behind this call only the plain one has a second derivative, which curvature needs.
        with sdpa_kernel(SDPBackend.MATH):
            mixed = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class EncoderBlock(nn.Module):
    """Pre-norm encoder block: attention, then a GELU perceptron, each added to its input."""

    def __init__(self, dim: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = SelfAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_ratio * dim), nn.GELU(), nn.Linear(mlp_ratio * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Shape in equals shape out, `(rows, tokens, dim)`."""
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class VisionTransformer(nn.Module):
    """Patches, learned positions, encoder blocks, LayerNorm, mean over the tokens, logits."""

    def __init__(
        self, channels: int, tokens: int, patch: int, classes: int, dim: int, depth: int, heads: int, mlp_ratio: int
    ) -> None:
        super().__init__()
        self.embed = nn.Conv2d(channels, dim, patch, stride=patch)
        self.position = nn.Parameter(torch.empty(1, tokens, dim))
        nn.init.trunc_normal_(self.position, std=0.02)
        self.blocks = nn.Sequential(*(EncoderBlock(dim, heads, mlp_ratio) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        """`(rows, C, H, W)` to `(rows, classes)`."""
        tokens = self.embed(x).flatten(2).transpose(1, 2) + self.position
        out: Tensor = self.head(self.norm(self.blocks(tokens)).mean(1))
        return out


def vit(
    input_shape: Sequence[int],
    classes: int,
    *,
    patch: int | None = None,
    dim: int = 64,
    depth: int = 4,
    heads: int = 4,
    mlp_ratio: int = 2,
) -> VisionTransformer:
    """A vision transformer small enough for one core: no class token (mean over tokens), no dropout, GELU, LayerNorm.

    Maps `(rows, C, H, W)` to `(rows, classes)`. `patch` must divide both sides; None takes the smallest one above 1
    that leaves at most 64 tokens (8x8: 2, 28x28 and 32x32: 4, 64x64: 8). `dim` must be a multiple of `heads`.

    Example:
        >>> model = vit((3, 32, 32), 10)
        >>> tuple(model.position.shape), sum(p.numel() for p in model.parameters())
        ((1, 64, 64), 141898)
    """
    channels, height, width = image_shape("vit", input_shape, 2)
    positive("vit", dim=dim, depth=depth, heads=heads, mlp_ratio=mlp_ratio)
    if dim % heads:
        raise ValueError(f"options of model 'vit': dim={dim} is not a multiple of heads={heads}")
    divisors = [size for size in range(1, min(height, width) + 1) if math.gcd(height, width) % size == 0]
    if patch is None:
        fitting = [size for size in divisors if size > 1 and height * width <= MOST_TOKENS * size**2]
        if not fitting:
            raise ValueError(
                f"model 'vit' finds no patch that divides {height}x{width} into at most {MOST_TOKENS} tokens: "
                f"give patch, one of {divisors}"
            )
        patch = fitting[0]
    elif patch not in divisors:
        raise ValueError(
            f"option patch of model 'vit' is {patch!r}: expected a divisor of {height} and {width}, one of {divisors}"
        )
    tokens = height * width // patch**2
    return VisionTransformer(channels, tokens, patch, classes, dim, depth, heads, mlp_ratio)
