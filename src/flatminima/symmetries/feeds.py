"""How a constant that is added to units reaches the bias of the layer that reads them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .actions import Feed
from .classes import Classes, position_among
from .parameters import Entry
from .propagation import Propagation
from .tape import Call


@dataclass(frozen=True, eq=False)
class BiasFeed:
    """For one reading weight: where it takes a constant of each unit.

    Attributes:
        target, source: bias and weight, by name.
        shapes: of both.
        to: (outputs,) positions in the bias.
        positions: (outputs, m) positions in the weight.
        unit: (m,) the unit that each column reads.
    """

    target: str
    source: str
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    to: Tensor
    positions: Tensor
    unit: Tensor

    def moves_like(self, other: BiasFeed) -> bool:
        """Whether both are of the same elements."""
        return (self.target, self.source) == (other.target, other.source) and torch.equal(
            self.positions, other.positions
        )

    def action(self, constants: Tensor) -> Feed:
        """Add what the constants, one for each unit, become behind the weight."""
        return Feed(self.target, self.source, self.shapes, self.to, self.positions, constants[self.unit])


def bias_feeds(flow: Propagation, classes: Classes, roots: Tensor) -> tuple[BiasFeed, ...] | None:
    """One for each weight that reads the units of these classes; None where one has no bias of its own."""
    found: list[BiasFeed] = []
    for use in flow.uses:
        for entry in use.entries:
            unit = position_among(classes.roots(entry.into)[0], roots)
            if bool((unit >= 0).any()):
                part = None if _pads(use.call) else _feed(flow, entry, unit)
                if part is None:
                    return None
                if not any(part.moves_like(other) for other in found):  # a layer that runs several times
                    found.append(part)
    return tuple(found)


def _pads(call: Call) -> bool:
    """Whether a convolution reads zeros beyond the border, where no constant is added."""
    return call.op == "convolution" and any(call.args[4])


def _feed(flow: Propagation, entry: Entry, unit: Tensor) -> BiasFeed | None:
    shape = tuple(flow.parameters.numbers[entry.name].shape)
    out, units = entry.out.expand(shape).reshape(-1), unit.expand(shape).reshape(-1)
    taken = (units >= 0).nonzero().reshape(-1)
    labels, counts = torch.unique(out[taken], return_counts=True)
    elements = [flow.biases.get(label) for label in labels.tolist()]
    if any(element is None for element in elements) or len(set(counts.tolist())) != 1:
        return None
    positions = taken[torch.argsort(out[taken], stable=True)].reshape(len(labels), -1)
    if not bool((units[positions] == units[positions[0]]).all()):
        return None
    places = [flow.parameters.locate(int(element)) for element in elements if element is not None]
    if len({name for name, _ in places}) != 1:
        return None
    target = places[0][0]
    return BiasFeed(
        target, entry.name, (tuple(flow.parameters.numbers[target].shape), shape),
        torch.tensor([place for _, place in places]), positions, units[positions[0]],
    )  # fmt: skip
