"""What finders are given: one run of a model, and the analyses of it, each made when it is first asked for."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from .flow import Flow
from .groups import Groups
from .heads import Attention, heads
from .identity import Identity
from .parameters import Parameters
from .rewrite import normalised
from .scales import Scales
from .tape import SHAPE_ONLY, Call, Tape


class Network:
    """A recorded run and what is known about it.

    Attributes:
        tape: the run, with normalisations in one form.
    """

    def __init__(self, tape: Tape) -> None:
        self.tape = normalised(tape)

    @cached_property
    def flow(self) -> Flow:
        """Positive scales, carried through every operation."""
        return Flow(self.tape, Parameters(self.tape))

    @cached_property
    def scales(self) -> Scales:
        """Groups of units whose scales are free."""
        return Scales(self.flow)

    @cached_property
    def raw(self) -> Groups:
        """Groups of units that move together, with nothing decided about normalisations, outputs, products and ties."""
        return Groups(self.flow)

    @cached_property
    def through_norms(self) -> Scales:
        """Groups of units whose scales would be free if normalisations had no ``eps``."""
        return Scales(self.flow, through_norms=True)

    @cached_property
    def to_output(self) -> Scales:
        """Groups of units whose scales are free if one factor of all outputs does not matter."""
        return Scales(self.flow, to_output=True)

    @cached_property
    def standing(self) -> Groups:
        """Groups of units of equal standing, by their identity."""
        return Groups(Identity(self.tape, Parameters(self.tape)))

    @cached_property
    def attentions(self) -> tuple[Attention, ...]:
        """Every pair of matrix products that makes an attention."""
        return tuple(heads(self))

    def typical(self, name: str) -> float:
        """The root mean square of a parameter, 1 where it is zero."""
        return float(self.tape.parameters[name].tensor.square().mean().sqrt()) or 1.0

    def times_used(self, name: str) -> int:
        """How often the run uses a parameter, as a weight or as numbers of their own."""
        return len(self.raw.uses_of[name])

    def reader(self, name: str) -> Call | None:
        """The first operation on the way to the outputs that takes a parameter, or a copy of it."""
        value = self.tape.parameters[name]
        return next((call for call in self.tape.calls if value in call.inputs and call.op not in SHAPE_ONLY), None)

    @cached_property
    def trades(self) -> Scales:
        """The same where one of two factors grows as the other shrinks."""
        return Scales(self.flow, trade=True)

    @cached_property
    def suspects(self) -> Scales:
        """Groups that would be free if smooth activations were homogeneous."""
        return Scales(Flow(self.tape, Parameters(self.tape), "suspect"))

    @cached_property
    def flips(self) -> Scales:
        """Groups of units whose signs are free."""
        return Scales(Flow(self.tape, Parameters(self.tape), "odd"))

    def alike(self, roots: Tensor) -> bool:
        """Whether units (of `raw` classes) are multiplied by the same numbers, wherever they are multiplied by numbers."""
        for event in self.flow.events:
            if event.category != "scaled" or event.call is None:
                continue
            free, other = sorted(event.call.args[:2], key=lambda value: not self.flow.is_free(value))
            if other.tensor.numel() == 1 or not bool(torch.isin(self.raw.classes.roots(event.labels)[0], roots).any()):
                continue
            shape = event.call.out[0].shape
            labels, factor = self.raw.classes.roots(self.flow.labels(free))[0].expand(shape), other.tensor.expand(shape)
            met = [factor[labels == root] for root in roots.tolist()]
            if any(not torch.equal(numbers, met[0]) for numbers in met):
                return False
        return True
