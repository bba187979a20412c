"""Sites made of elementary actions: where a symmetry acts in one network, and how random numbers become a map."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .actions import Action, Scale

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
