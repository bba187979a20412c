"""Units that nobody reads, and units that do the same: weights that the function does not depend on.

* ``dead-unit``: all outgoing weights of a unit are zero, so that its incoming weights are arbitrary.
* ``duplicate-unit``: two units with identical incoming weights; ``(a, b) -> (a + t, b - t)`` for their outgoing weights.

Both hold on a subset of the parameters only: a small step away from zero outgoing weights makes the unit count. So nothing
follows for the Hessian, and a dead unit made live can change its inertia.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from .actions import Action, Shift
from .base import Findings, Site, Symmetry
from .groups import Group, TiedError
from .network import Network
from .permutations import running_statistics
from .sites import Slices, normal

_ALONE = frozenset({"write", "read", "elementwise", "batch-norm"})


def find(network: Network) -> Findings:
    """Both kinds, for every group of units that only layers read."""
    dead: list[Site] = []
    duplicate: list[Site] = []
    for group in network.standing.groups:
        if not (group.writers and group.readers):
            continue
        try:
            written, read = network.standing.slices_of(group.roots)
        except (TiedError, ValueError):
            continue  # unit-permutation has said why
        if group.categories <= _ALONE:
            unread = _all_zero(read, network)
            if bool(unread.any()):
                parts = tuple(s.of(unread.nonzero().reshape(-1)) for s in written)
                dead.append(_Arbitrary(_name(group, unread), parts, tuple(network.typical(s.name) for s in parts)))
        if group.categories <= _ALONE | {"norm"}:
            twins = _twins(group, written, network)
            if twins:
                chosen = torch.zeros(len(group.roots), dtype=torch.bool)
                chosen[torch.tensor(twins).reshape(-1)] = True
                sizes = tuple(network.typical(s.name) for s in read)
                duplicate.append(_Traded(_name(group, chosen), tuple(read), tuple(twins), sizes))
    proposed = [Symmetry.of("dead-unit", dead), Symmetry.of("duplicate-unit", duplicate)]
    return Findings(tuple(s for s in proposed if s.places))


def _name(group: Group, chosen: Tensor) -> str:
    units = chosen.nonzero().reshape(-1).tolist()
    which = ", ".join(str(unit) for unit in units[:4]) + (f" and {len(units) - 4} more" if len(units) > 4 else "")
    return f"{group.name} (units {which})"


def _values(part: Slices, network: Network) -> Tensor:
    tensors = network.tape.buffers if part.name in network.tape.buffers else None
    value = tensors[part.name] if tensors else network.tape.parameters[part.name].tensor
    return value.reshape(-1)[part.positions]


def _all_zero(read: list[Slices], network: Network) -> Tensor:
    return torch.stack([(_values(s, network) == 0).all(1) for s in read]).all(0)


def _twins(group: Group, written: list[Slices], network: Network) -> list[tuple[int, int]]:
    """Pairs of units with identical incoming weights."""
    rows = torch.cat([_values(s, network) for s in (*written, *running_statistics(group, network))], 1)
    found: dict[bytes, list[int]] = defaultdict(list)
    for unit, row in enumerate(rows):
        found[row.contiguous().numpy().tobytes()].append(unit)
    return [(units[0], other) for units in found.values() for other in units[1:]]


@dataclass(frozen=True, eq=False)
class _Arbitrary:
    """Something is added to every entry of these slices."""

    name: str
    slices: tuple[Slices, ...]
    sizes: tuple[float, ...]

    def sample(self, generator: torch.Generator, max_scale: float) -> tuple[Action, ...]:
        actions = []
        for part, size in zip(self.slices, self.sizes, strict=True):
            amount = torch.zeros(math.prod(part.shape), dtype=torch.float64)
            amount[part.positions] = normal(generator, *part.positions.shape) * (size * math.log(max_scale))
            actions.append(Shift(part.name, amount.reshape(part.shape)))
        return tuple(actions)


@dataclass(frozen=True, eq=False)
class _Traded:
    """What is added to the outgoing weights of one unit is taken from its twin's."""

    name: str
    slices: tuple[Slices, ...]
    twins: tuple[tuple[int, int], ...]
    sizes: tuple[float, ...]

    def sample(self, generator: torch.Generator, max_scale: float) -> tuple[Action, ...]:
        actions = []
        for part, size in zip(self.slices, self.sizes, strict=True):
            amount = torch.zeros(math.prod(part.shape), dtype=torch.float64)
            for one, other in self.twins:
                t = normal(generator, part.positions.shape[1]) * (size * math.log(max_scale))
                amount[part.positions[one]] += t
                amount[part.positions[other]] -= t
            actions.append(Shift(part.name, amount.reshape(part.shape)))
        return tuple(actions)
