"""Labels carried through every operation of a run: the part that all analyses share.

Here are the operations about which there is nothing to decide: elements that are moved about, and weights at work in linear
operations. What it means that units are added, multiplied, normalised or passed through an activation is for the subclasses:
`Flow` follows scales, `Identity` follows which unit is which.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .classes import FIXED, ZERO, Classes, compact, pairs, unique
from .ops import COMPARE, MEETS, MOVES, POOLS, PRODUCTS, REDUCES, SAME, SUMS, moved, number
from .parameters import Parameters
from .records import Average, Contraction, Event, NormUse, Product, Use
from .tape import PARAMETER, SHAPE_ONLY, Call, Tape, Value

NOT_ANALYSED = "which is not analysed"
"""How a parameter is reported that is at work in an operation that is not known."""

COMPUTED = "is computed, so it cannot be changed as a parameter"
"""How a layer is reported whose weight is no parameter itself."""

Handler = Callable[[Call], bool]
"""Sets the labels of what a call returns; False where the call lets nothing through."""


class Propagation(ABC):
    """The labels of one run.

    Attributes:
        classes: which labels move together.
        events, uses, norms: in the order of the run.
        products, contractions, averages: of free tensors with each other, and with matrices that no map changes.
        gains: (labels of a normalised tensor, labels of the gain that multiplies it).
        colours: what tells units apart although they meet the same, as (labels, colour of each).
        biases: for labels that a weight writes, the number of the parameter element that is added to them.
        computed: (layer, reason) for weights that are no parameters themselves.
        unread: (parameter, reason) for parameters at work in operations that are not known.
        unfollowed: operations that units reach and that may or may not let a map through.
    """

    def __init__(self, tape: Tape, parameters: Parameters) -> None:
        self.tape, self.parameters = tape, parameters
        self.classes = Classes()
        self.events: list[Event] = []
        self.uses: list[Use] = []
        self.norms: list[NormUse] = []
        self.products: list[Product] = []
        self.contractions: list[Contraction] = []
        self.averages: list[Average] = []
        self.gains: list[tuple[Tensor, Tensor]] = []
        self.colours: list[tuple[Tensor, Tensor]] = []
        self.biases: dict[int, int | None] = {}
        self.computed: list[tuple[str, str]] = []
        self.unread: list[tuple[str, str]] = []
        self.unfollowed: list[Call] = []
        self._labels: dict[int, Tensor] = {}
        self._numbers: dict[int, Tensor] = {key: parameters.numbers[name] for key, name in parameters.values.items()}
        self._opaque = tape.opaque()
        self._handlers = self._table()
        for key in list(self._numbers):
            if key in self._opaque:
                self._stop_opaque(parameters.as_data(self._numbers.pop(key), self.classes), key)
        for call in tape.calls:
            self._step(call)
        for value in tape.outputs:
            self._note("output", None, self.labels(value))

    def labels(self, value: Value) -> Tensor:
        """The labels of a value, in its shape; `FIXED` for what no map changes and `ZERO` for constant zeros."""
        if id(value) in self._labels:
            return self._labels[id(value)]
        if id(value) in self._numbers:
            self._labels[id(value)] = self.parameters.as_data(self._numbers[id(value)], self.classes)
            return self._labels[id(value)]
        is_zero = value.depends == 0 and value.tensor.dtype.is_floating_point and not bool(value.tensor.any())
        return torch.tensor(ZERO if is_zero else FIXED).expand(value.shape)

    def numbers(self, value: Value) -> Tensor | None:
        """The numbers of the parameter elements that a value consists of, if it does."""
        return self._numbers.get(id(value))

    def is_free(self, value: Value) -> bool:
        """Whether some map may change the value."""
        return id(value) in self._labels or id(value) in self._numbers

    # ----- one operation ----------------------------------------------------------------------------------------------

    def _table(self) -> dict[str, Handler]:
        """What to do with each operation; those not in the table are for `_unary`."""
        sets: tuple[tuple[frozenset[str], Handler], ...] = (
            (SAME, self._same), (MOVES, self._move), (SUMS, self._sum), (MEETS, self._meet), (PRODUCTS, self._product),
            (REDUCES, self._reduce), (frozenset(POOLS), self._pool), (COMPARE, self._compare), (_CONTRACTS, self._contract),
        )  # fmt: skip
        return {op: handler for ops, handler in sets for op in ops} | {
            "convolution": self._convolution, "copy": self._copy, "embedding": self._embedding,
            "_embedding_bag": self._bag, "_embedding_bag_forward_only": self._bag,
            "masked_fill": self._masked_fill, "normalise": self._norm, "view_as_complex": self._complex,
            "view_as_real": self._real, "where": self._where,
        }  # fmt: skip

    def _step(self, call: Call) -> None:
        data = [value for value in call.inputs if self.is_free(value)]
        if not data or call.op in SHAPE_ONLY:
            return
        if not self._handlers.get(call.op, self._unary)(call):
            self._stop(call, data)
        for value in call.out:
            if id(value) in self._opaque and self.is_free(value):
                self._stop_opaque(self.labels(value), id(value))
                self._labels.pop(id(value), None)
                self._numbers.pop(id(value), None)

    def _note(self, category: str, call: Call | None, labels: Tensor) -> None:
        self.events.append(Event(category, call, unique(labels)))

    def _set(self, value: Value, labels: Tensor) -> bool:
        self._labels[id(value)] = labels.expand(value.shape)
        return True

    @abstractmethod
    def _why(self, call: Call) -> str:
        """Why units that reach this operation stay as they are."""

    def _stop(self, call: Call, values: list[Value], why: str | None = None) -> None:
        for value in values:
            if id(value) in self._numbers and id(value) not in self._labels:
                where = self.tape.describe(call)
                for name in self.parameters.names(self._numbers[id(value)]):
                    self.unread.append((name, f"it is used by {where}, {NOT_ANALYSED}"))
            self.classes.fix(self.labels(value), why or self._why(call))

    def _stop_opaque(self, labels: Tensor, key: int) -> None:
        branch = self._opaque[key]
        where = f"'{branch.module}'" if branch.module else "the model"
        self.classes.fix(labels, f"{where} decides by values, `{branch.line}`: its other branch is not known")

    # ----- elements moved about ---------------------------------------------------------------------------------------

    def _same(self, call: Call) -> bool:
        value, out = call.args[0], call.out[0]
        if id(value) in self._numbers and id(value) not in self._labels:
            self._numbers[id(out)] = self._numbers[id(value)]
            return True
        return self._set(out, self.labels(value))

    def _move(self, call: Call) -> bool:
        data = [value for value in call.inputs if value.tensor.is_floating_point() or value.tensor.is_complex()]
        if any(self.is_free(value) for value in call.inputs if value not in data):
            return False
        if call.func is not None and call.func._overloadname == "dtype":  # the bits, seen as another type
            return False
        whole = all(id(value) in self._numbers for value in data) and call.op != "constant_pad_nd"
        table = self._numbers if whole else self._labels
        convert = (lambda value: self._numbers[id(value)]) if whole else self.labels
        for value, result in zip(call.out, moved(call, convert), strict=True):
            table[id(value)] = result
        return True

    def _copy(self, call: Call) -> bool:
        return self._set(call.out[0], self.labels(call.args[1]))

    def _complex(self, call: Call) -> bool:
        labels = self.labels(call.args[0])
        self.classes.tie(labels[..., 0], labels[..., 1], self._why(call))
        return self._set(call.out[0], labels[..., 0])

    def _real(self, call: Call) -> bool:
        return self._set(call.out[0], self.labels(call.args[0]).unsqueeze(-1))

    # ----- for the subclasses -----------------------------------------------------------------------------------------

    @abstractmethod
    def _unary(self, call: Call) -> bool:
        """A function of each element of the first argument, or an operation that is not known."""

    @abstractmethod
    def _sum(self, call: Call) -> bool: ...

    @abstractmethod
    def _meet(self, call: Call) -> bool:
        """The larger or smaller of two elements."""

    @abstractmethod
    def _product(self, call: Call) -> bool:
        """Two tensors multiplied or divided element by element."""

    @abstractmethod
    def _compare(self, call: Call) -> bool: ...

    @abstractmethod
    def _where(self, call: Call) -> bool: ...

    @abstractmethod
    def _masked_fill(self, call: Call) -> bool: ...

    @abstractmethod
    def _reduce(self, call: Call) -> bool:
        """Elements combined along axes."""

    @abstractmethod
    def _pool(self, call: Call) -> bool:
        """Elements combined within windows."""

    @abstractmethod
    def _norm(self, call: Call) -> bool: ...

    @abstractmethod
    def _multiplied(self, call: Call, a: Value, b: Value) -> Tensor:
        """The labels of a product of matrices neither of which is a parameter, as (n, i, j)."""

    @abstractmethod
    def _tied(self, call: Call, first: Tensor, second: Tensor) -> Tensor:
        """The labels of a sum of two labelled tensors."""

    @abstractmethod
    def _over(self, call: Call, labels: Tensor, over: tuple[int, ...]) -> Tensor:
        """The labels with every axis of `over` reduced to its first element, for which the others stand as well."""

    # ----- weights ----------------------------------------------------------------------------------------------------

    def _remember(self, bias: Value, labels: Tensor) -> None:
        """Note which parameter element is added to which label, if it is one for each."""
        if id(bias) in self._numbers:
            for label, element in pairs(labels, self._numbers[id(bias)]):
                self.biases[label] = element if self.biases.get(label, element) == element else None

    def _contract(self, call: Call) -> bool:
        bias, a, b = _operands(call)
        matrices = [value for value in (a, b) if id(value) in self._numbers]
        weights_only = [value for value in (a, b) if value.depends == PARAMETER]
        if len(matrices) == 1 and len(weights_only) == 1:
            labels = self._weighted(call, a, b)
        elif weights_only:
            return self._computed(call, a, b, *([] if bias is None else [bias]))
        else:
            labels = self._multiplied(call, a, b)
        labels = labels.reshape(call.out[0].shape)
        if bias is not None:
            self._remember(bias, labels)
            labels = self._tied(call, labels, self.labels(bias))
        return self._set(call.out[0], labels)

    def _computed(self, call: Call, *values: Value) -> bool:
        layer = call.module or self.tape.describe(call)
        reason = f"the weight or bias of {layer} {COMPUTED}"
        self.computed.append((layer, reason))
        for value in values:
            if self.is_free(value):
                self.classes.fix(self.labels(value), reason)
        return True

    def _weighted(self, call: Call, a: Value, b: Value) -> Tensor:
        flipped = id(a) in self._numbers
        data, weight = (b, a) if flipped else (a, b)
        x = as_batch(self.labels(data), first=not flipped)
        numbers = as_batch(self._numbers[id(weight)], first=flipped)
        if flipped:  # (W x)^T = x^T W^T
            x, numbers = x.transpose(1, 2), numbers.transpose(1, 2)
        if all(bool((n == numbers[0]).all()) for n in numbers[1:]):
            numbers = numbers[:1]  # one matrix for the whole batch
        into = self._over(call, x, (0, 1) if len(numbers) == 1 else (1,))
        columns, inverse = torch.unique(numbers[:, 0], return_inverse=True)
        fresh = self.classes.new(len(columns))[inverse].unsqueeze(1)
        self._use(call, numbers, fresh, into.transpose(1, 2))
        labels = fresh.expand(x.shape[0], x.shape[1], fresh.shape[2])
        return labels.transpose(1, 2) if flipped else labels

    def _use(self, call: Call, numbers: Tensor, out: Tensor, into: Tensor, *, separate: bool = False) -> None:
        self._note("write", call, out)
        self._note("read", call, into)
        self.uses.append(Use(call, tuple(self.parameters.entries(numbers, out, into, separate=separate))))

    def _convolution(self, call: Call) -> bool:
        data, weight, bias = call.args[:3]
        transposed, groups = call.args[6], call.args[8]
        if id(weight) not in self._numbers or data.depends == PARAMETER:
            return weight.depends == PARAMETER and self._computed(call, *call.inputs)
        x = self.labels(data)
        first = self._over(call, x, (0, *range(2, x.ndim))).reshape(-1)  # one label for each channel
        rows = weight.shape[0]
        if transposed:
            fresh = self.classes.new(weight.shape[1] * groups)
            out = fresh.reshape(groups, -1).repeat_interleave(rows // groups, 0)
            into = first.reshape(-1, 1)
        else:
            fresh = self.classes.new(rows)
            out = fresh.reshape(-1, 1)
            into = first.reshape(groups, -1).repeat_interleave(rows // groups, 0)
        spatial = (1,) * (weight.tensor.ndim - 2)
        out, into = out.reshape(*out.shape, *spatial), into.reshape(*into.shape, *spatial)
        self._use(call, self._numbers[id(weight)], out, into, separate=groups > 1)
        labels = fresh.reshape(-1, *spatial)
        if bias is not None:
            self._remember(bias, fresh)
            labels = self._tied(call, labels, self.labels(bias).reshape(-1, *spatial))
        return self._set(call.out[0], labels)

    def _embedding(self, call: Call) -> bool:
        table = call.args[0]
        if id(table) not in self._numbers:
            return False
        numbers = self._numbers[id(table)]
        fresh = self.classes.new(numbers.shape[1])
        self._use(call, numbers, fresh.reshape(1, -1), torch.tensor([[FIXED]]))
        return self._set(call.out[0], fresh)

    def _bag(self, call: Call) -> bool:
        """Sums, means or maxima of rows of a table: every column by itself."""
        weights = number(call, 6, "per_sample_weights")
        if isinstance(weights, Value) and self.is_free(weights):
            return False
        is_linear = number(call, 4, "mode", 0) != _MAX
        return (is_linear or self._keeps_maxima()) and self._embedding(call)

    @abstractmethod
    def _keeps_maxima(self) -> bool:
        """Whether the larger of two numbers stays the larger one."""


_MAX = 2  # of the modes of an embedding bag
_CONTRACTS = frozenset({"mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot", "vdot"})


def _operands(call: Call) -> tuple[Value | None, Value, Value]:
    """(bias, left, right) of a matrix product."""
    if call.op.startswith(("add", "badd")):
        return call.args[0], call.args[1], call.args[2]
    return None, call.args[0], call.args[1]


def as_batch(labels: Tensor, *, first: bool) -> Tensor:
    """A vector, matrix or batch of matrices as (n, i, k) if it is the first operand, else as (n, k, j)."""
    if labels.ndim == 1:
        labels = labels.unsqueeze(0 if first else 1)
    return labels if labels.ndim == 3 else labels.unsqueeze(0)


def squeezed(labels: Tensor, over: tuple[int, ...], out: Value) -> tuple[int, ...]:
    """The shape of reduced labels that broadcasts to the result, whether or not it kept the axes."""
    kept: list[Any] = [1 if axis in over else size for axis, size in enumerate(labels.shape)]
    return tuple(kept if len(kept) == len(out.shape) else [s for axis, s in enumerate(kept) if axis not in over])


def first_along(labels: Tensor, over: tuple[int, ...]) -> Tensor:
    """The first element along each of these axes, which stay with length 1."""
    for axis in over:
        labels = labels.narrow(axis, 0, 1)
    return labels


def constant_along(labels: Tensor, over: tuple[int, ...]) -> bool:
    """Whether the labels do not change along these axes."""
    whole, first = compact(labels, first_along(labels, over).expand(labels.shape))
    return bool((whole == first).all())
