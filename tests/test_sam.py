"""SAM against twenty plain lines, and everything that an optimiser owes the loop around it."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatminima import SAM

pytestmark = pytest.mark.usefixtures("one_thread")

Base = Callable[[Any], torch.optim.Optimizer]


def net(dtype: torch.dtype = torch.float64, *, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)


def rows(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 3, dtype=torch.float64, generator=generator).to(dtype), torch.arange(8) % 2


def closure(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    return lambda: F.cross_entropy(model(x), y)


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


# ----- the trajectory -------------------------------------------------------------------------------------------------


def reference(
    model: nn.Module, x: Tensor, y: Tensor, steps: int, lr: float, momentum: float, rho: float
) -> list[float]:
    """Foret et al. (2021), algorithm 1, with momentum, written plainly."""
    parameters, losses = list(model.parameters()), []
    velocity = [torch.zeros_like(p) for p in parameters]
    for _ in range(steps):
        loss = F.cross_entropy(model(x), y)
        gradient = torch.autograd.grad(loss, parameters)
        norm = torch.sqrt(sum((g**2).sum() for g in gradient))
        clean = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p, g in zip(parameters, gradient, strict=True):
                p += rho * g / norm
        gradient = torch.autograd.grad(F.cross_entropy(model(x), y), parameters)
        with torch.no_grad():
            for p, w, v, g in zip(parameters, clean, velocity, gradient, strict=True):
                v.mul_(momentum).add_(g)
                p.copy_(w - lr * v)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("ordinary", [True, False], ids=["ordinary closure", "closure that only returns the loss"])
def test_the_trajectory_is_the_papers(ordinary: bool) -> None:
    x, y = rows()
    model, twin = net(), net()
    opt = SAM(torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9), rho=0.2)

    def usual() -> Tensor:
        opt.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    losses = [float(opt.step(usual if ordinary else closure(model, x, y))) for _ in range(30)]
    expected = reference(twin, x, y, 30, 0.3, 0.9, 0.2)
    assert losses == pytest.approx(expected, rel=1e-12)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-11, atol=1e-13)


def test_rho_zero_is_the_base() -> None:
    x, y = rows()
    model, twin = net(), net()
    opt, base = SAM(torch.optim.Adam(model.parameters()), rho=0.0), torch.optim.Adam(twin.parameters())
    for _ in range(5):
        opt.step(closure(model, x, y))
        base.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        base.step()
    assert equal(weights(model), weights(twin))


def test_each_group_has_its_own_rho_and_the_norm_is_global() -> None:
    x, y = rows()
    model = net()
    groups = [{"params": model[0].parameters(), "rho": 0.3}, {"params": model[2].parameters()}]
    opt = SAM(torch.optim.SGD(groups, lr=0.1), rho=0.1)
    assert [g["rho"] for g in opt.param_groups] == [0.3, 0.1]
    before = weights(model)
    gradient = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    norm = math.sqrt(sum(float((g**2).sum()) for g in gradient))
    seen: list[list[Tensor]] = []
    opt.step(lambda: (seen.append(weights(model)), F.cross_entropy(model(x), y))[1])
    for moved, w, g, rho in zip(seen[1], before, gradient, [0.3, 0.3, 0.1, 0.1], strict=True):
        assert torch.allclose(moved, w + rho * g / norm, rtol=1e-12, atol=1e-14)
    opt.param_groups[1]["rho"] = 0.0
    opt.step(lambda: (seen.append(weights(model)), F.cross_entropy(model(x), y))[1])
    assert equal(seen[2][2:], seen[3][2:])
    assert not equal(seen[2][:2], seen[3][:2])


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_the_norm_neither_underflows_nor_overflows_in_double_precision(size: float) -> None:
    w = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    opt = SAM(torch.optim.SGD([w], lr=1.0), rho=0.5)
    seen: list[list[float]] = []
    opt.step(lambda: (seen.append(w.tolist()), size * (3 * w[0] + 4 * w[1]))[1])
    assert seen[1] == pytest.approx([0.3, 0.4])
    assert opt.skipped == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_norm_of_half_precision_gradients_does_not_overflow(dtype: torch.dtype) -> None:
    w = nn.Parameter(torch.zeros(4, dtype=dtype))
    opt = SAM(torch.optim.SGD([w], lr=0.0), rho=0.5)
    seen: list[list[float]] = []
    opt.step(lambda: (seen.append(w.tolist()), (w * 60000).sum())[1])
    assert seen[1] == pytest.approx([0.25] * 4, rel=0.01)
    assert opt.skipped == 0


def test_the_perturbed_block_can_be_used_alone() -> None:
    x, y = rows()
    model = net()
    opt = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.25)
    F.cross_entropy(model(x), y).backward()
    before = weights(model)
    with opt.perturbed() as info:
        norm = info.norm
        there = math.sqrt(
            sum(float(((p.detach() - w) ** 2).sum()) for p, w in zip(model.parameters(), before, strict=True))
        )
    assert norm == pytest.approx(math.sqrt(sum(float((p.grad**2).sum()) for p in model.parameters())), rel=1e-12)
    assert there == pytest.approx(0.25, rel=1e-12)
    assert equal(weights(model), before)


# ----- the closure ----------------------------------------------------------------------------------------------------


def test_the_closure_is_called_exactly_twice() -> None:
    x, y = rows()
    model = net()
    opt = SAM(torch.optim.SGD(model.parameters(), lr=0.1))
    calls = []
    for step in range(3):
        opt.step(lambda: (calls.append(0), F.cross_entropy(model(x), y))[1])
        assert len(calls) == 2 * (step + 1)


def test_the_loss_returned_is_that_of_the_clean_weights_and_carries_no_graph() -> None:
    x, y = rows()
    model = net()
    expected = float(F.cross_entropy(model(x), y).detach())
    loss = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=1.0).step(closure(model, x, y))
    assert float(loss) == expected
    assert not loss.requires_grad


def test_step_works_under_no_grad() -> None:
    x, y = rows()
    model, twin = net(), net()
    with torch.no_grad():
        SAM(torch.optim.SGD(model.parameters(), lr=0.1)).step(closure(model, x, y))
    SAM(torch.optim.SGD(twin.parameters(), lr=0.1)).step(closure(twin, x, y))
    assert equal(weights(model), weights(twin))


# ----- the way back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fifty_steps_at_lr_zero_change_no_bit_and_no_storage(dtype: torch.dtype) -> None:
    x, y = rows(dtype)
    model = net(dtype)
    before, where = weights(model), [p.data_ptr() for p in model.parameters()]
    opt = SAM(torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9), rho=0.5)
    moved = []
    for _ in range(50):
        opt.step(lambda: (moved.append(not equal(weights(model), before)), F.cross_entropy(model(x), y))[1])
    assert moved == [False, True] * 50
    assert equal(weights(model), before)
    assert [p.data_ptr() for p in model.parameters()] == where


def test_an_exception_in_the_second_pass_restores() -> None:
    x, y = rows()
    model = nn.Sequential(net(), nn.BatchNorm1d(2, dtype=torch.float64))
    opt = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.5, model=model)
    before, statistics, calls = weights(model), [], []

    def interrupted() -> Tensor:
        loss = F.cross_entropy(model(x), y)
        statistics.append(model[1].running_mean.clone())
        calls.append(0)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return loss

    with pytest.raises(KeyboardInterrupt):
        opt.step(interrupted)
    assert len(calls) == 2
    assert equal(weights(model), before)
    assert torch.equal(model[1].running_mean, statistics[0])
    opt.step(closure(model, x, y))  # nothing is left displaced


# ----- gradients that are zero, absent or not finite ------------------------------------------------------------------


def test_a_zero_gradient_moves_nothing_and_lets_the_base_decide() -> None:
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    opt = SAM(torch.optim.SGD([w], lr=0.1, weight_decay=1.0), rho=0.5)
    seen = []
    opt.step(lambda: (seen.append(w.tolist()), (w * 0).sum())[1])
    assert all(values == [1.0, 2.0] for values in seen)
    assert w.tolist() == pytest.approx([0.9, 1.8])
    assert opt.skipped == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("bad", [1, 2])
def test_a_gradient_that_is_not_finite_skips_the_step_and_is_counted(value: float, bad: int) -> None:
    x, y = rows()
    model = net()
    opt = SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.5)
    opt.step(closure(model, x, y))
    before, state, calls = weights(model), copy.deepcopy(opt.state_dict()), []

    def broken() -> Tensor:
        calls.append(0)
        loss = F.cross_entropy(model(x), y)
        return loss * value if len(calls) == bad else loss

    opt.step(broken)
    assert opt.skipped == 1
    assert equal(weights(model), before)
    assert equal(opt.state_dict(), state)
    opt.step(closure(model, x, y))
    assert opt.skipped == 1
    assert not equal(weights(model), before)


def test_parameters_with_a_gradient_in_one_pass_only() -> None:
    a, b, never = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(3))
    opt = SAM(torch.optim.SGD([a, b, never], lr=0.1), rho=0.5)
    calls, seen = [], []

    def alternating() -> Tensor:
        calls.append(0)
        seen.append([p.detach().clone() for p in (a, b, never)])
        return (a**2).sum() / 2 if len(calls) == 1 else (b**2).sum() / 2

    opt.step(alternating)
    assert torch.allclose(seen[1][0], 1 + 0.5 * torch.ones(2).double() / math.sqrt(2))
    assert seen[1][1].tolist() == [1.0, 1.0]
    assert a.tolist() == [1.0, 1.0]  # no gradient where the update is made: restored, not stepped
    assert b.tolist() == [0.9, 0.9]
    assert never.tolist() == [1.0, 1.0]


# ----- one identity with the base -------------------------------------------------------------------------------------


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.05)


@pytest.mark.parametrize("base", [sgd, adamw])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(base: Base) -> None:
    x, y = rows(torch.float32)

    def start() -> tuple[nn.Module, SAM, torch.optim.lr_scheduler.LRScheduler]:
        model = net(torch.float32)
        opt = SAM(base(model.parameters()), rho=0.1)
        return model, opt, torch.optim.lr_scheduler.StepLR(opt, 3, 0.5)

    def train(model: nn.Module, opt: SAM, schedule: torch.optim.lr_scheduler.LRScheduler, steps: int) -> None:
        for _ in range(steps):
            opt.step(closure(model, x, y))
            schedule.step()

    straight = start()
    train(*straight, 10)
    first = start()
    train(*first, 4)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first], file)
    file.seek(0)
    second = start()
    for part, state in zip(second, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    train(*second, 6)
    assert equal(weights(second[0]), weights(straight[0]))
    assert equal(second[1].state_dict(), straight[1].state_dict())
    assert straight[1].param_groups[0]["lr"] == pytest.approx(
        base([nn.Parameter(torch.ones(1))]).param_groups[0]["lr"] / 8
    )


@pytest.mark.parametrize("base", [sgd, adamw])
def test_the_checkpoint_is_the_bases(base: Base) -> None:
    x, y = rows()
    model = net()
    inner = base(model.parameters())
    opt = SAM(inner, rho=0.1)
    opt.step(closure(model, x, y))
    assert opt.param_groups is inner.param_groups
    assert opt.state is inner.state
    assert opt.defaults is inner.defaults
    assert equal(opt.state_dict(), inner.state_dict())
    plain = base(net().parameters())
    plain.load_state_dict(opt.state_dict())
    assert equal(plain.state_dict()["state"], inner.state_dict()["state"])
    plain.step()


def test_a_checkpoint_of_the_bare_base_keeps_the_present_rho() -> None:
    x, y = rows()
    model, twin = net(), net()
    plain = sgd(model.parameters())
    F.cross_entropy(model(x), y).backward()
    plain.step()
    opt = SAM(sgd(twin.parameters()), rho=0.7)
    opt.load_state_dict(plain.state_dict())
    assert opt.param_groups[0]["rho"] == 0.7
    assert equal(opt.state_dict()["state"], plain.state_dict()["state"])
    opt.step(closure(twin, x, y))


def test_wrapping_keeps_the_bases_state() -> None:
    x, y = rows()
    model = net()
    inner = sgd(model.parameters())
    F.cross_entropy(model(x), y).backward()
    inner.step()
    before = copy.deepcopy(inner.state_dict()["state"])
    opt = SAM(inner)
    assert len(before) == 4
    assert equal(opt.state_dict()["state"], before)


def test_named_parameters_and_added_groups() -> None:
    x, y = rows()
    model = net()
    opt = SAM(torch.optim.SGD(model[0].named_parameters(), lr=0.1), rho=0.2)
    opt.add_param_group({"params": list(model[2].named_parameters()), "rho": 0.4})
    assert [g["rho"] for g in opt.base.param_groups] == [0.2, 0.4]
    before = weights(model)
    opt.step(closure(model, x, y))
    assert all(not torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))


# ----- random draws and statistics ------------------------------------------------------------------------------------


def test_batchnorm_statistics_come_from_the_first_pass_only() -> None:
    x, y = rows()
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).double()
    twin, careless = copy.deepcopy(model), copy.deepcopy(model)
    SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=1.0, model=model).step(closure(model, x, y))
    twin(x)
    assert equal(dict(model[1].named_buffers()), dict(twin[1].named_buffers()))
    assert int(model[1].num_batches_tracked) == 1
    SAM(torch.optim.SGD(careless.parameters(), lr=0.1), rho=1.0).step(closure(careless, x, y))
    assert int(careless[1].num_batches_tracked) == 2


@pytest.mark.parametrize("replay", [True, False])
def test_dropout_masks_are_replayed_in_the_second_pass(replay: bool) -> None:
    x, y = rows()
    model = nn.Sequential(nn.Linear(3, 50), nn.Dropout(0.5), nn.Linear(50, 2)).double()
    masks: list[Tensor] = []
    model[1].register_forward_hook(lambda module, inputs, output: masks.append(output.detach() == 0))
    opt = SAM(torch.optim.SGD(model.parameters(), lr=0.1), replay_rng=replay)
    for _ in range(2):
        opt.step(closure(model, x, y))
    assert torch.equal(masks[0], masks[1]) == replay
    assert torch.equal(masks[2], masks[3]) == replay
    assert not torch.equal(masks[0], masks[2])


def test_the_random_stream_goes_on_as_after_one_pass() -> None:
    x, y = rows()
    model = nn.Sequential(nn.Dropout(0.5), net())
    torch.manual_seed(0)
    model(x)
    expected = torch.rand(3)
    opt = SAM(torch.optim.SGD(model.parameters(), lr=0.1))
    torch.manual_seed(0)
    opt.step(closure(model, x, y))
    assert torch.equal(torch.rand(3), expected)


# ----- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [-0.1, math.nan, math.inf])
def test_a_radius_that_is_none_is_refused(rho: float) -> None:
    with pytest.raises(ValueError, match="rho is the radius"):
        SAM(torch.optim.SGD(net().parameters(), lr=0.1), rho=rho)


def test_a_class_instead_of_an_instance_is_refused() -> None:
    with pytest.raises(TypeError, match=r"an optimiser instance, got SGD.*Build it first"):
        SAM(torch.optim.SGD, rho=0.1)
    with pytest.raises(TypeError, match="got generator"):
        SAM(net().parameters())


def test_a_base_that_uses_the_name_rho_is_refused() -> None:
    for base in (
        torch.optim.Adadelta(net().parameters()),
        SAM(sgd(net().parameters())),
        SAM(sgd(net().parameters())).base,
    ):
        before = copy.deepcopy(base.param_groups[0]["rho"])
        with pytest.raises(ValueError, match="already has a hyperparameter named rho"):
            SAM(base, rho=0.3)
        assert base.param_groups[0]["rho"] == before


def test_a_closure_that_is_none_is_refused() -> None:
    x, y = rows()
    model = net()
    opt = SAM(torch.optim.SGD(model.parameters(), lr=0.1))
    before = weights(model)
    with pytest.raises(ValueError, match=r"call step\(closure\)"):
        opt.step()
    with pytest.raises(ValueError, match="must return the loss, got NoneType"):
        opt.step(lambda: None)
    with pytest.raises(ValueError, match="must return the loss, got float"):
        opt.step(lambda: 0.5)
    with pytest.raises(ValueError, match="a loss without gradient"):
        opt.step(lambda: F.cross_entropy(model(x), y).detach())
    assert equal(weights(model), before)
