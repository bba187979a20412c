"""Each variant against its formula, written plainly in float64, over 25 steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatminima import SAM
from flatminima.optim import BSAM
from flatminima.optim.combine import SurrogateGap
from flatminima.optim.directions import Adaptive
from flatminima.optim.schedules import Every

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS, LR, RHO = 25, 0.2, 0.3
Vectors = list[Tensor]
Gradient = Callable[[Vectors], Vectors]


def net(norm_layer: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    middle = [nn.LayerNorm(5)] if norm_layer else []
    return nn.Sequential(nn.Linear(3, 5), *middle, nn.Tanh(), nn.Linear(5, 2)).double()


def rows(seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 3, dtype=torch.float64, generator=generator), torch.arange(8) % 2


def batches(count: int = 4) -> list[tuple[Tensor, Tensor]]:
    return [rows(seed) for seed in range(count)]


def loss_at(model: nn.Module, weights: Vectors, batch: tuple[Tensor, Tensor]) -> Tensor:
    named = dict(zip((n for n, _ in model.named_parameters()), weights, strict=True))
    return F.cross_entropy(torch.func.functional_call(model, named, (batch[0],)), batch[1])


def gradient_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Gradient:
    def at(weights: Vectors) -> Vectors:
        leaves = [w.detach().clone().requires_grad_() for w in weights]
        return list(torch.autograd.grad(loss_at(model, leaves, batch), leaves))

    return at


def start(model: nn.Module) -> Vectors:
    return [p.detach().clone() for p in model.parameters()]


def plus(a: Vectors, b: Vectors, s: float = 1.0) -> Vectors:
    return [x + s * y for x, y in zip(a, b, strict=True)]


def inner(a: Vectors, b: Vectors) -> float:
    return float(sum((x * y).sum() for x, y in zip(a, b, strict=True)))


def length(a: Vectors) -> float:
    return math.sqrt(inner(a, a))


def scaled(a: Vectors, s: float) -> Vectors:
    return [x * s for x in a]


def trained(opt: Any, model: nn.Module, *, steps: int = STEPS) -> tuple[Vectors, list[float], int]:
    """Weights, losses, and how often the closure was called."""
    calls, losses = [], []
    for step in range(steps):
        x, y = batches()[step % 4]

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            calls.append(0)
            return F.cross_entropy(model(x), y)

        losses.append(float(opt.step(closure)))
    return start(model), losses, len(calls)


def agree(a: Vectors, b: Vectors) -> None:
    for x, y in zip(a, b, strict=True):
        assert torch.allclose(x, y, rtol=1e-12, atol=1e-12), float((x - y).abs().max())


def moved_far(a: Vectors, b: Vectors) -> None:
    """The references must differ from plain descent, or they prove nothing."""
    assert length(plus(a, b, -1.0)) > 1e-3


def descent(model: nn.Module) -> Vectors:
    w = start(model)
    for step in range(STEPS):
        w = plus(w, gradient_of(model, batches()[step % 4])(w), -LR)
    return w


def sgd(model: nn.Module, **keywords: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=LR, **keywords)


def simple(direction: Callable[[Vectors, Vectors], Vectors], model: nn.Module) -> Vectors:
    w = start(model)
    for step in range(STEPS):
        gradient = gradient_of(model, batches()[step % 4])
        w = plus(w, gradient(plus(w, direction(w, gradient(w)))), -LR)
    return w


# ----- directions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", ["identity", "adaptive"])
def test_asam_is_the_authors_formula(bias: str) -> None:
    def direction(w: Vectors, g: Vectors) -> Vectors:
        t = [x.abs() + 0.01 if x.dim() >= 2 or bias == "adaptive" else torch.ones_like(x) for x in w]
        tg = [a * b for a, b in zip(t, g, strict=True)]
        return [RHO * a * b / length(tg) for a, b in zip(t, tg, strict=True)]

    model = net()
    expected, plain = simple(direction, model), descent(model)
    found, _, calls = trained(SAM(sgd(model), RHO, variant="asam", bias=bias), model)
    agree(found, expected)
    moved_far(found, plain)
    assert calls == 2 * STEPS


def test_asam_moves_tensors_that_start_at_zero() -> None:
    w, b = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2))
    opt = SAM(torch.optim.SGD([w, b], lr=0.0), rho=0.5, variant="asam")
    w.grad, b.grad = torch.ones(2, 2), torch.ones(2)
    with opt.perturbed():
        assert float(w.detach().abs().min()) > 0
        assert float(b.detach().abs().min()) > 0


def test_friendly_sam() -> None:
    model = net()
    w, m, plain = start(model), None, descent(model)
    for step in range(STEPS):
        gradient = gradient_of(model, batches()[step % 4])
        g = gradient(w)
        d = g if m is None else plus(g, m, -0.8)
        m = g if m is None else plus(scaled(m, 0.7), g, 0.3)
        w = plus(w, gradient(plus(w, d, RHO / length(d))), -LR)
    found, _, calls = trained(SAM(sgd(model), RHO, variant="friendly-sam", sigma=0.8, decay=0.7), model)
    agree(found, w)
    moved_far(found, plain)
    assert calls == 2 * STEPS


def test_msam_looks_along_the_coming_update_and_costs_one_gradient() -> None:
    model = net()
    w, v, plain = start(model), None, descent(model)
    losses = []
    for step in range(STEPS):
        batch = batches()[step % 4]
        away = w if v is None else plus(w, v, -RHO / length(v))
        losses.append(float(loss_at(model, away, batch)))
        g = gradient_of(model, batch)(away)
        v = g if v is None else plus(scaled(v, 0.9), g)
        w = plus(w, v, -LR)
    found, seen, calls = trained(SAM(sgd(model, momentum=0.9), RHO, variant="msam"), model)
    agree(found, w)
    moved_far(found, plain)
    assert seen == pytest.approx(losses, rel=1e-12)
    assert calls == STEPS


def test_msam_follows_the_first_moment_of_adam() -> None:
    model = net()
    x, y = rows()
    opt = SAM(torch.optim.AdamW(model.parameters(), lr=0.01), RHO, variant="msam")
    opt.step(lambda: F.cross_entropy(model(x), y))
    moment = [opt.state[p]["exp_avg"].clone() for p in model.parameters()]
    before, seen = start(model), []
    opt.step(lambda: (seen.append(start(model)), F.cross_entropy(model(x), y))[1])
    agree(seen[0], plus(before, moment, -RHO / length(moment)))


def test_sam_on_moves_normalisation_layers_alone() -> None:
    model = net(norm_layer=True)
    where = [i for i, (n, _) in enumerate(model.named_parameters()) if n.startswith("1.")]

    def direction(w: Vectors, g: Vectors) -> Vectors:
        size = length([g[i] for i in where])
        return [RHO * x / size if i in where else torch.zeros_like(x) for i, x in enumerate(g)]

    expected, plain = simple(direction, model), descent(model)
    opt = SAM(sgd(model), RHO, variant="sam-on", model=model)
    found, _, calls = trained(opt, model)
    agree(found, expected)
    moved_far(found, plain)
    assert calls == 2 * STEPS
    assert sum(c.numel() for c in opt._engine.perturbation._clean) == 10  # and no copy of the rest is made


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("noise", ["sphere", "gaussian", "uniform"])
def test_random_perturbations(noise: str, draws: int) -> None:
    model = net()
    w, plain = start(model), descent(model)
    for step in range(STEPS):
        gradient, total = gradient_of(model, batches()[step % 4]), None
        for draw in range(draws):
            generator = torch.Generator().manual_seed((7 * 1_000_003 + step) * 1_009 + draw)
            draw_one = torch.rand if noise == "uniform" else torch.randn
            z = [draw_one(x.shape, dtype=torch.float64, generator=generator) for x in w]
            e = [0.1 * (2 * x - 1) for x in z] if noise == "uniform" else scaled(z, 0.1)
            e = scaled(z, 0.1 / length(z)) if noise == "sphere" else e
            g = gradient(plus(w, e))
            total = g if total is None else plus(total, g)
        w = plus(w, total, -LR / draws)
    opt = SAM(sgd(model), 0.1, variant="random", noise=noise, draws=draws, seed=7)
    found, _, calls = trained(opt, model)
    agree(found, w)
    moved_far(found, plain)
    assert calls == draws * STEPS


def test_weight_decay_in_the_ascent_steers_the_perturbation() -> None:
    model = net()

    def reference(in_ascent: bool) -> Vectors:
        w = start(model)
        for step in range(STEPS):
            gradient = gradient_of(model, batches()[step % 4])
            g = plus(gradient(w), w, 0.3 if in_ascent else 0.0)
            w = plus(w, plus(gradient(plus(w, g, RHO / length(g))), w, 0.3), -LR)
        return w

    expected, other = reference(True), reference(False)
    found, _, _ = trained(SAM(sgd(model, weight_decay=0.3), RHO, decay_in_ascent=True), model)
    agree(found, expected)
    moved_far(found, other)


# ----- combinations ---------------------------------------------------------------------------------------------------


def test_gsam_takes_out_the_orthogonal_part_of_the_clean_gradient() -> None:
    model = net()
    w, plain = start(model), descent(model)
    for step in range(STEPS):
        gradient = gradient_of(model, batches()[step % 4])
        g = gradient(w)
        there = gradient(plus(w, g, RHO / length(g)))
        orthogonal = plus(g, there, -inner(g, there) / inner(there, there))
        assert abs(inner(orthogonal, there)) < 1e-12
        w = plus(w, plus(there, orthogonal, -0.4), -LR)
    found, _, calls = trained(SAM(sgd(model), RHO, variant="gsam", alpha=0.4), model)
    agree(found, w)
    moved_far(found, plain)
    assert calls == 2 * STEPS


@pytest.mark.parametrize("decouple", [True, False])
def test_wsam_weighs_the_sharpness(decouple: bool) -> None:
    model = net()
    w, v, plain, a = start(model), None, descent(model), 0.6 / 0.4
    for step in range(STEPS):
        gradient = gradient_of(model, batches()[step % 4])
        g = gradient(w)
        there = gradient(plus(w, g, RHO / length(g)))
        along = g if decouple else plus(scaled(g, 1 - a), there, a)
        v = along if v is None else plus(scaled(v, 0.5), along)
        w = plus(w, v, -LR)
        if decouple:
            w = plus(w, plus(there, g, -1.0), -LR * a)
    opt = SAM(sgd(model, momentum=0.5), RHO, variant="wsam", gamma=0.6, decouple=decouple)
    found, _, calls = trained(opt, model)
    agree(found, w)
    moved_far(found, plain)
    assert calls == 2 * STEPS


def test_wsam_at_one_half_is_sam_and_at_zero_the_base() -> None:
    model, twin = net(), net()
    found, _, _ = trained(SAM(sgd(model), RHO, variant="wsam", gamma=0.5, decouple=False), model)
    expected, _, _ = trained(SAM(sgd(twin), RHO), twin)
    agree(found, expected)
    model, base = net(), descent(net())
    found, _, _ = trained(SAM(sgd(model), RHO, variant="wsam", gamma=0.0), model)
    agree(found, base)


@pytest.mark.parametrize("k", [1, 4])
def test_looksam_uses_its_direction_again_without_a_second_evaluation(k: int) -> None:
    model = net()
    w, u, plain = start(model), None, descent(model)
    for step in range(STEPS):
        gradient = gradient_of(model, batches()[step % 4])
        g = gradient(w)
        if step % k == 0:
            there = gradient(plus(w, g, RHO / length(g)))
            u = plus(there, g, -inner(there, g) / inner(g, g))
            u = scaled(u, 1 / length(u))
            w = plus(w, there, -LR)
        else:
            w = plus(w, plus(g, u, 0.7 * length(g)), -LR)
    found, _, calls = trained(SAM(sgd(model), RHO, variant="looksam", k=k, alpha=0.7), model)
    agree(found, w)
    moved_far(found, plain)
    assert calls == STEPS + math.ceil(STEPS / k)


# ----- schedules ------------------------------------------------------------------------------------------------------


def scheduled(model: nn.Module, fires: Callable[[int, float], bool]) -> tuple[Vectors, int]:
    w, calls = start(model), 0
    for step in range(STEPS):
        gradient = gradient_of(model, batches()[step % 4])
        g = gradient(w)
        now = fires(step, inner(g, g))
        w = plus(w, gradient(plus(w, g, RHO / length(g))) if now else g, -LR)
        calls += 1 + now
    return w, calls


def test_sam_every_third_step() -> None:
    model = net()
    expected, cost = scheduled(model, lambda step, _: step % 3 == 0)
    found, _, calls = trained(SAM(sgd(model), RHO, variant="every-k", k=3), model)
    agree(found, expected)
    assert calls == cost == STEPS + 9


def test_sam_with_probability() -> None:
    model = net()
    draws = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(5 * 1_000_003 + step)
        draws.append(float(torch.rand((), dtype=torch.float64, generator=generator)) < 0.4)
    expected, cost = scheduled(model, lambda step, _: draws[step])
    found, _, calls = trained(SAM(sgd(model), RHO, variant="probability", p=0.4, seed=5), model)
    agree(found, expected)
    assert calls == cost
    assert STEPS < cost < 2 * STEPS


@pytest.mark.parametrize("threshold", [0.0, (1.0, -1.0)])
def test_ae_sam_fires_where_the_gradient_is_large(threshold: Any) -> None:
    model = net()
    mean, variance, first, last = 0.0, math.exp(-10), *(threshold if isinstance(threshold, tuple) else (0.0, 0.0))

    def fires(step: int, square: float) -> bool:
        nonlocal mean, variance
        mean = 0.8 * mean + 0.2 * square
        variance = 0.8 * variance + 0.2 * (square - mean) ** 2
        return square >= mean + (first + step / STEPS * (last - first)) * math.sqrt(variance)

    expected, cost = scheduled(model, fires)
    opt = SAM(sgd(model), RHO, variant="ae-sam", threshold=threshold, total_steps=STEPS, decay=0.8)
    found, _, calls = trained(opt, model)
    agree(found, expected)
    assert calls == cost
    assert STEPS < cost < 2 * STEPS


# ----- micro-batches --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["sam", "m-sam"])
def test_micro_batches_are_perturbed_together_or_each_by_its_own_gradient(variant: str) -> None:
    model = net()
    w, shares, plain = start(model), [0.25, 0.75], descent(model)
    for step in range(STEPS):
        gradients = [gradient_of(model, batches()[(step + i) % 4]) for i in range(2)]
        g = [gradient(w) for gradient in gradients]
        if variant == "sam":
            mean = plus(scaled(g[0], shares[0]), g[1], shares[1])
            g = [mean, mean]
        there = [gradients[i](plus(w, g[i], RHO / length(g[i]))) for i in range(2)]
        w = plus(w, plus(scaled(there[0], shares[0]), there[1], shares[1]), -LR)
    opt = SAM(sgd(model), RHO, variant=variant)
    for step in range(STEPS):
        pair = [batches()[(step + i) % 4] for i in range(2)]
        opt.step([lambda b=b: F.cross_entropy(model(b[0]), b[1]) for b in pair], weights=shares)
    agree(start(model), w)
    moved_far(w, plain)


def test_accumulated_micro_batches_are_the_whole_batch() -> None:
    model, twin = net(), net()
    x, y = rows()
    opt, whole = SAM(sgd(model), RHO), SAM(sgd(twin), RHO)
    for _ in range(STEPS):
        opt.step([lambda i=i: F.cross_entropy(model(x[i : i + 2]), y[i : i + 2]) for i in range(0, 8, 2)])
        whole.step(lambda: F.cross_entropy(twin(x), y))
    agree(start(model), start(twin))


# ----- projected ascent -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 4])
def test_sa_gd_steps_from_the_largest_loss_that_projected_ascent_finds(steps: int) -> None:
    model = net()
    w, plain, maxima = start(model), descent(model), []
    for step in range(STEPS):
        batch = batches()[step % 4]
        gradient, v, best = gradient_of(model, batch), [torch.zeros_like(x) for x in w], (-math.inf, [])
        for _ in range(steps + 1):
            value, g = float(loss_at(model, plus(w, v), batch)), gradient(plus(w, v))
            best = max(best, (value, g), key=lambda pair: pair[0])
            v = plus(v, g, RHO / length(g))
            v = scaled(v, min(1.0, RHO / length(v)))
        w = plus(w, best[1], -LR)
        maxima.append(best[0])
    opt, seen = SAM(sgd(model), RHO, variant="sa-gd", steps=steps), []
    for step in range(STEPS):
        x, y = batches()[step % 4]
        opt.step(lambda x=x, y=y: F.cross_entropy(model(x), y))
        seen.append(opt.maximum)
    agree(start(model), w)
    moved_far(w, plain)
    assert seen == pytest.approx(maxima, rel=1e-12)


def test_sa_gd_finds_the_maximum_of_a_convex_quadratic_over_the_ball() -> None:
    w = nn.Parameter(torch.tensor([0.3, 0.1], dtype=torch.float64))
    h = torch.tensor([1.0, 4.0], dtype=torch.float64)
    angles = torch.linspace(0, 2 * math.pi, 200_001, dtype=torch.float64)
    ring = torch.tensor([0.3, 0.1], dtype=torch.float64) + 0.5 * torch.stack([angles.cos(), angles.sin()], 1)
    opt = SAM(torch.optim.SGD([w], lr=0.0), 0.5, variant="sa-gd", steps=60)
    opt.step(lambda: (h * w**2).sum() / 2)
    assert opt.maximum == pytest.approx(float((h * ring**2).sum(1).max() / 2), rel=1e-8)
    assert w.tolist() == [0.3, 0.1]


def test_sa_gd_with_groups_stays_in_the_ellipsoid() -> None:
    a, b = (nn.Parameter(torch.full((2,), 0.1, dtype=torch.float64)) for _ in range(2))
    opt = SAM(torch.optim.SGD([{"params": [a], "rho": 0.5}, {"params": [b], "rho": 0.0}], lr=0.0), variant="sa-gd")
    seen = []
    opt.step(lambda: (seen.append((a.detach().clone(), b.detach().clone())), (a**2).sum() + (b**2).sum())[1])
    assert all(float((x - 0.1).norm()) <= 0.5 + 1e-12 and torch.equal(y, b) for x, y in seen)
    assert float((seen[-1][0] - 0.1).norm()) == pytest.approx(0.5)


# ----- bSAM -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2])
def test_bsam_is_the_authors_update(count: int) -> None:
    model = net()
    w, n, wd = start(model), 50, 0.02
    m, s = [torch.zeros_like(x) for x in w], [torch.full_like(x, 0.7) for x in w]
    plain = descent(model)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(3 * 1_000_003 + step)
        slope, curve = [torch.zeros_like(x) for x in w], [torch.zeros_like(x) for x in w]
        for i in range(count):
            gradient = gradient_of(model, batches()[(step + i) % 4])
            e = [torch.randn(x.shape, dtype=torch.float64, generator=generator) for x in w]
            g = gradient([x + z / torch.sqrt(n * p) for x, z, p in zip(w, e, s, strict=True)])
            there = gradient([x + 0.3 * y / p for x, y, p in zip(w, g, s, strict=True)])
            slope = plus(slope, there, 1 / count)
            curve = plus(curve, [torch.sqrt(p) * y.abs() for p, y in zip(s, g, strict=True)], 1 / count)
        m = [0.8 * a + 0.2 * (b + wd * x) for a, b, x in zip(m, slope, w, strict=True)]
        w = [x - 0.05 * a / p for x, a, p in zip(w, m, s, strict=True)]
        s = [0.95 * p + 0.05 * (c + 0.1 + wd) for p, c in zip(s, curve, strict=True)]
    opt = BSAM(model.parameters(), n, 0.05, (0.8, 0.95), wd, 0.3, 0.1, 0.7, seed=3)
    for step in range(STEPS):
        pair = [batches()[(step + i) % 4] for i in range(count)]
        opt.step([lambda b=b: F.cross_entropy(model(b[0]), b[1]) for b in pair])
    agree(start(model), w)
    agree([opt.state[p]["precision"] for p in model.parameters()], s)
    moved_far(w, plain)


def test_bsam_restores_skips_and_refuses() -> None:
    model = net()
    x, y = rows()
    opt = BSAM(model.parameters(), rows=100, lr=0.0)
    before = start(model)
    for _ in range(20):
        opt.step(lambda: F.cross_entropy(model(x), y))
    assert all(torch.equal(a, b) for a, b in zip(before, start(model), strict=True))
    calls: list[int] = []
    for bad in (1, 2):
        calls.clear()
        live = BSAM(model.parameters(), rows=100, lr=0.1)
        live.step(
            lambda bad=bad: (calls.append(0), F.cross_entropy(model(x), y) * (math.nan if len(calls) == bad else 1))[1]
        )
        assert live.skipped == 1
        assert all(torch.equal(a, b) for a, b in zip(before, start(model), strict=True))
    for wrong in (
        {"rows": 0},
        {"rows": 10, "rho": -1.0},
        {"rows": 10, "betas": (1.0, 0.9)},
        {"rows": 10, "initial_precision": 0.0},
    ):
        with pytest.raises(ValueError, match="got"):
            BSAM(model.parameters(), **wrong)


# ----- compositions and refusals --------------------------------------------------------------------------------------


def test_policies_compose() -> None:
    model = net()
    w = start(model)
    for step in range(STEPS):
        gradient = gradient_of(model, batches()[step % 4])
        g = gradient(w)
        if step % 2 == 0:
            t = [x.abs() + 0.1 for x in w]
            tg = [a * b for a, b in zip(t, g, strict=True)]
            there = gradient([x + RHO * a * b / length(tg) for x, a, b in zip(w, t, tg, strict=True)])
            g = plus(there, plus(g, there, -inner(g, there) / inner(there, there)), -0.2)
        w = plus(w, g, -LR)
    opt = SAM(sgd(model), RHO, direction=Adaptive(0.1, "adaptive"), when=Every(2), combine=SurrogateGap(0.2))
    found, _, _ = trained(opt, model)
    agree(found, w)


def test_sam_on_needs_normalisation_layers_that_the_optimiser_has() -> None:
    plain, normed = net(), net(norm_layer=True)
    for base, model in ((sgd(plain), plain), (sgd(plain), normed)):
        with pytest.raises(ValueError, match=r"in the given Sequential the optimiser has no parameter"):
            SAM(base, variant="sam-on", model=model)
        assert "rho" not in base.param_groups[0]


def test_an_unknown_variant_is_answered_with_the_nearest() -> None:
    base = sgd(net())
    with pytest.raises(ValueError, match=r"unknown variant 'gsma': expected one of gsam"):
        SAM(base, variant="gsma")
    with pytest.raises(TypeError, match=r"unknown option of looksam 'alhpa': expected one of alpha, k"):
        SAM(base, variant="looksam", alhpa=1.0)
    with pytest.raises(TypeError, match="has no options"):
        SAM(base, momentum=0.9)
    with pytest.raises(ValueError, match="BSAM"):
        SAM(base, variant="bsam")
    assert "rho" not in base.defaults
    assert "rho" not in base.param_groups[0]
    assert SAM(base, variant="AE_SAM").variant == "AE_SAM"


@pytest.mark.parametrize(
    ("variant", "options", "message"),
    [
        ("asam", {"eta": -1.0}, "eta"),
        ("asam", {"bias": "none"}, "unknown bias policy 'none'"),
        ("friendly-sam", {"decay": 1.0}, "decay"),
        ("wsam", {"gamma": 1.0}, "gamma"),
        ("looksam", {"k": 0}, "k counts steps"),
        ("every-k", {"k": 2.5}, "k counts steps"),
        ("probability", {"p": 1.5}, "p is a probability"),
        ("ae-sam", {"threshold": (1.0, -1.0)}, "give total_steps"),
        ("random", {"noise": "cauchy"}, "unknown kind of noise"),
        ("random", {"draws": 0}, "draws counts"),
        ("sa-gd", {"steps": 0}, "steps counts"),
        ("sam-on", {}, "give model="),
        ("msam", {}, "msam follows the momentum of the base optimiser and SGD has none"),
        ("msam", {"combine": SurrogateGap()}, "looks without a gradient"),
        ("m-sam", {"combine": SurrogateGap()}, "needs the one gradient"),
    ],
)
def test_a_value_out_of_range_is_refused_before_anything_changes(variant: str, options: Any, message: str) -> None:
    base = sgd(net())
    with pytest.raises(ValueError, match=message):
        SAM(base, variant=variant, **options)
    assert "rho" not in base.param_groups[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 10, 1000, 100_000])
def test_looksam_does_not_keep_a_direction_of_rounding_noise(size: int, dtype: torch.dtype) -> None:
    """On half the squared length all gradients are parallel, and the step between two looks is the base's."""
    for seed in range(10):
        torch.manual_seed(seed)
        w = nn.Parameter(torch.randn(size).to(dtype))
        opt = SAM(torch.optim.SGD([w], lr=0.1), rho=0.05, variant="looksam")
        opt.step(lambda w=w: 0.5 * (w**2).sum())
        before = w.detach().clone()
        opt.step(lambda w=w: 0.5 * (w**2).sum())
        assert torch.equal(w.detach(), before.add(before, alpha=-0.1))


