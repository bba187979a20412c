"""A model as finders of symmetries see it: every operation of one run, in terms of ATen, with values and parameters named.

The model is run once on the example, in float64, and each operation that reaches torch's dispatcher is written down. This is
the intermediate representation of `torch.export` (a linear layer, attention and `einsum` all become `mm`, `bmm`, views and
elementwise operations; hooks, functional calls and parametrizations show what they do), but taken from an ordinary run, so
that whatever runs can be read: no symbolic tracing that a cache, a mask or a library's own wrappers could stop.

What a run cannot show is the other branch of a decision that depends on values. Every place where a number leaves the tensors
(`if x.sum() > 0`, `.item()`, `.numpy()`) is noted with its module; `Branch.module` is then opaque: what flows into it, out of
it and between its parts is not followed, only the insides of its parts are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

PARAMETER, INPUT, CHOICE = 1, 2, 4
"""What a value depends on: parameters, floating-point inputs, integer inputs (tokens, masks); a sum of these."""


SHAPE_ONLY = frozenset(
    """
    arange bernoulli empty empty_like empty_strided eye fill full full_like linspace new_empty new_empty_strided new_full
    new_ones new_zeros normal ones ones_like rand rand_like randint randn randn_like randperm scalar_tensor uniform zero zeros
    zeros_like
    """.split()  # noqa: SIM905
)
"""Operations that do not look at the values of their arguments, only at their shape."""


@dataclass(eq=False)
class Value:
    """One tensor at one moment of the run.

    Attributes:
        tensor: what it held.
        source: the call that made it, or None for parameters, buffers, inputs and constants.
        depends: see `PARAMETER`.
        name: of the parameter or buffer that it is.
    """

    tensor: Tensor
    source: Call | None = None
    depends: int = 0
    name: str | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return tuple(self.tensor.shape)


@dataclass(eq=False)
class Call:
    """One operation.

    Attributes:
        op: its name without overload and without the underscore of an in-place form, e.g. ``'add'``.
        func: the operation itself.
        args: positional arguments with a `Value` in place of every tensor.
        kwargs: the others.
        out: the tensors it returned, in order.
        module: path of the innermost module that was running.
        function: the torch function that the model called, e.g. ``'gelu'``.
    """

    op: str
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    module: str
    function: str
    out: tuple[Value, ...] = ()

    @cached_property
    def inputs(self) -> tuple[Value, ...]:
        """Every tensor among the arguments, in order."""
        return tuple(leaf for leaf in tree_flatten((self.args, self.kwargs))[0] if isinstance(leaf, Value))


@dataclass(eq=False)
class Scope:
    """What went into, or came out of, one call of a module; and the module that called it."""

    module: str
    caller: str
    values: tuple[Value, ...]


@dataclass(frozen=True)
class Branch:
    """A number that left the tensors: where, at which line of the model's code, and whether inputs or weights decide it."""

    module: str
    line: str
    depends: int


@dataclass(frozen=True, eq=False)
class Tape:
    """One run of a model.

    Attributes:
        calls: those that the outputs depend on, in order.
        outputs: what the model predicts with.
        modules: of the model, by path.
        parameters: each parameter's value by name; several names of one parameter share a value.
        buffers: each buffer by name, as it was before the run.
        elements: each parameter's elements as numbers that are equal where memory is shared, by name, (its shape), int64.
        scopes: every call of a module.
        branches: decisions that depend on values.
    """

    calls: tuple[Call, ...]
    outputs: tuple[Value, ...]
    modules: dict[str, nn.Module]
    parameters: dict[str, Value]
    buffers: dict[str, Tensor]
    elements: dict[str, Tensor]
    scopes: tuple[Scope, ...]
    branches: tuple[Branch, ...]

    def opaque(self) -> dict[int, Branch]:
        """By id, the values that pass through code which decides by values: what happens to them otherwise is unknown."""
        found: dict[int, Branch] = {}
        for branch in self.branches:
            if not branch.depends & (PARAMETER | INPUT):
                continue
            passing = [value for s in self.scopes if branch.module in (s.module, s.caller) for value in s.values]
            for call in self.calls:
                if call.module == branch.module:
                    passing.extend((*call.inputs, *call.out))
            found |= {id(value): branch for value in passing}
        return found

    def describe(self, call: Call) -> str:
        """The operation for people: ``'bn1 (BatchNorm2d)'`` where a layer of torch does it, else ``'gelu'``."""
        module = self.modules.get(call.module) if call.module else None
        if module is None or any(True for _ in module.children()) or isinstance(module, nn.Identity):
            return call.function or call.op
        is_layer = type(module).__module__.startswith("torch.nn") or call.op == "normalise" or is_activation(module)
        return f"{call.module} ({type(module).__name__})" if is_layer else call.function or call.op


def is_activation(module: nn.Module) -> bool:
    """Whether a module has neither parts nor parameters, like an activation function."""
    return next(module.children(), None) is None and next(module.parameters(), None) is None


def live(calls: Sequence[Call], results: Sequence[Value]) -> list[Call]:
    """The calls that the results depend on."""
    needed = {id(value) for value in results}
    kept = []
    for call in reversed(calls):
        if any(id(value) in needed for value in call.out):
            kept.append(call)
            needed.update(id(value) for value in call.inputs)
    return kept[::-1]
