"""The mean of the weights a training run passes through, and how it gets into a model and out again.

Three choices carry the file. The mean is kept in float32 or wider, because a bfloat16 mean stops moving once 1/n drops
below its resolution. It is kept as a flat list of tensors, never as a deep copy of the module, because the module may
not be copyable. The counter is a Python int, because a counter on the device costs a synchronisation per step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

ModelOrParameters: TypeAlias = nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]]


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype a mean of tensors of ``dtype`` is kept in: ``dtype`` itself, or float32 where it is narrower."""
    return torch.promote_types(dtype, torch.float32)


class Mean:
    """Running mean of a list of tensors, ``m_n = m_{n-1} + (x_n - m_{n-1}) / n``.

    The first ``add`` fixes the shapes, devices and number of tensors; buffers are allocated then, one per tensor, in
    float32 or the tensor's own dtype if that is wider. A constant sequence is reproduced to the bit.

    Attributes:
        n: how many values the mean holds (a Python int).
        tensors: the mean itself. Live buffers, meaningless while ``n == 0``.

    Example:
        >>> mean = Mean()
        >>> for value in (1.0, 2.0, 6.0):
        ...     mean.add([torch.tensor([value])])
        >>> mean.n, mean.tensors
        (3, [tensor([3.])])
    """

    def __init__(self) -> None:
        self.n = 0
        self.tensors: list[Tensor] = []

    @torch.no_grad()
    def add(self, values: Sequence[Tensor]) -> None:
        """Take one more value of every tensor into the mean.

        Raises:
            ValueError: the number, a shape, a device or a dtype no longer fits the mean.
        """
        if not self.tensors:
            self.tensors = [torch.empty_like(v, dtype=accumulator_dtype(v.dtype), requires_grad=False) for v in values]
        self._require_same(values)
        if self.n == 0:
            torch._foreach_copy_(self.tensors, list(values))
        else:
            self._lerp(values, 1.0 / (self.n + 1))
        self.n += 1

    @torch.no_grad()
    def merge(self, other: Mean) -> None:
        """Become the mean of both sets of values: ``m + (o - m) * n_o / (n + n_o)``. ``other`` is left as it was."""
        if other.n == 0:
            return
        if not self.tensors:
            self.tensors = [torch.empty_like(tensor) for tensor in other.tensors]
        self._require_same(other.tensors)
        if self.n == 0:
            torch._foreach_copy_(self.tensors, other.tensors)
        else:
            self._lerp(other.tensors, other.n / (self.n + other.n))
        self.n += other.n

    def reset(self) -> None:
        """Forget the values and keep the buffers for the next ones."""
        self.n = 0

    def first_nonfinite(self) -> int | None:
        """Index of the first tensor that holds a NaN or an infinity, or None. Waits for the device once."""
        if self.n == 0:
            return None
        finite = [tensor.isfinite().all() for tensor in self.tensors]
        return next((index for index, flag in enumerate(finite) if not flag), None)

    def state_dict(self) -> dict[str, Any]:
        """A copy of the mean: ``{"n": int, "tensors": list of tensors}``; without tensors while the mean is empty."""
        return {"n": self.n, "tensors": [tensor.clone() for tensor in self.tensors] if self.n else []}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], like: Sequence[Tensor]) -> Mean:
        """The mean that ``state`` describes, on the devices of ``like``, the tensors whose mean it is.

        Raises:
            ValueError: the saved tensors are not means of tensors shaped and typed like ``like``.
        """
        mean = cls()
        if not state["n"]:
            return mean
        saved = state["tensors"]
        if len(saved) != len(like):
            raise ValueError(f"The saved mean has {len(saved)} tensors, the parameters to average are {len(like)}.")
        for index, (tensor, parameter) in enumerate(zip(saved, like, strict=True)):
            expected = (tuple(parameter.shape), accumulator_dtype(parameter.dtype))
            if (tuple(tensor.shape), tensor.dtype) != expected:
                raise ValueError(
                    f"Saved mean {index} is {tensor.dtype} of shape {tuple(tensor.shape)}; this parameter needs "
                    f"{expected[1]} of shape {expected[0]}. Load the state into the same model that was averaged."
                )
        mean.n = int(state["n"])
        mean.tensors = [tensor.detach().to(p.device, copy=True) for tensor, p in zip(saved, like, strict=True)]
        return mean

    def _lerp(self, values: Sequence[Tensor], weight: float) -> None:
        wide = [(m, v) for m, v in zip(self.tensors, values, strict=True) if m.dtype == v.dtype]
        if wide:
            torch._foreach_lerp_([m for m, _ in wide], [v for _, v in wide], weight)
        if len(wide) < len(self.tensors):
            # One tensor at a time: the widened copy of a narrow tensor is then never more than one tensor of memory.
            for m, v in zip(self.tensors, values, strict=True):
                if m.dtype != v.dtype:
                    m.lerp_(v.to(m.dtype), weight)

    def _require_same(self, values: Sequence[Tensor]) -> None:
        # The foreach operations broadcast; without this a parameter that changed its shape would be averaged silently.
        if len(values) != len(self.tensors):
            raise ValueError(f"The mean is of {len(self.tensors)} tensors, but {len(values)} were given.")
        for index, (mean, value) in enumerate(zip(self.tensors, values, strict=True)):
            if mean.shape != value.shape:
                was, now = tuple(mean.shape), tuple(value.shape)
                raise ValueError(
                    f"Tensor {index} had shape {was} when its mean began and now has shape {now}. "
                    "A mean cannot change shape: start a new average after changing the model."
                )
            if mean.device != value.device:
                raise ValueError(
                    f"Tensor {index} moved from {mean.device} to {value.device} after its mean began. "
                    "Move the model before the first update, or resume from a state_dict."
                )
            if mean.dtype != value.dtype and mean.dtype != accumulator_dtype(value.dtype):
                raise ValueError(
                    f"Tensor {index} is now {value.dtype}, too wide for the mean begun in {mean.dtype}. "
                    "Change the model's dtype before the first update."
                )


