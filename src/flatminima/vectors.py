"""A list of tensors as one long vector: its norm and inner products, also when the tensors are shards on several ranks.

Norms are the only arithmetic that a sharpness-aware step cannot do tensor by tensor, and three things go wrong in them: half
precision overflows above 65504, many small tensors cost a call each, and a shard knows only its part of the sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)
_HALF = (torch.float16, torch.bfloat16)
# Below this mean size the call outweighs the traffic, and one copy into a flat vector is cheaper than a call per tensor.
SMALL = 2**14


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: the tensor itself, or the local shard of a ``DTensor`` (sharing its storage)."""
    if type(tensor) in _PLAIN or not hasattr(tensor, "to_local"):
        return tensor
    with torch.no_grad():
        shard: Tensor = tensor.to_local()
    return getattr(shard, "elem", shard)


def plain(tensors: Sequence[Tensor]) -> bool:
    """Whether all are ordinary tensors, none a shard or another subclass."""
    return {Tensor, nn.Parameter}.issuperset(map(type, tensors))


def dense(tensor: Tensor) -> Tensor:
    """The tensor with its zeros written out."""
    return tensor.to_dense() if tensor.layout is not torch.strided else tensor


def norm(tensors: Sequence[Tensor], whole: Sequence[Tensor] | None = None) -> float:
    r"""The Euclidean norm :math:`\sqrt{\sum_i \lVert t_i \rVert^2}` of all entries together.

    Args:
        tensors: what this rank holds, any floating dtype.
        whole: the tensors they are shards of, when some are (one reduction per device mesh, over the ranks that share it).

    Half precision is summed in single. A single-precision result of zero or infinity is computed again in double, so that
    neither tiny nor huge gradients are mistaken for none. NaN and infinite entries give NaN or infinity.

    Example:
        >>> norm([torch.tensor([3.0]), torch.tensor([[4.0]])])
        5.0
        >>> [f"{norm([torch.tensor(v, dtype=torch.float64)]):.3g}" for v in ([3e-30, 4e-30], [3e-200, 4e-200], [3e200, 4e200])]
        ['5e-30', '5e-200', '5e+200']
    """
    if not tensors:
        return 0.0
    if whole is not None and not plain(whole):
        squares = [torch.linalg.vector_norm(t, dtype=_wide(t)).square() for t in tensors]
        return math.sqrt(_total(squares, whole))
    value = _norm(tensors)
    if value == 0.0 or math.isinf(value):
        value = float(torch.stack([torch.linalg.vector_norm(t, dtype=_wide(t)).cpu() for t in tensors]).norm())
    return value if 1e-150 < value < 1e150 else _scaled(tensors, value)


def _scaled(tensors: Sequence[Tensor], value: float) -> float:
    """The norm where squares leave the range of a double; zero, NaN and infinite entries keep ``value``."""
    largest = max((float(t.abs().max()) for t in tensors if t.numel()), default=0.0)
    if largest == 0.0 or not math.isfinite(largest):
        return value
    return largest * float(torch.stack([(t.to(_wide(t)) / largest).norm().cpu() for t in tensors]).norm())


def dot(a: Sequence[Tensor], b: Sequence[Tensor], whole: Sequence[Tensor] | None = None) -> float:
    r"""The inner product :math:`\sum_i \langle a_i, b_i \rangle`, summed over tensors in double precision.

    Example:
        >>> dot([torch.ones(2), torch.ones(1)], [torch.ones(2), torch.tensor([3.0])])
        5.0
    """
    if not a:
        return 0.0
    parts = [torch.sum(x.to(_wide(x)) * y.to(_wide(y))) for x, y in zip(a, b, strict=True)]
    return _total(parts, whole if whole is not None else a)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def _norm(tensors: Sequence[Tensor]) -> float:
    first = tensors[0]
    dtype = first.dtype
    if len({t.dtype for t in tensors}) > 1 or len({t.get_device() for t in tensors}) > 1:
        kinds = {(t.dtype, t.device) for t in tensors}
        return math.hypot(*(_norm([t for t in tensors if (t.dtype, t.device) == kind]) for kind in kinds))
    if dtype in _HALF:
        return _norm([t.float() for t in tensors])
    if len(tensors) > 1 and sum([t.numel() for t in tensors]) < SMALL * len(tensors):
        flat = torch._C._nn.flatten_dense_tensors(list(tensors))
        return float(torch.linalg.vector_norm(flat))
    norms = torch.stack(torch._foreach_norm(list(tensors))).to(_wide(first))
    return float(torch.linalg.vector_norm(norms))


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
