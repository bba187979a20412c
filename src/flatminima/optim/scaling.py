"""A ``GradScaler`` between an optimiser and its base, which it takes for two.

The scaler notes by ``id(optimizer)`` whether gradients were unscaled already. The caller knows the wrapper, the update is the
base's: what was noted for the one counts for the other, or gradients that were unscaled for clipping would be unscaled twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Scaling:
    """An enabled scaler, and the two names of one optimiser.

    Args:
        scaler: the ``GradScaler``.
        wrapper: what the caller may have given to ``scaler.unscale_``.
        base: what steps.
    """

    def __init__(self, scaler: Any, wrapper: torch.optim.Optimizer, base: torch.optim.Optimizer) -> None:
        self._scaler, self._wrapper, self._base = scaler, id(wrapper), id(base)

    @classmethod
    def of(cls, scaler: Any, wrapper: Any) -> Scaling | None:
        """None where nothing is scaled."""
        return None if scaler is None or not scaler.is_enabled() else cls(scaler, wrapper, wrapper.base)

    @property
    def unit(self) -> float:
        """What a gradient of a scaled loss has to be multiplied by to be the loss's."""
        return 1.0 / float(self._scaler.get_scale())

    def unscaled(self) -> bool:
        """Whether the caller has unscaled the gradients that lie in ``.grad``."""
        states = self._states()
        if _stage(states, self._wrapper) == "UNSCALED" and _stage(states, self._base) == "READY":
            states[self._base] = states.pop(self._wrapper)
        return _stage(states, self._base) == "UNSCALED"

    def forget(self) -> None:
        """The next gradients are not unscaled; whether those before were finite still counts in ``scaler.update()``."""
        states = self._states()
        for known in (self._wrapper, self._base):
            if _stage(states, known) == "UNSCALED":
                states[object()] = states.pop(known)

    def scale(self, loss: Tensor) -> Tensor:
        """The loss to call ``backward`` on."""
        scaled: Tensor = self._scaler.scale(loss)
        return scaled

    def step(self, base: torch.optim.Optimizer) -> None:
        """The base's step along the gradients without their scale."""
        self._scaler.step(base)

    def look(self, base: torch.optim.Optimizer) -> None:
        """Let the scaler see gradients that are not finite; it has seen those that were unscaled."""
        if not self.unscaled():
            self._scaler.unscale_(base)

    def _states(self) -> Any:
        return getattr(self._scaler, "_per_optimizer_states", {})


def unit_of(scaling: Scaling | None) -> float:
    """What the gradients in ``.grad`` have to be multiplied by to be the loss's."""
    return 1.0 if scaling is None or scaling.unscaled() else scaling.unit


def _stage(states: Any, key: int) -> str:
    return str(states[key]["stage"].name) if key in states else "READY"
