"""Which scales of units a network leaves free: labels carried through every operation of a run.

Every unit that a weight writes, and every element of a parameter that is used as a number of its own, gets a label with an
unknown scale. An operation lets a scale through, ties scales together, or stops them with a reason. What remains free at the
end, with its weights on both sides, is a symmetry for the finders to name.

The scales are positive numbers (``group="positive"``), signs (``group="odd"``), or positive numbers in a network whose smooth
activations are taken for homogeneous (``group="suspect"``): its classes are the false friends that a proof has to refuse.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .classes import FIXED, ZERO, Classes, compact, pairs, unique
from .ops import (
    COMPARE,
    DEGREES,
    EVEN,
    HOMOGENEOUS,
    LINEAR,
    MEETS,
    MOVES,
    NEARLY,
    ODD,
    POOLS,
    PRODUCTS,
    REDUCES,
    SAME,
    SHAPE_ONLY,
    SUMS,
    axes,
    moved,
    number,
)
from .parameters import Entry, Parameters
from .rewrite import Norm
from .tape import PARAMETER, Call, Tape, Value

Group = Literal["positive", "odd", "suspect"]


@dataclass(frozen=True, eq=False)
class Event:
    """Something that units met.

    Attributes:
        category: ``write`` and ``read`` (a weight), ``homogeneous``, ``odd``, ``sigmoid``, ``suspect`` and ``elementwise``
            (activations), ``scaled`` (times numbers that no map changes), ``averaged`` (times a matrix of such), ``gain``,
            ``product``, ``contracted`` (times other units, element by element or summed), ``norm``, ``batch-norm``, ``mixed``
            (a symmetric function of several), ``output``.
        call: where; None for the output.
        labels: of the units, sorted.
    """

    category: str
    call: Call | None
    labels: Tensor


@dataclass(frozen=True, eq=False)
class Use:
    """A weight at work in a linear operation.

    Attributes:
        call: the operation.
        entries: of each parameter in it, the units its elements write and read.
        bias: the value that the operation itself adds, if any.
    """

    call: Call
    entries: tuple[Entry, ...]
    bias: Value | None


@dataclass(frozen=True, eq=False)
class Product:
    """Two free tensors multiplied element by element: the distinct pairs of labels, and the label of each pair's product."""

    call: Call
    first: Tensor
    second: Tensor
    out: Tensor


@dataclass(frozen=True, eq=False)
class Contraction:
    """Two free tensors (n, i, k) and (n, k, j) multiplied as matrices: the labels (n, k) that are summed over."""

    call: Call
    first: Tensor
    second: Tensor


@dataclass(frozen=True, eq=False)
class Average:
    """A free tensor times a matrix that no map changes: the matrix, and the labels (n, units) of the axis that stays."""

    call: Call
    matrix: Value
    labels: Tensor


@dataclass(frozen=True, eq=False)
class NormUse:
    """A normalisation: the labels before and after it, in the shape of its argument."""

    call: Call
    norm: Norm
    before: Tensor
    after: Tensor

    def together(self) -> tuple[Tensor, ...]:
        """The labels before it, in sets that share one scale."""
        if self.norm.style == "layer":
            return (self.before.reshape(-1),)
        if self.norm.style == "group":
            return tuple(self.before.reshape(self.norm.groups, -1))
        return ()


