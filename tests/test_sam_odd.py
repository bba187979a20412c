"""SAM in odd company: parameters, bases, closures and surroundings that a wrapper is not usually tried with."""

from __future__ import annotations

import copy
import math
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatminima import SAM, Perturbation
from flatminima.optim import BSAM

pytestmark = pytest.mark.usefixtures("one_thread")
MOST = ["sam", "asam", "gsam", "wsam", "friendly-sam", "looksam", "ae-sam", "random", "m-sam", "sa-gd"]


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)


def rows(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 3, dtype=torch.float64, generator=generator).to(dtype), torch.arange(8) % 2


def loss(model: nn.Module, dtype: torch.dtype = torch.float64) -> Tensor:
    x, y = rows(dtype)
    return F.cross_entropy(model(x), y)


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def sgd(parameters: Any, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9)


# ----- parameters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", MOST)
def test_empty_and_single_number_parameters(variant: str) -> None:
    model = net()
    nothing = nn.Parameter(torch.zeros(0, 3, dtype=torch.float64))
    scale = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
    opt = SAM(sgd([*model.parameters(), nothing, scale]), 0.1, variant=variant)
    before = scale.item()
    for _ in range(3):
        opt.step(lambda: loss(model) * scale + nothing.sum())
    assert opt.skipped == 0
    assert scale.item() != before


@pytest.mark.parametrize("variant", MOST)
def test_a_complex_parameter_is_a_pair_of_real_ones(variant: str) -> None:
    torch.manual_seed(0)
    pairs = nn.Parameter(torch.randn(4, 4, 2, dtype=torch.float64))
    numbers = nn.Parameter(torch.view_as_complex(pairs.detach().clone()))
    a = torch.randn(4, 4, dtype=torch.complex128)
    options: dict[str, Any] = {"bias": "adaptive"} if variant == "asam" else {}
    one, two = (SAM(sgd([p], 0.05), 0.3, variant=variant, **options) for p in (numbers, pairs))
    for _ in range(6):
        one.step(lambda: (numbers @ a - 1).abs().square().mean())
        two.step(lambda: (torch.view_as_complex(pairs) @ a - 1).abs().square().mean())
    assert torch.allclose(torch.view_as_real(numbers.detach()), pairs.detach(), rtol=1e-10)


@pytest.mark.parametrize("variant", ["sam", "asam", "gsam"])
def test_layouts_in_memory_survive(variant: str) -> None:
    generator = torch.Generator().manual_seed(0)
    big = torch.randn(10, 12, dtype=torch.float64, generator=generator)
    p, q = nn.Parameter(big[:, :5].t()), nn.Parameter(big[::2, 6::3])
    opt = SAM(sgd([p, q], 0.0), 0.3, variant=variant)
    before, strides, seen = big.clone(), (p.stride(), q.stride()), []
    for _ in range(3):
        opt.step(lambda: (seen.append(float((big - before).norm())), p.square().sum() + q.pow(3).sum())[1])
    assert torch.equal(big, before)
    assert (p.stride(), q.stride()) == strides
    assert [s > 0 for s in seen] == [False, True] * 3
    if variant != "asam":
        assert seen[1] == pytest.approx(0.3)


@pytest.mark.parametrize("how", ["between steps", "in the closure"])
def test_storage_that_is_swapped_is_found_again(how: str) -> None:
    """As recurrent layers do when they flatten their weights, in a forward pass."""
    model = net()
    opt, before = SAM(sgd(model.parameters(), 0.0), 0.3), weights(model)

    def closure() -> Tensor:
        value = loss(model)
        if how == "in the closure":
            for p in model.parameters():
                p.data = p.data.clone()
        return value

    for _ in range(3):
        opt.step(closure)
        if how == "between steps":
            for p in model.parameters():
                p.data = p.data.clone()
    assert same(weights(model), before)


def test_a_model_that_changes_its_dtype() -> None:
    model = net()
    opt = SAM(torch.optim.SGD(model.parameters(), lr=0.0), 0.3)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float64):
        model.to(dtype)
        before, seen = weights(model), []
        opt.step(lambda seen=seen, dtype=dtype: (seen.append(weights(model)), loss(model, dtype))[1])
        assert same(weights(model), before)
        assert not same(seen[0], seen[1])
        assert opt.skipped == 0


def test_parameters_without_values_are_refused() -> None:
    with torch.device("meta"):
        model = nn.Linear(3, 2)
    opt = SAM(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="meta device have no values: materialise"):
        opt.step(lambda: model(torch.ones(1, 3, device="meta")).sum())


# ----- bases ----------------------------------------------------------------------------------------------------------

