"""Float32 masters of half-precision parameters: small perturbations and small updates arrive, and nothing else changes."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatminima import SAM
from flatminima.averaging import SWA
from flatminima.optim import VARIANTS
from flatminima.optim.masters import Masters

pytestmark = pytest.mark.usefixtures("one_thread")

HALF = [torch.bfloat16, torch.float16]
EVERY = sorted(VARIANTS)
Base = Callable[[Any], torch.optim.Optimizer]


def net(dtype: torch.dtype = torch.bfloat16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)


def rows(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 3, generator=generator).to(dtype), torch.arange(8) % 2


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def sgd(parameters: Any, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01)


def fused(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, fused=True)


def sam(model: nn.Module, base: Base = sgd, rho: float = 0.3, variant: str = "sam", **options: Any) -> SAM:
    given = {"model": model} if variant == "sam-on" else {}
    return SAM(base(model.parameters()), rho, variant=variant, master=True, **given, **options)


def train(model: nn.Module, opt: SAM, steps: int, dtype: torch.dtype = torch.bfloat16) -> None:
    x, y = rows(dtype)
    for _ in range(steps):
        opt.step(lambda: F.cross_entropy(model(x), y))


# ----- the trajectory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF)
def test_perturbation_and_update_live_in_the_masters(dtype: torch.dtype) -> None:
    x, y = rows(dtype)
    model = net(dtype)
    master = [w.float() for w in weights(model)]
    velocity = [torch.zeros_like(m) for m in master]
    names = list(dict(model.named_parameters()))

    def gradient(at: list[Tensor]) -> list[Tensor]:
        leaves = [w.to(dtype).requires_grad_() for w in at]
        loss = F.cross_entropy(torch.func.functional_call(model, dict(zip(names, leaves, strict=True)), (x,)), y)
        return [g.float() for g in torch.autograd.grad(loss, leaves)]

    for _ in range(20):
        g = gradient(master)
        norm = math.sqrt(sum(float(a.double().square().sum()) for a in g))
        g = gradient([m + a * (0.3 / norm) for m, a in zip(master, g, strict=True)])
        for m, v, a in zip(master, velocity, g, strict=True):
            v.mul_(0.9).add_(a)
            m.sub_(v, alpha=0.1)
    opt = sam(model)
    train(model, opt, 20, dtype)
    for p, own, m in zip(model.parameters(), opt.master_parameters(), master, strict=True):
        assert own.dtype == torch.float32
        assert torch.allclose(own, m, rtol=1e-5, atol=1e-6)
        assert torch.equal(p, own.to(dtype))
        assert opt.state[p]["momentum_buffer"].dtype == torch.float32


def test_radius_and_cosine_are_realised_where_they_round_away_without() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(200_000, generator=generator) * 0.03
    gradient = torch.randn(200_000, generator=generator).bfloat16()
    found = {}
    for master in (True, False):
        w = nn.Parameter(values.bfloat16())
        opt = SAM(torch.optim.SGD([w], lr=0.0), rho=0.01, master=master)
        if master:
            opt.master_parameters()[0].data.copy_(values)  # the low bits that training leaves in it
        w.grad = gradient.clone()
        before = w.detach().clone()
        context = (
            contextlib.nullcontext() if master else pytest.warns(UserWarning, match=r"rounded away .* master=True")
        )
        with context, opt.perturbed() as info:
            direction = gradient.double() / gradient.double().norm()
            along = (w.detach() - before).double() * direction
            found[master] = (info.radius, info.cosine, float(along.sum()))
        assert torch.equal(w, before)
    radius, cosine, along = found[True]
    assert radius == pytest.approx(0.01, rel=1e-3)
    assert cosine == pytest.approx(1.0, abs=1e-5)
    assert along == pytest.approx(0.01, rel=0.1)  # of the rounded weights: the intended length, on average
    assert found[False][1] < 0.9


def test_updates_below_the_resolution_add_up() -> None:
    target = torch.full((64,), 0.75)
    for master, moves in ((True, True), (False, False)):
        w = nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
        opt = SAM(torch.optim.SGD([w], lr=1e-4), rho=0.0, master=master)
        for _ in range(300):  # each update is 2.5e-5; the number below 1 is 4e-3 away
            opt.step(lambda w=w: (w.float() - target).square().sum() / 2)
        assert bool((w < 1).all()) == moves
    exact = 0.75 + 0.25 * (1 - 1e-4) ** 300
    w = nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    opt = SAM(torch.optim.SGD([w], lr=1e-4), rho=0.0, master=True)
    for _ in range(300):
        opt.step(lambda: (w.float() - target).square().sum() / 2)
    assert float(opt.master_parameters()[0][0].detach()) == pytest.approx(exact, abs=2e-4)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("variant", EVERY)
def test_at_lr_zero_no_bit_changes(variant: str, dtype: torch.dtype) -> None:
    model = net(dtype)
    opt = sam(model, lambda p: sgd(p, 0.0), 0.5, variant)
    opt.master_parameters()[0].data.add_(1e-5)  # a master is not just its parameter
    train(model, opt, 1, dtype)
    before, masters = weights(model), [m.detach().clone() for m in opt.master_parameters()]
    where = [p.data_ptr() for p in model.parameters()]
    train(model, opt, 11, dtype)
    assert same(weights(model), before)
    assert same(opt.master_parameters(), masters)
    assert [p.data_ptr() for p in model.parameters()] == where
    assert opt.skipped == 0


@pytest.mark.parametrize("loop", ["closure", "halves"])
def test_both_loops_agree(loop: str) -> None:
    x, y = rows()
    model, twin = net(), net()
    opt = sam(model)
    train(twin, sam(twin), 5)
    for _ in range(5):
        if loop == "closure":
            opt.step(lambda: F.cross_entropy(model(x), y))
        else:
            for half in (opt.ascend, opt.descend):
                F.cross_entropy(model(x), y).backward()
                half(zero_grad=True)
    assert same(weights(model), weights(twin))


# ----- checkpoints and copies -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [sgd, adamw, fused])
@pytest.mark.parametrize("variant", EVERY)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(variant: str, base: Base) -> None:
    straight, first, second = net(), net(), net()
    train(straight, sam(straight, base, variant=variant), 13)
    opt = sam(first, base, variant=variant)
    train(first, opt, 6)
    file = io.BytesIO()
    torch.save([first.state_dict(), opt.state_dict()], file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    again = sam(second, base, variant=variant)
    for part, state in zip((second, again), loaded, strict=True):
        part.load_state_dict(state)
    assert same(again.master_parameters(), opt.master_parameters())
    train(second, again, 7)
    assert same(weights(second), weights(straight))
    base(net().parameters()).load_state_dict(loaded[1])  # the bare base takes it too, rounding its state


def test_a_checkpoint_of_the_bare_base_begins_at_the_parameters() -> None:
    model, other = net(), net()
    plain = sgd(model.parameters())
    x, y = rows()
    F.cross_entropy(model(x), y).backward()
    plain.step()
    opt = sam(other)
    other.load_state_dict(model.state_dict())
    opt.load_state_dict(plain.state_dict())
    train(other, opt, 2)
    assert all(v["momentum_buffer"].dtype == torch.float32 for v in opt.state.values())


def test_wrapping_widens_the_state_the_base_has() -> None:
    model = net()
    x, y = rows()
    base = torch.optim.AdamW(model.parameters())
    F.cross_entropy(model(x), y).backward()
    base.step()
    moments = [base.state[p]["exp_avg"].float() for p in model.parameters()]
    SAM(base, master=True)
    assert same([base.state[p]["exp_avg"] for p in model.parameters()], moments)
    assert {base.state[p]["exp_avg_sq"].dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_go_on_as_the_original_would(way: str) -> None:
    model = net()
    opt = sam(model)
    train(model, opt, 3)
    twin, two = copy.deepcopy((model, opt)) if way == "deepcopy" else pickle.loads(pickle.dumps((model, opt)))
    train(model, opt, 4)
    train(twin, two, 4)
    assert same(weights(model), weights(twin))
    assert same(opt.master_parameters(), two.master_parameters())


# ----- what happens around it -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["load_state_dict", "data", "clamp"])
def test_what_is_done_to_the_parameters_is_taken_over(how: str) -> None:
    model = net()
    opt = sam(model, lambda p: sgd(p, 0.0))
    train(model, opt, 2)
    first = next(model.parameters())
    fine = opt.master_parameters()[0]
    fine.data.add_(1e-5 * torch.rand_like(fine))
    train(model, opt, 1)
    if how == "load_state_dict":
        model.load_state_dict({name: w + 1 for name, w in model.state_dict().items()})
    elif how == "data":
        first.data[0, 0] = 7.0
    else:
        with torch.no_grad():
            first.clamp_(-0.25, 0.25)
    expected, kept = weights(model), fine.detach().clone()
    train(model, opt, 2)
    assert same(weights(model), expected)
    if how == "data":  # and what was not touched keeps its low bits
        assert torch.equal(fine.detach().flatten()[1:], kept.flatten()[1:])


def test_other_dtypes_are_their_own_masters_and_groups_may_be_added() -> None:
    model = net()
    model[3].float()
    opt = SAM(torch.optim.SGD(model[0].parameters(), lr=0.1), master=True)
    opt.add_param_group({"params": list(model[3].parameters())})
    opt.add_param_group({"params": list(model[1].parameters()), "rho": 0.5})
    x, y = rows()
    before = weights(model)
    for _ in range(3):
        opt.step(lambda: F.cross_entropy(model[3](torch.tanh(model[1](model[0](x))).float()), y))
    masters = dict(zip([p for g in opt.param_groups for p in g["params"]], opt.master_parameters(), strict=True))
    assert [masters[p] is p for p in model.parameters()] == [False] * 4 + [True] * 2
    assert all(not torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))


@pytest.mark.parametrize("bad", [1, 2])
def test_pure_half_precision_weights_with_a_scaler(bad: int) -> None:
    """Without masters the scaler refuses: gradients in float16 cannot be unscaled in place."""
    x, y = rows(torch.float16)
    model, twin = net(torch.float16), net(torch.float16)
    opt, plain = sam(model), sam(twin)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6)
    for _ in range(5):
        opt.step(lambda: F.cross_entropy(model(x), y), scaler=scaler)
        scaler.update()
        plain.step(lambda: F.cross_entropy(twin(x), y))
    for a, b in zip(opt.master_parameters(), plain.master_parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0.05, atol=2e-3)
    before, masters, calls = weights(model), [m.detach().clone() for m in opt.master_parameters()], []

    def overflowing() -> Tensor:
        calls.append(0)
        return F.cross_entropy(model(x), y) * (1e6 if len(calls) == bad else 1.0)

    opt.step(overflowing, scaler=scaler)
    scaler.update()
    assert opt.skipped == 1
    assert scaler.get_scale() == 2.0**5
    assert same(weights(model), before)
    assert same(opt.master_parameters(), masters)


def test_an_exception_between_the_passes_restores_both() -> None:
    x, y = rows()
    model = net()
    opt = sam(model)
    train(model, opt, 3)
    before, masters, calls = weights(model), [m.detach().clone() for m in opt.master_parameters()], []

    def interrupted() -> Tensor:
        calls.append(0)
        if len(calls) == 2:
            assert not same(weights(model), before)
            raise KeyboardInterrupt
        return F.cross_entropy(model(x), y)

    with pytest.raises(KeyboardInterrupt):
        opt.step(interrupted)
    assert same(weights(model), before)
    assert same(opt.master_parameters(), masters)
    assert {id(p) for g in opt.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}


def test_an_exception_in_the_base_leaves_the_groups_alone() -> None:
    model = net()
    opt = sam(model)
    opt.base.register_step_pre_hook(lambda *_: (_ for _ in ()).throw(KeyError("hook")))
    with pytest.raises(KeyError, match="hook"):
        train(model, opt, 1)
    assert opt.param_groups[0]["params"][0] is next(model.parameters())
    assert all(p.dtype == torch.bfloat16 for p in opt.state)


def test_an_average_of_the_masters_is_finer_than_one_of_their_shadows() -> None:
    model = net()
    opt = sam(model, lambda p: sgd(p, 1e-4))
    fine, coarse, exact = SWA(opt.master_parameters()), SWA(model), []
    for _ in range(50):
        train(model, opt, 1)
        fine.update()
        coarse.update()
        exact.append([m.detach().double() for m in opt.master_parameters()])
    mean = [torch.stack(each).mean(0) for each in zip(*exact, strict=True)]
    errors = [
        max(float((a.double() - m).abs().max()) for a, m in zip(average.tensors(), mean, strict=True))
        for average in (fine, coarse)
    ]
    assert errors[0] < 1e-6 < errors[1]


def test_parameters_in_double_have_no_masters() -> None:
    model = net(torch.float64)
    opt = sam(model)
    assert all(m is p for m, p in zip(opt.master_parameters(), model.parameters(), strict=True))
    assert Masters(opt.base).state_dict({p: i for i, p in enumerate(model.parameters())}) == {}
