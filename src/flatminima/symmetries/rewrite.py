"""Normalisations, whoever wrote them, brought to one form: ``normalise``, then a gain, then a bias.

torch's fused layer, group and batch normalisation (and GLU) are taken apart; RMS and layer normalisation spelled out in
elementary operations (as in Llama, T5 or ConvNeXt) are put together. Afterwards a run has calls ``normalise(x)`` with a `Norm`
in their keyword arguments, and gains and biases are ordinary products and sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops import SAME, axes, number
from .tape import Call, Tape, Value, live


@dataclass(frozen=True)
class Norm:
    """What a normalisation does.

    Attributes:
        style: ``layer``: over `axes`, every other position by itself; ``group``: over groups of channels (axis 1) and all
            positions; ``batch``: every channel over rows and positions; ``running``: a fixed affine map of every channel.
        axes: what is normalised together, of a layer.
        centred: whether the mean is removed.
        eps: added to the mean square.
        groups: of channels.
        running: names of the buffers of mean and variance.
    """

    style: Literal["layer", "group", "batch", "running"]
    axes: tuple[int, ...]
    centred: bool
    eps: float
    groups: int = 1
    running: tuple[str, str] | None = None

    @property
    def unit_axes(self) -> tuple[int, ...]:
        """The axes along which the elements are different units."""
        return self.axes if self.style == "layer" else (1,)


def normalised(tape: Tape) -> Tape:
    """The same run with every normalisation in the form ``normalise``, gain, bias."""
    calls: list[Call] = []
    for call in tape.calls:
        taken = _TAKE_APART.get(call.op)
        if taken is not None:
            calls.extend(taken(call))
        else:
            calls.append(_spelled_out(call) or call)
    return replace(tape, calls=tuple(live(calls, tape.outputs)))


# ----- torch's own ----------------------------------------------------------------------------------------------------


def _layer(call: Call) -> Iterator[Call]:
    x, shape, weight, bias, eps = call.args
    axes = tuple(range(x.tensor.ndim - len(shape), x.tensor.ndim))
    plain = F.layer_norm(x.tensor, tuple(shape), eps=eps)
    return _chain(call, x, Norm("layer", axes, True, eps), plain, weight, bias, tuple(shape))


def _rms(call: Call) -> Iterator[Call]:
    x, shape = call.args[:2]
    weight, eps = number(call, 2, "weight"), number(call, 3, "eps")
    axes = tuple(range(x.tensor.ndim - len(shape), x.tensor.ndim))
    eps = torch.finfo(torch.float64).eps if eps is None else eps
    plain = x.tensor * torch.rsqrt(x.tensor.square().mean(axes, keepdim=True) + eps)
    return _chain(call, x, Norm("layer", axes, False, eps), plain, weight, None, tuple(shape))


def _group(call: Call) -> Iterator[Call]:
    x, weight, bias, _, channels, _, groups, eps = call.args
    plain = F.group_norm(x.tensor, groups, eps=eps)
    norm = Norm("group", (), True, eps, groups)
    return _chain(call, x, norm, plain, weight, bias, _per_channel(x, channels))


def _batch(call: Call) -> Iterator[Call]:
    x, weight, bias, mean, variance, training, _, eps = call.args[:8]
    running = None if training or mean is None else (mean.name or "", variance.name or "")
    norm = Norm("running" if running else "batch", (), True, eps, running=running)
    if running:
        plain = F.batch_norm(x.tensor, mean.tensor, variance.tensor, eps=eps)
    else:
        plain = F.batch_norm(x.tensor, None, None, training=True, eps=eps)
    return _chain(call, x, norm, plain, weight, bias, _per_channel(x, x.shape[1]))


def _per_channel(x: Value, channels: int) -> tuple[int, ...]:
    return (channels,) + (1,) * (x.tensor.ndim - 2)


def _chain(
    call: Call, x: Value, norm: Norm, plain: Tensor, weight: Value | None, bias: Value | None, shape: tuple[int, ...]
) -> Iterator[Call]:
    value = x
    steps: list[tuple[str, tuple[Any, ...], dict[str, Any], Tensor]] = [("normalise", (), {"norm": norm}, plain)]
    for op, parameter in (("mul", weight), ("add", bias)):
        if parameter is not None:
            broadcast = Call("view", None, (parameter, shape), {}, call.module, call.function)
            broadcast.out = (Value(parameter.tensor.reshape(shape), broadcast, parameter.depends),)
            yield broadcast
            plain = plain * broadcast.out[0].tensor if op == "mul" else plain + broadcast.out[0].tensor
            steps.append((op, broadcast.out, {}, plain))
    # The views of gain and bias come first; then the steps, the last of which makes what the call made.
    for i, (op, others, kwargs, tensor) in enumerate(steps):
        step = Call(op, None, (value, *others), kwargs, call.module, call.function)
        if i == len(steps) - 1:
            step.out = (call.out[0],)
            call.out[0].source = step
        else:
            step.out = (Value(tensor, step, call.out[0].depends),)
        value = step.out[0]
        yield step


def _gated(call: Call) -> Iterator[Call]:
    """``glu(x) = a * sigmoid(b)`` with the halves a and b of x."""
    x, axis = call.args[0], number(call, 1, "dim", -1)
    halves = Call("chunk", torch.ops.aten.chunk.default, (x, 2, axis), {}, call.module, call.function)
    halves.out = tuple(Value(half, halves, x.depends) for half in x.tensor.chunk(2, axis))
    gate = Call("sigmoid", None, (halves.out[1],), {}, call.module, call.function)
    gate.out = (Value(halves.out[1].tensor.sigmoid(), gate, x.depends),)
    product = Call("mul", None, (halves.out[0], gate.out[0]), {}, call.module, call.function, call.out[:1])
    call.out[0].source = product
    yield from (halves, gate, product)


_TAKE_APART: dict[str, Callable[[Call], Iterator[Call]]] = {
    "glu": _gated,
    "native_layer_norm": _layer,
    "_fused_rms_norm": _rms,
    "native_group_norm": _group,
    "native_batch_norm": _batch,
    "_native_batch_norm_legit": _batch,
    "_native_batch_norm_legit_no_training": lambda call: _batch(
        replace(call, args=(*call.args[:5], False, *call.args[5:]))
    ),
    "_batch_norm_no_update": lambda call: _batch(replace(call, args=(*call.args[:5], False, *call.args[5:]))),
    "cudnn_batch_norm": _batch,
}


# ----- spelled out ----------------------------------------------------------------------------------------------------


def _spelled_out(call: Call) -> Call | None:
    """``x / sqrt(mean(x^2) + eps)`` in one of its spellings, also with the mean of x removed, as one call."""
    if call.op not in ("mul", "div") or len(call.args) < 2 or not all(isinstance(a, Value) for a in call.args[:2]):
        return None
    first, second = call.args[:2]
    over = _length(second, _same(first)) if call.op == "div" else None
    if over is not None:
        return _put_together(call, first, Norm("layer", over, False, 0.0))
    for numerator, other in ((first, second), (second, first)) if call.op == "mul" else ((first, second),):
        inside = _under_root(other, inverted=call.op == "mul")
        if inside is None:
            continue
        square, eps = inside
        found = _mean_square(square, _same(numerator))
        if found is not None:
            x, over, centred = found
            return _put_together(call, x, Norm("layer", over, centred, eps))
    return None


def _put_together(call: Call, x: Value, norm: Norm) -> Call:
    whole = Call("normalise", None, (x,), {"norm": norm}, call.module, call.function)
    whole.out = call.out
    call.out[0].source = whole
    return whole


def _length(value: Value, numerator: Value) -> tuple[int, ...] | None:
    """The axes over which a value is the Euclidean length of the numerator, also where ``max(length, eps)`` guards a division
    by zero: a length below it does not occur on the example, and at 0 there is nothing to scale."""
    call, guarded = value.source, False
    while call is not None and call.op in SAME | {"expand", "clamp_min"}:
        if call.op == "clamp_min":
            limit = call.args[1].tensor if isinstance(call.args[1], Value) else call.args[1]
            if guarded or not bool(((call.args[0].tensor > limit) | (call.args[0].tensor == 0)).all()):
                return None
            guarded = True
        call = call.args[0].source
    if call is None or call.op != "linalg_vector_norm" or number(call, 1, "ord", 2) != 2:
        return None
    same = _same(call.args[0]) is numerator and call.out[0].tensor.ndim == numerator.tensor.ndim
    return axes(call, numerator.tensor.ndim) if same and guarded else None


def _same(value: Value) -> Value:
    """Where the elements come from, past copies and casts."""
    while value.source is not None and value.source.op in SAME:
        value = value.source.args[0]
    return value


def _under_root(value: Value, *, inverted: bool) -> tuple[Value, float] | None:
    """``(s, eps)`` where the value is ``1 / sqrt(s + eps)``, or ``sqrt(s + eps)`` if not inverted."""
    call = _same(value).source
    if call is None:
        return None
    exponent = call.args[1] if call.op == "pow" and len(call.args) > 1 else None
    if inverted and call.op == "reciprocal":
        return _under_root(call.args[0], inverted=False)
    if not (call.op == "rsqrt" or exponent == -0.5) if inverted else not (call.op == "sqrt" or exponent == 0.5):
        return None
    inside = _same(call.args[0])
    added = inside.source
    if added is not None and added.op == "add" and len(added.args) > 1:
        constant = added.args[1]
        if isinstance(constant, int | float):
            return _same(added.args[0]), float(constant)
        if isinstance(constant, Value) and constant.depends == 0 and constant.tensor.numel() == 1:
            return _same(added.args[0]), float(constant.tensor)
        return None
    return inside, 0.0


def _mean_square(value: Value, numerator: Value) -> tuple[Value, tuple[int, ...], bool] | None:
    """``(x, axes, centred)`` where the value is the mean square of the numerator, and that is x or x minus its mean."""
    call = value.source
    if call is None:
        return None
    plain = _less_its_mean(numerator)
    if call.op == "var":
        over = axes(call, call.args[0].tensor.ndim)
        biased = call.kwargs.get("correction", 1) == 0 or (len(call.args) > 2 and call.args[2] is False)
        if plain is not None and biased and _same(call.args[0]) is plain[0] and plain[1] == over:
            return plain[0], over, True
        return None
    if call.op != "mean":
        return None
    over = axes(call, call.args[0].tensor.ndim)
    squared = _same(call.args[0]).source
    if squared is None:
        return None
    is_square = (
        squared.op == "square"
        or (squared.op == "pow" and squared.args[1] == 2)
        or (squared.op == "mul" and squared.args[0] is squared.args[1])
    )
    base = _same(squared.args[0]) if is_square else None
    if base is None:
        return None
    if plain is not None and plain[1] == over and (base is numerator or _less_its_mean(base) == plain):
        return plain[0], over, True
    return (numerator, over, False) if base is numerator else None


def _less_its_mean(value: Value) -> tuple[Value, tuple[int, ...]] | None:
    """``(x, axes)`` where the value is ``x - mean(x, axes)``."""
    call = value.source
    if call is None or call.op != "sub" or not all(isinstance(a, Value) for a in call.args[:2]):
        return None
    x, mean = _same(call.args[0]), _same(call.args[1]).source
    if mean is None or mean.op != "mean" or _same(mean.args[0]) is not x:
        return None
    return x, axes(mean, x.tensor.ndim)
