"""Running a model once and writing down every operation that reaches torch's dispatcher."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_flatten, tree_map_only

from flatminima.objective import unwrapped

from .execution import EagerMode, double_copy, outputs, run, run_as_is, widened
from .tape import CHOICE, INPUT, PARAMETER, SHAPE_ONLY, Branch, Call, Scope, Tape, Value, live


class UntraceableError(Exception):
    """The model cannot be run operation by operation; the message names what stopped it."""


def record(model: nn.Module, inputs: Any, mode: str = "eval") -> Tape:
    """Run `model` once and write down what it does; the model and the global random state stay as they are.

    Raises:
        ValueError: the model itself fails on the inputs.
        UntraceableError: it runs, but not operation by operation, or it returns no tensor.

    Cost: one forward pass, two where it cannot be recorded.
    """
    try:
        twin = double_copy(model, mode, torch.device("cpu"))
    except Exception as error:
        raise UntraceableError(f"{type(model).__name__} cannot be copied: {reason(error)}") from error
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in twin.parameters()):
        raise UntraceableError(f"{type(model).__name__} has lazy layers that were never run: call it once on a batch")
    recorder = _Recorder(twin)
    buffers = {name: buffer.clone() for name, buffer in twin.named_buffers()}
    try:
        returned = recorder.run(inputs)
    except Exception as error:
        _raise_own_failure(model, mode, inputs)
        raise UntraceableError(f"{type(model).__name__} cannot be followed in float64: {reason(error)}") from error
    try:
        found = outputs(returned)
    except TypeError as error:
        raise UntraceableError(str(error)) from error
    results = tuple(recorder.value(tensor) for tensor in found)
    parameters = {name: recorder.value(p) for name, p in twin.named_parameters(remove_duplicate=False)}
    return Tape(
        tuple(live(recorder.calls, results)), results, dict(twin.named_modules()), parameters, buffers,
        _elements(unwrapped(model)[0]), tuple(recorder.scopes), tuple(dict.fromkeys(recorder.branches)),
    )  # fmt: skip


def _raise_own_failure(model: nn.Module, mode: str, inputs: Any) -> None:
    """A model that fails in its own precision as well fails by itself."""
    try:
        run_as_is(model, mode, inputs)
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} fails on example_input of {_shapes(inputs)}: {reason(error)}. "
            "Give a batch as the model is trained on"
        ) from error


def _shapes(inputs: Any) -> str:
    tensors = [leaf for leaf in tree_flatten(inputs)[0] if isinstance(leaf, Tensor)]
    return ", ".join(f"shape {tuple(t.shape)} and {t.dtype}" for t in tensors) or type(inputs).__name__


def _elements(model: nn.Module) -> dict[str, Tensor]:
    # Identity is judged on the original model: a deep copy separates parameters that share storage without being the same
    # object, and changing the original in place would change both.
    starts: dict[int, int] = {}
    found: dict[str, Tensor] = {}
    following = 0
    for name, parameter in model.named_parameters(remove_duplicate=False):
        storage = parameter.untyped_storage()
        if storage.data_ptr() not in starts or not parameter.numel():
            starts[storage.data_ptr()] = following
            following += max(storage.nbytes() // parameter.element_size(), parameter.numel())
        found[name] = starts[storage.data_ptr()] + _places(parameter).reshape(parameter.shape)
    return found


class _Recorder(EagerMode):
    def __init__(self, twin: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.twin = twin
        self.calls: list[Call] = []
        self.scopes: list[Scope] = []
        self.branches: list[Branch] = []
        self.functions = _Functions(self)
        self._stack = [""]
        self._values: dict[int, Value] = {}
        self._alive: list[Tensor] = []  # so that no two tensors of the run share an id
        self._sharing: dict[int, list[Tensor]] = {}
        for name, tensor in [*twin.named_parameters(), *twin.named_buffers()]:
            depends = PARAMETER if isinstance(tensor, nn.Parameter) else 0
            self._bind(tensor, Value(tensor.detach(), None, depends, name))

    def run(self, inputs: Any) -> Any:
        """The twin's output; everything is recorded on the way."""
        for path, module in self.twin.named_modules():
            if path and not isinstance(module, torch.jit.ScriptModule):
                module.register_forward_pre_hook(self._enter(path), with_kwargs=True, prepend=True)
                module.register_forward_hook(self._leave, with_kwargs=True, prepend=True)
        self.twin.register_forward_pre_hook(self._arrive, with_kwargs=True, prepend=True)
        with self.functions:
            return run(self.twin, inputs, self)

    def _arrive(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        for tensor in tree_flatten((args, kwargs))[0]:
            if isinstance(tensor, Tensor):
                wide = tensor.is_floating_point() or tensor.is_complex()
                self._bind(tensor, Value(tensor, None, INPUT if wide else CHOICE))

    def _enter(self, path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._pass(path, (args, kwargs))
            self._stack.append(path)

        return hook

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, returned: Any) -> None:
        self._pass(self._stack.pop(), returned)

    def _pass(self, path: str, tree: Any) -> None:
        tensors = [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]
        self.scopes.append(Scope(path, self._stack[-1], tuple(self.value(tensor) for tensor in tensors)))

    def value(self, tensor: Tensor) -> Value:
        """The tensor as it is now; one that no recorded operation made is a constant."""
        if id(tensor) not in self._values:
            self._bind(tensor, Value(tensor))
        return self._values[id(tensor)]

    def _bind(self, tensor: Tensor, value: Value) -> None:
        if id(tensor) not in self._values:
            self._alive.append(tensor)
            if tensor.layout == torch.strided:
                self._sharing.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
        self._values[id(tensor)] = value

    def read(self, tensor: Tensor) -> None:
        """Note that the program learns a number."""
        depends = self.value(tensor).depends
        if depends:
            self.branches.append(Branch(self._stack[-1], _line(), depends))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = widened(func, args), widened(func, kwargs or {})
        if func._schema.name == "aten::_local_scalar_dense":
            self.read(args[0])
            return func(*args, **kwargs)
        if func._schema.name == "aten::lift_fresh":  # a literal of the program: nothing happens
            return func(*args, **kwargs)
        call = Call(
            func._schema.name.split("::")[1].rstrip("_"), func,
            tree_map_only(Tensor, self.value, args), tree_map_only(Tensor, self.value, _read(func, kwargs)),
            self._stack[-1], self.functions.name,
        )  # fmt: skip
        written = list(_written(func, args, kwargs))
        for tensor in written:
            self.value(tensor).tensor = tensor.clone()
        returned = func(*args, **kwargs)
        made = [leaf for leaf in tree_flatten(returned)[0] if isinstance(leaf, Tensor)] or written
        depends = 0
        for value in () if call.op in SHAPE_ONLY else call.inputs:
            depends |= value.depends
        call.out = tuple(Value(tensor, call, depends) for tensor in made)
        self.calls.append(call)
        for tensor, value in zip(made, call.out, strict=True):
            self._bind(tensor, value)
        for tensor in written:
            self._spread(tensor, call)
        return returned

    def _spread(self, written: Tensor, call: Call) -> None:
        """Other views of memory that was written hold something new, which is followed no further."""
        for other in self._sharing.get(written.untyped_storage().data_ptr(), []):
            if other is not written and _overlap(other, written):
                before, after = self._values[id(other)], self._values[id(written)]
                spread = Call("write through a view", None, (before, after), {}, call.module, call.function)
                spread.out = (Value(other.clone(), spread, before.depends | after.depends),)
                self.calls.append(spread)
                self._values[id(other)] = spread.out[0]


class _Functions(TorchFunctionMode):
    """The name of the torch function at work, and reads that no dispatcher sees."""

    _READS = frozenset({"tolist", "numpy", "__array__", "__dlpack__"})

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.name = ""
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.name = getattr(func, "__name__", "")
        if self.name == "__get__":
            self.name = str(resolve_name(func) or "").split(".")[-2]
        if self.name in self._READS and args and isinstance(args[0], Tensor):
            self._recorder.read(args[0])
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.name = ""


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The arguments that an operation writes to: those of in-place forms, and `out`."""
    for slot, argument in zip(func._schema.arguments, args, strict=False):
        if isinstance(argument, Tensor) and slot.alias_info is not None and slot.alias_info.is_write:
            yield argument
    for slot in func._schema.arguments:
        if slot.is_out and isinstance(kwargs.get(slot.name), Tensor):
            yield kwargs[slot.name]


def _read(func: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments without the memory to write to."""
    places = {slot.name for slot in func._schema.arguments if slot.is_out}
    return {name: value for name, value in kwargs.items() if name not in places}


def _overlap(first: Tensor, second: Tensor) -> bool:
    """Whether two views of the same memory have an element in common."""
    places = [_places(tensor) for tensor in (first, second)]
    return bool(torch.isin(*places).any())


def _places(tensor: Tensor) -> Tensor:
    """Where in its memory each element of a tensor is."""
    numbers = torch.tensor(tensor.storage_offset())
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        numbers = numbers.unsqueeze(-1) + torch.arange(size) * stride
    return numbers.reshape(-1)


def reason(error: Exception) -> str:
    """The error in one line, with the line of the model's own source where it arose (never a path)."""
    message = (str(error).strip().splitlines() or [""])[0].rstrip(".")
    own = list(_own(traceback.extract_tb(error.__traceback__)))
    where = f" at `{own[-1].line}`" if own else ""
    return f"{type(error).__name__}: {message}{where}"


def _line() -> str:
    """The line of the model's own source that is running."""
    own = list(_own(traceback.extract_stack()))
    return str(own[-1].line) if own else ""


def _own(frames: traceback.StackSummary) -> Iterator[traceback.FrameSummary]:
    library, here = os.path.dirname(torch.__file__), os.path.dirname(__file__)
    for frame in frames:
        if frame.line and not frame.filename.startswith((library, here)):
            yield frame