def test_looksam_forgets_a_direction_that_is_gone() -> None:
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    opt = SAM(torch.optim.SGD([w], lr=0.1), rho=0.05, variant="looksam", k=2)
    opt.step(lambda: w[0] ** 2 + 3 * w[1] ** 2)
    assert len(opt._engine._memory["across"]) == 1
    opt.step(lambda: (w**2).sum())
    opt.step(lambda: (w**2).sum())
    assert not opt._engine._memory


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "sa-gd", "when": Every(2)}, r"projected ascent follows the gradient, at every step.*Every"),
        ({"variant": "sa-gd", "direction": Adaptive()}, "projected ascent follows the gradient.*Adaptive"),
        ({"variant": "sa-gd", "decay_in_ascent": True}, "projected ascent does not use it: leave it out"),
        ({"variant": "msam", "decay_in_ascent": True}, "Momentum does not use it: leave it out"),
        ({"variant": "random", "decay_in_ascent": True}, "Noise does not use it: leave it out"),
    ],
)
def test_parts_that_would_be_ignored_are_refused(options: Any, message: str) -> None:
    base = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match=message):
        SAM(base, **options)
    assert "rho" not in base.defaults


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"when": Every}, r"when must be a policy such as Every\(2\), got <class"),
        ({"direction": "asam"}, r"direction must be a policy such as Adaptive\(\), got 'asam'; .* give variant="),
        ({"direction": Adaptive}, "direction must be a policy"),
        ({"combine": SurrogateGap}, "combine must be a policy"),
        ({"combine": Every(2)}, "combine must be a policy"),
    ],
)
def test_what_is_no_policy_is_refused(part: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        SAM(torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1), **part)


@pytest.mark.parametrize(("steps", "bad", "name"), [(5, 1, "1st"), (5, 2, "2nd"), (5, 3, "3rd"), (12, 11, "11th")])
def test_sa_gd_names_the_pass_that_was_not_finite(steps: int, bad: int, name: str) -> None:
    w, calls = nn.Parameter(torch.tensor([1.0, 2.0])), []
    opt = SAM(torch.optim.SGD([w], lr=0.1), variant="sa-gd", steps=steps)
    opt.step(lambda: (calls.append(0), (w**2).sum() * (math.nan if len(calls) == bad else 1.0))[1])
    assert opt.skip_reason is not None
    assert opt.skip_reason.startswith(f"{name} pass of step 0: the gradient of")
