"""Frozen features: what the last linear layer of any model reads, in double precision."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flatminima.names import unknown

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

#: What every function of this package takes as features: a tensor, an array, or nested lists of numbers.
ArrayLike = Tensor | NDArray[Any] | Sequence[Any]


class FeatureError(ValueError):
    """Features or labels that cannot be used: the message says which, what was expected and what to do."""


def features(model: nn.Module, x: Any, layer: str | None = None, *, batch_size: int = 1024) -> Tensor:
    r"""The input of a layer, :math:`\phi(x)`, for every row of x, computed in double precision.

    A feature-classifier vocabulary freezes everything before a linear layer and asks what that layer could still say.
    By default it is the last ``nn.Linear`` that the forward pass calls. The model is only read: a copy in eval mode is
    cast to float64 and run without gradients.

    Args:
        model: any module; called as ``model(x)``, ``model(*x)`` for a tuple, ``model(**x)`` for a dictionary.
        x: inputs, rows first. Floating-point tensors are cast to float64.
        layer: name in ``model.named_modules()`` of the module whose *input* is taken.
        batch_size: rows that pass through the model at once.

    Returns:
        Float64 on the CPU, ``(rows, units)``. The input of a named layer that is not linear is flattened to that shape.

    Raises:
        FeatureError: no linear layer, an unknown one, one that the forward pass does not call or calls more than once,
            a linear layer that reads more than one vector a row, or NaN or infinity among the features.

    Cost: one forward pass in float64.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> phi = features(net, torch.zeros(5, 2))
        >>> phi.shape, phi.dtype
        (torch.Size([5, 3]), torch.float64)
        >>> features(net, torch.zeros(5, 2), layer="1").min() < 0            # before the ReLU: its input
        tensor(True)
    """
    if batch_size < 1:
        raise FeatureError(f"batch_size must be at least 1, got {batch_size}")
    frozen = copy.deepcopy(model).eval().to(torch.float64)
    modules = dict(frozen.named_modules())
    if layer is not None and layer not in modules:
        raise FeatureError(unknown("layer", layer, [name for name in modules if name]))
    watched = {
        name: module
        for name, module in modules.items()
        if (name == layer if layer is not None else isinstance(module, nn.Linear))
    }
    if not watched:
        kinds = ", ".join(sorted({type(module).__name__ for module in modules.values()}))
        raise FeatureError(
            f"the model has no nn.Linear, only {kinds}: pass layer=, the module whose input are the features"
        )
    calls: list[tuple[str, Tensor]] = []
    for name, module in watched.items():
        module.register_forward_pre_hook(_recorder(name, calls), with_kwargs=True)
    device = next((t.device for t in [*frozen.parameters(), *frozen.buffers()]), torch.device("cpu"))
    parts = []
    with torch.no_grad():
        for batch in _batches(x, batch_size, device):
            calls.clear()
            if isinstance(batch, Mapping):
                frozen(**batch)
            elif isinstance(batch, tuple):
                frozen(*batch)
            else:
                frozen(batch)
            parts.append(_taken(calls, layer, modules))
    found = torch.cat(parts)
    _check_finite(found.numpy(), "features")
    return found


def _recorder(name: str, calls: list[tuple[str, Tensor]]) -> Any:
    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if not given:
            raise FeatureError(f"layer {name!r} is called without a tensor")
        calls.append((name, given[0].detach()))

    return record


def _taken(calls: Sequence[tuple[str, Tensor]], layer: str | None, modules: Mapping[str, nn.Module]) -> Tensor:
    if not calls:
        which = f"layer {layer!r}" if layer is not None else "any nn.Linear"
        raise FeatureError(f"the forward pass does not call {which}: pass layer=, one of those it calls")
    name, value = calls[-1]
    times = sum(called == name for called, _ in calls)
    if times > 1:
        raise FeatureError(
            f"layer {name!r} is called {times} times in one forward pass: its input is not one vector a row"
        )
    if isinstance(modules[name], nn.Linear) and value.ndim != 2:
        raise FeatureError(
            f"layer {name!r} reads a tensor of shape {tuple(value.shape)}: expected (rows, units), one vector a row; pass "
            "layer=, a module after the pooling"
        )
    return value.reshape(len(value), -1).to("cpu", torch.float64)


def _batches(x: Any, size: int, device: torch.device) -> Any:
    def cut(value: Any, start: int) -> Any:
        part = value[start : start + size]
        return part.to(device, torch.float64 if part.is_floating_point() else part.dtype)

    tensors = list(x.values()) if isinstance(x, Mapping) else list(x) if isinstance(x, tuple) else [x]
    if not tensors or not all(isinstance(t, Tensor) and t.ndim > 0 for t in tensors):
        raise FeatureError(
            f"inputs must be a tensor, or a tuple or dictionary of tensors, rows first; got {type(x).__name__}"
        )
    rows = len(tensors[0])
    if rows == 0 or any(len(t) != rows for t in tensors):
        raise FeatureError(f"inputs must have the same number of rows, at least one; got {[len(t) for t in tensors]}")
    for start in range(0, rows, size):
        if isinstance(x, Mapping):
            yield {key: cut(value, start) for key, value in x.items()}
        elif isinstance(x, tuple):
            yield tuple(cut(value, start) for value in x)
        else:
            yield cut(x, start)


def matrix(values: ArrayLike, what: str) -> FloatArray:
    """A float64 array ``(rows, units)``; raises :class:`FeatureError` for another shape, no rows, NaN or infinity."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    array = np.asarray(values)
    if array.dtype.kind not in "fiub":
        raise FeatureError(f"{what} must be real numbers, got dtype {array.dtype}")
    if array.ndim != 2 or len(array) == 0:
        raise FeatureError(f"{what} must have shape (rows, units) with at least one row, got {array.shape}")
    array = np.ascontiguousarray(array, dtype=np.float64)
    _check_finite(array, what)
    return array


def class_labels(values: ArrayLike, what: str, rows: int, classes: int | None) -> IntArray:
    """Int64 class indices ``(rows,)`` in 0, ..., classes - 1; raises :class:`FeatureError` otherwise."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    array = np.asarray(values)
    if array.ndim != 1 or len(array) != rows:
        raise FeatureError(f"{what} must have shape ({rows},), one class index a row, got {array.shape}")
    if array.dtype.kind not in "iu":
        raise FeatureError(f"{what} must be integers, got dtype {array.dtype}")
    array = array.astype(np.int64)
    wrong = np.flatnonzero((array < 0) | (array >= classes)) if classes is not None else np.flatnonzero(array < 0)
    if len(wrong):
        expected = f"0 to {classes - 1}" if classes is not None else "0 or more"
        raise FeatureError(f"{what}[{wrong[0]}] is {array[wrong[0]]}: expected a class index of {expected}")
    return array


def _check_finite(array: NDArray[Any], what: str) -> None:
    if np.isfinite(array).all():
        return
    rows, units = np.nonzero(~np.isfinite(array))
    raise FeatureError(
        f"{what} hold {len(rows)} values that are NaN or infinite, the first in row {rows[0]}, unit {units[0]} "
        f"({array[rows[0], units[0]]}): the model's weights or inputs overflowed"
    )
