"""What the operations of a run do, sorted by what matters to symmetries. Names are those of ATen without overload.

Whatever only moves elements about is *run* on tensors of labels, so that no rule for views, splits, padding, rotations or
gathers is needed and none can be wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .classes import FIXED, ZERO
from .tape import Call, Value


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


SAME = frozenset({"alias", "clone", "contiguous", "detach", "_to_copy", "lift_fresh_copy", "native_dropout", "dropout"})
"""The result holds the elements of the first argument in the same places."""

MOVES = _names(
    """
    _reshape_alias _unsafe_view cat channel_shuffle chunk constant_pad_nd diagonal expand expand_copy flip gather im2col
    index index_select movedim narrow native_channel_shuffle permute permute_copy pixel_shuffle pixel_unshuffle
    reflection_pad1d reflection_pad2d reflection_pad3d repeat replication_pad1d replication_pad2d replication_pad3d reshape
    roll rot90 select select_copy slice slice_copy split split_copy split_with_sizes split_with_sizes_copy squeeze
    squeeze_copy stack swapaxes t t_copy take transpose transpose_copy tril triu unbind unbind_copy unfold unfold_copy
    unsafe_chunk unsafe_split unsafe_split_with_sizes unsqueeze unsqueeze_copy upsample_nearest1d upsample_nearest2d
    upsample_nearest3d view view_copy
    """
)

LINEAR = frozenset({"neg", "positive"})
HOMOGENEOUS = frozenset({"relu", "leaky_relu", "abs", "_prelu_kernel", "prelu", "rrelu", "rrelu_with_noise"})
"""``op(d x) = d op(x)`` for d > 0."""

DEGREES: dict[str, float] = {"square": 2.0, "sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1.0, "sign": 0.0, "sgn": 0.0}
"""``op(d x) = d^k op(x)`` for d > 0."""

ODD = _names("tanh sin asin sinh asinh atan atanh tan erf erfinv sign sgn trunc round softshrink hardshrink tanhshrink")
"""``op(-x) = -op(x)``."""

EVEN = frozenset({"abs", "square", "cos", "cosh"})
"""``op(-x) = op(x)``."""

NEARLY = _names(
    """
    gelu silu softplus elu selu celu mish hardswish hardsigmoid hardtanh log_sigmoid log_sigmoid_forward tanh sigmoid
    softshrink hardshrink exp erf
    """
)
"""Activations for which rescaling is a false friend: it is proposed, so that the proof can refuse it with a number."""

ELEMENTWISE = (LINEAR | HOMOGENEOUS | ODD | EVEN | NEARLY | frozenset(DEGREES)) | _names(
    """
    log log1p log2 log10 expm1 exp2 ceil floor frac logit digamma lgamma clamp clamp_min clamp_max threshold pow rsub nan_to_num
    isnan isinf isfinite logical_not bitwise_not heaviside
    """
)
"""Each element of the result depends on the same element of the first argument alone (and on numbers)."""

INHOMOGENEOUS = (NEARLY | ODD) - frozenset(DEGREES) | _names(
    """
    cos cosh ceil floor frac log1p expm1 exp2 logit digamma lgamma threshold _softmax _safe_softmax softmax _log_softmax
    log_softmax logsumexp
    """
)
"""No power of d is ``op(d x) / op(x)`` for all x: it is certain that these let no scale through. (The logarithm turns a scale
into a shift, which what follows may take away: it is not among them.)"""

SCALE_FREE = _names("isnan isinf isfinite isposinf isneginf logical_not signbit")
"""``op(d x) = op(x)`` for d > 0."""

COMPARE = _names("eq ne lt le gt ge isclose logical_and logical_or logical_xor bitwise_and bitwise_or")
SUMS = frozenset({"add", "sub", "rsub"})
MEETS = frozenset({"maximum", "minimum", "fmax", "fmin"})
PRODUCTS = frozenset({"mul", "div", "true_divide"})

REDUCES = _names("mean sum amax amin max min linalg_vector_norm norm nansum median std var")
"""Combine elements along axes, whatever their order; homogeneous of degree 1, the variance of degree 2."""

ORDERED: dict[str, int] = {
    "sort": 1, "topk": 2, "kthvalue": 2, "cummax": 1, "cummin": 1, "cumsum": 1, "argsort": 1, "argmax": 1, "argmin": 1,
    "_fft_r2c": 1, "_fft_c2c": 1, "_fft_c2r": 1,
}  # fmt: skip
"""Combine elements along axes by their order; homogeneous of degree 1. The position of the argument that names the axes."""

POOLS: dict[str, int] = {
    name.format(k): k
    for name in (
        "max_pool{}d", "max_pool{}d_with_indices", "avg_pool{}d", "adaptive_avg_pool{}d", "_adaptive_avg_pool{}d",
        "adaptive_max_pool{}d", "fractional_max_pool{}d", "lp_pool{}d",
    )
    for k in (1, 2, 3)
} | {"upsample_bilinear2d": 2, "_upsample_bilinear2d_aa": 2, "upsample_linear1d": 1, "upsample_trilinear3d": 3,
     "upsample_bicubic2d": 2, "_upsample_bicubic2d_aa": 2}  # fmt: skip
"""Combine elements along the last so many axes."""

SOFTMAXES = frozenset({"_softmax", "_safe_softmax", "softmax"})


def moved(call: Call, convert: Callable[[Value], Tensor]) -> tuple[Tensor, ...]:
    """The results of an operation that moves elements about, when it is given labels instead.

    Args:
        call: one of `MOVES`.
        convert: the labels, int64, of a value; asked for floating-point arguments only, the others are indices and masks.
    """

    def argument(value: Value) -> Tensor:
        is_data = value.tensor.is_floating_point() or value.tensor.is_complex()
        return convert(value) if is_data else value.tensor

    args = list(tree_map_only(Value, argument, call.args))
    kwargs = tree_map_only(Value, argument, call.kwargs)
    if call.op in ("view", "_unsafe_view", "_reshape_alias", "view_copy", "reshape"):
        return (args[0].reshape(call.out[0].shape),)
    if call.op in ("tril", "triu"):  # what becomes zero goes with everything, also with its old label
        return (args[0],)
    if call.op == "constant_pad_nd":
        value = args[2] if len(args) > 2 else kwargs.get("value", 0)
        return (torch.constant_pad_nd(args[0], args[1], ZERO if value == 0 else FIXED),)
    try:
        returned = call.func(*args, **kwargs)
    except (RuntimeError, NotImplementedError):  # not implemented for integers
        wide = tree_map_only(Tensor, lambda t: t.double() if t.dtype == torch.int64 else t, args[:1]) + args[1:]
        returned = call.func(*wide, **kwargs).long()
    return tuple(returned) if isinstance(returned, tuple | list) else (returned,)


def number(call: Call, position: int, name: str, default: Any = None) -> Any:
    """An argument of an operation by position or name."""
    if len(call.args) > position:
        return call.args[position]
    return call.kwargs.get(name, default)


def axes(call: Call, dimensions: int) -> tuple[int, ...]:
    """The axes that a reduction combines, sorted; all of them where none is given."""
    position = 2 if call.op in ("linalg_vector_norm", "norm") else ORDERED.get(call.op, 1)
    given = number(call, position, "dim", -1 if call.op in ("sort", "argsort", "topk", "kthvalue") else None)
    chosen = given if isinstance(given, list | tuple) else [given]
    if not chosen or not all(isinstance(axis, int) and not isinstance(axis, bool) for axis in chosen):
        return tuple(range(dimensions))
    return tuple(sorted(axis % dimensions for axis in chosen))