BASES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "fused AdamW": lambda p: torch.optim.AdamW(p, fused=True),
    "fused SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "foreach Adam, amsgrad": lambda p: torch.optim.Adam(p, foreach=True, amsgrad=True),
    "lr as a tensor": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01), foreach=False),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "Rprop": torch.optim.Rprop,
    "RMSprop": lambda p: torch.optim.RMSprop(p, momentum=0.9),
    "RAdam": torch.optim.RAdam,
    "ASGD": torch.optim.ASGD,
    "Adamax": torch.optim.Adamax,
    "Adagrad": torch.optim.Adagrad,
}
if hasattr(torch.optim, "Muon"):
    BASES["Muon"] = lambda p: torch.optim.Muon([q for q in p if q.dim() == 2], lr=0.01)


@pytest.mark.parametrize("variant", ["sam", "wsam", "looksam"])
@pytest.mark.parametrize("name", BASES)
def test_any_base_steps_along_the_perturbed_gradient_and_resumes_bitwise(name: str, variant: str) -> None:
    model, twin = net(), net()
    opt = SAM(BASES[name](list(model.parameters())), 0.1, variant=variant)
    before = weights(model)
    for _ in range(6):
        opt.step(lambda: loss(model))
    assert not same(weights(model), before)
    again = SAM(BASES[name](list(twin.parameters())), 0.1, variant=variant)
    twin.load_state_dict(model.state_dict())
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    for _ in range(6):
        opt.step(lambda: loss(model))
        again.step(lambda: loss(twin))
    assert same(weights(model), weights(twin))


def test_sparse_adam_steps_along_one_gradient_only() -> None:
    table = nn.Embedding(10, 3, sparse=True)
    opt = SAM(torch.optim.SparseAdam(list(table.parameters()), lr=0.1), 0.3)
    before = table.weight.detach().clone()
    for _ in range(3):
        opt.step(lambda: table(torch.tensor([1, 2])).square().sum())
    moved = (table.weight.detach() != before).any(1)
    assert moved.nonzero().flatten().tolist() == [1, 2]
    for variant in ("gsam", "wsam", "looksam"):
        with pytest.raises(ValueError, match="SparseAdam takes sparse gradients only"):
            SAM(torch.optim.SparseAdam(list(table.parameters())), variant=variant)


def test_a_base_that_maximises_is_refused() -> None:
    with pytest.raises(ValueError, match="minimise the negative"):
        SAM(torch.optim.SGD(net().parameters(), lr=0.1, maximize=True))
    model = net()
    opt = SAM(torch.optim.SGD(model[0].parameters(), lr=0.1))
    with pytest.raises(ValueError, match="minimise the negative"):
        opt.add_param_group({"params": model[2].parameters(), "maximize": True})
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize("rho", [np.float32(0.25), np.float64(0.25), 1])
def test_a_radius_may_be_any_real_number(rho: Any) -> None:
    model = net()
    seen: list[list[Tensor]] = []
    SAM(sgd(model.parameters()), rho).step(lambda: (seen.append(weights(model)), loss(model))[1])
    moved = math.sqrt(sum(float((b - a).square().sum()) for a, b in zip(*seen, strict=True)))
    assert moved == pytest.approx(float(rho), rel=1e-12)


@pytest.mark.parametrize("rho", [torch.tensor(0.1), True, "0.1", None])
def test_what_is_no_number_is_no_radius(rho: Any) -> None:
    with pytest.raises(ValueError, match=r"must be a number, got .*\((Tensor|bool|str|NoneType)\)"):
        SAM(sgd(net().parameters()), rho)


# ----- surroundings ---------------------------------------------------------------------------------------------------


def test_within_one_autocast_block_the_second_pass_sees_the_perturbed_weights() -> None:
    """Autocast keeps the cast weights until the block ends; they have to be forgotten when the weights move."""
    model, apart = net(torch.float32), net(torch.float32)
    x, y = rows(torch.float32)
    opt, other = SAM(sgd(model.parameters()), 2.0), SAM(sgd(apart.parameters()), 2.0)
    seen: list[float] = []

    def closure(model: nn.Module) -> Tensor:
        value = F.cross_entropy(model(x), y)
        seen.append(float(value.detach()))
        return value

    def own_block() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return closure(apart)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(3):
            opt.step(lambda: closure(model))
    inside = list(seen)
    seen.clear()
    for _ in range(3):
        other.step(own_block)
    assert inside == seen
    assert len(set(inside)) == 6
    assert same(weights(model), weights(apart))


