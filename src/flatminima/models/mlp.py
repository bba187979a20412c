"""Multilayer perceptron."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from flatminima.models.shapes import positive


def mlp(input_shape: Sequence[int], classes: int, *, hidden: Sequence[int] = (64, 64)) -> nn.Sequential:
    """Flatten, then Linear and ReLU per hidden width, then Linear to the logits; every layer has a bias.

    Maps `(rows, *input_shape)` to `(rows, classes)`. Initialised as PyTorch does. `hidden=()` is softmax regression.

    Example:
        >>> sum(p.numel() for p in mlp((1, 8, 8), 10).parameters())
        8970
    """
    for width in hidden:
        positive("mlp", hidden=width)
    widths = [math.prod(input_shape), *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], classes))
