"""Groups of units: what the same weights write and read, what meets the same operations, and which elements are theirs.

An analysis (`Propagation`) says which labels move together. Here its classes are looked at from the side of the parameters.
Nothing is decided about normalisations, outputs, products of units and tied weights; `Scales` does that.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .classes import FIXED, pairs, position_among, unique
from .parameters import NONE, Entry, condensed
from .propagation import Propagation
from .records import Event
from .sites import Draw, Entries, Rescaling, Slices, slices
from .tape import INPUT, PARAMETER

NORMS = frozenset({"norm", "batch-norm"})


class TiedError(Exception):
    """A weight is also used elsewhere in another way; the message says which."""


@dataclass(frozen=True, eq=False)
class Group:
    """Units that the same layers write and read, and that meet the same operations.

    Attributes:
        roots: the class of each unit, (units,).
        writers, readers: layers, in the order of the run.
        events: what the units meet.
        entries: every weight that follows their scales.
    """

    roots: Tensor
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    events: tuple[Event, ...]
    entries: tuple[Entries, ...]

    @property
    def name(self) -> str:
        """For people: ``'fc1 -> fc2'``."""
        ends = brief(self.readers) or ("output" if "output" in self.categories else "")
        return f"{brief(self.writers)} -> {ends}" if ends else brief(self.writers)

    @cached_property
    def categories(self) -> frozenset[str]:
        """Of the events."""
        return frozenset(event.category for event in self.events)

    def rescaling(self, draw: Draw) -> Rescaling:
        """The site with one scale for each unit."""
        return Rescaling(self.name, len(self.roots), self.entries, draw)


def brief(names: tuple[str, ...], most: int = 4) -> str:
    """The names with commas; of many the first ones and how many more."""
    if len(names) <= most:
        return ", ".join(names)
    return f"{', '.join(names[: most - 1])} and {len(names) - most + 1} more"


class Groups:
    """The groups of one analysis, with only this settled: layers that run several times have their units identified.

    Attributes:
        flow: the analysis.
        classes: which labels move together.
        uses_of: for each parameter its entries, and whether they are numbers of their own (gains, biases) or weights.
    """

    def __init__(self, flow: Propagation) -> None:
        self.flow, self.classes = flow, flow.classes.copy()
        self._entries = [entry for use in flow.uses for entry in use.entries]
        self._data = flow.parameters.data_entries(flow.classes)
        self.uses_of: dict[str, list[tuple[Entry, bool]]] = defaultdict(list)
        for is_data, entries in ((False, self._entries), (True, self._data)):
            for entry in entries:
                self.uses_of[entry.name].append((entry, is_data))
        self._settle()
        self.classes.freeze()

    def _settle(self) -> None:
        """One weight at work in several places: the units that it writes correspond, and so do those that it reads."""
        for name, found in self.uses_of.items():
            for (first, _), (second, _) in itertools.pairwise(found):
                both = condensed(torch.logical_and(*torch.broadcast_tensors(first.out != NONE, second.out != NONE)))
                if bool(both.any()):
                    for one, other in ((first.out, second.out), (first.into, second.into)):
                        mine, theirs = (
                            condensed(torch.where(both, self.classes.roots(x)[0], NONE)) for x in (one, other)
                        )
                        if mine.shape != theirs.shape:  # along different axes, such as those of a tied embedding
                            continue
                        matched = list(pairs(mine, theirs))
                        if len({a for a, _ in matched}) == len({b for _, b in matched}) == len(matched):
                            for a, b in matched:
                                if min(a, b) > FIXED:
                                    self.classes.tie(torch.tensor([a]), torch.tensor([b]), f"'{name}' is shared")

    def _is_whole(self, roles: set[int], events: tuple[int, ...]) -> bool:
        """Whether units that are written (role 0) or read (role 1) and meet these events make a group."""
        return True

    @cached_property
    def met(self) -> dict[int, set[str]]:
        """The categories of events that each class meets, by its root, also where the class is fixed."""
        found: dict[int, set[str]] = defaultdict(set)
        for event in self.flow.events:
            for label in event.labels.tolist():
                found[self.classes.root(label)[0] if label > FIXED else label].add(event.category)
        return found

    # ----- what is free -----------------------------------------------------------------------------------------------

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """Every group of free units, in the order of the run."""
        roles: dict[int, list[tuple[int, int]]] = defaultdict(list)  # root -> (entry, 0 written or 1 read)
        every = self._entries + self._data
        for i, entry in enumerate(every):
            for role, labels in ((0, entry.out), (1, entry.into)):
                for root in self._free(labels):
                    roles[root].append((i, role))
        met: dict[int, list[int]] = defaultdict(list)
        for i, event in enumerate(self.flow.events):
            for root in self._free(event.labels):
                met[root].append(i)
        colours: dict[int, set[tuple[int, int]]] = defaultdict(set)
        for i, (labels, colour) in enumerate(self.flow.colours):
            for root, one in zip(self.classes.roots(labels)[0].tolist(), colour.tolist(), strict=True):
                colours[root].add((i, one))
        profiles: dict[tuple[tuple[tuple[int, int], ...], tuple[int, ...], frozenset[tuple[int, int]]], list[int]]
        profiles = defaultdict(list)
        for root, found in roles.items():
            profiles[tuple(found), tuple(met[root]), frozenset(colours[root])].append(root)
        return tuple(
            self._group(torch.tensor(sorted(roots)), profile, events)
            for (profile, events, _), roots in sorted(profiles.items(), key=lambda item: min(item[0][1], default=0))
            if self._is_whole({role for _, role in profile}, events)
        )

    def slices_of(self, roots: Tensor, *, roles: bool = True, mixed: bool = False) -> tuple[list[Slices], list[Slices]]:
        """The entries of every parameter that write, and that read, the units of these classes (sorted).

        Args:
            roots: the classes.
            roles: whether it matters if a weight that is used twice writes here and reads there; it does not for maps that do
                the same to written and read entries.
            mixed: whether the map mixes units, which grouped convolutions do not allow.

        Raises:
            TiedError: an entry has another part to play as well.
            ValueError: the units have different shares of a parameter.
        """
        written: list[Slices] = []
        read: list[Slices] = []
        for name in self.touched(roots):
            found, shape = self.uses_of[name], tuple(self.flow.parameters.numbers[name].shape)
            plays = []
            for entry, _ in found:
                parts = [
                    slices(name, shape, position_among(self.classes.roots(labels)[0], roots), len(roots))
                    for labels in (entry.out, entry.into)
                ]
                plays.append((entry, parts))
            for entry, parts in plays:
                if bool((entry.into == NONE).all()):  # it reads zeros, which go with everything
                    parts[1] = next((other[1] for _, other in plays if other[1] is not None), None)
            moving = [(entry, parts) for entry, parts in plays if parts[0] or parts[1]]
            if mixed and any(entry.separate for entry, _ in moving):
                raise ValueError(f"'{name}' is a grouped convolution, whose units cannot be mixed")
            for entry, parts in plays:
                for _, others in moving:
                    if any(s is not None and covers(entry, s) for s in others) and not _agree(parts, others, roles):
                        raise TiedError(f"'{name}' is used {len(found)} times in the forward pass (tied parameters)")
            taken: list[Slices] = []
            for _, parts in moving:
                for part, kind in zip(parts, (written, read), strict=True):
                    if part is not None and not any(_same(part, other) for other in taken):
                        kind.append(part)
                        taken.append(part)
        return written, read

    @cached_property
    def _touched(self) -> dict[int, list[str]]:
        """The parameters that have to do with each class."""
        found: dict[int, list[str]] = defaultdict(list)
        for name, uses in self.uses_of.items():
            for root in {r for entry, _ in uses for labels in (entry.out, entry.into) for r in self._free(labels)}:
                found[root].append(name)
        return found

    def touched(self, roots: Tensor) -> list[str]:
        """The parameters that have to do with any of these classes."""
        return list(dict.fromkeys(name for root in roots.tolist() for name in self._touched.get(root, ())))

    @cached_property
    def _gains(self) -> set[int]:
        """The entries that multiply; what else is used as numbers of its own is added."""
        gains = [event.labels for event in self.flow.events if event.category == "gain"]
        labels = torch.cat(gains) if gains else torch.zeros(0, dtype=torch.int64)
        start = len(self._entries)
        return {start + i for i, entry in enumerate(self._data) if bool(torch.isin(entry.out, labels).any())}

    def _free(self, labels: Tensor) -> list[int]:
        return [root for root in unique(self.classes.roots(labels)[0]).tolist() if root > FIXED]

    def _group(self, roots: Tensor, profile: tuple[tuple[int, int], ...], events: tuple[int, ...]) -> Group:
        every, layer = self._entries + self._data, self.flow.parameters.layer
        written = [i for i, role in profile if role == 0]
        makers = [i for i in written if i < len(self._entries) or i in self._gains]
        writers = tuple(dict.fromkeys(layer(every[i].name) for i in makers or written))
        readers = tuple(dict.fromkeys(layer(every[i].name) for i, role in profile if role == 1))
        entries = tuple(
            found
            for i in dict.fromkeys(i for i, _ in profile)
            for reads, sign in ((False, 1.0), (True, -1.0))
            for found in self._powers(every[i].name, self._first_use(every[i], reads=reads), sign, roots)
        )
        return Group(roots, writers, readers, tuple(self.flow.events[i] for i in events), entries)

    def _first_use(self, entry: Entry, *, reads: bool) -> Tensor:
        """The labels of one role, without those elements that an earlier use of the same parameter already moves: all uses
        agree, but for one that reads zeros (the first state of a recurrent network) and has nothing to say."""
        labels = entry.into if reads else entry.out
        for earlier, _ in self.uses_of[entry.name]:
            if earlier is entry:
                break
            done = (earlier.out != NONE) & (earlier.into != NONE) if reads else earlier.out != NONE
            labels = torch.where(done, NONE, labels)
        return condensed(labels)

    def _powers(self, name: str, labels: Tensor, sign: float, roots: Tensor) -> list[Entries]:
        found, ratios = self.classes.roots(labels)
        unit = position_among(found, roots)
        return [
            Entries(name, torch.where(ratios == ratio, unit, -1), sign * ratio)
            for ratio in torch.unique(ratios[unit >= 0]).tolist()
        ]


def covers(entry: Entry, part: Slices) -> bool:
    """Whether the use that an entry stands for involves some of the elements of a part."""
    if bool((entry.out != NONE).all()):
        return True
    return bool((entry.out.expand(part.shape).reshape(-1)[part.positions] != NONE).any())


def depends_on_data(event: Event, flow: Propagation) -> bool:
    """Whether the factor of a ``scaled`` or ``averaged`` event is itself computed from inputs or parameters."""
    assert event.call is not None
    others = [value for value in event.call.inputs if not flow.is_free(value)]
    return any(value.depends & (PARAMETER | INPUT) and value.tensor.numel() > 1 for value in others)


def _same(first: Slices | None, second: Slices | None) -> bool:
    if first is None or second is None:
        return first is second
    return torch.equal(first.positions, second.positions)


def _agree(parts: list[Slices | None], others: list[Slices | None], roles: bool) -> bool:
    if roles:
        return all(_same(one, other) for one, other in zip(parts, others, strict=True))
    return all(
        any(_same(one, other) for other in theirs if other is not None)
        for mine, theirs in ((parts, others), (others, parts))
        for one in mine
        if one is not None
    )
