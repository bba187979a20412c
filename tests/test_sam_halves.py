"""Loops of one's own: both halves do what one step does, with a scaler, clipping, statistics and random numbers; or refuse."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatminima import EMA, SAM, SWA

pytestmark = pytest.mark.usefixtures("one_thread")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def rows() -> tuple[Tensor, Tensor]:
    return torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 2


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def close(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.allclose(x, y, rtol=1e-10, atol=1e-12) for x, y in zip(a, b, strict=True))


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ----- clipping with a GradScaler -------------------------------------------------------------------------------------


@pytest.mark.parametrize("clipped", [(1,), (2,), (1, 2)])
@pytest.mark.parametrize("whose", ["wrapper", "base"])
@pytest.mark.parametrize("variant", ["sam", "asam", "gsam", "wsam", "friendly-sam", "looksam", "ae-sam", "every-k"])
def test_unscaling_before_either_half_is_unscaling_once(variant: str, whose: str, clipped: tuple[int, ...]) -> None:
    x, y = rows()

    def train(enabled: bool) -> list[Tensor]:
        model = net()
        opt = SAM(sgd(model), 0.3, variant=variant)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled)
        for _ in range(8):
            for half, end in ((1, opt.ascend), (2, opt.descend)):
                scaler.scale(F.cross_entropy(model(x), y)).backward()
                if half in clipped:
                    scaler.unscale_(opt if whose == "wrapper" else opt.base)
                    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                end(zero_grad=True, scaler=scaler)
            scaler.update()
        assert not enabled or scaler.get_scale() == 1024.0
        return weights(model)

    assert close(train(True), train(False))


@pytest.mark.parametrize("variant", ["sam", "gsam", "looksam", "every-k", "m-sam", "msam", "random"])
def test_a_closure_may_unscale_and_clip(variant: str) -> None:
    x, y = rows()

    def train(enabled: bool) -> list[Tensor]:
        model = net()
        opt = SAM(sgd(model), 0.3, variant=variant)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled)

        def clipping() -> Tensor:
            loss = F.cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            scaler.unscale_(opt)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            return loss

        for _ in range(8):
            opt.step(clipping, scaler=scaler)
            scaler.update()
        return weights(model)

    assert close(train(True), train(False))


def test_gradients_that_are_unscaled_and_used_twice_are_unscaled_once() -> None:
    """A step that does not perturb may be ended with the gradients of the first half."""
    x, y = rows()

    def train(enabled: bool) -> list[Tensor]:
        model = net()
        opt = SAM(sgd(model), 0.3, variant="every-k", k=2)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled)
        for _ in range(4):
            scaler.scale(F.cross_entropy(model(x), y)).backward()
            scaler.unscale_(opt)
            if opt.ascend(scaler=scaler).moved:
                opt.zero_grad()
                scaler.scale(F.cross_entropy(model(x), y)).backward()
            opt.descend(zero_grad=True, scaler=scaler)
            scaler.update()
        return weights(model)

    assert close(train(True), train(False))


@pytest.mark.parametrize("bad", [1, 2])
@pytest.mark.parametrize("loop", ["halves", "closure"])
def test_an_overflow_that_was_unscaled_skips_the_step_and_lowers_the_scale(loop: str, bad: int) -> None:
    x, y = rows()
    model = net()
    opt, calls = SAM(sgd(model), 0.3), []
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = weights(model)

    def clipping() -> Tensor:
        calls.append(0)
        loss = F.cross_entropy(model(x), y) * (1e306 if len(calls) == bad else 1.0)
        scaler.scale(loss).backward()
        scaler.unscale_(opt)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        return loss

    if loop == "closure":
        opt.step(clipping, scaler=scaler)
    else:
        clipping()
        opt.ascend(zero_grad=True, scaler=scaler)
        if bad == 2:
            clipping()
        opt.descend(zero_grad=True, scaler=scaler)
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert opt.skipped == 1
    assert same(weights(model), before)


# ----- running statistics and random numbers --------------------------------------------------------------------------


class Noisy(nn.Module):
    """BatchNorm and dropout; keeps the masks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.drop, self.last = nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.Linear(6, 2)
        self.masks: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        mask = self.drop(torch.ones(len(x), 6))
        self.masks.append(mask)
        return self.last(self.norm(self.first(x)) * mask)


Loop = Callable[[SAM, Callable[[], Tensor]], None]


def halves(opt: SAM, loss: Callable[[], Tensor]) -> None:
    opt.zero_grad()
    loss().backward()
    opt.ascend(zero_grad=True)
    loss().backward()
    opt.descend()


def block(opt: SAM, loss: Callable[[], Tensor]) -> None:
    opt.zero_grad()
    loss().backward()
    with opt.perturbed():
        opt.zero_grad()
        loss().backward()
    opt.base.step()


def accumulated(opt: SAM, loss: Callable[[], Tensor]) -> None:
    opt.zero_grad()
    for _ in range(2):
        (loss() / 2).backward()
    opt.ascend(zero_grad=True)
    for _ in range(2):
        (loss() / 2).backward()
    opt.descend()


def steps(opt: SAM, loss: Callable[[], Tensor]) -> None:
    opt.step(loss)


def two_closures(opt: SAM, loss: Callable[[], Tensor]) -> None:
    opt.step([loss, loss])


