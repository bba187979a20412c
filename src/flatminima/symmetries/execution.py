"""Running a copy of a model in float64, the same way every time: what symmetries are found and proved with.

Models cast inside (a softmax or a normalisation in float32 is common). Rounding of that kind cannot be told from a change of
function at 1e-9, so that every cast to a narrower floating-point type is lifted to float64: what runs is the model's own
program in more exact arithmetic.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from flatminima.batches import moved
from flatminima.objective import unwrapped

MODES = ("eval", "train")
_WIDE = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}
_REINTERPRETS = frozenset({"aten::view.dtype", "aten::view_copy.dtype"})  # the bits, not the number


class EagerMode(TorchDispatchMode):
    """A dispatch mode that never runs under `torch.compile`."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would import its compiler, for seconds, to keep it away from a mode that it never meets


class Widened(EagerMode):
    """Every operation that asks for a narrower floating-point type gets float64 instead."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation with its types widened."""
        return func(*widened(func, args), **widened(func, kwargs or {}))


def widened(func: Any, arguments: Any) -> Any:
    """The arguments of an operation (tuple or dictionary) with each narrower floating-point type replaced by float64."""
    if func._schema.name + "." + func._schema.overload_name in _REINTERPRETS:
        return arguments
    if isinstance(arguments, dict):
        return {key: _wide(value) for key, value in arguments.items()}
    return tuple(_wide(value) for value in arguments)


def _wide(value: Any) -> Any:
    return _WIDE.get(value, value) if isinstance(value, torch.dtype) else value


def double_copy(model: nn.Module, mode: str, device: torch.device | None = None) -> nn.Module:
    """A deep copy in float64 and in the given mode, without the wrapper of `torch.compile` or data parallelism."""
    twin = copy.deepcopy(unwrapped(model)[0])
    first = next(iter(twin.parameters()), None)
    device = device or (torch.device("cpu") if first is None else first.device)
    if device.type == "mps":  # it has no float64
        device = torch.device("cpu")
    return twin.to(device).double().train(mode == "train")


def run(twin: nn.Module, inputs: Any, recorder: TorchDispatchMode | None = None) -> Any:
    """What a `double_copy` returns on the inputs; the global random state and the inputs stay as they are."""
    first = next(iter(twin.parameters()), None)
    device = torch.device("cpu") if first is None else first.device
    arguments = _prepared(inputs, device)  # cloned: a model may work on its input in place
    with evaluating(device), recorder or Widened():  # type: ignore[no-untyped-call]
        if isinstance(arguments, Mapping):
            return twin(**arguments)
        return twin(*arguments) if isinstance(arguments, tuple) else twin(arguments)


def run_as_is(model: nn.Module, mode: str, inputs: Any) -> Any:
    """What a copy of the model returns in its own precision."""
    twin = copy.deepcopy(unwrapped(model)[0]).train(mode == "train")
    first = next(iter(twin.parameters()), torch.zeros(()))
    given = moved(inputs, first.device)
    with torch.no_grad(), torch.random.fork_rng(devices=[first.device] if first.device.type == "cuda" else []):
        if isinstance(given, Mapping):
            return twin(**given)
        return twin(*given) if isinstance(given, tuple) else twin(given)


def _prepared(inputs: Any, device: torch.device) -> Any:
    if isinstance(inputs, Tensor):
        return inputs.detach().to(device=device, dtype=_WIDE.get(inputs.dtype, inputs.dtype)).clone()
    if isinstance(inputs, Mapping):
        return {key: _prepared(value, device) for key, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        return type(inputs)(_prepared(value, device) for value in inputs)
    return inputs


@contextlib.contextmanager
def evaluating(device: torch.device) -> Iterator[None]:
    """No gradient, a fixed random state, and attention by its plain formula; everything is put back."""
    default, fast_path = torch.get_default_dtype(), torch.backends.mha.get_fastpath_enabled()
    with (
        torch.no_grad(),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        sdpa_kernel(SDPBackend.MATH),
    ):
        # torch.manual_seed would reseed every device of the machine, also those that fork_rng does not restore.
        torch.default_generator.manual_seed(0)
        if device.type == "cuda":
            position = torch.cuda.current_device() if device.index is None else device.index
            torch.cuda.default_generators[position].manual_seed(0)
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            torch.set_default_dtype(torch.float64)  # of tensors that the model makes on its way
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
            torch.set_default_dtype(default)


def outputs(returned: Any) -> tuple[Tensor, ...]:
    """The tensors that a model predicts with: its one tensor, its `logits`, or every floating-point tensor it returns.

    Raises:
        TypeError: it returns no such tensor.
    """
    logits = returned.get("logits") if isinstance(returned, Mapping) else getattr(returned, "logits", None)
    found = tuple(_floating(returned if logits is None else logits))
    if not found:
        raise TypeError(
            f"the model returns {type(returned).__name__} without a floating-point tensor; expected one tensor, several, or "
            "`logits`"
        )
    return found


def _floating(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        if tree.is_floating_point():
            yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from _floating(value)
    elif isinstance(tree, tuple | list):
        for value in tree:
            yield from _floating(value)
