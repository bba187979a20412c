"""What every average of weights has in common: a schedule of updates, a way into a model and out, and a state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flatminima.averaging.mean import Mean
from flatminima.averaging.parameters import BufferPolicy, ModelOrParameters, ParameterSet

_LOOK = 1000  # updates between two looks for replaced parameters, which walk through the whole model


class WeightAverage(ABC):
    """Base of the averages that look at nothing but the steps: SWA, EMA, LAWA and the tail average.

    They share these arguments. ``update()`` is called after every ``optimizer.step()``; the first call is step 0, and
    the steps ``start``, ``start + every``, ... count.

    Args:
        model_or_params: a module, or its parameters, or its ``named_parameters()``. Only trainable ones are averaged;
            a parameter that appears twice counts once. The set is fixed now: one that is frozen later is still averaged, and
            one that is added or unfrozen later never is and keeps its value where the average is written. Make a new average
            after changing what trains.
        start: step of the first update that counts.
        every: count one step in so many.
        dtype: keep the average at least this wide; float32 or the parameter's own dtype if that is wider by default.
        device: keep the average there, for example ``"cpu"`` to spare the accelerator's memory. The update then waits
            for the copy.
        buffers: of the model, such as BatchNorm statistics. "keep" (default): those of the model that receives the
            average stay as they are; re-estimate BatchNorm's with :func:`~flatminima.averaging.reestimate_batchnorm`.
            "copy": a model that receives the average gets those of the averaged one as they are then. "average":
            floating-point buffers are averaged like parameters, the others copied.

    With FSDP2 (``fully_shard``) make the average after sharding, from the module; every process averages its shards
    and saves its own state, and all processes make the same calls. DDP needs nothing: every process has the same average.

    Raises:
        TypeError, ValueError: nothing trainable, an unknown policy, a count that is no count.
    """

    def __init__(
        self,
        model_or_params: ModelOrParameters,
        *,
        start: int = 0,
        every: int = 1,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        buffers: BufferPolicy = "keep",
    ) -> None:
        require_count("start", start, 0, "the step of the first update that counts")
        require_count("every", every, 1, "a number of steps")
        self.start = start
        self.every = every
        self._like = Mean(dtype=dtype, device=device)
        self._parameters = ParameterSet(model_or_params, buffers=buffers)
        self._step = -1

    @property
    @abstractmethod
    def n(self) -> int:
        """How many iterates the average holds."""

    @abstractmethod
    def _take(self, values: list[Tensor]) -> None:
        """Take in one iterate."""

    @abstractmethod
    def _average(self) -> Mean:
        """The average, asked for only while ``n > 0``."""

    @abstractmethod
    def _state(self) -> dict[str, Any]:
        """What the subclass needs to resume."""

    @abstractmethod
    def _restore(self, state: dict[str, Any], like: list[Tensor]) -> None:
        """Continue from what ``_state`` gave; raises before it changes anything."""

    @abstractmethod
    def _config(self) -> dict[str, Any]:
        """The settings that cannot change halfway."""

    @property
    def names(self) -> tuple[str, ...] | None:
        """Names of what is averaged, or None where parameters were given without names."""
        return self._parameters.names

    @property
    def step(self) -> int:
        """Step of the latest ``update()``; -1 before the first."""
        return self._step

    def update(self) -> None:
        """Take the current weights into the average, if it is their turn. Call it after every ``optimizer.step()``.

        Raises:
            RuntimeError: called inside ``swapped()`` of this or another average, or while the weights are perturbed.
            ValueError: a parameter changed its shape, device or dtype. Nothing is changed then. So is a parameter that was
                replaced by another object, at the latest when the average is used: updates look for that once in a while.
        """
        self._parameters.require_not_swapped("update()")
        if (self._step + 1) % _LOOK == 0:
            self._parameters.require_unreplaced()
        late = self._step + 1 - self.start
        if late >= 0 and late % self.every == 0:
            self._take(self._parameters.values())
        self._step += 1

    def tensors(self) -> tuple[Tensor, ...]:
        """A copy of the averaged tensors, float32 or wider, in the order of ``names``; sharded ones as DTensors.

        Raises:
            RuntimeError: no update has counted yet.
            ValueError: the average is not finite, or a parameter was replaced.
        """
        self._parameters.require_unreplaced()
        return self._parameters.export(self._usable())

    @contextmanager
    def swapped(self, model: nn.Module | None = None) -> Iterator[None]:
        """Hold the average in the model inside the block and restore its own weights afterwards, bit for bit.

        Buffers (BatchNorm statistics) are restored as well, so they can be re-estimated inside; they are known only
        if the average was made from a module or ``model`` is given. Costs one more copy of the parameters.

        Raises:
            RuntimeError: no update has counted yet.
            ValueError: the average is not finite, or ``model`` does not fit it.
        """
        with self._parameters.swapped(self._usable(), model):
            yield

    def copy_to(self, model: nn.Module) -> None:
        """Write the average into ``model`` for good, in place. Frozen parameters stay as they are.

        Raises:
            RuntimeError: no update has counted yet, or called where :meth:`update` may not be.
            ValueError: the average is not finite, or ``model`` does not fit it.
        """
        self._parameters.copy(self._usable(), model)

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything needed to resume, readable by ``torch.load(weights_only=True)``."""
        return {**self._parameters.state_dict(), "config": self._settings(), "step": self._step, **self._state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state``, to the bit as if there had been no interruption.

        Raises:
            ValueError: the state has other settings or other parameters, or is no state of this average. Nothing is
                changed then.
        """
        self._parameters.require_not_swapped("load_state_dict()")
        require_state(type(self).__name__, state, self.state_dict(), self._settings())
        self._parameters.require_state(state)
        self._restore(state, self._parameters.values())
        self._step = state["step"]

    def _settings(self) -> dict[str, Any]:
        return {"start": self.start, "every": self.every, "buffers": self._parameters.buffers, **self._config()}

    def _usable(self) -> Mean:
        if self.n == 0:
            first = f" of step {self.start}" if self.start > self._step else ""
            raise RuntimeError(f"There is no average yet. Call update() after the optimizer step{first} first.")
        average = self._average()
        self._parameters.require_finite(average)
        return average


def require_count(name: str, value: object, least: int, meaning: str) -> None:
    """Refuse what is not an int of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, {meaning}; got {value!r}.")
    if value < least:
        raise ValueError(f"{name}={value} must be at least {least}: it is {meaning}.")


def require_state(kind: str, state: dict[str, Any], current: dict[str, Any], config: dict[str, Any]) -> None:
    """Refuse a state that lacks an entry or was saved with other settings."""

    def require(missing: list[str]) -> None:
        if missing:
            raise ValueError(f"This is not a state saved by {kind}: it has no {', '.join(map(repr, sorted(missing)))}.")

    require([name for name in current if name not in state])
    for name, value in current.items():
        if isinstance(value, int | float) and not isinstance(state[name], type(value) | int):
            raise ValueError(
                f"This is not a state saved by {kind}: its {name!r} is {state[name]!r}, expected a number."
            )
    if state["config"] != config:
        differing = [name for name in config if state["config"].get(name) != config[name]]
        saved, here = (", ".join(f"{name}={c.get(name)!r}" for name in differing) for c in (state["config"], config))
        raise ValueError(
            f"The state was saved with {saved}; this {kind} has {here}. "
            f"A rule cannot change halfway: construct {kind} with the saved settings."
        )
    nested = {name: part for name, part in current.items() if isinstance(part, dict)}
    require([f"{name}.{key}" for name, part in nested.items() for key in part if key not in state[name]])