@pytest.mark.parametrize(("loop", "whole"), [(halves, steps), (block, steps), (accumulated, two_closures)])
def test_statistics_masks_and_the_stream_are_those_of_a_step(loop: Loop, whole: Loop) -> None:
    found: list[tuple[Noisy, Tensor]] = []
    for way in (loop, whole):
        model = Noisy()
        opt = SAM(torch.optim.SGD(model.parameters(), lr=0.1), 0.5, model=model)
        torch.manual_seed(7)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(4):
                x = torch.randn(8, 3)  # of the same stream
                way(opt, lambda model=model, x=x: model(x).square().mean())
        found.append((model, torch.rand(3)))
    (mine, after), (theirs, expected) = found
    assert torch.equal(after, expected)
    assert len(mine.masks) == len(theirs.masks)
    assert all(torch.equal(a, b) for a, b in zip(mine.masks, theirs.masks, strict=True))
    assert mine.norm.num_batches_tracked == theirs.norm.num_batches_tracked
    for a, b in zip(mine.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_giving_up_restores_statistics_and_the_stream() -> None:
    model = Noisy()
    opt = SAM(torch.optim.SGD(model.parameters(), lr=0.1), 0.5, model=model)
    opt.zero_grad()
    model(torch.ones(8, 3)).sum().backward()
    before, state = [b.clone() for b in model.buffers()], torch.get_rng_state()
    opt.ascend()
    opt.restore()
    opt.ascend()
    model(torch.randn(8, 3)).sum().backward()
    opt.restore()
    assert same(before, list(model.buffers()))
    assert torch.equal(state, torch.get_rng_state())


def test_masks_that_cannot_be_replayed_are_said_once() -> None:
    """Nothing says where the first pass began; or something was drawn between that and the pass."""
    x = torch.ones(8, 3)

    def unmarked(model: Noisy, opt: SAM) -> None:
        model.zero_grad()
        model(x).sum().backward()
        opt.ascend(zero_grad=True)
        model(x).sum().backward()
        opt.descend()

    def late(model: Noisy, opt: SAM) -> None:
        loss = model(x).sum()
        opt.zero_grad()
        loss.backward()
        opt.ascend(zero_grad=True)
        model(x).sum().backward()
        opt.descend()

    for loop in (unmarked, late):
        model = Noisy()
        opt = SAM(torch.optim.SGD(model.parameters(), lr=0.1), 0.5)
        with pytest.warns(UserWarning, match=r"other random numbers.*call zero_grad\(\) .*replay_rng=False") as said:
            loop(model, opt)
        assert said[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loop(model, opt)
            loop(model, SAM(torch.optim.SGD(model.parameters(), lr=0.1), 0.5, replay_rng=False))
            plain = net()  # draws nothing
            opt = SAM(sgd(plain), 0.5)
            for _ in range(2):
                plain(rows()[0]).sum().backward()
                opt.ascend(zero_grad=True)
                plain(rows()[0]).sum().backward()
                opt.descend()


def test_only_the_global_generators_are_replayed() -> None:
    """As the documentation says: other sources of randomness are the closure's own."""
    model, own = net(), torch.Generator()
    seen: list[tuple[float, float, float]] = []

    def loss() -> Tensor:
        seen.append((float(torch.rand(())), float(torch.rand((), generator=own)), random.random()))
        return model(rows()[0]).sum()

    SAM(sgd(model), 0.1).step(loss)
    assert seen[0][0] == seen[1][0]
    assert seen[0][1] != seen[1][1]
    assert seen[0][2] != seen[1][2]


# ----- what halves cannot do ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "sa-gd"}, r"sa-gd.*projected ascent.*call step\(closure\)"),
        ({"variant": "random", "draws": 3}, r"3 perturbations.*call step\(closure\)"),
    ],
)
@pytest.mark.parametrize("way", ["ascend", "perturbed"])
def test_variants_of_more_than_one_look_are_refused(options: dict[str, Any], message: str, way: str) -> None:
    model = net()
    opt = SAM(sgd(model), 0.3, **options)
    before = weights(model)
    model(rows()[0]).sum().backward()
    with pytest.raises(ValueError, match=message):
        opt.ascend() if way == "ascend" else opt.perturbed().__enter__()
    assert same(weights(model), before)
    opt.step(lambda: model(rows()[0]).sum())


# ----- averages and displaced weights ---------------------------------------------------------------------------------


def test_an_average_is_not_fed_with_displaced_weights() -> None:
    model = net()
    opt, swa = SAM(sgd(model), 0.3), SWA(model)
    model(rows()[0]).sum().backward()
    opt.ascend()
    with pytest.raises(RuntimeError, match=r"update\(\).*displaced.*descend\(\)"):
        swa.update()
    opt.descend()
    swa.update()
    model(rows()[0]).sum().backward()
    with opt.perturbed(), pytest.raises(RuntimeError, match="displaced"):
        swa.update()
    swa.update()
    assert swa.n == 2
    assert not any(vars(p) for p in model.parameters())


def test_an_average_in_the_model_is_neither_trained_nor_averaged() -> None:
    model = net()
    opt, swa, ema = SAM(sgd(model), 0.3), SWA(model), EMA(model, 10.0)

    def loss() -> Tensor:
        return model(rows()[0]).sum()

    swa.update()
    ema.update()
    opt.step(loss)
    loss().backward()
    before = weights(model)
    with swa.swapped():
        for use in (ema.update, opt.ascend, lambda: opt.step(loss), lambda: ema.copy_to(model)):
            with pytest.raises(RuntimeError, match=r"swapped\(\)"):
                use()
        with ema.swapped():
            pass
        with pytest.raises(RuntimeError, match=r"swapped\(\)"):
            ema.update()
        ema.copy_to(net())
    assert same(weights(model), before)
    assert ema.n == 1
    opt.ascend()
    with swa.swapped(), pytest.raises(RuntimeError, match=r"swapped\(\)"):
        opt.descend()
    opt.descend()
    ema.update()
    assert not any(vars(p) for p in model.parameters())
