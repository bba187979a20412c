"""Which units are of equal standing: labels of identity carried through every operation of a run.

Where `Flow` follows scales and stops at GELU, this analysis follows which unit an element *is*, through anything that acts on
each element by itself. Units that are added or multiplied element by element are identified with each other; a weight that
reads a unit, or a normalisation over all units, treats them alike. What tells units apart (a slice, constants of their own,
groups of a convolution) is noted as a colour; units that agree in all of it may change places.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from .classes import FIXED, compact, pairs, unique
from .ops import ELEMENTWISE, POOLS, SOFTMAXES, axes, number
from .propagation import Propagation, as_batch, constant_along, first_along, squeezed
from .records import Contraction, NormUse
from .rewrite import Norm
from .tape import Call, Value


class Identity(Propagation):
    """Which unit is which in one run; see `Propagation` for what it holds."""

    def _why(self, call: Call) -> str:
        return f"its units reach {self.tape.describe(call)}, which does not treat them one by one"

    # ----- elementwise ------------------------------------------------------------------------------------------------

    def _unary(self, call: Call) -> bool:
        if call.op in ELEMENTWISE and isinstance(call.args[0], Value):
            others = [value for value in call.inputs[1:] if self.is_free(value)]
            labels = self.labels(call.args[0])
            for value in others:  # slopes of PReLU
                labels = self._identified(call, labels, self.labels(value), call.args[0], value)
            self._note("elementwise", call, labels)
            return self._set(call.out[0], labels)
        if call.op in SOFTMAXES | {"_log_softmax"}:
            over = number(call, 1, "dim", -1) % call.args[0].tensor.ndim
            return self._symmetric(call, (over,), keeps=True)
        return False

    def _sum(self, call: Call) -> bool:
        first, second = call.args[:2]
        if not isinstance(first, Value) or not isinstance(second, Value):
            value = first if isinstance(first, Value) else second
            return self._set(call.out[0], self.labels(value))
        for bias, value in ((first, second), (second, first)):
            self._remember(bias, self.labels(value))
        return self._set(call.out[0], self._tied_values(call, first, second))

    def _product(self, call: Call) -> bool:
        first, second = call.args[:2]
        if not isinstance(first, Value) or not isinstance(second, Value):
            return self._sum(call)
        return self._set(call.out[0], self._tied_values(call, first, second))

    _meet = _product

    def _compare(self, call: Call) -> bool:
        return self._sum(call)

    def _where(self, call: Call) -> bool:
        condition, first, second = call.args
        labels = self._tied_values(call, first, second)
        return self._set(call.out[0], self._identified(call, labels, self.labels(condition), None, condition))

    def _masked_fill(self, call: Call) -> bool:
        value, mask = call.args[:2]
        return self._set(call.out[0], self._tied_values(call, value, mask))

    def _tied_values(self, call: Call, first: Value, second: Value) -> Tensor:
        return self._identified(call, self.labels(first), self.labels(second), first, second)

    def _tied(self, call: Call, first: Tensor, second: Tensor) -> Tensor:
        return self._identified(call, first, second)

    def _identified(
        self, call: Call, first: Tensor, second: Tensor, one: Value | None = None, other: Value | None = None
    ) -> Tensor:
        """The labels of two tensors that meet element by element.

        Units of one are identified with units of the other; a number that broadcasts over several units tells those that
        have another number apart, and keeps its own place.
        """
        first, second = torch.broadcast_tensors(first, second)
        for mine, theirs, constant in ((first, second, other), (second, first, one)):
            if bool((compact(theirs)[0] <= FIXED).all()):
                self._colour_by_values(mine, constant)
                return mine
        met = [(a, b) for a, b in pairs(self._roots(first), self._roots(second)) if min(a, b) > FIXED]
        several = [len({pair[side] for pair in met}) < len(met) for side in (0, 1)]  # one unit meets several others
        if several == [True, True] or bool(((first <= FIXED) != (second <= FIXED)).any()):
            self.classes.fix(first, self._why(call))
            self.classes.fix(second, self._why(call))
            return first
        for coarse, fine, side, value in ((first, second, 0, one), (second, first, 1, other)):
            if several[side] and value is not None and _broadcasts_over(value, fine):
                self._colour(torch.tensor([p[1 - side] for p in met]), torch.tensor([p[side] for p in met]))
                self.classes.fix(coarse, self._why(call))
                return fine
        self.classes.tie(first, second, self._why(call))
        return first

    def _roots(self, labels: Tensor) -> Tensor:
        return self.classes.roots(labels)[0]

    # ----- what tells units apart -------------------------------------------------------------------------------------

    def _colour(self, labels: Tensor, colours: Tensor) -> None:
        free = labels > FIXED
        self.colours.append((labels[free], colours[free]))

    def _colour_by_values(self, labels: Tensor, constant: Value | None) -> None:
        """Numbers that no map changes: units that meet other numbers, or as many in another order, are told apart."""
        if constant is None or not _varies_with(constant, labels):
            return
        small, values = (t.reshape(-1) for t in compact(labels, constant.tensor.expand(labels.shape)))
        order = torch.argsort(small, stable=True)
        distinct, counts = torch.unique(small, return_counts=True)
        rows = values[order].double().split(counts.tolist())
        colours: dict[bytes, int] = {}
        mine = [colours.setdefault(row.numpy().tobytes(), len(colours)) for row in rows]
        self._colour(distinct, torch.tensor(mine))

    def _colour_by_place(self, labels: Tensor, places: Tensor) -> None:
        """Units that occur in other places are told apart."""
        found: dict[int, list[int]] = defaultdict(list)
        for label, place in pairs(labels, places):
            found[label].append(place)
        colours: dict[tuple[int, ...], int] = {}
        mine = [colours.setdefault(tuple(where), len(colours)) for where in found.values()]
        self._colour(torch.tensor(list(found)), torch.tensor(mine))

    # ----- elements combined ------------------------------------------------------------------------------------------

    def _over(self, call: Call, labels: Tensor, over: tuple[int, ...]) -> Tensor:
        # The others must be the same unit, or may be taken for it: each unit in one place only.
        first = first_along(labels, over)
        if constant_along(labels, over):
            return first
        places = torch.arange(first.numel()).reshape(first.shape)
        found = [label for label, _ in pairs(self._roots(labels), places) if label > FIXED]
        if len(found) == len(set(found)) and not bool((compact(labels)[0] <= FIXED).any()):
            self.classes.tie(labels, first, self._why(call))
            return first
        self.classes.fix(labels, self._why(call))
        return torch.full_like(first, FIXED)

    def _keeps_maxima(self) -> bool:
        return True

    def _reduce(self, call: Call) -> bool:
        value = call.args[0]
        if not isinstance(value, Value) or any(isinstance(a, Value) for a in call.args[1:]):
            return False
        over = axes(call, value.tensor.ndim)
        return self._symmetric(call, over, keeps=False)

    def _pool(self, call: Call) -> bool:
        labels = self.labels(call.args[0])
        return self._set(call.out[0], self._over(call, labels, tuple(range(labels.ndim - POOLS[call.op], labels.ndim))))

    def _symmetric(self, call: Call, over: tuple[int, ...], *, keeps: bool) -> bool:
        """A function of all elements along some axes that does not care about their order; `keeps` where each has a result."""
        labels = self.labels(call.args[0])
        first = first_along(labels, over)
        if constant_along(labels, over):
            self._note("elementwise", call, first)
            return self._set(call.out[0], labels if keeps else first.reshape(squeezed(labels, over, call.out[0])))
        self._note("mixed", call, labels)
        self._colour_by_place(labels, torch.arange(first.numel()).reshape(first.shape))
        return not keeps or self._set(call.out[0], labels)

    def _norm(self, call: Call) -> bool:
        norm: Norm = call.kwargs["norm"]
        labels = self.labels(call.args[0])
        first = self._over(call, labels, tuple(axis for axis in range(labels.ndim) if axis not in norm.unit_axes))
        self._note("norm" if norm.style in ("layer", "group") else "batch-norm", call, first)
        self.norms.append(NormUse(call, norm, first, first))
        if norm.style == "group":
            self._colour_by_place(first.reshape(norm.groups, -1), torch.arange(norm.groups)[:, None])
        return self._set(call.out[0], first)

    # ----- weights ----------------------------------------------------------------------------------------------------

    def _multiplied(self, call: Call, a: Value, b: Value) -> Tensor:
        free = [self.is_free(a), self.is_free(b)]
        first, second = as_batch(self.labels(a), first=True), as_batch(self.labels(b), first=False)
        batch = torch.arange(len(first))
        if all(free):
            rows, columns = self._over(call, first, (1,))[:, 0], self._over(call, second, (2,))[:, :, 0]
            self._note("contracted", call, torch.cat([unique(rows), unique(columns)]))
            self.contractions.append(Contraction(call, rows, columns))
            return torch.tensor(FIXED).expand(first.shape[0], first.shape[1], second.shape[2])
        mine, axis = (first, 2) if free[0] else (second, 1)
        one = mine.narrow(axis, 0, 1)
        if not bool((mine == one).all()):  # a matrix of constants mixes the units
            self._stop(call, [a if free[0] else b])
            one = torch.full_like(one, FIXED)
        self._note("averaged", call, one)
        self._colour_by_place(one, batch[:, None, None])
        return one.expand(first.shape[0], first.shape[1], second.shape[2])

    def _convolution(self, call: Call) -> bool:
        if not super()._convolution(call):
            return False
        data, weight = call.args[:2]
        groups = call.args[8]
        if groups == 1 or self.numbers(weight) is None:
            return True
        into = self.labels(data).select(0, 0).flatten(1)[:, 0]
        out = self.labels(call.out[0]).select(0, 0).flatten(1)[:, 0]
        if len(into) == len(out) == groups:  # each channel by itself
            self.classes.tie(out, into, self._why(call))
        else:
            for labels in (into, out):
                self._colour_by_place(labels.reshape(groups, -1), torch.arange(groups)[:, None])
        return True


def _broadcasts_over(value: Value, fine: Tensor) -> bool:
    """Whether one element of a tensor meets several units of the finer labels."""
    shape = (1,) * (fine.ndim - value.tensor.ndim) + value.shape
    return any(
        size == 1 and fine.shape[axis] > 1 and bool((fine != fine.narrow(axis, 0, 1)).any())
        for axis, size in enumerate(shape)
    )


def _varies_with(constant: Value, labels: Tensor) -> bool:
    """Whether a tensor of constants has more than one element along an axis on which the units differ."""
    shape = (1,) * (labels.ndim - constant.tensor.ndim) + constant.shape
    return any(size > 1 and bool((labels != labels.narrow(axis, 0, 1)).any()) for axis, size in enumerate(shape))
