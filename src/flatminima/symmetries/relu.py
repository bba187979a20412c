"""Rescaling of positively homogeneous units: ReLU, leaky ReLU and PReLU.

A positively homogeneous activation satisfies ``relu(d z) = d relu(z)`` for every ``d > 0``. A unit may therefore be
written ``d`` times larger (its row of the layer's weight, and its bias) if every layer that reads it has its columns
divided by ``d``; no prediction changes. Collected in one diagonal matrix ``D``,

    theta' = D theta,    f(D theta) = f(theta) for all theta    =>    g' = D^-1 g,    H' = D^-1 H D^-1.

Trace and largest eigenvalue of the Hessian are thus not properties of the function. Two kinds share their sites:

* ``relu-layer-rescaling``: one ``d`` for a whole layer;
* ``relu-unit-rescaling``: one ``d`` for each unit or channel (entry N; entry BNa where batch norm comes in between).

Source: Dinh, Pascanu, Bengio, Bengio, "Sharp minima can generalize for deep nets", 2017 (arXiv 1703.04933).

A site starts at a layer that writes units (Linear, Conv1d/2d/3d, or a BatchNorm with gain and bias, which hides the
scale of whatever precedes it) and ends at all the Linear and Conv layers that read them. In between, every operation
must act on each unit alone and be positively homogeneous: the activations above, pooling, dropout in evaluation mode,
reshaping, means over positions. Linear layers in a row qualify too, the identity being positively homogeneous.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .base import Findings, Symmetry
from .graph import Network
from .sites import Entries, Rescaling, log_uniform, log_uniform_shared

LAYER = "relu-layer-rescaling"
UNIT = "relu-unit-rescaling"


def find(network: Network) -> Findings:
    """Propose both kinds of rescaling for every site of the network; refused sites come with the reason."""
    found: list[_Place] = []
    rejected: list[tuple[str, str]] = []
    for node in network.graph.nodes:
        layer = _layer(network, node)
        if layer is None or _is_judged_elsewhere(network, node, layer):
            continue
        try:
            found.append(_place(network, node, layer))
        except _RefusedError as refusal:
            rejected.append((layer.name, str(refusal)))
    rejected.extend(_unseen(network))
    if not found:
        return Findings((), tuple(rejected))
    layers = tuple(Rescaling(p.name, p.units, p.entries, log_uniform_shared) for p in found)
    units = tuple(Rescaling(p.name, p.units, p.entries, log_uniform) for p in found)
    proposed = (
        Symmetry.of(LAYER, layers),
        Symmetry.of(UNIT, units),
    )
    return Findings(proposed, tuple(rejected))


class _RefusedError(Exception):
    """This site cannot be rescaled; the message is the reason."""


@dataclass(frozen=True, eq=False)
class _Place:
    name: str
    units: int
    entries: tuple[Entries, ...]


@dataclass(frozen=True)
class _Layer:
    """A layer that can write units, and read them too unless it is a batch norm."""

    name: str
    weight: str | None  # names of parameters; None where the tensor is absent or not a parameter of its own
    bias: str | None
    computed: bool  # a weight or bias that is no parameter itself, e.g. under torch.nn.utils.parametrize
    spatial: int  # trailing axes behind the channel axis: 0 for Linear, k for ConvKd, -1 for batch norm (all behind 1)
    groups: int
    weight_shape: tuple[int, ...]

    @property
    def reads(self) -> bool:
        return self.spatial >= 0

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(name for name in (self.weight, self.bias) if name is not None)


@dataclass(frozen=True)
class _Layout:
    """Which unit each element of a tensor belongs to: in row-major order, ``unit = (index // run) % units``.

    Every reshape keeps this description, which is why flattening channels into blocks of columns needs no rule.
    """

    units: int
    run: int


# -------------------------------------------------------------------------------------------------- layers of a graph

_CONV_SPATIAL: dict[Any, int] = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}
_CONV_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


def _layer(network: Network, node: fx.Node) -> _Layer | None:
    """The Linear, Conv or affine BatchNorm that the node calls, as a module or as a function; None for other nodes."""
    module = network.module(node)
    if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | _BatchNorm):
        if isinstance(module, _BatchNorm) and not module.affine:
            return None
        held = {name: f"{node.target}.{name}" for name in ("weight", "bias") if getattr(module, name) is not None}
        known = {name: full for name, full in held.items() if full in network.uses}
        conv = module if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) else None
        return _Layer(
            name=str(node.target),
            weight=known.get("weight"),
            bias=known.get("bias"),
            computed=len(known) < len(held),
            spatial=-1 if isinstance(module, _BatchNorm) else len(conv.kernel_size) if conv else 0,
            groups=conv.groups if conv else 1,
            weight_shape=tuple(module.weight.shape),
        )
    if node.op == "call_function" and (node.target is F.linear or node.target in _CONV_SPATIAL):
        given = dict(zip(_CONV_ARGUMENTS, node.args, strict=False)) | node.kwargs
        weight, bias = _parameter(network, given.get("weight")), _parameter(network, given.get("bias"))
        shape = network.shapes.get(cast(fx.Node, given["weight"])) if isinstance(given.get("weight"), fx.Node) else None
        if shape is None:
            return None
        return _Layer(
            name=weight or node.name,
            weight=weight,
            bias=bias,
            computed=weight is None or (bias is None and given.get("bias") is not None),
            spatial=_CONV_SPATIAL.get(node.target, 0),
            groups=int(cast(int, given.get("groups", 1))),
            weight_shape=shape,
        )
    return None


def _parameter(network: Network, argument: object) -> str | None:
    if isinstance(argument, fx.Node) and argument.op == "get_attr" and str(argument.target) in network.uses:
        return str(argument.target)
    return None


def _is_judged_elsewhere(network: Network, node: fx.Node, layer: _Layer) -> bool:
    """Whether the layer is no site by construction: batch norm follows and has the scale, or it is the last layer."""
    if len(node.users) != 1:
        return False
    user = next(iter(node.users))
    follower = _layer(network, user)
    return user.op == "output" or (follower is not None and not follower.reads)


def _unseen(network: Network) -> Iterator[tuple[str, str]]:
    """Layers that the graph does not show, because they lie inside a leaf module such as a transformer layer."""
    called = {str(node.target) for node in network.graph.nodes if node.op in ("call_module", "get_attr")}
    for name, module in network.modules.items():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) and name not in called:
            holder = next((c for c in called if name.startswith(f"{c}.")), None)
            if holder is not None:
                inside = f"{holder} ({type(network.modules[holder]).__name__})"
                yield name, f"lies inside {inside}, which torch.fx treats as one operation"


# --------------------------------------------------------------------------------------------- from writer to readers


def _place(network: Network, writer: fx.Node, layer: _Layer) -> _Place:
    _require_own_parameters(network, layer)
    shape = network.shapes.get(writer)
    if shape is None:
        raise _RefusedError("its output is not a tensor")
    units = layer.weight_shape[0]
    behind = shape[2:] if layer.spatial < 0 else shape[len(shape) - layer.spatial :]
    unit = torch.arange(units)
    rows = unit.reshape((units,) + (1,) * (len(layer.weight_shape) - 1))
    entries = [Entries(cast(str, layer.weight), rows, 1)]
    if layer.bias is not None:
        entries.append(Entries(layer.bias, unit, 1))
    readers: list[str] = []
    for node, layout in _reading(network, writer, _Layout(units, math.prod(behind))):
        reader = cast(_Layer, _layer(network, node))
        _require_own_parameters(network, reader)
        entries.append(Entries(cast(str, reader.weight), _columns(network, node, reader, layout), -1))
        readers.append(reader.name)
    if not readers:
        raise _RefusedError("no layer reads it")
    return _Place(f"{layer.name} -> {', '.join(readers)}", units, tuple(entries))


def _require_own_parameters(network: Network, layer: _Layer) -> None:
    if layer.computed or layer.weight is None:
        raise _RefusedError(f"the weight or bias of {layer.name} is computed, so it cannot be rescaled")
    for name in layer.parameters:
        if network.uses[name] != 1:
            raise _RefusedError(f"'{name}' is used {network.uses[name]} times in the forward pass (tied parameters)")


def _reading(network: Network, writer: fx.Node, layout: _Layout) -> Iterator[tuple[fx.Node, _Layout]]:
    """Follow the units to every layer that reads them; refuse if anything else looks at them."""
    pending = [(writer, layout)]
    while pending:
        node, layout = pending.pop(0)
        for user in node.users:
            if _is_shape_query(user):
                continue
            if _data_input(user) is not node:
                raise _refusal(network, user)
            follower = _layer(network, user)
            if follower is not None and follower.reads:
                yield user, layout
            else:
                pending.append((user, _through(network, node, user, layout)))


def _columns(network: Network, node: fx.Node, reader: _Layer, layout: _Layout) -> Tensor:
    """The unit that each entry of the reader's weight multiplies; broadcasts to the weight's shape."""
    shape = network.shapes[cast(fx.Node, _data_input(node))]
    axis = len(shape) - 1 - reader.spatial
    inner = math.prod(shape[axis + 1 :])
    block = layout.run // inner if inner else 0
    if block * inner != layout.run or shape[axis] != layout.units * block:
        raise _RefusedError(f"{reader.name} does not read its units along its input axis")
    # Weight axis 1 counts the input channels within a group; output channel o belongs to group o // (out / groups).
    unit = torch.arange(layout.units).repeat_interleave(block).reshape(reader.groups, -1)
    if reader.groups > 1:
        unit = unit.repeat_interleave(reader.weight_shape[0] // reader.groups, dim=0)
    return unit.reshape(tuple(unit.shape) + (1,) * reader.spatial)


def _refusal(network: Network, user: fx.Node) -> _RefusedError:
    if user.op == "output":
        return _RefusedError("its units reach the output")
    return _RefusedError(f"its units reach {network.describe(user)}, which is not positively homogeneous unit by unit")


def _data_input(node: fx.Node) -> fx.Node | None:
    """The node's first argument, if it occurs nowhere else among its arguments."""
    first = node.args[0] if node.args else node.kwargs.get("input")
    occurrences: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), occurrences.append)
    return first if isinstance(first, fx.Node) and occurrences.count(first) == 1 else None


