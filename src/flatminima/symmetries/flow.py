"""Which scales of units a network leaves free: labels carried through every operation of a run.

Every unit that a weight writes, and every element of a parameter that is used as a number of its own, gets a label with an
unknown scale. An operation lets a scale through, ties scales together, or stops them with a reason. What remains free at the
end, with its weights on both sides, is a symmetry for the finders to name.

The scales are positive numbers (``group="positive"``), signs (``group="odd"``), or positive numbers in a network whose smooth
activations are taken for homogeneous (``group="suspect"``): its classes are the false friends that a proof has to refuse.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from .base import APPROXIMATE
from .classes import FIXED, ZERO, compact, unique
from .ops import (
    COMPARE,
    DEGREES,
    ELEMENTWISE,
    EVEN,
    HOMOGENEOUS,
    INHOMOGENEOUS,
    LINEAR,
    NEARLY,
    ODD,
    ORDERED,
    POOLS,
    PRODUCTS,
    SCALE_FREE,
    SUMS,
    axes,
    number,
)
from .parameters import Parameters
from .propagation import Handler, Propagation, as_batch, first_along, squeezed
from .records import Average, Contraction, NormUse, Product
from .rewrite import Norm
from .tape import Call, Tape, Value, is_activation

Group = Literal["positive", "odd", "suspect"]


class Flow(Propagation):
    """The scales of one run; see `Propagation` for what it holds."""

    def __init__(self, tape: Tape, parameters: Parameters, group: Group = "positive") -> None:
        self.group = group
        self._normalised: set[int] = set()
        super().__init__(tape, parameters)

    def _table(self) -> dict[str, Handler]:
        own: dict[str, Handler] = {
            "pow": self._power, "clamp": self._clamp, "clamp_min": self._clamp, "threshold": self._clamp,
        }  # fmt: skip
        return super()._table() | own | dict.fromkeys(ORDERED, self._ordered)

    def _step(self, call: Call) -> None:
        free = [value for value in call.inputs if self.is_free(value)]
        if free and self.group == "suspect" and self._is_activation(call):
            self._suspect(call, free)
        else:
            super()._step(call)
        for value in call.out:
            if self.is_free(value) and not _is_continuous(value):
                if (
                    value.tensor.dtype != torch.bool
                ):  # an integer part does not grow with the number; whether it is 0 stays
                    self._stop(call, [value])
                self._labels.pop(id(value), None)
                self._numbers.pop(id(value), None)

    def _why(self, call: Call) -> str:
        return f"its units reach {self.tape.describe(call)}, which is not positively homogeneous unit by unit"

    def _stop(self, call: Call, values: list[Value], why: str | None = None) -> None:
        if why is None and not self._lets_nothing_through(call):
            why = f"its units reach {self.tape.describe(call)}, through which no scale is followed"
            units = [self._labels[id(value)] for value in values if id(value) in self._labels]
            if any(bool((self.classes.roots(labels)[0] > FIXED).any()) for labels in units):
                self.unfollowed.append(call)
        super()._stop(call, values, why)

    def _lets_nothing_through(self, call: Call) -> bool:
        """Whether it is certain that no scale passes an operation, so that none is missed where it is stopped."""
        numbers = [argument for argument in call.args if isinstance(argument, int | float)]
        if call.op in INHOMOGENEOUS or not all(_is_continuous(value) for value in call.out):
            return call.op not in COMPARE or bool(numbers)
        if call.op in PRODUCTS:
            return bool(call.kwargs.get("rounding_mode"))
        if call.op == "pow":
            return not isinstance(call.args[0], Value)
        if call.op in SUMS:
            return bool(numbers) and not _is_small(numbers[0], call.inputs[0])
        if call.op in ("clamp", "clamp_min", "clamp_max"):
            low, high = number(call, 1, "min"), number(call, 2, "max")
            limits = [high] if call.op == "clamp_max" else [limit for limit in (low, high) if limit is not None]
            return not any(_is_small(limit, call.inputs[0]) for limit in limits)
        return call.op == "masked_fill" and bool(numbers)

    # ----- elementwise ------------------------------------------------------------------------------------------------

    def _unary(self, call: Call) -> bool:
        value = call.args[0] if call.args else None
        if not isinstance(value, Value) or not self.is_free(value):
            return False
        if any(id(other) in self._labels for other in call.inputs[1:]):
            return False
        op = call.op
        if op not in ELEMENTWISE | SCALE_FREE:
            return False
        labels = self.labels(value)
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
        if op in SCALE_FREE or DEGREES.get(op) == 0:
            return self._ignores(call, labels)
        if op in DEGREES:
            return self._through(call, "homogeneous", labels, DEGREES[op])
        if self.group == "suspect" and op in NEARLY:
            return self._through(call, "suspect", labels)
        return False

    def _suspect(self, call: Call, free: list[Value]) -> None:
        """A step inside an activation function: whatever it computes goes by the units it is given."""
        same = [value for value in free if value.shape == call.out[0].shape]
        if same:
            self._through(call, "suspect", self.labels(same[0]))
        else:
            self._stop(call, free)

    def _is_activation(self, call: Call) -> bool:
        """Whether the operation belongs to an activation function that is a module of its own, as those of Hugging Face."""
        module = self.tape.modules.get(call.module) if call.module else None
        return module is not None and not type(module).__module__.startswith("torch.nn") and is_activation(module)

    def _through(self, call: Call, category: str, labels: Tensor, degree: float = 1.0) -> bool:
        self._note(category, call, labels)
        return self._set(call.out[0], self.classes.multiple(labels, degree, self._why(call)))

    def _ignores(self, call: Call, *labels: Tensor) -> bool:
        """The result does not depend on a positive scale, and stays."""
        for each in labels:
            self._note("homogeneous", call, each)
        return True

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
        """Comparisons with zero, or of units with one scale, do not notice it; their result is fixed."""
        if self.group == "odd" or len(call.args) < 2 or call.op == "isclose":
            return False
        first, second = call.args[:2]
        if not isinstance(first, Value) or not isinstance(second, Value):
            value, limit = (first, second) if isinstance(first, Value) else (second, first)
            return limit == 0 and self._ignores(call, self.labels(value))
        labels = self.labels(first), self.labels(second)
        if "logical" not in call.op:  # which ask of each whether it is zero
            self.classes.tie(*labels, self._why(call))
        return self._ignores(call, *labels)

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
            mine, value = (both[0], first) if free[0] else (both[1], second)
            if id(value) not in self._numbers:  # a gain is itself what writes the units
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
        if call.op in ("linalg_vector_norm", "norm") and number(call, 1, "ord", 2) == 0:  # how many are not zero
            return True
        labels, over = self.labels(value), axes(call, value.tensor.ndim)
        first = self._over(call, labels, over)
        out = first.reshape(squeezed(labels, over, call.out[0]))
        return (
            self._set(call.out[0], out)
            if is_linear
            else self._through(call, "homogeneous", out, 1.0 + (call.op == "var"))
        )

    def _ordered(self, call: Call) -> bool:
        is_linear = call.op.startswith(("cumsum", "_fft"))
        if self.group == "odd" and not is_linear:
            return False
        labels = self.labels(call.args[0])
        over = axes(call, labels.ndim)
        first = self._over(call, labels, over)
        if not is_linear:
            self._note("homogeneous", call, first)
        for value in call.out:  # the positions do not change
            if _is_continuous(value):
                self._set(value, first.reshape(squeezed(labels, over, value)))
        return True

    def _keeps_maxima(self) -> bool:
        return self.group != "odd"

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
        first = first_along(labels, over)
        self.classes.tie(labels, first, self._why(call))
        return first

    # ----- normalisation ----------------------------------------------------------------------------------------------

    def _norm(self, call: Call) -> bool:
        norm: Norm = call.kwargs["norm"]
        labels = self.labels(call.args[0])
        others = tuple(axis for axis in range(labels.ndim) if axis not in norm.unit_axes)
        first = self._over(call, labels, others)  # there is one gain and one running mean for all rows
        fresh = self.classes.new(first.numel())
        self._normalised.update(fresh.tolist())
        after = fresh.reshape(first.shape)
        self._note("norm" if norm.style in ("layer", "group") else "batch-norm", call, first)
        self.norms.append(NormUse(call, norm, first, after))
        return self._set(call.out[0], after)

    # ----- matrices ---------------------------------------------------------------------------------------------------

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


def _is_continuous(value: Value) -> bool:
    return value.tensor.is_floating_point() or value.tensor.is_complex()


def _is_small(limit: Any, value: Value) -> bool:
    """Whether a number is as small beside a tensor as the ``eps`` of a normalisation: a scale may pass nearly."""
    size = float(limit.tensor.abs().max()) if isinstance(limit, Value) else abs(float(limit))
    return 0 < size <= APPROXIMATE * float(value.tensor.double().square().mean().sqrt())
