"""Which tensors of a model are averaged, and how an average gets into a model and out again.

Sharded parameters (FSDP2's ``fully_shard``) are averaged shard by shard: an average is elementwise, so every process
keeps the mean of its own part and nothing is gathered.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from flatminima.averaging.mean import Mean
from flatminima.names import unknown
from flatminima.perturbation import mark, marked
from flatminima.sharding import is_sharded, local, reshard, sharded_like

ModelOrParameters: TypeAlias = nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]]
BufferPolicy: TypeAlias = Literal["keep", "copy", "average"]

_SWAPPED = "the model holds an average: leave the swapped() block first"


class ParameterSet:
    """The tensors being averaged: parameters that are unique and trainable, held by reference, in the order given.

    Frozen parameters belong to the model and are never averaged. Buffers follow ``buffers``: "keep" leaves those of
    the model that receives the average alone; "copy" gives it those of the averaged model as they are then; "average"
    averages the floating-point ones as if they were parameters and copies the others (a mean of counters is no counter).
    """

    def __init__(self, model_or_params: ModelOrParameters, *, buffers: BufferPolicy = "keep") -> None:
        if buffers not in get_args(BufferPolicy):
            raise ValueError(unknown("buffers policy", buffers, get_args(BufferPolicy)))
        self.model = model_or_params if isinstance(model_or_params, nn.Module) else None
        if buffers != "keep" and self.model is None:
            raise ValueError(
                f"buffers={buffers!r} needs the module itself, which knows its buffers; got parameters. "
                "Pass the model, or use buffers='keep'."
            )
        self.buffers = buffers
        self._swapped = 0
        if self.model is not None:
            reshard(self.model)
        named = _named(model_or_params)
        unique = {id(tensor): (name, tensor) for name, tensor in reversed(named) if tensor.requires_grad}
        kept = list(reversed(unique.values()))
        if not kept:
            raise ValueError(
                f"There is nothing to average: of {len(named)} parameters none has requires_grad=True. "
                "Pass a model with trainable parameters, or those parameters themselves."
            )
        self.tensors = [tensor for _, tensor in kept]
        self.sharded = any(is_sharded(tensor) for tensor in self.tensors)
        self._floating = _floating_buffers(self.model) if self.model is not None and buffers == "average" else []
        names = [name for name, _ in kept if name is not None]
        self.parameter_names = tuple(names) if len(names) == len(kept) else None
        self.names = None if self.parameter_names is None else (*names, *(full for _, _, full in self._floating))

    def values(self) -> list[Tensor]:
        """The tensors to average as they are now: this process' shards of the parameters, then averaged buffers."""
        if not self.sharded and not self._floating:
            return self.tensors
        return [*(local(tensor) for tensor in self.tensors), *self._buffer_values()]

    def label(self, index: int) -> str:
        """How to call tensor ``index`` in a message."""
        return repr(self.names[index]) if self.names else f"number {index}"

    def require_not_swapped(self, action: str) -> None:
        """Refuse ``action`` while the parameters do not hold the weights being trained."""
        if self._swapped:
            raise RuntimeError(
                f"{action} was called inside swapped(), where the model holds the average. "
                "Leave the with-block first: the average is made of, and judged by, the weights being trained."
            )
        if (why := marked(self.tensors[0])) is not None:
            raise RuntimeError(f"{action} was called while {why}")

    def require_unreplaced(self) -> None:
        """Refuse a model one of whose averaged parameters is now another object: its updates would be missed."""
        if self.model is None or self.parameter_names is None:
            return
        if self.sharded:
            reshard(self.model)
        present = dict(self.model.named_parameters(remove_duplicate=False))
        for name, tensor in zip(self.parameter_names, self.tensors, strict=True):
            if present.get(name) is not tensor:
                raise ValueError(
                    f"Parameter {name!r} was replaced or removed after the average was made, so the average no longer "
                    "follows the model. Change the model first and make the average afterwards."
                )

    def first_nonfinite(self, mean: Mean) -> int | None:
        """Index of the first tensor of ``mean`` with a NaN or an infinity; all processes that share shards agree."""
        if not self.sharded or mean.n == 0:
            return mean.first_nonfinite()
        mesh = next(tensor for tensor in self.tensors if is_sharded(tensor)).device_mesh  # type: ignore[attr-defined]
        flags = torch.stack(mean.finite()).to(mesh.device_type, torch.int32)
        for dimension in range(mesh.ndim):
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MIN, group=mesh.get_group(dimension))
        return next((index for index, flag in enumerate(flags.tolist()) if not flag), None)

    def require_finite(self, mean: Mean) -> None:
        """Refuse to hand out an average with a NaN or an infinity in it."""
        index = self.first_nonfinite(mean)
        if index is not None:
            raise ValueError(
                f"The average of parameter {self.label(index)} is not finite: at least one of the {mean.n} averaged "
                "iterates held a NaN or an infinity. Stop averaging before training diverges."
            )

    def export(self, mean: Mean) -> tuple[Tensor, ...]:
        """A copy of the mean; of a sharded parameter a sharded tensor, whose ``full_tensor()`` gathers it."""
        copies = [tensor.clone() for tensor in mean.tensors]
        if not self.sharded:
            return tuple(copies)
        likes = [*self.tensors, *self._buffer_values()]
        return tuple(sharded_like(copy, like) for copy, like in zip(copies, likes, strict=True))

    def copy(self, mean: Mean, model: nn.Module | None) -> None:
        """Write ``mean`` into ``model`` for good, in place, in the parameters' own dtype."""
        if self._swapped:
            self.require_not_swapped("copy_to()")
        targets = self._targets(mean, model)
        why = next(filter(None, map(marked, self._parameters_of(model))), None)
        if why is not None:
            raise RuntimeError(f"copy_to() was called while {why}; what it wrote would be lost then")
        self._write(mean, model, targets)

    @contextmanager
    def swapped(self, mean: Mean, model: nn.Module | None) -> Iterator[None]:
        """Hold ``mean`` in ``model`` inside the block; afterwards put back parameters and buffers, bit for bit."""
        targets = self._targets(mean, model)
        holder = self.model if model is None else model
        parameters = [target.detach().clone() for target in targets]
        buffers = [] if holder is None else _saved_buffers(holder)
        live = int(any(target is own for target, own in zip(targets, self.values(), strict=True)))
        self._swapped += live
        holding = self._parameters_of(model)
        marks = [marked(tensor) for tensor in holding]
        mark(holding, _SWAPPED)
        try:
            self._write(mean, model, targets)
            yield
        finally:
            if holder is not None:
                reshard(holder)
            with torch.no_grad():
                torch._foreach_copy_(targets, parameters)
                for owner, name, buffer, value in buffers:
                    owner._buffers[name] = buffer  # a forward pass may have put another tensor in its place
                    buffer.copy_(value)
            for tensor, before in zip(holding, marks, strict=True):
                mark([tensor], before)
            self._swapped -= live

    def state_dict(self) -> dict[str, Any]:
        """Names and shapes (of this process' shards), by which a saved average recognises its parameters."""
        return {
            "names": None if self.names is None else list(self.names),
            "shapes": [list(tensor.shape) for tensor in self.values()],
        }

    def require_state(self, state: dict[str, Any]) -> None:
        """Refuse a state that was saved for other parameters."""
        current = self.state_dict()
        if state["shapes"] != current["shapes"]:
            raise ValueError(
                f"The state was saved for {len(state['shapes'])} parameters of shapes {_short(state['shapes'])}; here "
                f"are {len(current['shapes'])} of shapes {_short(current['shapes'])}. "
                "Load it into the model it was saved from."
            )
        if None not in (state["names"], current["names"]) and state["names"] != current["names"]:
            pairs = zip(state["names"], current["names"], strict=True)
            saved, here = next((a, b) for a, b in pairs if a != b)
            raise ValueError(
                f"The state was saved for a parameter {saved!r} where this model has {here!r}. "
                "Load it into the model it was saved from."
            )

    def _buffer_values(self) -> list[Tensor]:
        found = [owner._buffers[name] for owner, name, _ in self._floating]
        return [buffer for buffer in found if buffer is not None]

    def _targets(self, mean: Mean, model: nn.Module | None) -> list[Tensor]:
        """The tensors of ``model`` that correspond to the averaged ones, checked to fit ``mean``."""
        if model is not None:
            reshard(model)
        with torch.no_grad():
            targets = [local(tensor) for tensor in self._parameters_of(model)] + self._buffers_of(model)
        for index, (target, tensor) in enumerate(zip(targets, mean.tensors, strict=True)):
            if target.shape != tensor.shape:
                raise ValueError(
                    f"Parameter {self.label(index)} has shape {tuple(target.shape)} in the model but was averaged with "
                    f"shape {tuple(tensor.shape)}. Pass a model of the shape that was trained."
                )
        return targets

    def _parameters_of(self, model: nn.Module | None) -> Sequence[Tensor]:
        """Themselves, or those of ``model`` by name, or by order."""
        if model is None or model is self.model:
            self.require_unreplaced()
            return self.tensors
        inside = {id(parameter) for parameter in model.parameters()}
        own = [id(tensor) in inside for tensor in self.tensors]
        if all(own):
            return self.tensors
        if any(own) and self.model is None:
            raise ValueError(
                f"Parameter {self.label(own.index(False))} was replaced or removed after the average was made, so the average "
                "does not follow the model. Change the model first and make the average afterwards."
            )
        if self.parameter_names is not None:
            present = dict(model.named_parameters(remove_duplicate=False))
            missing = [name for name in self.parameter_names if name not in present]
            if missing:
                raise ValueError(
                    f"The model has no parameter {missing[0]!r} ({len(missing)} of {len(self.parameter_names)} averaged "
                    "names are missing). Pass a model of the same class, wrapped in the same way."
                )
            return [present[name] for name in self.parameter_names]
        found = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if len(found) != len(self.tensors):
            raise ValueError(
                f"The model has {len(found)} trainable parameters, the average has {len(self.tensors)}. "
                "The average was made from unnamed tensors; make it from the model to match parameters by name."
            )
        return found

    def _buffers_of(self, model: nn.Module | None) -> list[Tensor]:
        if not self._floating:
            return []
        modules = {} if model is None else {id(module) for module in model.modules()}
        if model is None or all(id(owner) in modules for owner, _, _ in self._floating):
            return self._buffer_values()
        present = dict(model.named_buffers(remove_duplicate=False))
        missing = [full for _, _, full in self._floating if full not in present]
        if missing:
            raise ValueError(f"The model has no buffer {missing[0]!r}. Pass a model of the same class.")
        return [present[full] for _, _, full in self._floating]

    def _write(self, mean: Mean, model: nn.Module | None, targets: list[Tensor]) -> None:
        with torch.no_grad():
            if self.buffers != "keep" and self.model is not None and model is not None and model is not self.model:
                present = dict(model.named_buffers())
                for name, buffer in self.model.named_buffers():
                    if name in present and present[name].shape == buffer.shape:
                        present[name].copy_(buffer)
            torch._foreach_copy_(targets, mean.tensors)


