"""What is moved and updated: the parameters of the base optimiser as this rank holds them, or their masters."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flatminima.optim.masters import Masters
from flatminima.optim.wrapper import named
from flatminima.sharding import is_sharded, shard_like, sharded_like
from flatminima.vectors import Kind, dense, local, real


class Held(NamedTuple):
    """Some parameters as this rank holds them.

    Attributes:
        values: the tensors to move: the parameters themselves, their shards, or their masters; complex ones as pairs.
        gradients: theirs, in the dense layout and the precision of the values.
        kind: what the values are like, where they are ordinary tensors.
    """

    values: list[Tensor]
    gradients: list[Tensor]
    kind: Kind | None


def whole(held: Tensor, parameter: Tensor) -> Tensor:
    """What this rank holds of a vector of the parameter's, as a tensor of the parameter's kind: sharded, or complex."""
    return sharded_like(torch.view_as_complex(held) if parameter.is_complex() else held, parameter)


def part_of(vector: Tensor, parameter: Tensor) -> Tensor:
    """A copy of what this rank holds of a vector of the parameter's: the inverse of :func:`whole`."""
    mine = local(vector) if is_sharded(vector) else shard_like(vector, parameter)
    return real(mine.detach()).to(local(parameter).device, copy=True)


class Weights:
    """The parameters of an optimiser.

    Args:
        base: the optimiser.
        master: keep half-precision parameters in single precision.

    Attributes:
        masters: their copies, or None.
    """

    def __init__(self, base: torch.optim.Optimizer, master: bool) -> None:
        self._base = base
        self.masters = Masters(base) if master else None
        self._kind = Kind([])

    def all(self) -> list[Tensor]:
        """All parameters, in the order of the groups."""
        groups = self._base.param_groups
        return groups[0]["params"] if len(groups) == 1 else [p for group in groups for p in group["params"]]

    def with_gradients(self) -> list[Tensor]:
        """Those that have one now."""
        return [p for p in self.all() if p.grad is not None]

    def hold(self, parameters: list[Tensor], gradients: bool = True, keep: bool = False) -> Held:
        """What this rank holds of some parameters and, unless they are not asked for, of their gradients.

        Args:
            parameters: each has a gradient, if gradients are asked for.
            gradients: whether they are.
            keep: the gradients will be changed in place, and the base has to see that.
        """
        found: list[Any] = [p.grad for p in parameters] if gradients else []
        held = parameters if self.masters is None else self.masters.of(parameters)
        if not self._kind.of(held):  # they nearly always are those of the step before
            if any(p.is_meta for p in held):
                raise ValueError(
                    "parameters on the meta device have no values: materialise the model before the first step"
                )
            self._kind = Kind(held)
        kind = self._kind if self._kind.ordinary else None
        if kind is None or not all([g.layout is torch.strided for g in found]):
            for i, g in enumerate(found):
                whole = dense(g)
                if keep and whole is not g:
                    parameters[i].grad = whole
                found[i] = real(local(whole))
        if self.masters is not None:
            found = [g.float() if g.dtype.itemsize < 4 else g for g in found]
        return Held(held if kind is not None else [real(local(p)) for p in held], found, kind)

    def follow(self) -> None:
        """Take over what was done to half-precision parameters since the last step."""
        if self.masters is not None:
            self.masters.follow(self.all())

    def moved(self, parameters: list[Tensor]) -> None:
        """The values changed, and the parameters follow."""
        if self.masters is not None:
            self.masters.publish(parameters)

    def why(self, length: float) -> str:
        """Which gradient it is that is not finite."""
        for name, p in named(self._base.param_groups):
            if p.grad is not None and not bool(torch.isfinite(local(dense(p.grad))).all()):
                kind = "NaN" if bool(torch.isnan(local(dense(p.grad))).any()) else "infinite"
                return f"the gradient of {name} is {kind}"
        return f"the norm of the gradients is {length}"