def _is_shape_query(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel")
    return node.target is getattr and node.args[1] in ("shape", "ndim", "dtype", "device")


# --------------------------------------------------------------------------- operations that rescaling passes through

_UNITWISE_MODULES = (
    nn.ReLU,
    nn.LeakyReLU,
    nn.PReLU,
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
)
_UNITWISE_FUNCTIONS: frozenset[Any] = frozenset(
    {F.relu, F.relu_, torch.relu, F.leaky_relu, F.leaky_relu_, F.prelu}
    | {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout, torch.clone}
)
_UNITWISE_METHODS = frozenset({"relu", "relu_", "prelu", "contiguous", "clone"})

_RESHAPING_MODULES = (nn.Flatten, nn.Unflatten)
_RESHAPING_FUNCTIONS: frozenset[Any] = frozenset({torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze})
_RESHAPING_METHODS = frozenset({"flatten", "unflatten", "view", "reshape", "squeeze", "unsqueeze"})

_POOLING_MODULES: dict[type[nn.Module], int] = {
    module: k + 1
    for family in (
        (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
        (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
        (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
        (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    )
    for k, module in enumerate(family)
}
_POOLING_FUNCTIONS: dict[Any, int] = {
    function: k + 1
    for family in (
        (F.max_pool1d, F.max_pool2d, F.max_pool3d),
        (torch.max_pool1d, torch.max_pool2d, torch.max_pool3d),
        (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d),
        (F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d),
        (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d),
    )
    for k, function in enumerate(family)
}

_REDUCING_FUNCTIONS: frozenset[Any] = frozenset({torch.mean, torch.sum, torch.amax})
_REDUCING_METHODS = frozenset({"mean", "sum", "amax"})


def _through(network: Network, node: fx.Node, user: fx.Node, layout: _Layout) -> _Layout:
    """The layout behind `user`, which takes `node` as its data; refuses what is not known to be harmless."""
    module = network.module(user)
    function = user.target if user.op == "call_function" else None
    method = user.target if user.op == "call_method" else None
    before, after = network.shapes[node], network.shapes.get(user)
    if after is not None:
        if isinstance(module, _UNITWISE_MODULES) or function in _UNITWISE_FUNCTIONS or method in _UNITWISE_METHODS:
            return layout
        if isinstance(module, _RESHAPING_MODULES) or function in _RESHAPING_FUNCTIONS:
            return layout
        if method in _RESHAPING_METHODS and not any(isinstance(a, torch.dtype) for a in user.args):
            return layout
        spatial = _POOLING_MODULES.get(type(module)) if module is not None else _POOLING_FUNCTIONS.get(function)
        if spatial is not None:
            return _reduced(network, user, layout, before, after, tuple(range(len(before) - spatial, len(before))))
        if function in _REDUCING_FUNCTIONS or method in _REDUCING_METHODS:
            return _reduced(network, user, layout, before, after, _reduced_axes(user, len(before)))
    raise _refusal(network, user)


def _reduced_axes(node: fx.Node, dimensions: int) -> tuple[int, ...]:
    given = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    axes = given if isinstance(given, list | tuple) else (given,)
    if not all(isinstance(axis, int) for axis in axes):
        return tuple(range(dimensions))
    return tuple(sorted(cast(int, axis) % dimensions for axis in axes))


def _reduced(
    network: Network,
    node: fx.Node,
    layout: _Layout,
    before: tuple[int, ...],
    after: tuple[int, ...],
    axes: tuple[int, ...],
) -> _Layout:
    """The layout behind an operation that combines elements along consecutive `axes` only."""
    first, last = axes[0], axes[-1]
    if axes == tuple(range(first, last + 1)) and 0 not in before and 0 not in after:
        tail = math.prod(before[first:])
        if layout.run % tail == 0:  # the axes lie inside the units: each unit keeps to itself, with fewer elements
            leading = math.prod(before[:first])
            return _Layout(layout.units, layout.run // tail * (math.prod(after) // leading))
        behind = math.prod(before[last + 1 :])
        if behind % (layout.units * layout.run) == 0:  # the axes lie outside: rows, positions
            return layout
    raise _RefusedError(f"{network.describe(node)} mixes its units")
