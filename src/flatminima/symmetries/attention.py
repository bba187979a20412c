"""The gauge freedom of attention, whoever wrote it: two matrix products with a softmax in between.

Per head, with queries q, keys k and values v:

* ``query-key``: ``q -> A q``, ``k -> A^-T k`` leaves every score ``q'k``; A is any invertible matrix. Where rotary
  positions act on q and k, only what commutes with the rotations is left: a scaled rotation of each pair of coordinates.
  Queries that share a key head (grouped queries) share A.
* ``query-key-diagonal``: the subset of diagonal A, also where gains write q and k.
* ``value-output``: ``v -> B v``, output map ``W_O -> W_O B^-1``; ``value-output-diagonal``: the subset of diagonal B.
* ``key-bias-shift``: ``b_K + t`` adds ``q't`` to all scores of a query, which the softmax does not see.
* ``value-bias-shift``: the rows of an attention matrix sum to 1, so that ``b_V + t`` adds ``W_O t`` to every output, and
  ``b_O`` takes it away.

Source: the gauge group of transformers, GL(d_k)^h x GL(d_v)^h with permutations of heads (OpenReview K1df8mmncF).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .actions import Action, Shift
from .base import Findings, Site, Symmetry
from .classes import FIXED, position_among
from .feeds import BiasFeed, bias_feeds
from .groups import Group, TiedError, brief, depends_on_data
from .heads import Attention
from .network import Network
from .parameters import Entry
from .sites import (
    Block,
    Mixing,
    Shifting,
    Slices,
    diagonal,
    invertible,
    log_uniform,
    log_uniform_signed,
    normal,
    rotations,
    scaled_pairs,
    slices,
)

_LINEAR = frozenset({"write", "scaled"})


def find(network: Network) -> Findings:
    """Every attention of the network."""
    places: dict[str, list[Site]] = defaultdict(list)
    refused: list[tuple[str, str]] = []
    for attention in network.attentions:
        for kind, search in (
            ("query-key", _query_key), ("value-output", _value_output), ("key-bias-shift", _key_bias),
            ("value-bias-shift", _value_bias),
        ):  # fmt: skip
            try:
                for found, site in search(network, attention):
                    places[found].append(site)
            except (TiedError, ValueError) as reason:
                refused.append((f"{attention.name} ({kind})", str(reason)))
    places["value-output-diagonal"] = [_diagonal_values(g) for g in network.scales.groups if _is_averaged(g, network)]
    return Findings(tuple(Symmetry.of(kind, found) for kind, found in places.items() if found), tuple(refused))


# ----- queries and keys -----------------------------------------------------------------------------------------------


def _query_key(network: Network, attention: Attention) -> Iterator[tuple[str, Site]]:
    """Full and diagonal maps, one matrix for each key head."""
    both = torch.cat([attention.queries, attention.keys])
    _require_free(network, both, _LINEAR | {"contracted", "gain"}, "the queries or keys")
    queries, keys = network.raw.classes.roots(both)[0].chunk(2)
    if bool(torch.isin(queries, keys).any()):
        raise ValueError("queries and keys share their weights: A and A^-T would have to be equal")
    full: list[Block] = []
    scaled: list[Block] = []
    layers: list[str] = []
    for mine in _shared(keys):
        shared, its_queries = keys[mine[0]], torch.unique(queries[mine], dim=0)
        counts = torch.bincount(shared)[shared]
        for multiplicity, draw, draw_diagonal in ((1, invertible, diagonal), (2, rotations, scaled_pairs)):
            chosen = counts == multiplicity
            units = int(chosen.sum())
            if not units:
                continue
            written = tuple(s for row in its_queries for s in _slices(network, row[chosen], multiplicity))
            read = tuple(_slices(network, shared[chosen], multiplicity))
            if not written or not read:
                raise ValueError("no weight writes the queries or the keys")
            layers += [network.flow.parameters.layer(s.name) for s in written + read]
            scaled.append(Block(units, written, read, draw_diagonal))
            mixable = all(network.alike(row[chosen]) for row in (*its_queries, shared)) or multiplicity == 2
            if mixable and not _met(network, torch.cat([its_queries[:, chosen].reshape(-1), shared])) & {"gain"}:
                full.append(Block(units, written, read, draw))
    name = f"{brief(tuple(dict.fromkeys(layers)))} ({len(queries)} heads)"
    if full:
        yield "query-key", Mixing(name, tuple(full))
    yield "query-key-diagonal", Mixing(name, tuple(scaled))


def _shared(keys: Tensor) -> list[list[int]]:
    """The heads of each key head."""
    found: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for head, row in enumerate(keys.tolist()):
        found[tuple(row)].append(head)
    used = [root for row in found for root in set(row)]
    if len(used) != len(set(used)):
        raise ValueError("its heads share some of their keys, but not all")
    return list(found.values())


def _slices(network: Network, row: Tensor, multiplicity: int) -> list[Slices]:
    """The weights of the units in a row of one head, in its order; of pairs, both members one after the other."""
    order = row if multiplicity == 1 else torch.unique(row)
    distinct = torch.unique(row)
    written, read = network.raw.slices_of(distinct, mixed=True)
    if read:
        raise ValueError(f"its units are also read by {brief(tuple(s.name for s in read))}")
    if multiplicity == 1:
        return [s.of(position_among(order, distinct)) for s in written]
    return [_members(network, s, distinct, multiplicity) for s in written]


def _members(network: Network, part: Slices, distinct: Tensor, multiplicity: int) -> Slices:
    """The slices of a tensor cut once more: by the label of each row before rotary positions made pairs of them."""
    entry = next(e for e, _ in network.raw.uses_of[part.name] if _writes(network, e, distinct))
    labels = entry.out.expand(part.shape).reshape(-1)[part.positions]
    members = [torch.unique(row) for row in labels]
    if any(len(m) != multiplicity for m in members):
        raise ValueError(f"the rows of '{part.name}' do not come in pairs")
    cut = [
        positions[label_row == label]
        for positions, label_row, m in zip(part.positions, labels, members, strict=True)
        for label in m
    ]
    return Slices(part.name, part.shape, torch.stack(cut))


def _writes(network: Network, entry: Entry, roots: Tensor) -> bool:
    return bool((position_among(network.raw.classes.roots(entry.out)[0], roots) >= 0).any())


# ----- values ---------------------------------------------------------------------------------------------------------


def _value_output(network: Network, attention: Attention) -> Iterator[tuple[str, Site]]:
    """One matrix for each value head."""
    if attention.values is None:
        return
    _require_free(network, attention.values, _LINEAR | {"averaged", "read"}, "the values")
    values = network.raw.classes.roots(attention.values)[0]
    blocks: list[Block] = []
    layers: list[str] = []
    for mine in _shared(values):
        row = values[mine[0]]
        distinct = torch.unique(row)
        if len(distinct) != len(row) or not network.alike(row):
            raise ValueError("its units do not all meet the same")
        written, read = network.raw.slices_of(distinct, mixed=True)
        if not written or not read:
            raise ValueError("no weight writes or reads the values")
        layers += [network.flow.parameters.layer(s.name) for s in written + read]
        blocks.append(Block(len(distinct), tuple(written), tuple(read), invertible))
    yield "value-output", Mixing(f"{brief(tuple(dict.fromkeys(layers)))} ({len(blocks)} heads)", tuple(blocks))


def _is_averaged(group: Group, network: Network) -> bool:
    return any(e.category == "averaged" and depends_on_data(e, network.flow) for e in group.events)


def _diagonal_values(group: Group) -> Site:
    return group.rescaling(log_uniform if "homogeneous" in group.categories else log_uniform_signed)


# ----- biases ---------------------------------------------------------------------------------------------------------


def _key_bias(network: Network, attention: Attention) -> Iterator[tuple[str, Site]]:
    """The bias of the keys, every element by itself."""
    keys = torch.unique(network.raw.classes.roots(attention.keys)[0])
    biases = _biases(network, keys)
    if not attention.sums_to_one or not biases:
        return
    _require_free(network, attention.keys, _LINEAR | {"contracted", "gain"}, "the keys")
    if "scaled" in _met(network, keys):
        raise ValueError(
            "the keys are multiplied by numbers that differ from position to position, such as rotary ones"
        )
    for name, unit in biases:
        shape = network.tape.parameters[name].shape
        flat = Slices(name, shape, (unit.expand(shape).reshape(-1) >= 0).nonzero().reshape(1, -1))
        yield "key-bias-shift", Shifting(f"{name} ({attention.name})", flat, network.typical(name))


def _biases(network: Network, roots: Tensor) -> list[tuple[str, Tensor]]:
    """The parameters that are added to units of these classes, and the unit of each of their elements."""
    found = []
    added = {element for element in network.flow.biases.values() if element is not None}
    for name in network.raw.touched(roots):
        numbers = network.flow.parameters.numbers[name]
        for entry, is_data in network.raw.uses_of[name]:
            unit = position_among(network.raw.classes.roots(entry.out)[0], roots)
            if is_data and bool((unit >= 0).any()) and set(numbers[unit.expand(numbers.shape) >= 0].tolist()) <= added:
                found.append((name, unit))
    return found


@dataclass(frozen=True, eq=False)
class _ValueBias:
    """``b_V + t``, and every bias behind the output map takes ``W_O t`` away."""

    name: str
    bias: Slices
    feeds: tuple[BiasFeed, ...]
    size: float

    def sample(self, generator: torch.Generator, max_scale: float) -> tuple[Action, ...]:
        shift = normal(generator, len(self.bias.positions)) * (self.size * math.log(max_scale))
        amount = torch.zeros(math.prod(self.bias.shape), dtype=torch.float64)
        amount[self.bias.positions] = shift[:, None]
        return (
            Shift(self.bias.name, amount.reshape(self.bias.shape)),
            *(feed.action(-shift) for feed in self.feeds),
        )


def _value_bias(network: Network, attention: Attention) -> Iterator[tuple[str, Site]]:
    """The bias of the values, all heads at once."""
    if attention.values is None or not attention.sums_to_one:
        return
    values = torch.unique(network.raw.classes.roots(attention.values)[0])
    biases = _biases(network, values)
    if not biases:
        return
    _require_free(network, attention.values, _LINEAR | {"averaged", "read"}, "the values")
    feeds = bias_feeds(network.flow, network.raw.classes, values)
    if feeds is None:
        raise ValueError("what reads the values has no bias of its own that could take the shift away")
    for name, unit in biases:
        part = slices(name, network.tape.parameters[name].shape, unit, len(values))
        if part is not None and part.positions.shape[1] == 1:
            yield "value-bias-shift", _ValueBias(f"{name} ({attention.name})", part, feeds, network.typical(name))


# ----- what units meet ------------------------------------------------------------------------------------------------


def _require_free(network: Network, labels: Tensor, allowed: frozenset[str], what: str) -> set[str]:
    """The categories of events that the units meet; ValueError where one of them is fixed or meets anything else."""
    classes = network.raw.classes
    roots = classes.roots(labels)[0]
    fixed = labels[roots <= FIXED].reshape(-1)
    if len(fixed):
        raise ValueError(f"{what} are not free: {classes.reason(int(fixed[0]))}")
    met = _met(network, roots)
    if not met <= allowed:
        raise ValueError(f"{what} also meet: {', '.join(sorted(met - allowed))}")
    return met


def _met(network: Network, roots: Tensor) -> set[str]:
    return {category for root in torch.unique(roots).tolist() for category in network.raw.met[root]}
