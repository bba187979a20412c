"""SAM where people train: scalers, low precision, schedules, compiled models, checkpoints, loops of their own."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatminima import SAM
from flatminima.optim import VARIANTS

pytestmark = pytest.mark.usefixtures("one_thread")


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)


def rows(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 3, dtype=torch.float64, generator=generator).to(dtype), torch.arange(8) % 2


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def adamw(model: nn.Module, lr: float = 0.01) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=lr)


def options(variant: str, model: nn.Module) -> dict[str, Any]:
    return {"variant": variant, "model": model} if variant == "sam-on" else {"variant": variant}


def normed() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 2))


EVERY = sorted(VARIANTS)

# ----- every variant keeps the promises of SAM ------------------------------------------------------------------------


@pytest.mark.parametrize("variant", EVERY)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(variant: str) -> None:
    x, y = rows(torch.float32)

    def train(model: nn.Module, opt: SAM, steps: int) -> None:
        for _ in range(steps):
            opt.step(lambda: F.cross_entropy(model(x), y))

    for base in (sgd, adamw):
        straight = normed()
        train(straight, SAM(base(straight), 0.1, **options(variant, straight)), 13)
        first = normed()
        opt = SAM(base(first), 0.1, **options(variant, first))
        train(first, opt, 6)
        file = io.BytesIO()
        torch.save([first.state_dict(), opt.state_dict()], file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        second = normed()
        again = SAM(base(second), 0.1, **options(variant, second))
        second.load_state_dict(loaded[0])
        again.load_state_dict(loaded[1])
        train(second, again, 7)
        assert same(weights(second), weights(straight))
        bare = base(normed())
        bare.load_state_dict(loaded[1])  # what a variant remembers does not keep the base from loading


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", EVERY)
@pytest.mark.filterwarnings("ignore:the perturbation is mostly rounded away")
def test_at_lr_zero_no_bit_and_no_storage_changes(variant: str, dtype: torch.dtype) -> None:
    x, y = rows(dtype)
    model = normed().to(dtype)
    before, where = weights(model), [p.data_ptr() for p in model.parameters()]
    opt = SAM(sgd(model, lr=0.0), 0.5, **options(variant, model))
    for _ in range(12):
        opt.step(lambda: F.cross_entropy(model(x), y))
    assert same(weights(model), before)
    assert [p.data_ptr() for p in model.parameters()] == where
    assert opt.skipped == 0


@pytest.mark.parametrize("variant", EVERY)
def test_an_exception_in_any_pass_restores(variant: str) -> None:
    x, y = rows(torch.float32)
    model = normed()
    opt = SAM(sgd(model), 0.5, **options(variant, model))
    opt.step(lambda: F.cross_entropy(model(x), y))
    before = weights(model)
    for bad in (1, 2):
        calls: list[int] = []

        def interrupted(bad: int = bad, calls: list[int] = calls) -> Tensor:
            calls.append(0)
            if len(calls) == bad:
                raise KeyboardInterrupt
            return F.cross_entropy(model(x), y)

        opt.base.param_groups[0]["lr"] = 0.0
        try:
            opt.step(interrupted)
        except KeyboardInterrupt:
            assert len(calls) == bad
        assert same(weights(model), before)
    opt.step(lambda: F.cross_entropy(model(x), y))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("variant", EVERY)
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_named(variant: str, value: float) -> None:
    x, y = rows(torch.float32)
    model = normed()
    opt = SAM(sgd(model), 0.5, **options(variant, model))
    for _ in range(5):  # the next step of LookSAM-5 and of every other one perturbs or not; both are tried
        before, skipped = weights(model), opt.skipped
        momentum = [opt.state[p]["momentum_buffer"].clone() for p in model.parameters() if p in opt.state]
        calls: list[int] = []

        def broken(calls: list[int] = calls) -> Tensor:
            calls.append(0)
            return F.cross_entropy(model(x), y) * value

        opt.step(broken)
        assert opt.skipped == skipped + 1
        assert opt.skip_reason is not None
        assert "gradient of parameter 0 of group 0 is NaN" in opt.skip_reason or "infinite" in opt.skip_reason
        assert same(weights(model), before)
        now = [opt.state[p]["momentum_buffer"] for p in model.parameters() if p in opt.state]
        assert same(now, momentum)
        opt.step(lambda: F.cross_entropy(model(x), y))
        assert all(bool(w.isfinite().all()) for w in weights(model))


@pytest.mark.parametrize("variant", EVERY)
def test_a_zero_gradient_moves_nothing(variant: str) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        model = normed().to(dtype)
        x, _ = rows(dtype)
        opt = SAM(sgd(model), 0.5, **options(variant, model))
        before = weights(model)
        for _ in range(3):
            opt.step(lambda model=model, x=x: (model(x) * 0).sum())
        assert same(weights(model), before)
        assert opt.skipped == 0


def test_names_of_parameters_are_used_where_the_base_knows_them() -> None:
    model = net()
    opt = SAM(torch.optim.SGD(model.named_parameters(), lr=0.1))
    opt.step(lambda: (model[2].weight * math.inf).sum())
    assert opt.skip_reason == "first pass of step 0: the gradient of 2.weight is infinite"


@pytest.mark.parametrize(
    "variant", ["sam", "asam", "gsam", "wsam", "looksam", "friendly-sam", "msam", "sa-gd", "random"]
)
def test_gradients_that_come_and_go(variant: str) -> None:
    a, b, frozen = (nn.Parameter(torch.ones(2, 2, dtype=torch.float64)) for _ in range(3))
    frozen.requires_grad_(False)
    opt = SAM(torch.optim.SGD([a, b, frozen], lr=0.0, momentum=0.9), 0.5, variant=variant)
    calls: list[int] = []
    for _ in range(6):
        opt.step(lambda: (calls.append(0), ((a if len(calls) % 3 else b) ** 2).sum() + (frozen**2).sum())[1])
        assert all(bool((p == 1).all()) for p in (a, b, frozen))


@pytest.mark.parametrize("variant", ["sam", "asam", "gsam", "friendly-sam", "looksam"])
def test_sparse_gradients_are_those_of_the_dense_layer(variant: str) -> None:
    torch.manual_seed(0)
    sparse = nn.Embedding(6, 3, sparse=True).double()
    full = nn.Embedding(6, 3).double()
    full.load_state_dict(sparse.state_dict())
    for model in (sparse, full):
        opt = SAM(torch.optim.SGD(model.parameters(), lr=0.1), 0.3, variant=variant)
        for step in range(8):
            index = torch.tensor([step % 6, (2 * step) % 6, 1])
            opt.step(lambda model=model, index=index: (model(index) ** 3).sum())
    assert torch.allclose(sparse.weight, full.weight, rtol=1e-12)


# ----- GradScaler -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ordinary", [True, False])
@pytest.mark.parametrize("variant", EVERY)
def test_a_scaler_changes_nothing_but_the_range(variant: str, ordinary: bool) -> None:
    x, y = rows()
    model, twin = normed().double(), normed().double()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=4)
    opt = SAM(sgd(model), 0.3, **options(variant, model))
    plain = SAM(sgd(twin), 0.3, **options(variant, twin))

    def usual() -> Tensor:
        opt.zero_grad()
        loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        return loss

    for _ in range(20):
        loss = opt.step(usual if ordinary else lambda: F.cross_entropy(model(x), y), scaler=scaler)
        scaler.update()
        assert float(loss) == pytest.approx(float(plain.step(lambda: F.cross_entropy(twin(x), y))), rel=1e-9)
    assert scaler.get_scale() == 2.0**17
    for a, b in zip(weights(model), weights(twin), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("bad", [1, 2])
def test_an_overflow_in_either_pass_skips_the_step_and_lowers_the_scale(bad: int) -> None:
    x, y = rows(torch.float32)
    model = net(torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    opt = SAM(sgd(model), 0.3)
    before, calls = weights(model), []

    def overflowing() -> Tensor:
        calls.append(0)
        loss = F.cross_entropy(model(x), y)
        return loss * (1e38 if len(calls) == bad else 1.0)

    opt.step(overflowing, scaler=scaler)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert opt.skipped == 1
    assert same(weights(model), before)
    opt.step(lambda: F.cross_entropy(model(x), y), scaler=scaler)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert not same(weights(model), before)


def test_the_two_step_loop_with_a_scaler() -> None:
    x, y = rows()
    model, twin = net(), net()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    opt, plain = SAM(sgd(model), 0.3), SAM(sgd(twin), 0.3)
    for _ in range(10):
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        opt.ascend(zero_grad=True, scaler=scaler)
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        opt.descend(zero_grad=True, scaler=scaler)
        scaler.update()
        plain.step(lambda: F.cross_entropy(twin(x), y))
    for a, b in zip(weights(model), weights(twin), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


def test_a_disabled_scaler_is_none() -> None:
    x, y = rows()
    model, twin = net(), net()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    SAM(sgd(model), 0.3).step(lambda: F.cross_entropy(model(x), y), scaler=scaler)
    SAM(sgd(twin), 0.3).step(lambda: F.cross_entropy(twin(x), y))
    assert same(weights(model), weights(twin))


# ----- a loop of one's own --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("ascend", "descend"), ("first_step", "second_step")])
@pytest.mark.parametrize("variant", ["sam", "asam", "gsam", "wsam", "friendly-sam", "looksam", "ae-sam", "every-k"])
@pytest.mark.parametrize("clear", [True, False])
def test_two_halves_are_one_step(variant: str, names: tuple[str, str], clear: bool) -> None:
    x, y = rows()
    model, twin = net(), net()
    opt, whole = SAM(sgd(model), 0.3, variant=variant), SAM(sgd(twin), 0.3, variant=variant)
    first, second = (getattr(opt, name) for name in names)
    for _ in range(12):
        F.cross_entropy(model(x), y).backward()
        first(zero_grad=clear)
        if not clear:
            opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        second(zero_grad=True)
        assert all(p.grad is None for p in model.parameters())
        whole.step(lambda: F.cross_entropy(twin(x), y))
    for a, b in zip(weights(model), weights(twin), strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)


def test_halves_in_the_wrong_order_are_refused_and_can_be_given_up() -> None:
    x, y = rows()
    model = net()
    opt = SAM(sgd(model), 0.3)
    before = weights(model)
    with pytest.raises(RuntimeError, match="call ascend"):
        opt.descend()
    F.cross_entropy(model(x), y).backward()
    opt.ascend()
    with pytest.raises(RuntimeError, match="while the weights are displaced"):
        opt.ascend()
    with pytest.raises(RuntimeError, match="while the weights are displaced"):
        opt.step(lambda: F.cross_entropy(model(x), y))
    with pytest.raises(RuntimeError, match="while the weights are displaced"), opt.perturbed():
        pass
    assert not same(weights(model), before)
    opt.restore()
    assert same(weights(model), before)


def test_a_first_half_that_is_not_finite_skips_the_second() -> None:
    model = net()
    x, y = rows()
    opt = SAM(sgd(model), 0.3)
    before = weights(model)
    (F.cross_entropy(model(x), y) * math.nan).backward()
    info = opt.ascend(zero_grad=True)
    assert info.skipped is not None
    assert not info.moved
    F.cross_entropy(model(x), y).backward()
    opt.descend()
    assert opt.skipped == 1
    assert same(weights(model), before)


def test_the_perturbed_block_reports_what_was_realised() -> None:
    x, y = rows()
    model = net()
    opt = SAM(sgd(model), 0.3, variant="asam")
    F.cross_entropy(model(x), y).backward()
    before = weights(model)
    with opt.perturbed() as info:
        away = math.sqrt(
            sum(float((p.detach() - w).square().sum()) for p, w in zip(model.parameters(), before, strict=True))
        )
        assert info.radius == pytest.approx(away, rel=1e-12)
        assert info.cosine == pytest.approx(1.0, rel=1e-12)
        assert info.moved
        assert "moved=True" in repr(info)
    assert info.radius == pytest.approx(away, rel=1e-12)  # measured once, kept
    with opt.perturbed() as info:
        pass
    with pytest.raises(RuntimeError, match="while they are displaced"):
        _ = info.radius


# ----- low precision --------------------------------------------------------------------------------------------------


def test_a_perturbation_that_rounds_away_is_reported() -> None:
    generator = torch.Generator().manual_seed(0)
    w = nn.Parameter((torch.randn(200_000, generator=generator) * 0.03).bfloat16())
    target = torch.randn(200_000, generator=generator).bfloat16()
    opt = SAM(torch.optim.SGD([w], lr=0.0), rho=0.01)
    with pytest.warns(UserWarning, match=r"rounded away in torch.bfloat16: realised radius .*cosine") as warned:
        opt.step(lambda: (w * target).sum())
    assert warned[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step(lambda: (w * target).sum())
        SAM(torch.optim.SGD([w], lr=0.0), rho=50.0).step(lambda: (w * target).sum())
    w.grad = target.clone()
    before = w.detach().clone()
    with opt.perturbed() as info:
        made = w.detach().double() - before.double()
        assert info.radius == pytest.approx(float(made.norm()), rel=1e-5)
        assert info.cosine == pytest.approx(float(F.cosine_similarity(made, target.double(), dim=0)), rel=1e-5)
        assert info.cosine < 0.9


# ----- schedules, hooks, copies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", ["closure", "halves"])
def test_schedules_of_lr_and_of_rho_work_without_warnings(loop: str) -> None:
    x, y = rows()
    model = net()
    groups = [{"params": model[0].parameters(), "rho": 0.3}, {"params": model[2].parameters()}]
    opt = SAM(torch.optim.SGD(groups, lr=0.1), rho=0.2)
    seen: list[list[Tensor]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 5)
        for step in range(5):
            for group, rho in zip(opt.param_groups, (0.3, 0.2), strict=True):
                group["rho"] = rho / (1 + step)
            if loop == "closure":
                opt.step(lambda: (seen.append(weights(model)), F.cross_entropy(model(x), y))[1])
            else:
                for half in (opt.ascend, opt.descend):
                    seen.append(weights(model))
                    F.cross_entropy(model(x), y).backward()
                    half(zero_grad=True)
            schedule.step()
    assert opt.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)
    for step in range(5):
        parts = [
            torch.cat(
                [(b - a).flatten() for a, b in zip(seen[2 * step], seen[2 * step + 1], strict=True)][2 * i : 2 * i + 2]
            )
            for i in (0, 1)
        ]
        assert float(torch.cat([p / r for p, r in zip(parts, (0.3, 0.2), strict=True)]).norm()) == pytest.approx(
            1 / (1 + step)
        )


def test_a_schedule_that_makes_rho_negative_is_stopped_and_the_weights_stay() -> None:
    x, y = rows()
    model = net()
    opt = SAM(sgd(model), 0.3)
    before = weights(model)
    opt.param_groups[0]["rho"] = -0.1
    with pytest.raises(ValueError, match=r"rho is the radius .* got -0.1"):
        opt.step(lambda: F.cross_entropy(model(x), y))
    assert same(weights(model), before)


@pytest.mark.parametrize("rho", [-0.1, math.nan, "0.1"])
def test_a_group_with_a_radius_that_is_none_is_refused(rho: Any) -> None:
    model = net()
    opt = SAM(torch.optim.SGD(model[0].parameters(), lr=0.1))
    with pytest.raises(ValueError, match="rho is the radius"):
        opt.add_param_group({"params": model[2].parameters(), "rho": rho})
    assert len(opt.param_groups) == 1
    base = torch.optim.SGD([{"params": model.parameters(), "rho": rho}], lr=0.1)
    with pytest.raises(ValueError, match="rho is the radius"):
        SAM(base)
    assert "rho" not in base.defaults


def test_a_base_that_evaluates_the_loss_itself_is_refused() -> None:
    with pytest.raises(TypeError, match=r"LBFGS evaluates the loss itself.*SGD or AdamW"):
        SAM(torch.optim.LBFGS(net().parameters()))


def test_hooks_fire_once() -> None:
    x, y = rows()
    model = net()
    opt, fired = SAM(sgd(model), 0.1), []
    opt.register_step_pre_hook(lambda *_: fired.append("before"))
    opt.register_step_post_hook(lambda *_: fired.append("after"))
    opt.base.register_step_pre_hook(lambda *_: fired.append("base"))
    opt.register_state_dict_post_hook(lambda *_: fired.append("saved"))
    opt.register_load_state_dict_post_hook(lambda *_: fired.append("loaded"))
    opt.step(lambda: F.cross_entropy(model(x), y))
    opt.load_state_dict(opt.state_dict())
    assert fired == ["before", "base", "after", "saved", "loaded"]


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@pytest.mark.parametrize("variant", ["sam", "friendly-sam", "looksam"])
def test_copies_go_on_as_the_original_would(variant: str, way: str) -> None:
    x, y = rows()
    model = net()
    opt = SAM(sgd(model), 0.3, variant=variant)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 2)  # it patches step, with functions that cannot be pickled
    for _ in range(3):
        opt.step(lambda: F.cross_entropy(model(x), y))
        schedule.step()
    if way == "deepcopy":
        model_two, two = copy.deepcopy((model, opt))
    else:
        model_two, two = pickle.loads(pickle.dumps((model, opt)))
    assert two.param_groups is two.base.param_groups
    assert all(a is b for a, b in zip(two.param_groups[0]["params"], model_two.parameters(), strict=True))
    for m, o in ((model, opt), (model_two, two)):
        for _ in range(4):
            o.step(lambda m=m: F.cross_entropy(m(x), y))
    assert same(weights(model), weights(model_two))


# ----- models -----------------------------------------------------------------------------------------------------------


def test_a_compiled_model() -> None:
    x, y = rows(torch.float32)
    model, twin = normed(), normed()
    compiled = torch.compile(model, backend="aot_eager")
    opt, plain = SAM(sgd(model), 0.3, model=compiled), SAM(sgd(twin), 0.3)
    for _ in range(5):
        opt.step(lambda: F.cross_entropy(compiled(x), y))
        plain.step(lambda: F.cross_entropy(twin(x), y))
    for a, b in zip(weights(model), weights(twin), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_a_recurrent_network_keeps_its_flat_weights() -> None:
    torch.manual_seed(0)
    model = nn.LSTM(3, 4)
    x = torch.randn(5, 2, 3)
    opt = SAM(torch.optim.SGD(model.parameters(), lr=0.1), 0.3)
    seen = [float(opt.step(lambda: model(x)[0].square().mean())) for _ in range(5)]
    assert seen == sorted(seen, reverse=True)


def test_channels_last_weights_move_and_come_back() -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    twin = nn.Conv2d(3, 4, 3)
    twin.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 6, 6)
    for m in (model, twin):
        opt = SAM(torch.optim.SGD(m.parameters(), lr=0.1), 0.3)
        for _ in range(3):
            opt.step(lambda m=m: m(x).square().mean())
    assert torch.allclose(model.weight, twin.weight, rtol=1e-5, atol=1e-7)
    assert model.weight.is_contiguous(memory_format=torch.channels_last)


def test_statistics_of_every_normalisation_layer_come_from_the_first_pass_and_frozen_ones_stay() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.BatchNorm1d(3, momentum=None), nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
    ).double()
    model[2].eval()
    twin = copy.deepcopy(model)
    x, y = rows()
    frozen = copy.deepcopy(model[2].state_dict())
    opt = SAM(sgd(model), 0.5, model=model)
    for _ in range(3):
        expected = copy.deepcopy(model)
        expected(x)
        opt.step(lambda: F.cross_entropy(model(x), y))
        assert torch.equal(model[0].running_mean, expected[0].running_mean)
    assert int(model[0].num_batches_tracked) == 3
    assert model[0].momentum is None
    assert torch.equal(model[2].running_mean, frozen["running_mean"])
    assert not model[2].training
    assert twin[2].running_mean.equal(model[2].running_mean)


def test_statistics_blocks_may_be_nested() -> None:
    from flatminima.optim.passes import Passes

    layer = nn.BatchNorm1d(3)
    passes, x = Passes(layer, True), torch.randn(4, 3)
    layer(x)
    kept = layer.running_mean.clone()
    with passes.statistics_kept(), passes.statistics_kept():
        layer(x + 1)
    layer(x)
    assert int(layer.num_batches_tracked) == 2
    assert not torch.equal(layer.running_mean, kept)
    assert layer.momentum == 0.1


@pytest.mark.parametrize("closure", [[], "loss", [lambda: None, 3]])
def test_closures_that_are_none_are_refused(closure: Any) -> None:
    model = net()
    before = weights(model)
    with pytest.raises((TypeError, ValueError), match="closure"):
        SAM(sgd(model)).step(closure)
    assert same(weights(model), before)


def test_a_vector_is_no_loss_and_weights_belong_to_closures() -> None:
    x, y = rows()
    model = net()
    opt = SAM(sgd(model))
    with pytest.raises(ValueError, match=r"got shape \(8,\)"):
        opt.step(lambda: F.cross_entropy(model(x), y, reduction="none"))
    with pytest.raises(ValueError, match="got 1 closures and 2 weights"):
        opt.step(lambda: F.cross_entropy(model(x), y), weights=[1.0, 1.0])


Closure = Callable[[], Tensor]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("scaled", [True, False])
def test_m_sam_skips_a_step_whose_first_pass_alone_is_not_finite(scaled: bool, count: int) -> None:
    x, y = rows(torch.float32)
    model = net(torch.float32)
    opt, calls = SAM(sgd(model), 0.3, variant="m-sam"), []
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
    before = weights(model)

    def broken() -> Tensor:
        calls.append(0)
        return F.cross_entropy(model(x), y) * (math.inf if len(calls) == 1 else 1.0)

    opt.step([broken] * count, scaler=scaler)
    assert len(calls) == 2 * count
    assert opt.skipped == 1
    assert opt.skip_reason is not None
    assert opt.skip_reason.startswith("first pass of step 0: the gradient of parameter 0 of group 0 is NaN")
    assert same(weights(model), before)
    if scaled:
        scaler.update()
        assert scaler.get_scale() == 2.0**9
    opt.step([broken] * count, scaler=scaler)
    assert not same(weights(model), before)


@pytest.mark.parametrize("variant", ["sam", "asam", "gsam", "friendly-sam"])
def test_a_tiny_gradient_in_half_precision_moves_by_rho_all_the_same(variant: str) -> None:
    """rho over its norm is more than half precision can hold."""
    w = nn.Parameter(torch.ones(2, 2).half())
    opt = SAM(torch.optim.SGD([w], lr=0.1), rho=0.05, variant=variant)
    w.grad = torch.full_like(w, 3e-7)
    with opt.perturbed() as info:
        assert info.radius == pytest.approx(0.05 * (1.01 if variant == "asam" else 1.0), rel=0.05)
    assert torch.equal(w.detach(), torch.ones_like(w))
    opt.step(lambda: (w * 3e-7).sum())
    assert opt.skipped == 0


@pytest.mark.parametrize("saved", ["friendly-sam", "looksam", "ae-sam", "every-k", "random", "probability"])
def test_what_another_variant_remembers_is_refused_before_anything_changes(saved: str) -> None:
    x, y = rows()

    def trained(variant: str) -> SAM:
        model = net()
        opt = SAM(adamw(model), 0.1, variant=variant)
        for _ in range(3):
            opt.step(lambda: F.cross_entropy(model(x), y))
        return opt

    state = trained(saved).state_dict()
    for variant in ("sam", "ae-sam", "looksam", "friendly-sam"):
        opt = trained(variant)
        if variant == saved:
            opt.load_state_dict(state)
            continue
        before = copy.deepcopy(opt.state_dict())
        state["param_groups"][0]["lr"] = 7.0
        with pytest.raises(ValueError, match=r"the checkpoint holds what .* remembered; this optimiser is made of"):
            opt.load_state_dict(state)
        after = opt.state_dict()
        assert after["param_groups"] == before["param_groups"]
        for mine, theirs in zip(after["state"].values(), before["state"].values(), strict=True):
            assert all(torch.equal(mine[k], theirs[k]) or bool(mine[k].isnan().all()) for k in theirs)
        opt.base.load_state_dict(state)
        state["param_groups"][0]["lr"] = 0.01


def test_a_vector_of_another_shape_is_refused_before_anything_changes() -> None:
    a, b = (SAM(torch.optim.SGD([nn.Parameter(torch.ones(n))], lr=0.1), variant="friendly-sam") for n in (2, 3))
    a.param_groups[0]["lr"] = 7.0
    with pytest.raises(ValueError, match=r"mean of parameter 0 has shape \(2,\), the parameter \(3,\)"):
        b.load_state_dict(a.state_dict())
    assert b.param_groups[0]["lr"] == 0.1
