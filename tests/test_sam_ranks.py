"""Two processes (gloo, on the CPU): gradients of several closures are averaged once, and each rank may perturb by its own.

The truth is one process in float64 that has all the micro-batches.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from flatminima import SAM
from flatminima.optim import BSAM
from flatminima.optim.directions import Adaptive, Friendly
from ranks_fixture import on_two_ranks

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")

STEPS, WEIGHTS = 4, [0.5, 0.3, 0.2]
# What is evaluated how often in a step, in passes that end with an average over the ranks.
PASSES = {"sam": 2, "gsam": 2, "looksam": 2, "m-sam": 1, "random": 1, "sa-gd": 3}
OPTIONS: dict[str, dict[str, Any]] = {"random": {"draws": 2}, "sa-gd": {"steps": 2}, "looksam": {"k": 1}}
SHAPES = ["returns the loss", "optimiser's zero_grad", "model's zero_grad"]
# The shape of the closures, and what else is special: an unused branch, gradients that live in buckets; weights kept gathered.
REPLICAS = [*((shape, "") for shape in SHAPES), (SHAPES[1], "branch"), (SHAPES[0], "buckets")]
SHARDS = [*((shape, "") for shape in SHAPES), (SHAPES[2], "gathered")]


class Net(nn.Module):
    """The last micro-batch of a step does not use the branch."""

    def __init__(self, branch: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(3, 7), nn.Linear(7, 2)
        self.branch = nn.Linear(3, 2) if branch else None
        self.double()

    def forward(self, x: Tensor, use: bool = True) -> Tensor:
        out = self.second(torch.tanh(self.first(x)))
        return out + self.branch(x) if self.branch is not None and use else out


def batch(step: int, rank: int, micro: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + 10 * micro + rank)
    return torch.randn(4, 3, dtype=torch.float64, generator=generator), torch.arange(4) % 2


def closures(model: nn.Module, opt: SAM, shape: str, step: int, ranks: list[int]) -> list[Callable[[], Tensor]]:
    def make(rank: int, micro: int) -> Callable[[], Tensor]:
        x, y = batch(step, rank, micro)

        def closure() -> Tensor:
            if shape != SHAPES[0]:
                (opt if shape == SHAPES[1] else model).zero_grad()
            loss = F.cross_entropy(model(x, micro != len(WEIGHTS) - 1), y)
            if shape != SHAPES[0]:
                loss.backward()
            return loss

        return closure

    return [make(rank, micro) for rank in ranks for micro in range(len(WEIGHTS))]


def sam(model: nn.Module, variant: str, given: nn.Module | None, **options: Any) -> SAM:
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return SAM(base, 0.3, variant=variant, model=given, **OPTIONS.get(variant, {}), **options)


def whole(model: nn.Module) -> list[Tensor]:
    return [getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for p in model.parameters()]


def truth(variant: str, branch: bool = False, **options: Any) -> list[Tensor]:
    model = Net(branch)
    opt = sam(model, variant, None, **options)
    for step in range(STEPS):
        opt.step(closures(model, opt, SHAPES[0], step, [0, 1]), weights=[w / 2 for w in WEIGHTS] * 2)
    return whole(model)


def averaged(counted: list[int], bucket: Any) -> Any:
    counted.append(bucket.index())
    return dist.all_reduce(bucket.buffer() / 2, async_op=True).get_future().then(lambda future: future.value()[0])


def replicas(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for variant in PASSES:
        for shape, special in REPLICAS:
            net, counted = Net(special == "branch"), []
            model = nn.parallel.DistributedDataParallel(
                net, find_unused_parameters=special == "branch", gradient_as_bucket_view=special == "buckets"
            )
            model.register_comm_hook(counted, lambda counted, bucket: averaged(counted, bucket))
            opt = sam(model, variant, model)
            work = [closures(model, opt, shape, step, [rank]) for step in range(STEPS)]
            losses = [float(opt.step(each, weights=WEIGHTS)) for each in work]
            found[f"{variant}, {shape}, {special}"] = (whole(net), losses, counted.count(0))
    return found


def sharded_net(**options: Any) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    net = Net()
    fully_shard(net.first, mesh=mesh, **options)
    return fully_shard(net, mesh=mesh, **options)


def shards(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for variant in PASSES:
        for shape, special in SHARDS:
            model = sharded_net(reshard_after_forward=special != "gathered")
            if special == "gathered":
                model.set_reshard_after_backward(False)
            opt = sam(model, variant, model)
            with contextlib.ExitStack() as stack:
                names = [name for name in ("reduce_scatter_single", "reduce_scatter_tensor") if hasattr(dist, name)]
                mocks = [stack.enter_context(mock.patch.object(dist, n, wraps=getattr(dist, n))) for n in names]
                for step in range(STEPS):
                    opt.step(closures(model, opt, shape, step, [rank]), weights=WEIGHTS)
            found[f"{variant}, {shape}, {special}"] = (whole(model), sum(m.call_count for m in mocks))
    model = sharded_net()
    opt = sam(model, "m-sam", model, direction=Adaptive(0.1), decay_in_ascent=True)
    for step in range(STEPS):
        opt.step(closures(model, opt, SHAPES[0], step, [rank]), weights=WEIGHTS)
    found["adaptive"] = whole(model)
    found["odd moments"] = odd_moments(rank)
    return found


def odd_moments(rank: int) -> dict[str, bool]:
    """What must not move or part the shards."""
    model = sharded_net()
    opt = sam(model, "m-sam", model)
    opt.param_groups[0]["lr"] = 0.0
    x, y = batch(0, rank, 0)

    def loss() -> Tensor:
        return F.cross_entropy(model(x), y)

    before, where = whole(model), [p.to_local().data_ptr() for p in model.parameters()]
    seen: list[float] = []
    for _ in range(3):
        opt.step(lambda: (seen.append(0.0), loss())[1])
    kept = {"at lr 0 no bit changes": all(map(torch.equal, before, whole(model)))}
    kept["nor any storage"] = [p.to_local().data_ptr() for p in model.parameters()] == where

    calls: list[int] = []

    def interrupted() -> Tensor:
        calls.append(0)
        value = loss()
        if len(calls) == 2:
            raise KeyboardInterrupt
        return value

    try:
        opt.step(interrupted)
    except KeyboardInterrupt:
        kept["an exception restores"] = all(map(torch.equal, before, whole(model)))
    with torch.no_grad():
        expected = torch.func.functional_call(
            Net(), dict(zip(dict(Net().named_parameters()), before, strict=True)), (x,)
        )
        kept["the gathered ones too"] = torch.equal(model(x), expected)

    calls.clear()
    opt.param_groups[0]["lr"] = 0.1

    def broken() -> Tensor:
        calls.append(0)
        return loss() * (math.nan if rank == 1 and len(calls) == 1 else 1.0)

    opt.step(broken)
    kept["a NaN of one rank's first pass is survived"] = all(bool(w.isfinite().all()) for w in whole(model))
    plain = sam(model, "sam", model)
    opt.zero_grad()
    loss().backward()
    with torch.no_grad():
        clean = model(x)  # leaves the root gathered
        with plain.perturbed():
            there = model(x)
        again = model(x)
    kept["an evaluation sees the perturbation"] = not torch.allclose(there, clean, atol=1e-3)
    kept["and the way back"] = torch.equal(again, clean)
    for name, call, words in (
        ("halves", opt.ascend, "step(closure)"),
        ("m-sam without the model", lambda: sam(model, "m-sam", None), "give model="),
        ("a memory of whole gradients", lambda: sam(model, "m-sam", model, direction=Friendly()), "no rank can keep"),
        ("bsam", lambda: BSAM(model.parameters(), rows=10), "sharded"),
    ):
        try:
            call()
            kept[name] = False
        except ValueError as error:
            kept[name] = words in str(error)
    return kept


def everything(rank: int, folder: Path) -> Any:
    return replicas(rank), shards(rank)


@pytest.fixture(scope="module")
def found() -> list[Any]:
    return on_two_ranks(everything)


def agree(a: list[Tensor], b: list[Tensor], what: str) -> None:
    for x, y in zip(a, b, strict=True):
        assert torch.allclose(x, y, rtol=1e-10, atol=1e-12), (what, float((x - y).abs().max()))


@pytest.mark.parametrize("variant", PASSES)
def test_replicas_accumulate_and_average_once_a_pass(found: list[Any], variant: str) -> None:
    expected = {branch: truth(variant, branch) for branch in (False, True)}
    for shape, special in REPLICAS:
        name = f"{variant}, {shape}, {special}"
        for rank in range(2):
            weights, losses, reduced = found[rank][0][name]
            agree(weights, expected[special == "branch"], name)
            assert reduced == PASSES[variant] * STEPS, name
            assert all(map(math.isfinite, losses))
        assert all(map(torch.equal, found[0][0][name][0], found[1][0][name][0]))


@pytest.mark.parametrize("variant", PASSES)
def test_shards_accumulate_and_average_once_a_pass(found: list[Any], variant: str) -> None:
    expected = truth(variant)
    for shape, special in SHARDS:
        name = f"{variant}, {shape}, {special}"
        for rank in range(2):
            weights, scattered = found[rank][1][name]
            agree(weights, expected, name)
            assert scattered == 2 * PASSES[variant] * STEPS, name  # of two sharded modules


def test_any_direction_is_taken_by_each_rank_of_a_sharded_model(found: list[Any]) -> None:
    expected = truth("m-sam", direction=Adaptive(0.1), decay_in_ascent=True)
    for rank in range(2):
        agree(found[rank][1]["adaptive"], expected, "adaptive")


def test_what_one_rank_does_alone_leaves_no_trace(found: list[Any]) -> None:
    for rank in range(2):
        odd = found[rank][1]["odd moments"]
        assert len(odd) == 11
        assert all(odd.values()), odd


def test_the_older_way_of_sharding_is_refused_by_name() -> None:
    class FullyShardedDataParallel(nn.Module):
        """Stands for torch's, which needs a process group to be made."""

    with pytest.raises(TypeError, match=r"fully_shard \(FSDP2\) instead"):
        sam(Net(), "sam", nn.Sequential(FullyShardedDataParallel()))
