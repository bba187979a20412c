"""Parameters spread over processes (FSDP2's ``fully_shard``): what this process holds, and the modules that gather them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)


def is_sharded(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a DTensor. By its method: builds of torch without ``distributed`` lack the class."""
    return type(tensor) not in _PLAIN and hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: the tensor itself, or the local shard of a ``DTensor`` (sharing its storage)."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        shard: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return getattr(shard, "elem", shard)  # a collective still under way wraps the tensor it fills


def shard_like(whole: Tensor, like: Tensor) -> Tensor:
    """This process' part of a tensor that all processes have, cut as ``like`` is; all of it where ``like`` is not sharded."""
    if not is_sharded(like):
        return whole
    from torch.distributed.tensor import distribute_tensor

    mesh: Any = like.device_mesh  # type: ignore[attr-defined]
    placements = like.placements  # type: ignore[attr-defined]
    return local(distribute_tensor(whole.to(mesh.device_type), mesh, placements, src_data_rank=None))


def sharded_like(shard: Tensor, like: Tensor) -> Tensor:
    """A sharded tensor of which this process holds ``shard``, cut as ``like`` is; the shard itself where ``like`` is not."""
    if not is_sharded(like):
        return shard
    mesh: Any = like.device_mesh  # type: ignore[attr-defined]
    placements = like.placements  # type: ignore[attr-defined]
    # DTensor.from_local of the very class: its module has moved between versions of torch.
    kind: Any = next(k for k in type(like).__mro__ if k.__name__ == "DTensor")
    whole: Tensor = kind.from_local(
        shard.to(mesh.device_type), mesh, placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return whole


def sharding_modules(model: nn.Module) -> list[Any]:
    """The modules that ``fully_shard`` was applied to, outermost first."""
    return [m for m in model.modules() if type(m).__name__.startswith("FSDP") and callable(getattr(m, "reshard", None))]


def reshard(model: nn.Module) -> None:
    """Put the parameters back into shards: after an evaluation the root module still holds the gathered ones."""
    for module in sharding_modules(model):
        module.reshard()
