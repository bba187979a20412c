"""Permutations: units of equal standing change places, and heads of equal standing.

* ``unit-permutation``: rows, biases, gains, running statistics and every column that reads them move along; any activation will
  do, and so do residual streams, normalisations and tied embeddings, as long as all uses move alike.
* ``head-permutation``: the rows of queries, keys and values of a head, and the columns that read it. Where several query heads
  share a key head, these move together, and the query heads of one key head among themselves.

The map is a permutation matrix, so orthogonal: Hessian eigenvalues are kept.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor

from .base import Findings, Site, Symmetry
from .classes import FIXED, position_among
from .groups import Group, TiedError
from .heads import Attention, output_columns
from .network import Network
from .sites import Permuting, Slices, slices

_ELSEWHERE = frozenset({"contracted", "averaged", "output"})  # heads are whole; outputs are named


def find(network: Network) -> Findings:
    """Both kinds."""
    units: list[Site] = []
    whole: list[Site] = []
    refused: list[tuple[str, str]] = []
    for group in network.standing.groups:
        if len(group.roots) > 1 and group.writers and not group.categories & _ELSEWHERE:
            try:
                units.append(_units(group, network))
            except (TiedError, ValueError) as reason:
                refused.append((group.name, f"unit-permutation: {reason}"))
    for attention in network.attentions:
        try:
            whole.extend(_heads(network, attention))
        except (TiedError, ValueError) as reason:
            refused.append((attention.name, f"head-permutation: {reason}"))
    proposed = [Symmetry.of("unit-permutation", units), Symmetry.of("head-permutation", whole)]
    return Findings(tuple(s for s in proposed if s.places), tuple(refused))


def _units(group: Group, network: Network) -> Site:
    written, read = network.standing.slices_of(group.roots, roles=False)
    return Permuting(group.name, len(group.roots), (*written, *read, *running_statistics(group, network)))


def running_statistics(group: Group, network: Network) -> Iterator[Slices]:
    """The buffers of batch normalisation that belong to the units."""
    for use in network.standing.flow.norms:
        for name in use.norm.running or ():
            unit = position_among(network.standing.classes.roots(use.before)[0].reshape(-1), group.roots)
            part = slices(name, tuple(network.tape.buffers[name].shape), unit, len(group.roots))
            if part is not None:
                yield part


# ----- heads ----------------------------------------------------------------------------------------------------------


def _heads(network: Network, attention: Attention) -> Iterator[Site]:
    """The key heads with all their queries, and the query heads of each key head."""
    if attention.values is None or len(attention.queries) < 2:
        return
    roots = network.raw.classes.roots
    queries, keys, values = (roots(labels)[0] for labels in (attention.queries, attention.keys, attention.values))
    if bool((torch.cat([queries, keys, values], 1) <= FIXED).any()):
        raise ValueError("its queries, keys or values are not free")
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for head, row in enumerate(torch.cat([keys, values], 1).tolist()):
        groups[tuple(row)].append(head)
    members = list(groups.values())
    width = values.shape[1]
    columns = _columns(network, attention, len(queries) * width)
    if len({len(heads) for heads in members}) == 1 and len(members) > 1:
        every = [head for heads in members for head in heads]
        first = [heads[0] for heads in members]
        parts = [
            *_rows(network, queries[every].reshape(len(members), -1)), *_rows(network, keys[first]),
            *_rows(network, values[first]),
            *(_regrouped(part, torch.tensor(every), width, len(members)) for part in columns),
        ]  # fmt: skip
        yield Permuting(f"{attention.name} ({len(members)} heads)", len(members), tuple(parts))
    for heads in members:
        if len(heads) > 1:
            rows = _rows(network, queries[heads])
            mine = [_regrouped(part, torch.tensor(heads), width, len(heads)) for part in columns]
            name = f"{attention.name} ({len(heads)} query heads of one key head)"
            yield Permuting(name, len(heads), (*rows, *mine))


def _rows(network: Network, units: Tensor) -> list[Slices]:
    """The weights of the units of each head, (heads, all that belongs to it)."""
    distinct = torch.unique(units)
    owner = {root: head for head, row in enumerate(units.tolist()) for root in row}
    if sum(len(set(row)) for row in units.tolist()) != len(owner):
        raise ValueError("its heads share weights, such as the gain of a normalisation of queries")
    head = torch.tensor([owner[root] for root in distinct.tolist()])
    found = []
    for name in network.raw.touched(distinct):
        shape = tuple(network.flow.parameters.numbers[name].shape)
        parts: list[Slices] = []
        for entry, _ in network.raw.uses_of[name]:
            unit = position_among(network.raw.classes.roots(entry.out)[0], distinct)
            part = slices(name, shape, torch.where(unit >= 0, head[unit], -1), len(units))
            if part is not None and not any(torch.equal(part.positions, other.positions) for other in parts):
                parts.append(part)
        if len(parts) > 1:
            raise TiedError(f"'{name}' is used in several ways (tied parameters)")
        found += parts
    if not found:
        raise ValueError("no weight writes its units")
    return found


def _columns(network: Network, attention: Attention, units: int) -> list[Slices]:
    found = []
    assert attention.values is not None
    network.raw.slices_of(torch.unique(network.raw.classes.roots(attention.values)[0]))  # refuses tied weights
    for entry in output_columns(network, attention):
        part = slices(entry.name, tuple(network.flow.parameters.numbers[entry.name].shape), entry.out, units)
        if part is not None:
            found.append(part)
    if not found:
        raise ValueError("what its heads put out is not read by a weight alone")
    return found


def _regrouped(part: Slices, heads: Tensor, width: int, groups: int) -> Slices:
    """The columns of each head, (groups, all that belongs to the heads of a group)."""
    units = (heads[:, None] * width + torch.arange(width)).reshape(-1)
    return Slices(part.name, part.shape, part.positions[units].reshape(groups, -1))
