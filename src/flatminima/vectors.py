"""A list of tensors as one long vector: its norm and inner products, also when the tensors are shards on several ranks.

Norms are the only arithmetic that a sharpness-aware step cannot do tensor by tensor, and four things go wrong in them: half
precision overflows above 65504, a single-precision sum over millions of entries loses four digits on a CPU, many small
tensors cost a call each, and a shard knows only its part of the sum.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flatminima.sharding import local

__all__ = ["SMALL", "Kind", "dense", "dot", "finite", "length", "local", "norm", "plain", "real"]

_PLAIN = (Tensor, nn.Parameter)
_HALF = (torch.float16, torch.bfloat16)
# Below this mean size the call outweighs the traffic, and one copy into a flat vector is cheaper than a call per tensor.
SMALL = 2**14
# Entries that are summed in single precision before the sums are added up in double.
_PIECE = 2**19
# Sums below are computed again in double precision: squares of their entries may have left the range of single.
_TINY = 1e-15


def plain(tensors: Sequence[Tensor]) -> bool:
    """Whether all are ordinary tensors, none a shard or another subclass."""
    return {Tensor, nn.Parameter}.issuperset(map(type, tensors))


class Kind:
    """What some tensors are like: asked once, where every training step would ask a hundred tensors the same ten questions.

    Gradients are of the kind of their parameters (torch sees to it), except that they may be sparse.

    Args:
        tensors: what is described.

    Attributes:
        ordinary: all are whole, dense and real.
        alike: ordinary, and of one dtype and device.
        small, large: indices of the tensors that are shorter or not shorter than :data:`SMALL`.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)
        self.ordinary = plain(tensors) and all(t.layout is torch.strided and not t.is_complex() for t in tensors)
        self._places = [t.data_ptr() for t in tensors] if self.ordinary else []
        self.alike = self.ordinary and len(tensors) > 0 and _alike(tensors)
        self.small = [i for i, t in enumerate(tensors) if t.numel() < SMALL]
        self.large = [i for i, t in enumerate(tensors) if t.numel() >= SMALL]

    def of(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the tensors that were described, and their storage the same."""
        return (
            self.ordinary
            and len(tensors) == len(self._tensors)
            and all(map(operator.is_, tensors, self._tensors))
            and [t.data_ptr() for t in tensors] == self._places
        )


def dense(tensor: Tensor) -> Tensor:
    """The tensor with its zeros written out."""
    return tensor.to_dense() if tensor.layout is not torch.strided else tensor


def real(tensor: Tensor) -> Tensor:
    """A complex tensor as pairs of real numbers (a view); any other as it is."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def norm(tensors: Sequence[Tensor], whole: Sequence[Tensor] | None = None, kind: Kind | None = None) -> float:
    r"""The Euclidean norm :math:`\sqrt{\sum_i \lVert t_i \rVert^2}` of all entries together.

    Args:
        tensors: what this rank holds, any floating dtype.
        whole: the tensors they are shards of, when some are (one reduction per device mesh, over the ranks that share it).
        kind: what they are like, if that is known.

    Half precision is summed in single, single in pieces whose sums are added in double. A result that is tiny or infinite is
    computed again in double, so that neither tiny nor huge gradients are mistaken for none. NaN and infinite entries give NaN
    or infinity.

    Example:
        >>> norm([torch.tensor([3.0]), torch.tensor([[4.0]])])
        5.0
        >>> [f"{norm([torch.tensor(v, dtype=torch.float64)]):.3g}" for v in ([3e-30, 4e-30], [3e-200, 4e-200], [3e200, 4e200])]
        ['5e-30', '5e-200', '5e+200']
    """
    if not tensors:
        return 0.0
    if kind is None and whole is not None and not plain(whole):
        squares = [torch.linalg.vector_norm(t, dtype=_wide(t)).square() for t in tensors]
        return math.sqrt(_total(squares, whole))
    value = _norm(tensors, kind)
    if value < _TINY or math.isinf(value):
        value = float(torch.stack([torch.linalg.vector_norm(t, dtype=_wide(t)).cpu() for t in tensors]).norm())
    return value if 1e-150 < value < 1e150 else _scaled(tensors, value)


def _scaled(tensors: Sequence[Tensor], value: float) -> float:
    """The norm where squares leave the range of a double; zero, NaN and infinite entries keep ``value``."""
    largest = max((float(torch.linalg.vector_norm(t, math.inf)) for t in tensors if t.numel()), default=0.0)
    if largest == 0.0 or not math.isfinite(largest):
        return value
    return largest * float(torch.stack([(t.to(_wide(t)) / largest).norm().cpu() for t in tensors]).norm())


def length(tensor: Tensor) -> Tensor:
    """The norm of one tensor, as a tensor: nothing waits for the device."""
    if tensor.dtype in _HALF:
        tensor = tensor.float()
    pieces = _pieces([tensor]) if tensor.is_cpu else [tensor]
    lengths = torch._foreach_norm(pieces)
    return lengths[0] if len(lengths) == 1 else torch.stack(lengths).norm()


def finite(tensors: Sequence[Tensor], whole: Sequence[Tensor] | None = None, kind: Kind | None = None) -> bool:
    """Whether no entry is NaN or infinite, on no rank. Arguments as of :func:`norm`.

    Example:
        >>> finite([torch.ones(2), torch.zeros(1)]), finite([torch.ones(2), torch.tensor([math.inf])])
        (True, False)
    """
    here = kind is not None or whole is None or plain(whole)
    if here and tensors and tensors[0].is_cpu and tensors[0].dtype not in _HALF and (kind or Kind(tensors)).alike:
        with torch.inference_mode():  # dispatch below autograd is cheaper
            # A sum meets every entry and cannot lose a NaN or an infinity; it is the cheapest pass over memory there is.
            sums = [t.sum() for t in _packed(tensors, kind)]
            total = float(sums[0] if len(sums) == 1 else torch.stack(sums).sum())
        if math.isfinite(total):
            return True  # else the sum may have overflowed
    return math.isfinite(norm(tensors, whole, kind))


def dot(a: Sequence[Tensor], b: Sequence[Tensor], whole: Sequence[Tensor] | None = None) -> float:
    r"""The inner product :math:`\sum_i \langle a_i, b_i \rangle`, summed over tensors in double precision.

    Example:
        >>> dot([torch.ones(2), torch.ones(1)], [torch.ones(2), torch.tensor([3.0])])
        5.0
    """
    if not a:
        return 0.0
    whole = a if whole is None else whole
    if plain(whole) and a[0].is_cpu and a[0].dtype not in _HALF and _alike([*a, *b]):
        kind = Kind(a)
        pairs = zip(_packed(a, kind), _packed(b, kind), strict=True)
        flat = ((u.reshape(-1).split(_PIECE), v.reshape(-1).split(_PIECE)) for u, v in pairs)
        products = [float(torch.dot(x, y)) for u, v in flat for x, y in zip(u, v, strict=True)]
        if all(_TINY < abs(each) < math.inf for each in products):
            return math.fsum(products)  # else single precision may have lost digits
    parts = [torch.sum(x.to(_wide(x)) * y.to(_wide(y))) for x, y in zip(a, b, strict=True)]
    return _total(parts, whole)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def _alike(tensors: Sequence[Tensor]) -> bool:
    return len({t.dtype for t in tensors}) == 1 and len({t.get_device() for t in tensors}) == 1


def _packed(tensors: Sequence[Tensor], kind: Kind | None = None) -> list[Tensor]:
    """The same entries in fewer tensors."""
    kind = Kind(tensors) if kind is None else kind
    if len(kind.small) < 4:
        return list(tensors)
    small = [tensors[i] for i in kind.small]
    return [torch._C._nn.flatten_dense_tensors(small), *[tensors[i] for i in kind.large]]


def _pieces(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same entries in tensors that are short enough to be summed in single precision."""
    short: list[Tensor] = []
    for t in tensors:
        size = t.numel()
        if size <= _PIECE:
            short.append(t)
        else:
            rows = t.view(-1) if t.is_contiguous() else t
            short += rows.split(max(1, _PIECE * rows.shape[0] // size))
    return short


@torch.inference_mode()
def _norm(tensors: Sequence[Tensor], kind: Kind | None = None) -> float:
    first = tensors[0]
    if not (_alike(tensors) if kind is None else kind.alike):
        kinds = {(t.dtype, t.device) for t in tensors}
        return math.hypot(*(_norm([t for t in tensors if (t.dtype, t.device) == each]) for each in kinds))
    if first.dtype in _HALF:
        return math.hypot(*(_norm([t.float()]) for t in _packed(tensors, kind)))
    short = _pieces(_packed(tensors, kind)) if first.is_cpu else list(tensors)
    norms = torch._foreach_norm(short)
    return float(norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms).to(_wide(first))))


def _total(parts: Sequence[Tensor], whole: Sequence[Tensor]) -> float:
    """The sum of one number per tensor; what is sharded is summed over the ranks that hold different shards."""
    here = 0.0
    sharded: dict[tuple[Any, Any], Tensor] = {}
    for part, tensor in zip(parts, whole, strict=True):
        placements = getattr(tensor, "placements", None)
        if placements is None:
            here += float(part)
        else:
            key = (tensor.device_mesh, placements)  # type: ignore[attr-defined]
            sharded[key] = sharded[key] + part if key in sharded else part
    if sharded:
        from torch.distributed.tensor import DTensor, Partial, Replicate

        for (mesh, placements), part in sharded.items():
            kinds = [Replicate() if p.is_replicate() else Partial() for p in placements]
            here += float(DTensor.from_local(part, mesh, kinds, run_check=False).full_tensor())
    return here
