"""Residual streams: spaces that layers only write to, add to and read from.

Nothing in such a network singles out a basis of the stream. All that writes to it may be multiplied by A, and all that reads
it by ``A^-1`` from the right:

* without a normalisation A is any invertible matrix, and the map is linear in the parameters;
* a layer or RMS normalisation commutes with orthogonal matrices only; layer normalisation moreover removes the mean, so that
  A has to keep the vector of ones. Behind a normalisation with gain g and bias b, with ``M = diag(g) Q diag(1/g)``: readers
  are multiplied by ``M^-1``, b by M, and g stays. That is not linear in (g, b, W) jointly, so no law for all of the Hessian
  follows; without a gain it is orthogonal.

A tied embedding writes to the stream and reads it as well: both uses agree if the gain in between is constant, else the map is
refused. Layers in a row without an activation are such a space too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .actions import Action, Mix
from .base import Findings, Site, Symmetry
from .classes import FIXED, pairs, position_among
from .groups import NORMS, Group, TiedError, brief, covers
from .network import Network
from .parameters import Entry
from .records import NormUse
from .sites import Slices, invertible, orthogonal, slices


def find(network: Network) -> Findings:
    """Every stream."""
    found: list[_Stream] = []
    refused: list[tuple[str, str]] = []
    for group in network.raw.groups:
        linear = group.categories <= {"write", "read", "scaled", "norm"} and group.categories & {"read", *NORMS}
        if len(group.roots) > 1 and "write" in group.categories and linear and _is_stream(group, network):
            try:
                found.append(_stream(group, network))
            except (TiedError, ValueError) as reason:
                refused.append((group.name, f"residual-stream: {reason}"))
    if not found:
        return Findings((), tuple(refused))
    places: list[Site] = list(found)
    is_linear = all(site.is_linear for site in found)
    is_orthogonal = is_linear and all(site.orthogonal for site in found)
    form = "linear" if is_linear else "nonlinear"
    return Findings((Symmetry.of("residual-stream", places, form=form, orthogonal=is_orthogonal),), tuple(refused))


@dataclass(frozen=True, eq=False)
class _Part:
    """Slices of a tensor, and which matrix they take: ``A``, ``A^-T``, or, behind a gain g, ``M`` or ``M^-T``."""

    slices: Slices
    matrix: str
    gain: Tensor | None = None

    def agrees(self, other: _Part) -> bool:
        """Whether both do the same to the same elements."""
        gains = [gain for gain in (self.gain, other.gain) if gain is not None]
        same_gain = not gains or (len(gains) == 2 and torch.equal(*gains))
        return self.matrix == other.matrix and same_gain and torch.equal(self.slices.positions, other.slices.positions)


@dataclass(frozen=True, eq=False)
class _Stream:
    name: str
    units: int
    parts: tuple[_Part, ...]
    orthogonal: bool
    keeps_ones: bool
    is_linear: bool  # not where a gain comes in between, even if its present value is constant

    def sample(self, generator: torch.Generator, max_scale: float) -> tuple[Action, ...]:
        if self.orthogonal:
            a = _keeping_ones(generator, self.units) if self.keeps_ones else orthogonal(generator, self.units)
            undone = a.T
        else:
            a, undone = invertible(generator, max_scale, self.units)
        actions = []
        for part in self.parts:
            matrix, inverse = (a, undone) if part.matrix in ("A", "M") else (undone.T, a.T)
            if part.gain is not None:
                g = part.gain if part.matrix == "M" else 1.0 / part.gain
                matrix, inverse = g[:, None] * matrix / g, g[:, None] * inverse / g
            actions.append(Mix(part.slices.name, part.slices.shape, part.slices.positions, matrix, inverse))
        return tuple(actions)


def _keeping_ones(generator: torch.Generator, units: int) -> Tensor:
    """A random orthogonal matrix Q with ``Q 1 = 1``."""
    basis: Tensor = torch.linalg.qr(
        torch.cat([torch.ones(units, 1, dtype=torch.float64), orthogonal(generator, units)[:, 1:]], 1)
    ).Q
    inner = torch.eye(units, dtype=torch.float64)
    inner[1:, 1:] = orthogonal(generator, units - 1)
    return basis @ inner @ basis.T


@dataclass(frozen=True, eq=False)
class _Behind:
    """The units behind a normalisation of a stream: their classes in the order of the stream, whether a gain comes before them,
    and the gain unless it is constant, so that it commutes with everything."""

    roots: Tensor
    is_gained: bool
    gain: Tensor | None


def _stream(group: Group, network: Network) -> _Stream:
    norms = [use for use in network.flow.norms if _reads(use, group, network)]
    behind = [_behind(use, group, network) for use in norms]
    parts: list[_Part] = []
    for name in network.raw.uses_of:
        parts += _agreed(name, group, behind, network)
    keeps_ones = any(use.norm.centred for use in norms)
    ends = tuple(
        dict.fromkeys([*(use.call.module or network.tape.describe(use.call) for use in norms), *group.readers])
    )
    return _Stream(
        f"{brief(group.writers)} -> {brief(ends)}",
        len(group.roots),
        tuple(parts),
        bool(norms),
        keeps_ones,
        not any(b.is_gained for b in behind),
    )


def _is_stream(group: Group, network: Network) -> bool:
    """Whether nothing singles out a unit: no constants of their own, no normalisation that mixes them with positions."""
    uses = [use for use in network.flow.norms if _reads(use, group, network)]
    names = (entry.name for entry in group.entries)
    separate = any(entry.separate for name in names for entry, _ in network.raw.uses_of[name])
    simple = bool(group.writers) and all(use.norm.style == "layer" for use in uses)
    return simple and not separate and network.alike(group.roots)


def _reads(use: NormUse, group: Group, network: Network) -> bool:
    return bool(torch.isin(network.raw.classes.roots(use.before)[0], group.roots).any())


def _behind(use: NormUse, group: Group, network: Network) -> _Behind:
    """What a normalisation hands on; refused if anything but linear layers receives it."""
    where = network.tape.describe(use.call)
    before = network.raw.classes.roots(use.before)[0].reshape(-1)
    if not torch.equal(torch.sort(before).values, group.roots):
        raise ValueError(f"{where} does not normalise exactly its units")
    gains = dict(
        pair
        for normal, gain in network.flow.gains
        if bool(torch.isin(normal, use.after).any())
        for pair in pairs(normal, gain)
    )
    after = use.after.reshape(-1)[torch.argsort(before)]
    labels = torch.tensor([gains.get(label, label) for label in after.tolist()])
    roots = network.raw.classes.roots(labels)[0]
    met = {category for root in roots.tolist() for category in network.raw.met[root]}
    linear = met <= {"gain", "read", "scaled"} and network.alike(roots)
    if bool((roots <= FIXED).any()) or len(torch.unique(roots)) != len(roots) or not linear:
        raise ValueError(f"what {where} puts out is not only read by linear layers")
    gain = _gain(labels, network) if gains else None
    constant = gain is None or bool((gain == gain[0]).all())
    return _Behind(roots, bool(gains), None if constant else gain)


def _gain(labels: Tensor, network: Network) -> Tensor:
    """The values of a gain, by its labels."""
    for name, found in network.raw.uses_of.items():
        for entry, is_data in found:
            if is_data and bool(torch.isin(labels, entry.out).all()):
                value = network.tape.parameters[name].tensor
                flat = entry.out.expand(value.shape).reshape(-1)
                order = [int((flat == label).nonzero()[0, 0]) for label in labels.tolist()]
                gain = value.reshape(-1)[order].double()
                if bool((gain == 0).any()):
                    raise ValueError(f"the gain '{name}' has zeros")
                return gain
    raise ValueError("the gain behind its normalisation is computed")


def _agreed(name: str, group: Group, behind: list[_Behind], network: Network) -> Iterator[_Part]:
    """What happens to one parameter, if all its uses agree."""
    found = network.raw.uses_of[name]
    shape = tuple(network.flow.parameters.numbers[name].shape)
    plays = [(entry, list(_parts(name, shape, entry, group, behind, network))) for entry, _ in found]
    moving = [parts for _, parts in plays if parts]
    for entry, parts in plays:
        for others in moving:
            covered = any(covers(entry, other.slices) for other in others)
            if covered and not (
                len(parts) == len(others) and all(a.agrees(b) for a, b in zip(parts, others, strict=True))
            ):
                raise TiedError(
                    f"'{name}' is used {len(found)} times in the forward pass and not alike (tied parameters)"
                )
    done: list[_Part] = []
    for parts in moving:
        for part in parts:
            if not any(torch.equal(part.slices.positions, other.slices.positions) for other in done):
                done.append(part)
                yield part


def _parts(
    name: str, shape: tuple[int, ...], entry: Entry, group: Group, behind: list[_Behind], network: Network
) -> Iterator[_Part]:
    roots = network.raw.classes.roots
    both = "A" if behind else "A^-T"  # an orthogonal A is its own A^-T
    for labels, matrix in ((entry.out, "A"), (entry.into, both)):
        part = slices(name, shape, position_among(roots(labels)[0], group.roots), len(group.roots))
        if part is not None:
            yield _Part(part, matrix)
    for after in behind:
        ordered, place = torch.sort(after.roots)
        for labels, matrix in ((entry.out, "M"), (entry.into, "M^-T")):
            if matrix == "M" and bool(torch.isin(labels, _gain_labels(network)).any()):
                continue
            unit = position_among(roots(labels)[0], ordered)
            part = slices(name, shape, torch.where(unit >= 0, place[unit], -1), len(ordered))
            if part is not None:
                yield _Part(part, "A" if after.gain is None else matrix, after.gain)


def _gain_labels(network: Network) -> Tensor:
    found = [event.labels for event in network.flow.events if event.category == "gain"]
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64)
