"""The diagonal symmetries of a network: groups of units whose scales are free, with every weight that follows them.

`Flow` says which labels move together while nothing is decided about normalisations, outputs, tied weights and products of
units. Here the decisions are taken; the groups are what is still free.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .classes import FIXED, unique
from .groups import NORMS, Groups
from .parameters import NONE, condensed
from .propagation import Propagation


class Scales(Groups):
    """The groups of a flow whose scales are free, each written by one weight at least and read or normalised.

    Args:
        flow: of any group of scales.
        trade: of two free tensors that are multiplied, let one grow as the other shrinks; else one of them is held fixed.
        through_norms: take the ``eps`` of a normalisation for 0, so that a common scale of what it normalises is free.
        to_output: let one factor of all outputs be free.
    """

    def __init__(
        self, flow: Propagation, *, trade: bool = False, through_norms: bool = False, to_output: bool = False
    ) -> None:
        self._trade, self._through_norms, self._to_output = trade, through_norms, to_output
        super().__init__(flow)

    def _settle(self) -> None:
        self._judge()
        self._settle_products()
        self._settle_ties()
        self._settle_products()

    def _is_whole(self, roles: set[int], events: tuple[int, ...]) -> bool:
        ends = NORMS | {"output"} | ({"product"} if self._trade else set())
        return roles == {0, 1} or any(self.flow.events[i].category in ends for i in events)

    def _judge(self) -> None:
        for event in self.flow.events:
            if event.category in NORMS and event.call is not None and not self._through_norms:
                where = self.flow.tape.describe(event.call)
                self.classes.fix(event.labels, f"its units reach {where}, which takes their scale away")
            elif event.category == "output" and self._to_output:
                self.classes.tie(event.labels, event.labels[:1], "its units reach the output")
            elif event.category == "output":
                self.classes.fix(event.labels, "its units reach the output")
            elif event.category == "contracted":
                self.classes.fix(event.labels, "its units are multiplied with other units and summed")
        for use in self.flow.norms:
            self.classes.fix(use.after, "a normalisation sets their scale")
            if self._through_norms:
                for together in use.together():
                    self.classes.tie(together, together[:1], "they are normalised together")

    def _settle_products(self) -> None:
        pending = [(p.first, p.second, p.out, p.call) for p in self.flow.products]
        while pending:
            left = []
            for a, b, out, call in pending:
                fixed_a, fixed_b = (self.classes.roots(labels)[0] <= FIXED for labels in (a, b))
                why = f"its units are multiplied by others at {self.flow.tape.describe(call)}"
                self.classes.tie(out[fixed_a], b[fixed_a], why)
                self.classes.tie(out[fixed_b & ~fixed_a], a[fixed_b & ~fixed_a], why)
                free = ~(fixed_a | fixed_b)
                (root_a, ratio_a), (root_b, ratio_b) = self.classes.roots(a), self.classes.roots(b)
                for i in (free & (root_a == root_b)).nonzero().reshape(-1).tolist():
                    power = float((ratio_a[i] + ratio_b[i]) / ratio_a[i])
                    if power:
                        self.classes.tie(out[i], a[i], why, power)
                    else:
                        self.classes.fix(out[i], why)
                free &= root_a != root_b
                if bool(free.any()):
                    left.append((a[free], b[free], out[free], call))
            if len(left) == len(pending) and all(len(x[0]) == len(y[0]) for x, y in zip(left, pending, strict=True)):
                a, b, out, call = left[0]
                why = f"it is one of two factors at {self.flow.tape.describe(call)}; the other one is rescaled"
                if self._trade:
                    self.classes.fix(out, why)
                    self.classes.tie(a, b, why, -1.0)
                    left = left[1:]
                else:
                    self.classes.fix(a if self._are_data(a) else b, why)
            pending = left

    def _are_data(self, labels: Tensor) -> bool:
        data = torch.cat([unique(entry.out) for entry in self._data]) if self._data else labels[:0]
        return bool(torch.isin(labels, data).all())

    def _settle_ties(self) -> None:
        for name, found in self.uses_of.items():
            reason = f"'{name}' is used {len(found)} times in the forward pass (tied parameters)"
            for i, (second, second_is_data) in enumerate(found):
                for first, first_is_data in found[:i]:
                    both = condensed(torch.logical_and(*torch.broadcast_tensors(first.out != NONE, second.out != NONE)))
                    if not bool(both.any()):
                        continue
                    pair = [self._where(both, labels) for labels in (first.out, first.into, second.out, second.into)]
                    if first_is_data or second_is_data:
                        for labels in pair:
                            self.classes.fix(labels, reason)
                    else:
                        self._settle_pair(pair, reason)

    def _settle_pair(self, labels: list[Tensor], reason: str) -> None:
        """One weight in two places: ``out - into = other_out - other_into``, two of them fixed or all in pairs."""
        out, into, other_out, other_into = labels
        fixed = [bool((part <= FIXED).all()) for part in labels]
        if fixed == [False, True, True, False]:
            self.classes.tie(out, other_into, reason, -1.0, direct=True)
        elif fixed == [True, False, False, True]:
            self.classes.tie(other_out, into, reason, -1.0, direct=True)
        else:
            self.classes.tie(out, other_out, reason, direct=True)
            self.classes.tie(into, other_into, reason, direct=True)

    def _where(self, both: Tensor, labels: Tensor) -> Tensor:
        """Labels where a mask holds, `FIXED` for all that are fixed: of a tied embedding few different ones are left."""
        fixed = self.classes.roots(labels)[0] == FIXED
        return condensed(torch.where(both, torch.where(fixed, FIXED, labels), NONE))