def _named(model_or_params: ModelOrParameters) -> list[tuple[str | None, Tensor]]:
    if isinstance(model_or_params, nn.Module):
        return list(model_or_params.named_parameters())
    expected = "Expected a torch.nn.Module, an iterable of parameters, or its named_parameters()"
    if isinstance(model_or_params, Tensor) or not isinstance(model_or_params, Iterable):
        raise TypeError(f"{expected}, got {type(model_or_params).__name__}.")
    named: list[tuple[str | None, Tensor]] = []
    for item in model_or_params:
        name, tensor = item if isinstance(item, tuple) and len(item) == 2 else (None, item)
        if not isinstance(tensor, Tensor) or not isinstance(name, str | None):
            raise TypeError(f"{expected}, got an iterable that holds {type(item).__name__}.")
        named.append((name, tensor))
    return named


def _floating_buffers(model: nn.Module) -> list[tuple[nn.Module, str, str]]:
    """Owner, name and full name of every floating-point buffer that belongs to the model's state."""
    owners = dict(model.named_modules())
    found = []
    for full, buffer in model.named_buffers():
        prefix, _, name = full.rpartition(".")
        owner = owners[prefix]
        if buffer.is_floating_point() and name not in owner._non_persistent_buffers_set:
            found.append((owner, name, full))
    return found


def _saved_buffers(model: nn.Module) -> list[tuple[nn.Module, str, Tensor, Tensor]]:
    return [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]


def _short(shapes: list[list[int]]) -> str:
    shown = ", ".join(str(tuple(shape)) for shape in shapes[:4])
    return f"[{shown}{', ...' if len(shapes) > 4 else ''}]"
