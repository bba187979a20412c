"""Checkpoints by torch.distributed.checkpoint: the base's state, and what a variant remembers, by the parameters' names."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from flatminima import BSAM, SAM
from ranks_fixture import on_two_ranks

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed"),
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:TypedStorage", "ignore:torch.distributed is", "ignore:.*FSDP.state_dict_type"),
]

VARIANTS = ("sam", "friendly-sam", "looksam", "ae-sam", "every-k", "random")


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)


def rows(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(1)).to(dtype), torch.arange(8) % 2


def train(model: nn.Module, opt: Any, steps: int, dtype: torch.dtype = torch.float32) -> None:
    x, y = rows(dtype)
    for _ in range(steps):
        opt.step(lambda: F.cross_entropy(model(x), y))


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def made(variant: str, master: bool = False) -> tuple[nn.Module, SAM]:
    model = net(torch.bfloat16 if master else torch.float32)
    groups = [{"params": [model[2].weight, model[0].weight]}, {"params": [model[0].bias, model[2].bias]}]
    return model, SAM(torch.optim.AdamW(groups, lr=0.01), 0.3, variant=variant, master=master)


@pytest.mark.parametrize("master", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.filterwarnings("ignore:the perturbation is mostly rounded away")
def test_a_run_resumed_from_names_is_bitwise_the_uninterrupted_one(variant: str, master: bool) -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    dtype = torch.bfloat16 if master else torch.float32
    straight, opt = made(variant, master)
    train(straight, opt, 3, dtype)
    state = copy.deepcopy(get_optimizer_state_dict(straight, opt))
    second, again = made(variant, master)
    second.load_state_dict(straight.state_dict())
    set_optimizer_state_dict(second, again, state)
    assert [group["lr"] for group in again.param_groups] == [0.01, 0.01]
    train(straight, opt, 4, dtype)
    train(second, again, 4, dtype)
    assert same(straight, second)
    for a, b in zip(opt.master_parameters(), again.master_parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("trained", [0, 3])
def test_a_file_fills_a_fresh_optimiser_in_place(variant: str, trained: int, tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    straight, opt = made(variant)
    train(straight, opt, trained)
    dcp.save({"opt": get_optimizer_state_dict(straight, opt)}, checkpoint_id=tmp_path / "saved", no_dist=True)
    second, again = made(variant)
    second.load_state_dict(straight.state_dict())
    state = {"opt": get_optimizer_state_dict(second, again)}  # of the fresh optimiser, before its first step
    dcp.load(state, checkpoint_id=tmp_path / "saved", no_dist=True)
    set_optimizer_state_dict(second, again, state["opt"])
    train(straight, opt, 6)
    train(second, again, 6)
    assert same(straight, second)


def test_asking_for_the_state_before_the_first_step_changes_no_weight() -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    x, y = rows()
    for make in (lambda p: SAM(torch.optim.AdamW(p, lr=0.1, weight_decay=0.1)), lambda p: BSAM(p, rows=8)):
        model, twin = net(), net()
        opt: Any = make(model.parameters())
        assert set(get_optimizer_state_dict(model, opt)["state"]) == {name for name, _ in model.named_parameters()}
        assert same(model, twin)
        assert opt.param_groups[0]["lr"] == 0.1
        with pytest.raises(ValueError, match="call step"):
            opt.step()
        F.cross_entropy(model(x), y).backward()
        opt.param_groups[0]["lr"] = 0.0
        with pytest.raises(ValueError, match="call step"):
            opt.step()


def test_bsam_resumes() -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    straight, second = net(), net()
    opt, again = (BSAM(m.parameters(), rows=8, seed=2) for m in (straight, second))
    train(straight, opt, 3)
    second.load_state_dict(straight.state_dict())
    set_optimizer_state_dict(second, again, copy.deepcopy(get_optimizer_state_dict(straight, opt)))
    train(straight, opt, 3)
    train(second, again, 3)
    assert same(straight, second)


def sharded(rank: int, folder: Path) -> Any:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))

    def make(variant: str) -> tuple[nn.Module, SAM]:
        model = net(torch.float64)
        for layer in (model[0], model[2], model):
            fully_shard(layer, mesh=mesh)
        return model, SAM(torch.optim.AdamW(model.parameters(), lr=0.01), 0.3, variant=variant, model=model)

    found = {}
    for variant in ("friendly-sam", "looksam"):
        straight, opt = make(variant)
        train(straight, opt, 3, torch.float64)
        dcp.save({"opt": get_optimizer_state_dict(straight, opt)}, checkpoint_id=folder / variant)
        full = copy.deepcopy(get_optimizer_state_dict(straight, opt, options=StateDictOptions(full_state_dict=True)))
        second, again = make(variant)
        third, other = make(variant)
        for model in (second, third):
            model.load_state_dict(straight.state_dict())
        state = {"opt": get_optimizer_state_dict(second, again)}
        dcp.load(state, checkpoint_id=folder / variant)
        set_optimizer_state_dict(second, again, state["opt"])
        set_optimizer_state_dict(third, other, full, options=StateDictOptions(full_state_dict=True))
        for model, each in ((straight, opt), (second, again), (third, other)):
            train(model, each, 4, torch.float64)
        found[variant] = [[p.full_tensor().detach() for p in m.parameters()] for m in (straight, second, third)]
    return found


def test_shards_are_saved_and_loaded_as_shards() -> None:
    for found in on_two_ranks(sharded):
        for straight, *resumed in found.values():
            for other in resumed:
                assert all(torch.equal(a, b) for a, b in zip(straight, other, strict=True))
