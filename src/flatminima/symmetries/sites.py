"""Sites made of elementary actions: where a symmetry acts in one network, and how random numbers become a map."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .actions import Action, Mix, Permute, Scale, Shift

Draw = Callable[[torch.Generator, float, int], Tensor]
"""(generator, max_scale, units) -> one nonzero scale per unit, (units,), float64, on the CPU."""


def uniform(generator: torch.Generator, *shape: int) -> Tensor:
    """Uniform in [0, 1): float64, on the CPU."""
    return torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float64).cpu()


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Standard normal: float64, on the CPU."""
    return torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float64).cpu()


def log_uniform(generator: torch.Generator, max_scale: float, units: int) -> Tensor:
    """One positive scale per unit, log-uniform in ``[1/max_scale, max_scale]``: shape (units,), float64, on the CPU."""
    return torch.exp((2.0 * uniform(generator, units) - 1.0) * math.log(max_scale))


def log_uniform_shared(generator: torch.Generator, max_scale: float, units: int) -> Tensor:
    """One positive scale for all units, log-uniform in ``[1/max_scale, max_scale]``: shape (units,), float64, CPU."""
    return log_uniform(generator, max_scale, 1).expand(units)


def log_uniform_signed(generator: torch.Generator, max_scale: float, units: int) -> Tensor:
    """As `log_uniform`, each with a random sign."""
    return log_uniform(generator, max_scale, units) * signs(generator, max_scale, units)


def signs(generator: torch.Generator, max_scale: float, units: int) -> Tensor:
    """Random signs, at least one of them -1: shape (units,), float64, on the CPU."""
    drawn = torch.where(uniform(generator, units) < 0.5, -1.0, 1.0)
    if units and bool((drawn > 0).all()):
        drawn[0] = -1.0
    return drawn


@dataclass(frozen=True, eq=False)
class Entries:
    """How the entries of one tensor follow the scales of a site: ``entry -> d[unit of the entry] ** power * entry``.

    Args:
        name: the tensor, by its name in the model.
        unit: int64 tensor that broadcasts to the tensor's shape: the unit that each entry belongs to, -1 for none.
        power: +1 where a unit is written, -1 where it is read by a layer that is linear in it.
    """

    name: str
    unit: Tensor
    power: float


@dataclass(frozen=True, eq=False)
class Rescaling:
    """A site of a diagonal symmetry ``theta' = D theta``: every entry is multiplied by a power of its unit's scale.

    If ``f(D theta) = f(theta)`` for every theta then ``g' = D^-1 g`` and ``H' = D^-1 H D^-1``.

    Args:
        name: for people, e.g. ``'fc1 -> fc2'``.
        units: how many units the site has.
        entries: the tensors that change.
        draw: scales at random, e.g. `log_uniform`.
    """

    name: str
    units: int
    entries: tuple[Entries, ...]
    draw: Draw

    def sample(self, generator: torch.Generator, max_scale: float) -> tuple[Action, ...]:
        """The actions for scales drawn at random."""
        return self.actions(self.draw(generator, max_scale, self.units))

    def actions(self, scales: Tensor) -> tuple[Action, ...]:
        """The actions for given nonzero scales, shape (units,)."""
        if scales.shape != (self.units,):
            raise ValueError(f"site '{self.name}' has {self.units} units; got scales of shape {tuple(scales.shape)}")
        padded = torch.cat([scales.double(), torch.ones(1, dtype=torch.float64)])  # index -1: no unit
        return tuple(Scale(e.name, padded[e.unit] ** e.power) for e in self.entries)


@dataclass(frozen=True, eq=False)
class Slices:
    """The entries of one tensor that belong to each of several units.

    Attributes:
        name: the tensor, by its name in the model.
        shape: of the tensor.
        positions: (units, m): row-major positions of the m entries of each unit, in the same order for all.
    """

    name: str
    shape: tuple[int, ...]
    positions: Tensor

    def of(self, units: Tensor) -> Slices:
        """Those of some units, in the given order."""
        return Slices(self.name, self.shape, self.positions[units])


def slices(name: str, shape: tuple[int, ...], unit: Tensor, units: int) -> Slices | None:
    """The entries of each unit; None where no entry belongs to any of them.

    Args:
        name: the tensor.
        shape: of the tensor.
        unit: int64, broadcasts to the shape: the unit of each entry, -1 for none.
        units: how many there are.

    Raises:
        ValueError: the units have different numbers of entries, so that one cannot take the place of another.
    """
    unit = unit.reshape((1,) * (len(shape) - unit.ndim) + tuple(unit.shape))
    varying = [axis for axis, size in enumerate(unit.shape) if size > 1]
    axis = varying[0] if len(varying) == 1 else None
    flat = (unit if axis is not None else unit.expand(shape)).reshape(-1)
    counts = torch.bincount(flat[flat >= 0], minlength=units)
    if not bool(counts.any()):
        return None
    if not bool((counts == counts[0]).all()):
        raise ValueError(f"its units have different shares of '{name}'")
    order = torch.argsort(flat, stable=True)[-int(counts.sum()) :]
    if axis is not None:  # whole rows or columns: no need to sort their elements
        places = torch.arange(math.prod(shape)).reshape(shape).movedim(axis, 0).reshape(shape[axis], -1)
        positions = places[order].reshape(units, -1)
        return Slices(name, shape, positions if int(counts[0]) == 1 else positions.sort(1).values)
    return Slices(name, shape, order.reshape(units, -1))


