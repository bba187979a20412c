"""The variants of sharpness: boxes, averages, micro-batches, normalised logits and other units of the weights."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatminima import Measurement, MeasureOptions, Objective, measure
from flatminima.curvature.probes import random_stream
from flatminima.measures import NotApplicableError, scales
from flatminima.measures.logit_normalised import logit_normalised
from flatminima.measures.sharpness import Ball, one_step_rise
from quadratic_fixture import highest_in_ball, quadratic, with_spectrum

pytestmark = pytest.mark.usefixtures("one_thread")
SPECTRUM = torch.tensor([6.0, 3.0, 1.0, 0.5, 0.0, 0.0]).double()
HESSIAN = with_spectrum(SPECTRUM)
N = len(SPECTRUM)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def one(f: Objective, name: str, seed: int = 0, **options: float) -> Measurement:
    return measure(f, [name], options=replace(MeasureOptions(), **options), seed=seed)[name]


# ----- boxes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_linf_sharpness_against_every_corner_of_the_box(seed: int) -> None:
    """A convex quadratic is largest at a corner; the ascent finds one, and never claims more than the best of them."""
    w, rho = randn(N, seed=seed), 0.3
    corners = rho * torch.tensor(list(itertools.product([-1.0, 1.0], repeat=N))).double()
    slope = HESSIAN @ w
    exact = float((corners @ slope + ((corners @ HESSIAN) * corners).sum(1) / 2).max())
    found = one(quadratic(HESSIAN, w), "linf_sharpness", linf_rho=rho, seed=seed)
    assert 0.9 * exact <= found.value <= exact * (1 + 1e-12)
    assert found.error_kind.startswith("lower bound")


def test_linf_sharpness_of_separate_weights_is_exact() -> None:
    f = quadratic(torch.diag(SPECTRUM))
    assert one(f, "linf_sharpness", linf_rho=0.2).value == pytest.approx(0.2**2 * float(SPECTRUM.sum()) / 2)
    w = randn(N)
    relative = 0.2**2 * float((w**2 * SPECTRUM).sum()) / 2
    found = one(quadratic(torch.diag(SPECTRUM), w, -SPECTRUM * w), "adaptive_linf_sharpness", adaptive_linf_rho=0.2)
    assert found.value == pytest.approx(relative)


@pytest.mark.parametrize(
    ("name", "units"), [("linf_average_sharpness", torch.ones(N)), ("adaptive_average_sharpness", randn(N).abs())]
)
def test_averages_are_traces_to_second_order(name: str, units: Tensor) -> None:
    w = randn(N)
    options = {"radius": 0.7, "adaptive_rho": 0.7}
    exact = 0.7**2 * float((units.double() ** 2 * HESSIAN.diagonal()).sum()) / (2 * N)
    inside = 0
    for seed in range(60):
        found = one(quadratic(HESSIAN, w), name, seed=seed, **options)
        assert found.error_kind == "standard error"
        inside += abs(found.value - exact) <= 2.131 * float(found.error or 0)
    assert 50 <= inside <= 60
    assert one(quadratic(HESSIAN, w), name, draws=4000, **options).value == pytest.approx(exact, rel=0.04)


# ----- units of the weights -------------------------------------------------------------------------------------------


class Tensors(nn.Module):
    """A matrix, a convolution kernel and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.conv = nn.Conv1d(1, 2, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.conv(x[:, None, :2])[:, :, 0]


def test_the_units_are_those_of_their_formulas() -> None:
    model = Tensors().double()
    f = Objective(model, F.mse_loss, (randn(5, 3), randn(5, 2)))
    w, b, k = model.linear.weight.detach(), model.linear.bias.detach(), model.conv.weight.detach()
    parts = {
        "elementwise": (w.abs(), b.abs(), k.abs()),
        "filterwise": (
            w.norm(dim=1, keepdim=True).expand_as(w),
            b.abs(),
            k.pow(2).sum((1, 2)).sqrt()[:, None, None].expand_as(k),
        ),
        "asam": (w.abs() + 0.01, torch.ones_like(b), k.abs() + 0.01),
        "plain": (torch.ones_like(w), torch.ones_like(b), torch.ones_like(k)),
    }
    for name, expected in parts.items():
        found = getattr(scales, name)(f)
        assert found.dtype == torch.float64
        assert torch.allclose(found, torch.cat([part.reshape(-1) for part in expected])), name


@pytest.mark.parametrize(
    ("name", "units"), [("filter_adaptive_sharpness", scales.filterwise), ("asam_sharpness", scales.asam)]
)
def test_adaptive_variants_find_the_maximum_over_their_ellipsoid(name: str, units: object) -> None:
    """Least squares: the loss is quadratic, and the ellipsoid a ball in other coordinates."""
    x, y = randn(20, 3), randn(20, 2, seed=1)
    f = Objective(nn.Linear(3, 2).double(), F.mse_loss, (x, y))
    assert callable(units)
    t = units(f)
    hessian = f.hvp(torch.eye(f.n, dtype=torch.float64))
    exact = highest_in_ball(t[:, None] * hessian * t, t * f.gradient(), 0.5)
    assert 0.98 * exact <= one(f, name, adaptive_rho=0.5).value <= exact * (1 + 1e-10)


def test_a_single_start_is_the_gradient_alone() -> None:
    f = quadratic(HESSIAN, randn(N))
    found = one(f, "sam_sharpness", ascent_starts=1, ascent_steps=1)
    assert found.value == pytest.approx(one_step_rise(f, Ball(scales.plain(f), 0.05)), rel=1e-14)
    assert found.error is None
    assert one_step_rise(quadratic(HESSIAN), Ball(scales.plain(f), 0.05)) == 0.0  # no gradient: no step


# ----- micro-batches --------------------------------------------------------------------------------------------------


def regression(rows: int = 50) -> tuple[Objective, Tensor, Tensor]:
    x, y = randn(rows, 3), randn(rows, 1, seed=1)
    model = nn.Linear(3, 1, bias=False).double()
    return Objective(model, F.mse_loss, (x, y)), x, y


def exact_sharpness(f: Objective, x: Tensor, y: Tensor, rho: float) -> float:
    w = f.point()
    hessian, slope = 2 * x.T @ x / len(x), 2 * x.T @ (x @ w - y[:, 0]) / len(x)
    return highest_in_ball(hessian, slope, rho)


def test_m_sharpness_is_the_mean_over_micro_batches_by_rows() -> None:

    f, x, y = regression()
    found = one(f, "m_sharpness", micro_batch=8, rho=0.3)  # six of 8 rows and a rest of 2
    order = torch.randperm(50, generator=random_stream(0, "m-sharpness"))
    parts = [exact_sharpness(f, x[i], y[i], 0.3) * len(i) / 50 for i in order.split(8)]
    assert 0.98 * sum(parts) <= found.value <= sum(parts) * (1 + 1e-10)
    assert "7 micro-batches" in found.note
    assert found.value > one(f, "sam_sharpness", rho=0.3).value  # one perturbation for all can only do less
    whole = one(f, "m_sharpness", micro_batch=50, rho=0.3)
    assert whole.value == pytest.approx(one(f, "sam_sharpness", rho=0.3).value, rel=1e-9)
    assert whole.cost == pytest.approx(one(f, "sam_sharpness", rho=0.3).cost)


def test_a_draw_of_micro_batches_has_a_standard_error() -> None:
    f, _, _ = regression(400)
    everything = one(f, "m_sharpness", micro_batch=4, max_micro_batches=100, rho=0.3)
    inside = 0
    for seed in range(40):
        found = one(f, "m_sharpness", micro_batch=4, max_micro_batches=20, rho=0.3, seed=seed)
        assert "standard error" in found.error_kind
        inside += abs(found.value - everything.value) <= 2.09 * float(found.error or 0)
    assert inside >= 34  # the partition differs from seed to seed too, by less
    assert found.cost < everything.cost / 4


def test_micro_batches_of_half_precision_and_of_masked_targets() -> None:
    net, x, y = classifier()
    half = Objective(net.to(torch.bfloat16), F.cross_entropy, (x.to(torch.bfloat16), y))
    assert one(half, "m_sharpness", micro_batch=7).value > 0
    net, x, y = classifier()
    y[:20] = -100
    masked = one(Objective(net, F.cross_entropy, (x, y)), "m_sharpness", micro_batch=30)
    assert masked.value == pytest.approx(
        one(Objective(net, F.cross_entropy, (x[20:], y[20:])), "sam_sharpness").value, rel=1e-9
    )


def test_micro_batches_leave_model_and_data_alone() -> None:
    f, x, _ = regression()
    before = (x.clone(), f.point())
    one(f, "m_sharpness", micro_batch=8)
    assert torch.equal(before[0], x)
    assert torch.equal(before[1], f.point())


# ----- normalised logits ----------------------------------------------------------------------------------------------


def classifier() -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    return net, randn(30, 4), torch.arange(30) % 3


def test_normalised_logits_are_those_of_the_formula() -> None:
    net, x, y = classifier()
    f = Objective(net, F.cross_entropy, (x, y))
    z = net(x)
    spread = ((z - z.mean(1, keepdim=True)) ** 2).mean(1, keepdim=True).sqrt()
    assert logit_normalised(f).loss() == pytest.approx(float(F.cross_entropy(z / spread, y).detach()), rel=1e-12)

    def plainly(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output / output.std(1, correction=0, keepdim=True), target)

    by_hand = Objective(net, plainly, (x, y))
    pairs = [
        ("logit_normalised_sharpness", "sam_sharpness"),
        ("logit_normalised_average_sharpness", "average_sharpness"),
        ("logit_normalised_adaptive_sharpness", "adaptive_sharpness"),
    ]
    for normalised, ordinary in pairs:
        assert one(f, normalised).value == pytest.approx(one(by_hand, ordinary).value, rel=1e-9)


def test_the_temperature_does_not_touch_the_normalised_adaptive_sharpness() -> None:
    net, x, y = classifier()
    before = measure(
        Objective(net, F.cross_entropy, (x, y)), ["logit_normalised_adaptive_sharpness", "adaptive_sharpness"]
    )
    with torch.no_grad():
        net[2].weight *= 7
        net[2].bias *= 7
    after = measure(Objective(net, F.cross_entropy, (x, y)), list(before))
    other, same = before
    assert after[same].value == pytest.approx(before[same].value, rel=1e-9)
    assert abs(after[other].value / before[other].value - 1) > 0.1


def test_what_has_no_logits_is_refused_with_the_reason() -> None:
    x = randn(6, 4)
    single = Objective(nn.Linear(4, 1).double(), F.mse_loss, (x, randn(6, 1)))
    found = one(single, "logit_normalised_sharpness")
    assert not found.applies
    assert math.isnan(found.value)
    assert "there is one class" in found.note
    flat = nn.Linear(4, 3).double()
    nn.init.zeros_(flat.weight)
    nn.init.zeros_(flat.bias)
    f = Objective(flat, F.cross_entropy, (x, torch.arange(6) % 3))
    with pytest.raises(NotApplicableError, match="no spread to divide by"):
        logit_normalised(f)
    assert "no spread" in one(f, "logit_normalised_sharpness").note


def test_logits_of_sequences_are_normalised_over_their_classes() -> None:
    torch.manual_seed(0)
    x, y = randn(4, 5, 3), torch.randint(0, 6, (4, 5))
    model = nn.Linear(3, 6).double()

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output.flatten(0, 1), target.flatten())

    z = model(x).detach().flatten(0, 1)
    expected = float(F.cross_entropy(z / z.std(1, correction=0, keepdim=True), y.flatten()))
    assert logit_normalised(Objective(model, loss, (x, y))).loss() == pytest.approx(expected, rel=1e-12)