class ParameterSet:
    """The parameters being averaged: unique, trainable, held by reference, in the order they were given.

    Frozen parameters and buffers are not in it: they belong to the model and are never averaged.
    """

    def __init__(self, model_or_params: ModelOrParameters) -> None:
        self.model = model_or_params if isinstance(model_or_params, nn.Module) else None
        self._swapped = 0
        named = _named(model_or_params)
        unique = {id(tensor): (name, tensor) for name, tensor in reversed(named) if tensor.requires_grad}
        kept = list(reversed(unique.values()))
        if not kept:
            raise ValueError(
                f"There is nothing to average: of {len(named)} parameters none has requires_grad=True. "
                "Pass a model with trainable parameters, or those parameters themselves."
            )
        self.tensors = [tensor for _, tensor in kept]
        names = [name for name, _ in kept if name is not None]
        self.names = tuple(names) if len(names) == len(kept) else None

    def label(self, index: int) -> str:
        """How to call parameter ``index`` in a message."""
        return repr(self.names[index]) if self.names else f"number {index}"

    def require_not_swapped(self, action: str) -> None:
        """Refuse ``action`` while the average stands in for the training weights."""
        if self._swapped:
            raise RuntimeError(
                f"{action} was called inside swapped(), where the model holds the average. "
                "Leave the with-block first: the average is made of, and judged by, the weights being trained."
            )

    def require_unreplaced(self) -> None:
        """Refuse a model one of whose averaged parameters is now another object: its updates would be missed."""
        if self.model is None or self.names is None:
            return
        present = dict(self.model.named_parameters(remove_duplicate=False))
        for name, tensor in zip(self.names, self.tensors, strict=True):
            if present.get(name) is not tensor:
                raise ValueError(
                    f"Parameter {name!r} was replaced or removed after the average was made, so the average no longer "
                    "follows the model. Change the model first and make the average afterwards."
                )

    def require_finite(self, mean: Mean) -> None:
        """Refuse to hand out an average with a NaN or an infinity in it."""
        index = mean.first_nonfinite()
        if index is not None:
            raise ValueError(
                f"The average of parameter {self.label(index)} is not finite: at least one of the {mean.n} averaged "
                "iterates held a NaN or an infinity. Stop averaging before training diverges."
            )

    def targets(self, model: nn.Module | None) -> list[Tensor]:
        """The parameters of ``model`` that correspond to the averaged ones: themselves, by name, or by order."""
        if model is None:
            self.require_unreplaced()
            return self.tensors
        inside = {id(parameter) for parameter in model.parameters()}
        if all(id(tensor) in inside for tensor in self.tensors):
            return self.tensors
        if self.names is not None:
            present = dict(model.named_parameters(remove_duplicate=False))
            missing = [name for name in self.names if name not in present]
            if missing:
                raise ValueError(
                    f"The model has no parameter {missing[0]!r} ({len(missing)} of {len(self.names)} averaged names "
                    "are missing). Pass a model of the same class, wrapped in the same way."
                )
            found = [present[name] for name in self.names]
        else:
            found = [parameter for parameter in model.parameters() if parameter.requires_grad]
            if len(found) != len(self.tensors):
                raise ValueError(
                    f"The model has {len(found)} trainable parameters, the average has {len(self.tensors)}. "
                    "The average was made from unnamed tensors; make it from the model to match parameters by name."
                )
        return list(found)

    def copy(self, mean: Mean, model: nn.Module | None) -> None:
        """Write ``mean`` into ``model`` for good, in place, in the parameters' own dtype."""
        self.require_not_swapped("copy_to()")
        targets = self._checked_targets(mean, model)
        with torch.no_grad():
            torch._foreach_copy_(targets, mean.tensors)

    @contextmanager
    def swapped(self, mean: Mean, model: nn.Module | None) -> Iterator[None]:
        """Hold ``mean`` in ``model`` inside the block; afterwards put back parameters and buffers, bit for bit."""
        targets = self._checked_targets(mean, model)
        holder = self.model if model is None else model
        parameters = [target.detach().clone() for target in targets]
        buffers = [] if holder is None else _buffers(holder)
        live = int(targets is self.tensors)
        self._swapped += live
        try:
            with torch.no_grad():
                torch._foreach_copy_(targets, mean.tensors)
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(targets, parameters)
                for owner, name, buffer, value in buffers:
                    owner._buffers[name] = buffer  # a forward pass may have put another tensor in its place
                    buffer.copy_(value)
            self._swapped -= live

    def state_dict(self) -> dict[str, Any]:
        """Names and shapes, by which a saved average recognises its parameters."""
        return {
            "names": None if self.names is None else list(self.names),
            "shapes": [list(tensor.shape) for tensor in self.tensors],
        }

    def require_state(self, state: dict[str, Any]) -> None:
        """Refuse a state that was saved for other parameters."""
        current = self.state_dict()
        if state["shapes"] != current["shapes"]:
            raise ValueError(
                f"The state was saved for {len(state['shapes'])} parameters of shapes {_short(state['shapes'])}; here "
                f"are {len(self.tensors)} of shapes {_short(current['shapes'])}. "
                "Load it into the model it was saved from."
            )
        if None not in (state["names"], current["names"]) and state["names"] != current["names"]:
            pairs = zip(state["names"], current["names"], strict=True)
            saved, here = next((a, b) for a, b in pairs if a != b)
            raise ValueError(
                f"The state was saved for a parameter {saved!r} where this model has {here!r}. "
                "Load it into the model it was saved from."
            )

    def _checked_targets(self, mean: Mean, model: nn.Module | None) -> list[Tensor]:
        targets = self.targets(model)
        for index, (target, tensor) in enumerate(zip(targets, mean.tensors, strict=True)):
            if target.shape != tensor.shape:
                raise ValueError(
                    f"Parameter {self.label(index)} has shape {tuple(target.shape)} in the model but was averaged with "
                    f"shape {tuple(tensor.shape)}. Pass a model of the shape that was trained."
                )
        return targets