@dataclass(frozen=True, eq=False)
class Block:
    """Units that are mixed by one matrix A: what is written takes A, what reads it A^-T, so that the product stays.

    Attributes:
        units: how many.
        written, read: slices of them.
        draw: (generator, max_scale, units) -> A and its inverse.
    """

    units: int
    written: tuple[Slices, ...]
    read: tuple[Slices, ...]
    draw: Callable[[torch.Generator, float, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Mixing:
    """A site of a symmetry that mixes units: slices of some tensors times A, of others times A^-T.

    Args:
        name: for people.
        blocks: sets of units with a matrix of their own.
    """

    name: str
    blocks: tuple[Block, ...]

    def sample(self, generator: torch.Generator, max_scale: float) -> tuple[Action, ...]:
        """The actions for matrices drawn at random."""
        actions: list[Action] = []
        for block in self.blocks:
            a, undone = block.draw(generator, max_scale, block.units)
            actions += [Mix(s.name, s.shape, s.positions, a, undone) for s in block.written]
            actions += [Mix(s.name, s.shape, s.positions, undone.T, a.T) for s in block.read]
        return tuple(actions)


@dataclass(frozen=True, eq=False)
class Permuting:
    """A site where units of equal standing change places.

    Args:
        name: for people.
        units: how many.
        slices: of every tensor that holds something of theirs.
    """

    name: str
    units: int
    slices: tuple[Slices, ...]

    def sample(self, generator: torch.Generator, max_scale: float) -> tuple[Action, ...]:
        """The actions of a random permutation, not the identity."""
        order = torch.argsort(uniform(generator, self.units))
        if bool((order == torch.arange(self.units)).all()):
            order = order.roll(1)
        return self.actions(order)

    def actions(self, order: Tensor) -> tuple[Action, ...]:
        """Unit i becomes what unit ``order[i]`` was."""
        return tuple(
            Permute(s.name, s.shape, s.positions.reshape(-1), s.positions[order].reshape(-1)) for s in self.slices
        )


@dataclass(frozen=True, eq=False)
class Shifting:
    """A site where all units of a set are shifted alike: one vector is added to the slices of each of them.

    Args:
        name: for people.
        slices: the tensor and its units.
        size: of a typical entry.
    """

    name: str
    slices: Slices
    size: float

    def sample(self, generator: torch.Generator, max_scale: float) -> tuple[Action, ...]:
        """The actions of a normal vector, of ``log(max_scale)`` typical entries."""
        amount = torch.zeros(math.prod(self.slices.shape), dtype=torch.float64)
        vector = normal(generator, self.slices.positions.shape[1]) * (self.size * math.log(max_scale))
        amount[self.slices.positions] = vector
        return (Shift(self.slices.name, amount.reshape(self.slices.shape)),)


def orthogonal(generator: torch.Generator, units: int) -> Tensor:
    """A random orthogonal matrix (Haar measure): (units, units), float64, on the CPU."""
    q, r = torch.linalg.qr(normal(generator, units, units))
    haar: Tensor = q * r.diagonal().sign()
    return haar


def invertible(generator: torch.Generator, max_scale: float, units: int) -> tuple[Tensor, Tensor]:
    """A random matrix with singular values log-uniform in ``[1/max_scale, max_scale]``, and its inverse."""
    u, s, v = orthogonal(generator, units), log_uniform(generator, max_scale, units), orthogonal(generator, units)
    return u @ (s[:, None] * v), (v.T / s) @ u.T


def diagonal(generator: torch.Generator, max_scale: float, units: int) -> tuple[Tensor, Tensor]:
    """A random diagonal matrix with entries of either sign, and its inverse."""
    scales = log_uniform_signed(generator, max_scale, units)
    return torch.diag(scales), torch.diag(1.0 / scales)


def rotations(generator: torch.Generator, max_scale: float, units: int) -> tuple[Tensor, Tensor]:
    """A random scaled rotation of each consecutive pair of units, and its inverse; these commute with rotary positions."""
    angle, scale = uniform(generator, units // 2) * 2 * math.pi, log_uniform(generator, max_scale, units // 2)
    turns = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    a = torch.block_diag(*(turns.permute(2, 0, 1) * scale[:, None, None]))
    undone = torch.block_diag(*(turns.permute(2, 1, 0) / scale[:, None, None]))
    return a, undone


def scaled_pairs(generator: torch.Generator, max_scale: float, units: int) -> tuple[Tensor, Tensor]:
    """As `diagonal`, with one entry for each consecutive pair of units."""
    scales = log_uniform_signed(generator, max_scale, units // 2).repeat_interleave(2)
    return torch.diag(scales), torch.diag(1.0 / scales)
