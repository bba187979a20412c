"""Reference networks by name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from flatminima.models.convnet import convnet
from flatminima.models.group_norm import mnist_cnn, resnet_gn
from flatminima.models.mlp import mlp
from flatminima.models.resnet import resnet18, resnet20
from flatminima.models.vit import vit
from flatminima.names import unknown

_BUILDERS: dict[str, tuple[Callable[..., nn.Module], str]] = {
    "mlp": (mlp, "multilayer perceptron with ReLU; option hidden"),
    "convnet": (convnet, "small convolutional network with ReLU; options channels, hidden, norm (none or batch)"),
    "convnet-bn": (functools.partial(convnet, norm="batch"), "the same with BatchNorm; options channels, hidden, norm"),
    "resnet18": (resnet18, "ResNet-18, BatchNorm; options width, stem (small, for 32x32 pictures, or imagenet)"),
    "resnet20": (resnet20, "ResNet-20 for 32x32 pictures, BatchNorm; options width, blocks (1: ResNet-8)"),
    "mnist-cnn": (mnist_cnn, "DomainBed's network for MNIST, GroupNorm; option width"),
    "resnet-gn": (resnet_gn, "residual network of three blocks, GroupNorm; options width, stem_stride"),
    "vit": (vit, "tiny vision transformer, LayerNorm and GELU; options patch, dim, depth, heads, mlp_ratio"),
}

MODELS: Mapping[str, str] = MappingProxyType({name: text for name, (_, text) in _BUILDERS.items()})
"""Names that `build` takes, with one line on each."""


def options_of(name: str) -> tuple[str, ...]:
    """The options that `build` takes for this network.

    Example:
        >>> options_of("mlp")
        ('hidden',)
    """
    parameters = inspect.signature(_BUILDERS[name][0]).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)


def build(
    name: str, input_shape: Sequence[int], classes: int | Sequence[str], *, seed: int | None = None, **options: Any
) -> nn.Module:
    """A freshly initialised network, float32 on the CPU, in train mode.

    Args:
        name: one of `MODELS`.
        input_shape: shape of one input, without the rows.
        classes: the number of logits, or the names of the classes.
        seed: initialise from this seed and leave the global random state as it was; None uses the global state.
        options: the builder's own, see `MODELS`.

    Raises:
        ValueError: unknown name or option (the valid ones are listed, nearest first), or a size that does not fit.

    Example:
        >>> model = build("mlp", (1, 8, 8), 10, seed=0, hidden=(32,))
        >>> model(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """
    if name not in _BUILDERS:
        raise ValueError(unknown("model", name, MODELS))
    builder = _BUILDERS[name][0]
    valid = options_of(name)
    for option in options:
        if option not in valid:
            raise ValueError(unknown(f"option of model {name!r}", option, valid))
    count = classes if isinstance(classes, int) else len(classes)
    if count < 1 or not input_shape or min(input_shape) < 1:
        raise ValueError(
            f"model {name!r} got input_shape {tuple(input_shape)} and {count} classes: expected sizes above zero"
        )
    if seed is None:
        return builder(input_shape, count, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return builder(input_shape, count, **options)