class WeightAverage:
    """Uniform mean of the weights over every ``update()``: Polyak averaging of the iterates, or of their tail.

    ``mean = (1/n) sum_t theta_t`` over the trainable parameters, one vote per call, kept in float32 or wider. Call
    ``update()`` after ``optimizer.step()`` from the step where the tail begins. Frozen parameters and buffers are not
    averaged; re-estimate BatchNorm statistics with :func:`~flatminima.averaging.reestimate_batchnorm`.

    Args:
        model_or_params: a module, or its parameters, or its ``named_parameters()``. Only trainable ones are averaged;
            a parameter that appears twice counts once. The set is fixed now: later freezing changes nothing.

    Raises:
        TypeError: something else was given.
        ValueError: nothing in it is trainable.

    Cost: no gradient evaluation; one pass over the parameters per update; one copy of them in memory.

    Source: Polyak and Juditsky, SIAM J. Control Optim. 30(4), 1992.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> average = WeightAverage(model)
        >>> for weight in (1.0, 3.0):
        ...     _ = nn.init.constant_(model.weight, weight)
        ...     average.update()
        >>> with average.swapped():
        ...     model.weight.item()
        2.0
        >>> model.weight.item()
        3.0
    """

    def __init__(self, model_or_params: ModelOrParameters) -> None:
        self._parameters = ParameterSet(model_or_params)
        self._mean = Mean()

    @property
    def n(self) -> int:
        """How many iterates the average holds."""
        return self._mean.n

    @property
    def names(self) -> tuple[str, ...] | None:
        """Names of the averaged parameters, or None where they were given without names."""
        return self._parameters.names

    def update(self) -> None:
        """Take the current weights into the average.

        Raises:
            RuntimeError: called inside ``swapped()``.
            ValueError: a parameter changed its shape or device.
        """
        self._parameters.require_not_swapped("update()")
        self._mean.add(self._parameters.tensors)

    def tensors(self) -> tuple[Tensor, ...]:
        """A copy of the averaged tensors, float32 or wider, in the order of ``names``."""
        return tuple(tensor.clone() for tensor in self._usable().tensors)

    @contextmanager
    def swapped(self, model: nn.Module | None = None) -> Iterator[None]:
        """Hold the average in the model inside the block and restore its own weights afterwards, bit for bit.

        Buffers (BatchNorm statistics) are restored as well, so they can be re-estimated inside; they are known only
        if the average was made from a module or ``model`` is given. Costs one more copy of the parameters.

        Raises:
            RuntimeError: no update yet.
            ValueError: the average is not finite, or ``model`` does not fit it.
        """
        with self._parameters.swapped(self._usable(), model):
            yield

    def copy_to(self, model: nn.Module) -> None:
        """Write the average into ``model`` for good, in place. Frozen parameters and buffers stay as they are.

        Raises:
            RuntimeError: no update yet, or called inside ``swapped()``.
            ValueError: the average is not finite, or ``model`` does not fit it.
        """
        self._parameters.copy(self._usable(), model)

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything needed to resume, readable by ``torch.load(weights_only=True)``."""
        return {**self._parameters.state_dict(), "mean": self._mean.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state`` as if there had been no interruption.

        Raises:
            ValueError: the state belongs to other parameters. Nothing is changed then.
        """
        self._parameters.require_not_swapped("load_state_dict()")
        self._parameters.require_state(state)
        self._mean = Mean.from_state_dict(state["mean"], self._parameters.tensors)

    def _usable(self) -> Mean:
        if self._mean.n == 0:
            raise RuntimeError("There is no average yet. Call update() after an optimizer step first.")
        self._parameters.require_finite(self._mean)
        return self._mean


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


def _buffers(model: nn.Module) -> list[tuple[nn.Module, str, Tensor, Tensor]]:
    return [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]


def _short(shapes: list[list[int]]) -> str:
    shown = ", ".join(str(tuple(shape)) for shape in shapes[:4])
    return f"[{shown}{', ...' if len(shapes) > 4 else ''}]"