def test_a_move_within_one_autocast_block_is_seen_and_so_is_the_way_back() -> None:
    layer = nn.Linear(2, 1, bias=False)
    x = torch.ones(1, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = layer(x).item()
        with Perturbation() as away:
            away.move([layer.weight], [torch.ones(1, 2)], 1.0)
            assert layer(x).item() == pytest.approx(before + 2, abs=0.05)
        assert layer(x).item() == before


def test_grad_mode_and_inference_mode_make_no_difference() -> None:
    model, twin = net(), net()
    opt, other = SAM(sgd(model.parameters()), 0.3, variant="gsam"), SAM(sgd(twin.parameters()), 0.3, variant="gsam")
    with torch.inference_mode():
        opt.step(lambda: loss(model))
    with torch.no_grad():
        opt.step(lambda: loss(model))
    opt.zero_grad()
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        loss(model).backward()
        with mode():
            opt.ascend(zero_grad=True)
        loss(model).backward()
        with mode():
            opt.descend(zero_grad=True)
    for _ in range(5):
        other.step(lambda: loss(twin))
    assert same(weights(model), weights(twin))
    assert not any(v.is_inference() for state in opt.state.values() for v in state.values())


def test_four_threads_train_four_models() -> None:
    found: list[Any] = []

    def train() -> None:
        try:
            model = net()
            opt = SAM(sgd(model.parameters()), 0.3, replay_rng=False)
            for _ in range(30):
                opt.step(lambda: loss(model))
            found.append(weights(model))
        except Exception as error:
            found.append(error)

    model = net()  # seeds the one generator that all threads share
    opt = SAM(sgd(model.parameters()), 0.3)
    start = copy.deepcopy(model.state_dict())
    for _ in range(30):
        opt.step(lambda: loss(model))
    threads = [threading.Thread(target=train) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert not [error for error in found if isinstance(error, Exception)]
    assert all(bool(w.isfinite().all()) for each in found for w in each)
    assert start.keys() == model.state_dict().keys()


def test_two_optimisers_share_a_model() -> None:
    model, twin = net(), net()
    one, two = SAM(sgd(model[0].parameters()), 0.3), SAM(sgd(model[2].parameters()), 0.2, variant="gsam")
    for _ in range(4):
        one.step(lambda: loss(model))
        kept = weights(model[0])
        two.step(lambda: loss(model))
        assert same(weights(model[0]), kept)
    assert not same(weights(model), weights(twin))


def test_a_step_inside_of_a_step_is_refused_and_the_weights_come_back() -> None:
    model = net()
    opt, before, calls = SAM(sgd(model.parameters()), 0.3), weights(model), []

    def closure() -> Tensor:
        calls.append(0)
        return opt.step(lambda: loss(model)) if len(calls) == 2 else loss(model)

    with pytest.raises(RuntimeError, match="while the weights are displaced"):
        opt.step(closure)
    assert same(weights(model), before)


# ----- closures -------------------------------------------------------------------------------------------------------


def test_closures_of_frameworks() -> None:
    """One that returns the loss without its graph, as Lightning's, and the loop that LBFGS is trained in."""
    model, twin, third = net(), net(), net()
    opt, other, plain = (SAM(sgd(m.parameters()), 0.3) for m in (model, twin, third))

    class Closure:
        def __call__(self) -> Tensor:
            value = loss(model)
            opt.zero_grad()
            value.backward()
            return value.detach().clone()

    def lbfgs() -> Tensor:
        if torch.is_grad_enabled():
            other.zero_grad()
        value = loss(twin)
        if value.requires_grad:
            value.backward()
        return value

    for _ in range(4):
        opt.step(closure=Closure())
        other.step(lbfgs)
        plain.step(lambda: loss(third))
    assert same(weights(model), weights(third))
    assert same(weights(twin), weights(third))


def test_gradients_that_are_zeroed_in_place() -> None:
    model, twin = net(), net()
    opt, other = SAM(sgd(model.parameters()), 0.3, variant="gsam"), SAM(sgd(twin.parameters()), 0.3, variant="gsam")

    def closure() -> Tensor:
        opt.zero_grad(set_to_none=False)
        value = loss(model)
        value.backward()
        return value

    for _ in range(5):
        opt.step(closure)
        other.step(lambda: loss(twin))
    assert same(weights(model), weights(twin))


@pytest.mark.parametrize("variant", ["sam", "gsam", "wsam", "looksam", "friendly-sam"])
def test_gradients_that_are_written_in_place_as_a_captured_graph_does(variant: str) -> None:
    model, twin = net(), net()
    opt, other = SAM(sgd(model.parameters()), 0.3, variant=variant), SAM(sgd(twin.parameters()), 0.3, variant=variant)
    static = [torch.zeros_like(p) for p in model.parameters()]

    def replay() -> None:
        found = torch.autograd.grad(loss(model), list(model.parameters()))
        for p, buffer, g in zip(model.parameters(), static, found, strict=True):
            buffer.copy_(g)
            p.grad = buffer

    for _ in range(6):
        for half in (opt.ascend, opt.descend):
            replay()
            half()
        assert all(p.grad is buffer for p, buffer in zip(model.parameters(), static, strict=True))
        other.step(lambda: loss(twin))
    for a, b in zip(weights(model), weights(twin), strict=True):
        assert torch.allclose(a, b, rtol=1e-12)


def test_the_first_gradient_is_gone_in_the_second_pass() -> None:
    model = net()
    opt = SAM(sgd(model.parameters()), 0.3)
    alive: list[list[Any]] = []

    def closure() -> Tensor:
        value = loss(model)
        if len(alive) == 1:
            assert all(reference() is None for reference in alive[0])
        value.backward()
        alive.append([weakref.ref(p.grad) for p in model.parameters()])
        return value

    opt.step(closure)
    assert len(alive) == 2


def test_a_closure_that_turns_parameters_off_and_on() -> None:
    model = net()
    opt, before, calls = SAM(sgd(model.parameters(), 0.0), 0.3), weights(model), []

    def closure() -> Tensor:
        calls.append(0)
        model[0].requires_grad_(len(calls) % 2 == 0)
        return loss(model)

    for _ in range(3):
        opt.step(closure)
    assert same(weights(model), before)


@pytest.mark.parametrize("ordinary", [True, False])
def test_a_loss_of_another_model_warns_once_and_moves_nothing(ordinary: bool) -> None:
    model, other = net(), net()
    opt, before = SAM(sgd(model.parameters()), 0.3), weights(model)

    def closure() -> Tensor:
        value = loss(other)
        if ordinary:
            value.backward()
        return value

    with pytest.warns(UserWarning, match="the loss does not depend on them"):
        opt.step(closure)
    opt.step(closure)
    assert same(weights(model), before)


@pytest.mark.parametrize("weights_of", [[1.0, -1.0], [0.0, 0.0], [math.nan, 1.0]])
def test_weights_that_weigh_nothing_are_refused(weights_of: list[float]) -> None:
    model = net()
    opt, before = SAM(sgd(model.parameters()), 0.3), weights(model)
    with pytest.raises(ValueError, match="finite, >= 0 and not all zero"):
        opt.step([lambda: loss(model)] * 2, weights=weights_of)
    assert same(weights(model), before)


@pytest.mark.parametrize("bad", [1, 2])
def test_an_overflow_in_either_half_lowers_the_scale(bad: int) -> None:
    x, y = rows(torch.float32)
    model = net(torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    opt, before = SAM(torch.optim.SGD(model.parameters(), lr=0.1), 0.3), weights(model)
    for half, call in enumerate((opt.ascend, opt.descend), start=1):
        scaler.scale(F.cross_entropy(model(x), y) * (1e38 if half == bad else 1.0)).backward()
        call(zero_grad=True, scaler=scaler)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert opt.skipped == 1
    assert same(weights(model), before)


# ----- copies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_displaced_weights_are_not_copied(way: Callable[[Any], Any]) -> None:
    model = net()
    opt = SAM(sgd(model.parameters()), 0.3)
    loss(model).backward()
    opt.ascend()
    with pytest.raises(RuntimeError, match=r"copying or pickling .* while the weights are displaced"):
        way((model, opt))
    opt.descend()
    twin, two = way((model, opt))
    opt.step(lambda: loss(model))
    two.step(lambda: loss(twin))
    assert same(weights(model), weights(twin))


@pytest.mark.parametrize("way", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_bsam_can_be_copied_and_resumed(way: Callable[[Any], Any]) -> None:
    model, third = net(), net()
    opt = BSAM(model.parameters(), rows=100, lr=0.1, seed=3)
    with torch.inference_mode():
        opt.step(lambda: loss(model))
    for _ in range(3):
        opt.step(lambda: loss(model))
    twin, two = way((model, opt))
    resumed = BSAM(third.parameters(), rows=100, lr=0.1, seed=3)
    third.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    for _ in range(4):
        for m, o in ((model, opt), (twin, two), (third, resumed)):
            o.step(lambda m=m: loss(m))
    assert same(weights(model), weights(twin))
    assert same(weights(model), weights(third))


def test_bsam_refuses_parameters_it_cannot_learn_a_precision_for() -> None:
    for parameters in ([nn.Parameter(torch.ones(2, dtype=torch.bfloat16))], [nn.Parameter(torch.ones(2).cfloat())]):
        with pytest.raises(ValueError, match=r"whole real parameters .* got torch\."):
            BSAM(parameters, rows=10)


def test_bsam_checks_groups_that_are_added() -> None:
    opt = BSAM([nn.Parameter(torch.ones(2))], rows=10)
    for group, message in (
        ({"params": [nn.Parameter(torch.ones(2).half())]}, r"whole real parameters .* got torch\.float16"),
        ({"params": [nn.Parameter(torch.ones(2))], "lr": -1.0}, "lr must be finite and >= 0, got -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            opt.add_param_group(group)
        assert len(opt.param_groups) == 1
    opt.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": 0.5})
    assert [group["lr"] for group in opt.param_groups] == [0.1, 0.5]
