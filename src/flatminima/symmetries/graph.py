"""A model as finders of symmetries see it: its torch.fx graph with shapes, and how often each parameter is used."""

from __future__ import annotations

import copy
import os
import traceback
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn


class UntraceableError(Exception):
    """The model cannot be turned into a graph; the message names what stopped it."""


@dataclass(frozen=True, eq=False)
class Network:
    """A traced model.

    Args:
        graph: of a copy of the model in evaluation mode; layers of ``torch.nn`` are its leaves.
        modules: every submodule of that copy by name.
        shapes: for each node that is a tensor, its shape on the example input.
        uses: for each parameter name, how often the forward pass uses its storage, under any name. A symmetry that
            changes a parameter in one role may only do so where this is 1.
    """

    graph: fx.Graph
    modules: dict[str, nn.Module]
    shapes: dict[fx.Node, tuple[int, ...]]
    uses: dict[str, int]

    def module(self, node: fx.Node) -> nn.Module | None:
        """The layer that the node calls, or None."""
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def describe(self, node: fx.Node) -> str:
        """The node for people: ``'bn1 (BatchNorm2d)'``, ``'gelu'``, ``'.transpose'``, ``'the output'``."""
        if node.op == "output":
            return "the output"
        if node.op == "call_module":
            return f"{node.target} ({type(self.modules[str(node.target)]).__name__})"
        if node.op == "call_method":
            return f".{node.target}"
        return str(getattr(node.target, "__name__", node.target))


def trace(model: nn.Module, example_input: Tensor) -> Network:
    """Trace `model` and record shapes; the model and the global random state stay as they are.

    Raises:
        ValueError: the model itself fails on `example_input`.
        UntraceableError: torch.fx cannot follow the model.

    Cost: two forward passes.
    """
    try:
        twin = copy.deepcopy(model).eval()
    except Exception as error:
        raise UntraceableError(f"{type(model).__name__} cannot be copied: {_reason(error)}") from error
    first = next(iter(model.parameters()), example_input)
    inputs = example_input.to(first.device)
    with torch.no_grad(), torch.random.fork_rng(devices=[first.device] if first.device.type == "cuda" else []):
        try:
            twin(inputs.clone())
        except Exception as error:
            raise ValueError(
                f"{type(model).__name__} fails on example_input of shape {tuple(inputs.shape)} and {inputs.dtype}: "
                f"{_reason(error)}. Give a batch as the model is trained on"
            ) from error
        try:
            traced = fx.symbolic_trace(twin)
            recorder = _ShapeRecorder(traced)
            recorder.run(inputs.clone())
        except Exception as error:
            raise UntraceableError(f"torch.fx cannot trace {type(model).__name__}: {_reason(error)}") from error
    return Network(traced.graph, dict(traced.named_modules()), recorder.shapes, _uses(model, traced))


class _ShapeRecorder(fx.Interpreter):
    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__(traced)
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n] = tuple(value.shape)
        return value


def _uses(model: nn.Module, traced: fx.GraphModule) -> dict[str, int]:
    # Identity is judged on the original model: a deep copy separates parameters that share storage without being the
    # same object, and rescaling the original in place would change both.
    def key(tensor: Tensor) -> tuple[str, int]:
        return (str(tensor.device), tensor.data_ptr()) if tensor.numel() else ("empty", id(tensor))

    keys = {name: key(tensor) for name, tensor in model.named_parameters(remove_duplicate=False)}
    layers = dict(traced.named_modules())
    count: Counter[tuple[str, int]] = Counter()
    for node in traced.graph.nodes:
        target = str(node.target)
        if node.op == "call_module":
            held = {f"{target}.{name}" for name, _ in layers[target].named_parameters()}
            count.update({keys[name] for name in held if name in keys})
        elif node.op == "get_attr" and target in keys:
            count[keys[target]] += len(node.users)
    return {name: count[identity] for name, identity in keys.items()}


def _reason(error: Exception) -> str:
    """The error in one line, with the line of the model's own source where it arose (never a path)."""
    message = (str(error).strip().splitlines() or [""])[0].rstrip(".")
    library = os.path.dirname(torch.__file__)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.line and frame.filename != __file__ and not frame.filename.startswith(library)
    ]
    where = f" at `{frames[-1].line}`" if frames else ""
    return f"{type(error).__name__}: {message}{where}"