class Flow:
    """The labels of one run.

    Attributes:
        classes: which labels move together.
        events, uses, norms: in the order of the run.
        products, contractions, averages: of free tensors with each other, and with matrices that no map changes.
        gains: (labels of a normalised tensor, labels of the gain that multiplies it).
        colours: what tells units apart although they meet the same, as (labels, colour of each); see `Identity`.
        biases: for labels that a weight writes, the number of the parameter element that is added to them.
        computed: (layer, reason) for weights that are no parameters themselves.
    """

    def __init__(self, tape: Tape, parameters: Parameters, group: Group = "positive") -> None:
        self.tape, self.parameters, self.group = tape, parameters, group
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
        self._labels: dict[int, Tensor] = {}
        self._numbers: dict[int, Tensor] = {key: parameters.numbers[name] for key, name in parameters.values.items()}
        self._normalised: set[int] = set()
        self._opaque = tape.opaque()
        for key in list(self._numbers):
            if key in self._opaque:
                self._stop_opaque(self._numbers.pop(key), key)
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

    def _step(self, call: Call) -> None:
        data = [value for value in call.inputs if self.is_free(value)]
        if not data or call.op in SHAPE_ONLY:
            return
        handler = self._handler(call)
        if handler is None or not handler(call):
            self._stop(call, data)
        for value in call.out:
            if id(value) in self._opaque and self.is_free(value):
                self._stop_opaque(self.labels(value), id(value))
                self._labels.pop(id(value), None)
                self._numbers.pop(id(value), None)

    def _handler(self, call: Call) -> Callable[[Call], bool] | None:
        op = call.op
        if op in _CONTRACTS:
            return self._contract
        for names, handler in (
            (SAME, self._same), (MOVES, self._move), (SUMS, self._sum), (MEETS, self._meet), (PRODUCTS, self._product),
            (REDUCES, self._reduce), (POOLS, self._pool), (COMPARE, self._compare),
        ):  # fmt: skip
            if op in names:
                return handler
        special = {
            "normalise": self._norm, "convolution": self._convolution, "embedding": self._embedding, "where": self._where,
            "masked_fill": self._masked_fill, "copy": self._copy, "view_as_complex": self._complex, "pow": self._power,
            "view_as_real": self._real, "clamp": self._clamp, "clamp_min": self._clamp, "threshold": self._clamp,
        }  # fmt: skip
        return special.get(op, self._unary)

    def _note(self, category: str, call: Call | None, labels: Tensor) -> None:
        self.events.append(Event(category, call, unique(labels)))

    def _set(self, value: Value, labels: Tensor) -> bool:
        self._labels[id(value)] = labels.expand(value.shape)
        return True

    def _why(self, call: Call) -> str:
        return f"its units reach {self.tape.describe(call)}, which is not positively homogeneous unit by unit"

    def _stop(self, call: Call, values: list[Value]) -> None:
        for value in values:
            self.classes.fix(self.labels(value), self._why(call))

    def _stop_opaque(self, labels: Tensor, key: int) -> None:
        branch = self._opaque[key]
        where = f"'{branch.module}'" if branch.module else "the model"
        reason = f"{where} decides by values, `{branch.line}`: its other branch is not known"
        self.classes.fix(labels, reason)

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

    # ----- elementwise ------------------------------------------------------------------------------------------------

    def _unary(self, call: Call) -> bool:
        value = call.args[0] if call.args else None
        if not isinstance(value, Value) or not self.is_free(value):
            return False
        if any(id(other) in self._labels for other in call.inputs[1:]):
            return False
        labels, op = self.labels(value), call.op
        if op in LINEAR:
            return self._set(call.out[0], labels)
        if self.group == "odd":
            if op in EVEN:
                return True
            if op in ODD or (op == "hardtanh" and number(call, 1, "min_val") == -number(call, 2, "max_val")):
                return self._through(call, "odd", labels)
            return op == "sigmoid" and self._through(call, "sigmoid", labels)
        if op in HOMOGENEOUS:
            return self._through(call, "homogeneous", labels)
        if op in DEGREES:
            return DEGREES[op] == 0 or self._through(call, "homogeneous", labels, DEGREES[op])
        if self.group == "suspect" and (op in NEARLY or self._is_activation(call)):
            return self._through(call, "suspect", labels)
        return False

    def _is_activation(self, call: Call) -> bool:
        """Whether the operation belongs to an activation function that is a module of its own, as those of Hugging Face."""
        module = self.tape.modules.get(call.module)
        return bool(call.module) and module is not None and not any(module.children()) and not any(module.parameters())

    def _through(self, call: Call, category: str, labels: Tensor, degree: float = 1.0) -> bool:
        self._note(category, call, labels)
        return self._set(call.out[0], self.classes.multiple(labels, degree, self._why(call)))

    def _power(self, call: Call) -> bool:
        exponent = call.args[1]
        if not isinstance(exponent, int | float) or not isinstance(call.args[0], Value):
            return False
        return self._power_of(call, self.labels(call.args[0]), float(exponent))

    def _power_of(self, call: Call, labels: Tensor, exponent: float) -> bool:
        if self.group == "odd":
            if exponent != int(exponent):
                return False
            return exponent % 2 == 0 or self._through(call, "odd", labels)
        return exponent == 0 or self._through(call, "homogeneous", labels, exponent)

    def _clamp(self, call: Call) -> bool:
        low, high = number(call, 1, "min"), number(call, 2, "max")
        is_relu = {low, high} <= ({0} if call.op == "threshold" else {0, None}) and (low, high) != (None, None)
        if self.group != "odd" and is_relu:
            return self._through(call, "homogeneous", self.labels(call.args[0]))
        if self.group == "odd" and low is not None and high is not None and low == -high:
            return self._through(call, "odd", self.labels(call.args[0]))
        return False

    def _sum(self, call: Call) -> bool:
        first, second = call.args[:2]
        for number_, value in ((first, second), (second, first)):
            if not isinstance(number_, Value):
                return number_ == 0 and self._set(call.out[0], self.labels(value))
        for bias, value in ((first, second), (second, first)):
            self._remember(bias, self.labels(value))
        return self._set(call.out[0], self._tied(call, self.labels(first), self.labels(second)))

    def _remember(self, bias: Value, labels: Tensor) -> None:
        """Note which parameter element is added to which label, if it is one for each."""
        if id(bias) in self._numbers:
            for label, element in pairs(labels, self._numbers[id(bias)]):
                self.biases[label] = element if self.biases.get(label, element) == element else None

    def _tied(self, call: Call, first: Tensor, second: Tensor) -> Tensor:
        self.classes.tie(first, second, self._why(call))
        first, second = torch.broadcast_tensors(first, second)
        if bool((compact(first)[0] != ZERO).all()):
            return first
        return torch.where(first == ZERO, second, first)

    def _meet(self, call: Call) -> bool:
        if self.group == "odd" or not all(isinstance(value, Value) for value in call.args[:2]):
            return False
        labels = self._tied(call, self.labels(call.args[0]), self.labels(call.args[1]))
        return self._through(call, "homogeneous", labels)

    def _where(self, call: Call) -> bool:
        condition, first, second = call.args
        if self.is_free(condition):
            return False
        return self._set(call.out[0], self._tied(call, self.labels(first), self.labels(second)))

    def _masked_fill(self, call: Call) -> bool:
        value, mask, fill = call.args
        filled = float(fill.tensor) if isinstance(fill, Value) else float(fill)
        if self.is_free(mask) or (isinstance(fill, Value) and self.is_free(fill)):
            return False
        return filled in (0.0, float("inf"), float("-inf")) and self._set(call.out[0], self.labels(value))

    def _compare(self, call: Call) -> bool:
        """Comparisons with zero do not notice a scale; their result is fixed."""
        return self.group != "odd" and len(call.args) > 1 and not isinstance(call.args[1], Value) and call.args[1] == 0

    def _product(self, call: Call) -> bool:
        first, second = call.args[:2]
        divides = call.op != "mul"
        if not isinstance(first, Value):  # a number times or over a tensor
            labels = self.labels(second)
            return self._set(call.out[0], self._inverse(call, labels) if divides else labels)
        if not isinstance(second, Value):
            return len(call.args) == 2 and not call.kwargs and self._set(call.out[0], self.labels(first))
        if call.kwargs.get("rounding_mode"):
            return False
        if first is second:
            return divides or self._power_of(call, self.labels(first), 2.0)
        free = [self.is_free(first), self.is_free(second)]
        if all(free) and not divides:
            for normal, gain in ((first, second), (second, first)):
                if id(gain) in self._numbers and self._is_normalised(normal):
                    return self._gain(call, normal, gain)
        both = (self.labels(first), self._inverse(call, self.labels(second)) if divides else self.labels(second))
        for i, value in ((0, first), (1, second)):
            if free[i] and id(value) in self._numbers:
                self._note("gain", call, both[i])
        if not all(free):
            mine = both[0 if free[0] else 1]
            self._note("scaled", call, mine)
            return self._set(call.out[0], mine)
        out = self._fresh_pairs(call, *both)
        return self._set(call.out[0], out)

    def _inverse(self, call: Call, labels: Tensor) -> Tensor:
        return labels if self.group == "odd" else self.classes.multiple(labels, -1.0, self._why(call))

    def _is_normalised(self, value: Value) -> bool:
        return set(unique(self.labels(value)).tolist()) <= self._normalised

    def _gain(self, call: Call, normal: Value, gain: Value) -> bool:
        before, labels = torch.broadcast_tensors(self.labels(normal), self.labels(gain))
        self.gains.append((before, labels))
        self._note("gain", call, labels)
        return self._set(call.out[0], labels)

    def _fresh_pairs(self, call: Call, first: Tensor, second: Tensor) -> Tensor:
        """Labels for a product of two free tensors: their scale is the product of the two, which is settled at the end."""
        first, second = torch.broadcast_tensors(first, second)
        a, b = compact(first, second)
        keys, inverse = torch.unique(torch.stack([a.reshape(-1), b.reshape(-1)]), dim=1, return_inverse=True)
        fresh = self.classes.new(keys.shape[1])
        self.products.append(Product(call, keys[0], keys[1], fresh))
        self._note("product", call, torch.cat([keys.reshape(-1), fresh]))
        return fresh[inverse].reshape(a.shape).expand(first.shape)

    # ----- elements combined ------------------------------------------------------------------------------------------

    def _reduce(self, call: Call) -> bool:
        value = call.args[0]
        if not isinstance(value, Value) or any(isinstance(a, Value) for a in call.args[1:]):
            return False
        is_linear = call.op in ("mean", "sum", "nansum")
        if self.group == "odd" and not is_linear:
            return False
        if call.op in ("linalg_vector_norm", "norm") and isinstance(number(call, 1, "ord", 2), Value):
            return False
        labels, over = self.labels(value), axes(call, value.tensor.ndim)
        first = self._over(call, labels, over)
        if not is_linear:
            self._note("homogeneous", call, first)
        return self._set(call.out[0], first.reshape(squeezed(labels, over, call.out[0])))

    def _pool(self, call: Call) -> bool:
        labels = self.labels(call.args[0])
        over = tuple(range(labels.ndim - POOLS[call.op], labels.ndim))
        is_linear = "max" not in call.op and "lp" not in call.op
        if self.group == "odd" and not is_linear:
            return False
        first = self._over(call, labels, over)
        if not is_linear:
            self._note("homogeneous", call, first)
        return self._set(call.out[0], first)

    def _over(self, call: Call, labels: Tensor, over: tuple[int, ...]) -> Tensor:
        """The labels with every axis of `over` reduced to its first element, to which the others are tied."""
        first = labels
        for axis in over:
            first = first.narrow(axis, 0, 1)
        self.classes.tie(labels, first, self._why(call))
        return first

    # ----- normalisation ----------------------------------------------------------------------------------------------

    def _norm(self, call: Call) -> bool:
        norm: Norm = call.kwargs["norm"]
        labels = self.labels(call.args[0])
        others = tuple(axis for axis in range(labels.ndim) if axis not in norm.unit_axes)
        first = self._over(call, labels, others)  # one gain, one running mean for all rows
        fresh = self.classes.new(first.numel())
        self._normalised.update(fresh.tolist())
        after = fresh.reshape(first.shape)
        self._note("norm" if norm.style in ("layer", "group") else "batch-norm", call, first)
        self.norms.append(NormUse(call, norm, first, after))
        return self._set(call.out[0], after)

    # ----- weights ----------------------------------------------------------------------------------------------------

    def _contract(self, call: Call) -> bool:
        bias, a, b = _operands(call)
        matrices = [value for value in (a, b) if id(value) in self._numbers]
        weights_only = [value for value in (a, b) if value.depends == PARAMETER]
        if len(matrices) == 1 and len(weights_only) == 1:
            labels = self._weighted(call, a, b, bias)
        elif weights_only:
            return self._computed(call, a, b)
        else:
            labels = self._multiplied(call, a, b)
        if bias is not None:
            labels = labels.reshape(call.out[0].shape)
            self._remember(bias, labels)
            labels = self._tied(call, labels, self.labels(bias))
        return self._set(call.out[0], labels.reshape(call.out[0].shape))

    def _computed(self, call: Call, *values: Value) -> bool:
        layer = call.module or self.tape.describe(call)
        reason = f"the weight or bias of {layer} is computed, so it cannot be changed as a parameter"
        self.computed.append((layer, reason))
        for value in values:
            if self.is_free(value):
                self.classes.fix(self.labels(value), reason)
        return True

    def _weighted(self, call: Call, a: Value, b: Value, bias: Value | None) -> Tensor:
        flipped = id(a) in self._numbers
        data, weight = (b, a) if flipped else (a, b)
        x, numbers = (
            as_batch(self.labels(data), first=not flipped),
            as_batch(self._numbers[id(weight)], first=flipped),
        )
        if flipped:  # (W x)^T = x^T W^T
            x, numbers = x.transpose(1, 2), numbers.transpose(1, 2)
        if all(bool((n == numbers[0]).all()) for n in numbers[1:]):
            numbers = numbers[:1]  # one matrix for the whole batch
        into = self._over(call, x, (0, 1) if len(numbers) == 1 else (1,))
        columns, inverse = torch.unique(numbers[:, 0], return_inverse=True)
        fresh = self.classes.new(len(columns))[inverse].unsqueeze(1)
        self._use(call, numbers, fresh, into.transpose(1, 2), bias)
        labels = fresh.expand(x.shape[0], x.shape[1], fresh.shape[2])
        return labels.transpose(1, 2) if flipped else labels

    def _use(self, call: Call, numbers: Tensor, out: Tensor, into: Tensor, bias: Value | None) -> None:
        self._note("write", call, out)
        self._note("read", call, into)
        self.uses.append(Use(call, tuple(self.parameters.entries(numbers, out, into)), bias))

    def _multiplied(self, call: Call, a: Value, b: Value) -> Tensor:
        free = [self.is_free(a), self.is_free(b)]
        first, second = as_batch(self.labels(a), first=True), as_batch(self.labels(b), first=False)
        if not all(free):
            mine = first if free[0] else second
            one = mine.narrow(2 if free[0] else 1, 0, 1)
            self.classes.tie(mine, one, self._why(call))
            self._note("averaged", call, one)
            self.averages.append(Average(call, b if free[0] else a, one[:, :, 0] if free[0] else one[:, 0]))
            return one.expand(first.shape[0], first.shape[1], second.shape[2])
        if self.group == "odd":
            self._stop(call, [a, b])
        rows, columns = first[:, :1], second[:, :, :1]
        self.classes.tie(first, rows, self._why(call))
        self.classes.tie(second, columns, self._why(call))
        self._note("contracted", call, torch.cat([unique(rows), unique(columns)]))
        self.contractions.append(Contraction(call, rows[:, 0], columns[:, :, 0]))
        return torch.tensor(FIXED).expand(first.shape[0], first.shape[1], second.shape[2])

    def _convolution(self, call: Call) -> bool:
        data, weight, bias = call.args[:3]
        transposed, groups = call.args[6], call.args[8]
        if id(weight) not in self._numbers or data.depends == PARAMETER:
            return weight.depends == PARAMETER and self._computed(call, *(v for v in (data, weight) if self.is_free(v)))
        x = self.labels(data)
        first = self._over(call, x, (0, *range(2, x.ndim))).reshape(-1)  # one label for each channel
        numbers = self._numbers[id(weight)]
        if len(first) == 1:
            first = first.expand(weight.shape[0] if transposed else weight.shape[1] * groups)
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
        self._use(call, numbers, out.reshape(*out.shape, *spatial), into.reshape(*into.shape, *spatial), bias)
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
        self._use(call, numbers, fresh.reshape(1, -1), torch.zeros(1, 1, dtype=torch.int64), None)
        return self._set(call.out[0], fresh)


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
