"""Two processes (gloo, on the CPU) against one: replicas, per-rank perturbations, sharded parameters."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from flatminima import SAM
from ranks_fixture import on_two_ranks

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)


def rows(dtype: torch.dtype, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 3, dtype=torch.float64, generator=generator).to(dtype), torch.arange(8) % 2


def mine(dtype: torch.dtype, step: int, rank: int) -> tuple[Tensor, Tensor]:
    x, y = rows(dtype, step)
    return x[rank * 4 : rank * 4 + 4], y[rank * 4 : rank * 4 + 4]


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def replicated(rank: int, folder: Path) -> Any:
    found: dict[str, Any] = {}
    for variant in ("sam", "m-sam", "gsam", "friendly-sam", "looksam", "ae-sam", "probability", "sa-gd"):
        model = nn.parallel.DistributedDataParallel(net())
        opt = SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), 0.3, variant=variant, model=model)
        for step in range(20):
            x, y = mine(torch.float64, step, rank)
            opt.step(lambda model=model, x=x, y=y: F.cross_entropy(model(x), y))
        found[variant] = weights(model)
    for variant in ("sam", "m-sam"):
        model = nn.parallel.DistributedDataParallel(net(torch.bfloat16))
        opt = SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), 0.3, variant=variant, model=model)
        for step in range(300):
            x, y = mine(torch.bfloat16, step, rank)
            opt.step(lambda model=model, x=x, y=y: F.cross_entropy(model(x), y))
        found[f"{variant} bfloat16"] = weights(model)
        opt = SAM(torch.optim.SGD(model.parameters(), lr=0.1), 0.3, variant=variant, model=model, master=True)
        for step in range(50):
            x, y = mine(torch.bfloat16, step, rank)
            opt.step(lambda model=model, x=x, y=y: F.cross_entropy(model(x), y))
        found[f"{variant} bfloat16, masters"] = [*weights(model), *(m.detach() for m in opt.master_parameters())]
    # A gradient that is not finite on one rank alone, in the first pass alone, must neither hang nor part the replicas.
    model = nn.parallel.DistributedDataParallel(net())
    opt = SAM(torch.optim.SGD(model.parameters(), lr=0.1), 0.3, variant="m-sam", model=model)
    x, y = mine(torch.float64, 0, rank)
    for _ in range(2):
        calls: list[int] = []

        def broken(calls: list[int] = calls, model: nn.Module = model, x: Tensor = x, y: Tensor = y) -> Tensor:
            calls.append(0)
            return F.cross_entropy(model(x), y) * (math.nan if rank == 1 and len(calls) == 1 else 1.0)

        opt.step(broken)
    found["nan"] = weights(model)
    return found


def one_process(per_rank: bool) -> list[Tensor]:
    model = net()
    opt = SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), 0.3, variant="m-sam" if per_rank else "sam")
    for step in range(20):
        parts = [mine(torch.float64, step, rank) for rank in range(2)]
        opt.step([lambda p=p: F.cross_entropy(model(p[0]), p[1]) for p in parts])
    return weights(model)


def test_replicas_stay_bitwise_equal(replicas: list[Any]) -> None:
    assert len(replicas[0]) == 13
    for name, one in replicas[0].items():
        for a, b in zip(one, replicas[1][name], strict=True):
            assert torch.equal(a, b), name
            assert bool(a.isfinite().all()), name


@pytest.mark.parametrize("variant", ["sam", "m-sam"])
def test_two_ranks_train_as_one_process_does(replicas: list[Any], variant: str) -> None:
    for a, b in zip(replicas[0][variant], one_process(variant == "m-sam"), strict=True):
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-13)


def test_per_rank_perturbations_are_not_the_common_one(replicas: list[Any]) -> None:
    gap = max(float((a - b).abs().max()) for a, b in zip(replicas[0]["sam"], replicas[0]["m-sam"], strict=True))
    assert gap > 1e-3


def sharded(rank: int, folder: Path) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    found: dict[str, Any] = {}
    for variant in ("sam", "asam", "gsam", "wsam", "friendly-sam", "looksam", "ae-sam", "msam", "sa-gd"):
        model = net()
        for layer in (model[0], model[2]):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        where = [p.to_local().data_ptr() for p in model.parameters()]
        opt = SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), 0.3, variant=variant)
        seen = []
        for step in range(10):
            x, y = mine(torch.float64, step, rank)
            seen.append(opt.step(lambda model=model, x=x, y=y: F.cross_entropy(model(x), y)).item())
        found[variant] = [p.full_tensor().detach().clone() for p in model.parameters()]
        found[variant + " losses"] = seen
        before = [p.to_local().clone() for p in model.parameters()]
        opt.param_groups[0]["lr"] = 0.0
        x, y = mine(torch.float64, 0, rank)
        opt.step(lambda model=model, x=x, y=y: F.cross_entropy(model(x), y))
        assert [p.to_local().data_ptr() for p in model.parameters()] == where
        assert all(torch.equal(a, p.to_local()) for a, p in zip(before, model.parameters(), strict=True))
        if variant == "sam":
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            with opt.perturbed() as info:
                found["norm"] = (info.norm, info.radius, info.cosine)
            opt.zero_grad()
            x, y = mine(torch.float64, 1, rank)
            opt.step(lambda model=model, x=x, y=y: F.cross_entropy(model(x), y) * (math.inf if rank == 0 else 1.0))
            assert opt.skipped == 1
    for layer in (model := net(torch.bfloat16)):
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    opt = SAM(torch.optim.AdamW(model.parameters(), lr=0.01), 0.3, model=model, master=True)
    for step in range(10):
        x, y = mine(torch.bfloat16, step, rank)
        opt.step(lambda model=model, x=x, y=y: F.cross_entropy(model(x), y))
    pairs = zip(model.parameters(), opt.master_parameters(), strict=True)
    found["masters"] = [(p.full_tensor().detach(), m.full_tensor().detach()) for p, m in pairs]
    return found


def everything(rank: int, folder: Path) -> Any:
    return replicated(rank, folder), sharded(rank, folder)


@pytest.fixture(scope="module")
def both() -> list[Any]:
    return on_two_ranks(everything)  # the processes take longer to start than to do all of it


@pytest.fixture
def replicas(both: list[Any]) -> list[Any]:
    return [found[0] for found in both]


@pytest.fixture
def shards(both: list[Any]) -> list[Any]:
    return [found[1] for found in both]


def whole(variant: str) -> tuple[list[Tensor], SAM, nn.Module]:
    model = net()
    opt = SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), 0.3, variant=variant)
    for step in range(10):
        x, y = rows(torch.float64, step)
        opt.step(lambda x=x, y=y: F.cross_entropy(model(x), y))
    return weights(model), opt, model


@pytest.mark.parametrize(
    "variant", ["sam", "asam", "gsam", "wsam", "friendly-sam", "looksam", "ae-sam", "msam", "sa-gd"]
)
def test_sharded_parameters_train_as_whole_ones(shards: list[Any], variant: str) -> None:
    expected, _, _ = whole(variant)
    for rank in range(2):
        for a, b in zip(shards[rank][variant], expected, strict=True):
            assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


def test_sharded_half_precision_parameters_have_sharded_masters(shards: list[Any]) -> None:
    model = net(torch.bfloat16)
    opt = SAM(torch.optim.AdamW(model.parameters(), lr=0.01), 0.3, master=True)
    for step in range(10):
        x, y = rows(torch.bfloat16, step)
        opt.step(lambda x=x, y=y: F.cross_entropy(model(x), y))
    expected = opt.master_parameters()
    for one, other, alone in zip(shards[0]["masters"], shards[1]["masters"], expected, strict=True):
        assert torch.equal(one[0], one[1].bfloat16())
        assert torch.equal(one[1], other[1])
        assert torch.allclose(
            one[1], alone, atol=0.02
        )  # gradients of half batches are rounded, and averaged, in bfloat16


def test_norm_radius_and_cosine_are_those_of_all_shards(shards: list[Any]) -> None:
    _, opt, model = whole("sam")
    opt.param_groups[0]["lr"] = 0.0
    x, y = rows(torch.float64, 0)
    opt.step(lambda: F.cross_entropy(model(x), y))
    opt.zero_grad()
    F.cross_entropy(model(x), y).backward()
    with opt.perturbed() as info:
        for rank in range(2):
            assert shards[rank]["norm"] == pytest.approx((info.norm, 0.3, 1.0), rel=1e-10)
