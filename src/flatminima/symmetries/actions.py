"""How named tensors of a model change: the few elementary moves that every symmetry is made of.

Positions are row-major indices into the flattened tensor. An action sees float64 values, returns new ones, and knows its
inverse; `Member` applies a sequence of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Action(Protocol):
    """A change of some named tensors (parameters or buffers) of a model."""

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors that the action reads or changes, by their names in the model."""
        ...

    def __call__(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The new values of the tensors that change; `values` holds all of `names` in float64 and is left untouched.

        Raises ValueError where a value does not have the shape that the action was made for.
        """
        ...

    def inverse(self) -> Action:
        """The action that undoes this one."""
        ...


@dataclass(frozen=True, eq=False)
class Scale:
    """``tensor -> factor * tensor``, entry by entry.

    Args:
        name: the tensor, by its name in the model.
        factor: nonzero float64 tensor that broadcasts to the tensor's shape.
    """

    name: str
    factor: Tensor

    @property
    def names(self) -> tuple[str, ...]:
        """The one tensor that changes."""
        return (self.name,)

    def __call__(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The scaled tensor; ValueError where the factor does not fit its shape."""
        value = values[self.name]
        if not _broadcasts(self.factor, value):
            raise _misfit(self.name, value, f"scales it by a factor of shape {tuple(self.factor.shape)}")
        return {self.name: value * self.factor.to(value.device)}

    def inverse(self) -> Scale:
        """Division by the same factor."""
        return Scale(self.name, 1.0 / self.factor)


@dataclass(frozen=True, eq=False)
class Shift:
    """``tensor -> tensor + amount``.

    Args:
        name: the tensor, by its name in the model.
        amount: float64 tensor that broadcasts to the tensor's shape.
    """

    name: str
    amount: Tensor

    @property
    def names(self) -> tuple[str, ...]:
        """The one tensor that changes."""
        return (self.name,)

    def __call__(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The shifted tensor; ValueError where the amount does not fit its shape."""
        value = values[self.name]
        if not _broadcasts(self.amount, value):
            raise _misfit(self.name, value, f"adds an amount of shape {tuple(self.amount.shape)}")
        return {self.name: value + self.amount.to(value.device)}

    def inverse(self) -> Shift:
        """Subtraction of the same amount."""
        return Shift(self.name, -self.amount)


@dataclass(frozen=True, eq=False)
class Permute:
    """``tensor.flatten()[target] = tensor.flatten()[source]``: entries change places.

    Args:
        name: the tensor, by its name in the model.
        shape: of the tensor.
        target: positions that are written, (m,).
        source: positions that are read, the same set in another order, (m,).
    """

    name: str
    shape: tuple[int, ...]
    target: Tensor
    source: Tensor

    @property
    def names(self) -> tuple[str, ...]:
        """The one tensor that changes."""
        return (self.name,)

    def __call__(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The rearranged tensor; ValueError where it has another shape."""
        flat = _flat(values[self.name], self.name, self.shape)
        moved = flat.clone()
        moved[self.target.to(flat.device)] = flat[self.source.to(flat.device)]
        return {self.name: moved.reshape(self.shape)}

    def inverse(self) -> Permute:
        """Back to the old places."""
        return Permute(self.name, self.shape, self.source, self.target)


@dataclass(frozen=True, eq=False)
class Mix:
    """``tensor.flatten()[positions[i]] = sum_j matrix[i, j] * tensor.flatten()[positions[j]]``: a linear map of slices.

    Args:
        name: the tensor, by its name in the model.
        shape: of the tensor.
        positions: (units, m): the m entries of each unit, in the same order for all.
        matrix: (units, units), float64, invertible.
        undone: the inverse of `matrix`.
    """

    name: str
    shape: tuple[int, ...]
    positions: Tensor
    matrix: Tensor
    undone: Tensor

    @property
    def names(self) -> tuple[str, ...]:
        """The one tensor that changes."""
        return (self.name,)

    def __call__(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensor with the slices mixed; ValueError where it has another shape."""
        flat = _flat(values[self.name], self.name, self.shape)
        positions = self.positions.to(flat.device)
        mixed = flat.clone()
        mixed[positions] = self.matrix.to(flat.device) @ flat[positions]
        return {self.name: mixed.reshape(self.shape)}

    def inverse(self) -> Mix:
        """The inverse matrix on the same slices."""
        return Mix(self.name, self.shape, self.positions, self.undone, self.matrix)


@dataclass(frozen=True, eq=False)
class Feed:
    """``target.flatten()[to[o]] += sum_i source.flatten()[positions[o, i]] * amount[i]``: weights move into a bias.

    Args:
        target: the bias, by its name in the model.
        source: the weight.
        shapes: of both, in this order.
        to: (outputs,) positions in the target.
        positions: (outputs, m) positions in the source.
        amount: (m,) float64.
    """

    target: str
    source: str
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    to: Tensor
    positions: Tensor
    amount: Tensor

    @property
    def names(self) -> tuple[str, ...]:
        """The bias, which changes, and the weight, which is read."""
        return (self.target, self.source)

    def __call__(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The new bias; ValueError where a shape is another."""
        bias = _flat(values[self.target], self.target, self.shapes[0]).clone()
        weight = _flat(values[self.source], self.source, self.shapes[1])
        bias[self.to.to(bias.device)] += weight[self.positions.to(bias.device)] @ self.amount.to(bias.device)
        return {self.target: bias.reshape(self.shapes[0])}

    def inverse(self) -> Feed:
        """The same amount taken out again; right while the weight is what it was."""
        return Feed(self.target, self.source, self.shapes, self.to, self.positions, -self.amount)


def _broadcasts(small: Tensor, value: Tensor) -> bool:
    return small.ndim <= value.ndim and all(
        s in (1, v) for s, v in zip(reversed(small.shape), reversed(value.shape), strict=False)
    )


def _flat(value: Tensor, name: str, shape: tuple[int, ...]) -> Tensor:
    if tuple(value.shape) != shape:
        raise _misfit(name, value, f"was made for shape {shape}")
    return value.reshape(-1)


def _misfit(name: str, value: Tensor, what: str) -> ValueError:
    return ValueError(
        f"'{name}' has shape {tuple(value.shape)}, but this symmetry {what}: it was found in a different network; find the "
        "symmetries of this one"
    )
