"""F2M's box and objective against the specification's vectors and float64 finite differences."""

from __future__ import annotations

import io
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from flatminima.optim.flat_region import Clamped, FlatRegion
from flatminima.optim.flat_region_parts import prototypes
from flatminima.optim.flat_region_probe import probe

VECTORS = json.loads((Path(__file__).parent / "vectors" / "f2m.json").read_text(encoding="utf-8"))


class Embedder(nn.Module):
    """Two convolutions, BatchNorm and a nonlinearity that is smooth enough for finite differences."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.low = nn.Conv2d(1, 3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.high = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.high(torch.tanh(self.norm(self.low(x)))).tanh().mean((2, 3))
        return z, self.head(z)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(9, 1, 7, 7, generator=generator, dtype=torch.float64), torch.arange(9) % 3


def on_logits(output: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
    return cross_entropy(output[1], y)


def picked(output: tuple[Tensor, Tensor]) -> Tensor:
    return output[0]


def bits(model: nn.Module) -> list[Tensor]:
    return [tensor.clone() for tensor in model.state_dict().values()]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


# ------------------------------------------------------------------------------------------------------------ objective


class Toy(nn.Module):
    """The specification's quadratic: its output is theta itself and the embedding (theta * x)^2."""

    def __init__(self, theta: list[float]) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta, dtype=torch.float64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.theta, (self.theta * x) ** 2


def toy() -> tuple[Toy, FlatRegion, Tensor, Tensor, Callable[[Any, Tensor], Tensor], list[list[Tensor]]]:
    v = VECTORS["objective"]
    a, c, samples = (torch.tensor(v[name], dtype=torch.float64) for name in ("A", "c", "samples"))
    noise = [[torch.tensor(eps, dtype=torch.float64)] for eps in v["noise"]]
    model = Toy(v["theta"])

    def quadratic(output: tuple[Tensor, Tensor], _: Tensor) -> Tensor:
        theta = output[0]
        return 0.5 * theta @ a @ theta - c @ theta + v["d"]

    return model, FlatRegion(model, 0.1), samples, torch.tensor(v["classes"]), quadratic, noise


@pytest.mark.parametrize("case", VECTORS["objective"]["cases"])
def test_objective_vectors(case: dict[str, Any]) -> None:
    model, region, x, y, criterion, noise = toy()
    weights = {name: case[name] for name in ("prototype_weight", "std_weight", "detach_clean")}
    found = region.loss(model, x, y, criterion, noise=noise, embedding=lambda out: out[1], **weights)
    (gradient,) = torch.autograd.grad(found.value, model.theta)
    assert found.value.item() == pytest.approx(case["objective"], abs=1e-9)
    assert gradient.tolist() == pytest.approx(case["grad"], abs=1e-9)
    assert found.losses.tolist() == pytest.approx(VECTORS["objective"]["per_noise"], abs=1e-9)
    if case["prototype_weight"]:
        assert found.shifts.tolist() == pytest.approx(VECTORS["objective"]["shifts"], abs=1e-9)
    else:
        assert found.shifts.tolist() == [0, 0, 0]


def test_prototype_vectors() -> None:
    _, _, x, y, _, _ = toy()
    theta = torch.tensor(VECTORS["objective"]["theta"], dtype=torch.float64)
    expected = torch.tensor(VECTORS["objective"]["clean_prototypes"], dtype=torch.float64)
    torch.testing.assert_close(prototypes((theta * x) ** 2, y), expected)


@pytest.mark.parametrize("detach", [False, True])
def test_gradients_are_those_of_finite_differences(detach: bool) -> None:
    # Every parameter counts: those below the perturbed convolution get wrong gradients if its weight is swapped.
    model, (x, y) = Embedder().double().eval(), batch()
    region = FlatRegion([model.high.weight], 0.3)
    noise, fixed = region.sample(2), prototypes(model(x)[0], y).detach()

    def value() -> Tensor:
        if not detach:
            return region.loss(
                model, x, y, on_logits, prototype_weight=0.7, std_weight=0.5, embedding=picked, noise=noise
            ).value
        total = torch.zeros((), dtype=torch.float64)
        for eps in noise:
            output = region.forward(model, x, eps)
            total = total + on_logits(output, y) + 0.7 * (prototypes(output[0], y) - fixed).square().sum(1).mean()
        return total / 2

    if detach:
        region.backward(model, x, y, on_logits, prototype_weight=0.7, embedding=picked, noise=noise)
    else:
        value().backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        for index in range(0, parameter.numel(), max(1, parameter.numel() // 5)):
            there = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter.view(-1)[index] += sign * 1e-5
                    there.append(value().item())
                    parameter.view(-1)[index] -= sign * 1e-5
            assert parameter.grad.view(-1)[index].item() == pytest.approx((there[0] - there[1]) / 2e-5, abs=1e-8)


def test_the_prototype_term_changes_the_gradient() -> None:
    model, (x, y) = Embedder().double().eval(), batch()
    region = FlatRegion([model.high.weight], 0.3)
    noise = region.sample(2)
    gradients = []
    for weight in (0.0, 1.0):
        found = region.loss(model, x, y, on_logits, prototype_weight=weight, embedding=picked, noise=noise)
        gradients.append(torch.autograd.grad(found.value, model.high.weight)[0])
    assert (gradients[0] - gradients[1]).norm() > 1e-3 * gradients[0].norm()


def test_backward_adds_up_what_loss_gives() -> None:
    model, (x, y) = Embedder().double().eval(), batch()
    region = FlatRegion([model.high.weight, model.low.weight], 0.1)
    noise = region.sample(3)
    whole = region.loss(model, x, y, on_logits, prototype_weight=0.5, embedding=picked, noise=noise, detach_clean=True)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(whole.value, parameters)
    found = region.backward(model, x, y, on_logits, prototype_weight=0.5, embedding=picked, noise=noise)
    assert found.value.item() == pytest.approx(whole.value.item(), rel=1e-12)
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-14)


def test_nothing_moves_and_the_clean_pass_has_the_last_word_on_batchnorm() -> None:
    model, (x, y) = Embedder().double(), batch()
    region = FlatRegion([model.low.weight], 0.5)
    before = [parameter.data_ptr() for parameter in model.parameters()]
    weights = [parameter.clone() for parameter in model.parameters()]
    expected = Embedder().double()
    expected(x)
    region.loss(model, x, y, on_logits, draws=3, prototype_weight=1.0, embedding=picked).value.backward()
    assert same(bits(model), bits(expected))
    assert [parameter.data_ptr() for parameter in model.parameters()] == before
    assert same(list(model.parameters()), weights)
    region.loss(model, x, y, on_logits, draws=3)
    assert int(model.norm.num_batches_tracked) == 2  # without a clean pass the first draw counts, and it alone


def test_tied_weights_get_the_same_noise() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    region = FlatRegion(model, 0.5)
    (eps,) = region.sample()
    x = torch.randn(2, 3)
    weight = model[0].weight + eps[0]
    torch.testing.assert_close(region.forward(model, x, eps), x @ weight.T @ weight.T)


# ---------------------------------------------------------------------------------------------------------------- noise


def test_uniform_noise_fills_the_box() -> None:
    parameter = nn.Parameter(torch.zeros(40_000))
    (eps,) = FlatRegion([parameter], 0.02).sample()[0]
    assert eps.abs().max() <= 0.02 * (1 + 1e-6)
    assert abs(eps.mean().item()) < 5 * 0.02 / math.sqrt(3 * 40_000)
    assert eps.square().mean().item() == pytest.approx(0.02**2 / 3, rel=0.03)


@pytest.mark.parametrize("kind", ["beta_grid", "beta_grid_released"])
def test_the_five_levels(kind: Any) -> None:
    parameters = [nn.Parameter(torch.zeros(50)) for _ in range(3000)]
    eps = torch.cat(FlatRegion(parameters, 1.0, noise=kind).sample()[0])
    shares = [(eps == level).double().mean().item() for level in (-1.0, -0.5, 0.0, 0.5, 1.0)]
    assert sum(shares) == pytest.approx(1)
    if kind == "beta_grid":
        assert min(shares) > 0.1
        assert abs(eps.mean().item()) < 0.05  # alpha and beta are alike in law; standard error 0.013
        assert shares[0] == pytest.approx(shares[4], abs=0.04)
    else:  # frequencies and mean that the specification measured on the released code
        assert shares == pytest.approx([0.26, 0.0, 0.17, 0.16, 0.42], abs=0.03)
        assert eps.mean().item() == pytest.approx(0.235, abs=0.05)


def test_antithetic_noise_cancels() -> None:
    drawn = FlatRegion([nn.Parameter(torch.zeros(9))], 1.0, antithetic=True).sample(4)
    assert torch.equal(drawn[0][0], -drawn[1][0])
    assert torch.equal(drawn[2][0], -drawn[3][0])
    assert not torch.equal(drawn[0][0], drawn[2][0])


def test_relative_bounds_follow_the_scale() -> None:
    parameter = nn.Parameter(torch.tensor([3.0, -4.0]))
    region = FlatRegion([parameter], 0.1, relative=True)
    rms = math.sqrt(12.5)
    assert region.half_widths()[0].item() == pytest.approx(0.1 * rms)
    with torch.no_grad():
        parameter.mul_(10)
    assert region.half_widths()[0].item() == pytest.approx(rms)
    region.project_()
    assert parameter.tolist() == pytest.approx([3 + 0.1 * rms, -4 - 0.1 * rms])  # the box is where its centre was


# ------------------------------------------------------------------------------------------------------------------ box


def test_box_vectors() -> None:
    v = VECTORS["box"]
    parameter = nn.Parameter(torch.tensor(v["theta_star"], dtype=torch.float64))
    region = FlatRegion([parameter], v["half_width_b"])
    parameter.data.copy_(torch.tensor(v["theta0"]))
    optimizer = torch.optim.SGD([parameter], lr=v["lr"], momentum=v["momentum"], weight_decay=v["weight_decay"])
    total = [0, 0]
    for step in v["steps"]:
        parameter.grad = torch.tensor(step["grad"], dtype=torch.float64)
        optimizer.step()
        assert region.project_() == Clamped(step["low"], step["high"])
        assert parameter.tolist() == pytest.approx(step["after_clamp"], abs=1e-8)
        assert optimizer.state[parameter]["momentum_buffer"].tolist() == pytest.approx(
            step["momentum_buffer"], abs=1e-7
        )
        total = [total[0] + step["low"], total[1] + step["high"]]
    assert region.clamped == Clamped(*total)
    assert region.saturation() == [(0.5, pytest.approx(1.0, rel=1e-9))]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rounding_never_leaves_the_box(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    start = (torch.randn(2000, generator=generator, dtype=torch.float64) * 3).to(dtype)
    parameter, b = nn.Parameter(start.clone()), 1e-3
    region = FlatRegion([parameter], b)
    for sign in (1, -1):
        with torch.no_grad():
            parameter.add_(sign)
        moved = region.project_()
        assert moved == ((0, 2000) if sign == 1 else (2000, 0))
        assert (parameter.double() - start.double()).abs().max() <= b * (1 + 1e-12)
    assert region.saturation()[0][0] == 1.0


def test_only_the_region_is_projected_and_in_place() -> None:
    model = Embedder()
    region = FlatRegion([model.high.weight], 0.01)
    others = [tensor.clone() for name, tensor in model.state_dict().items() if name != "high.weight"]
    pointer = model.high.weight.data_ptr()
    with torch.no_grad():
        model.high.weight.add_(1)
    assert region.project_().high == model.high.weight.numel()
    assert model.high.weight.data_ptr() == pointer
    assert same([t for name, t in model.state_dict().items() if name != "high.weight"], others)


def test_resuming_keeps_box_hits_and_noise() -> None:
    parameter = nn.Parameter(torch.randn(5))
    region = FlatRegion([parameter], 0.1, relative=True, seed=3)
    region.sample(3)
    parameter.data.add_(1)
    region.project_()
    file = io.BytesIO()
    torch.save(region.state_dict(), file)
    file.seek(0)
    other = FlatRegion([nn.Parameter(parameter.detach().clone())], 0.1, relative=True)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.clamped == region.clamped == Clamped(0, 5)
    assert torch.equal(other.sample()[0][0], region.sample()[0][0])
    for r in (region, other):
        r.params[0].data.sub_(9)
        r.project_()
    assert torch.equal(other.params[0], parameter)
    with pytest.raises(ValueError, match=r"saved box is of parameters of shapes \[\(5,\)\]"):
        FlatRegion([nn.Parameter(torch.ones(4))], 0.1, relative=True).load_state_dict(region.state_dict())


# ---------------------------------------------------------------------------------------------------------------- probe


def test_the_indicator_vectors() -> None:
    model, region, x, y, criterion, noise = toy()
    region.sample = lambda draws=1: noise  # type: ignore[method-assign]
    found = region.probe(model, [(x, y)], criterion, draws=3)
    expected = VECTORS["objective"]["flatness"]
    assert found.clean == pytest.approx(VECTORS["objective"]["clean_loss"], abs=1e-12)
    assert found.mean_square == pytest.approx(expected["mean_square"], abs=1e-9)
    assert found.mean_rise == pytest.approx(expected["mean_rise"], abs=1e-9)
    assert found.losses == pytest.approx(VECTORS["objective"]["per_noise"], abs=1e-9)
    assert max(found.losses) <= found.worst


@pytest.mark.parametrize("seed", range(5))
def test_the_worst_point_against_every_corner(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    model = nn.Linear(6, 1, bias=False).double()
    model.weight.data = torch.randn(1, 6, generator=generator, dtype=torch.float64)
    region = FlatRegion(model, 0.2)
    data = [(root[:4], torch.zeros(4, 1)), (root[4:], torch.zeros(2, 1))]  # batches of unlike length
    found = probe(region, model, data, nn.functional.mse_loss, starts=6, draws=20, steps=25)

    def loss(weight: Tensor) -> float:
        return float((root @ weight).square().mean())

    center = model.weight.detach()[0]
    corners = [loss(center + 0.2 * torch.tensor(s, dtype=torch.float64)) for s in itertools.product((-1, 1), repeat=6)]
    assert found.clean == pytest.approx(loss(center))
    assert found.worst == pytest.approx(loss(center + found.offset[0][0]))
    # A convex loss is highest at a corner. Ascent may end at a corner that is only higher than its neighbours (it does
    # for seed 1 with 6 starts); with many starts the highest is among them.
    assert 0.95 * max(corners) < found.worst <= max(corners) * (1 + 1e-12)
    torch.testing.assert_close(found.offset[0].abs(), torch.full((1, 6), 0.2, dtype=torch.float64))
    at = (center + found.offset[0][0]).requires_grad_()
    (gradient,) = torch.autograd.grad((root @ at).square().mean(), at)
    assert torch.equal(gradient.sign(), found.offset[0][0].sign())
    thorough = probe(region, model, data, nn.functional.mse_loss, starts=30, draws=30, steps=25)
    assert thorough.worst == pytest.approx(max(corners), rel=1e-9)
    assert found.worst > max(found.losses)


def test_the_probe_leaves_the_model_alone() -> None:
    model, (x, y) = Embedder().double(), batch()
    model.norm.eval()
    before, modes = bits(model), [module.training for module in model.modules()]
    found = probe(FlatRegion([model.high.weight], 0.1), model, [(x, y)], on_logits, steps=3, draws=3)
    assert same(bits(model), before)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert found.worst > found.clean
    assert found.gradient_equivalents == 2 * 3 + (1 + 3 + 2) / 3


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"bound": 0.0}, ValueError, "bound=0.0 must be positive"),
        ({"bound": math.nan}, ValueError, "bound=nan must be positive"),
        ({"bound": "0.1"}, TypeError, "bound must be a number"),
        ({"noise": "unform"}, ValueError, "unknown noise 'unform': expected one of uniform"),
        ({"noise": "beta_grid_released", "antithetic": True}, ValueError, "not symmetric"),
        ({"params": []}, ValueError, "no parameters"),
        ({"params": [3]}, TypeError, "got int"),
        ({"params": [torch.zeros(2)], "relative": True}, ValueError, "number 0 of shape .2,. is zero"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"params": [torch.ones(2)], "bound": 0.1, **settings}
    with pytest.raises(error, match=message):
        FlatRegion(**arguments)


def test_misuse_is_refused_before_anything_is_done() -> None:
    model, (x, y) = Embedder().double(), batch()
    region = FlatRegion([model.high.weight], 0.1, antithetic=True)
    before = bits(model)
    for arguments, message in (
        ({"draws": 3}, "draws=3 must be even"),
        ({"draws": 0}, "draws=0"),
        ({"std_weight": 1.0, "noise": [[torch.zeros(4, 3, 3, 3)]]}, "needs at least 2 draws, got 1"),
        ({"prototype_weight": -1.0}, "must be finite and >= 0"),
        ({"std_weight": math.nan}, "std_weight=nan must be finite and >= 0"),
        ({"noise": []}, "no draw to average over"),
    ):
        with pytest.raises(ValueError, match=message):
            region.loss(model, x, y, on_logits, **arguments)
    with pytest.raises(ValueError, match="no draw to average over"):
        region.backward(model, x, y, on_logits, noise=[])
    with pytest.raises(ValueError, match="does not hold parameter number 0"):
        region.loss(Embedder().double(), x, y, on_logits)
    assert same(bits(model), before)
    with pytest.raises(ValueError, match="Pass embedding="):
        prototypes(torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match="batches is empty"):
        probe(region, model, [], on_logits)
    model.high.weight.data[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="1 coordinates of the parameters are NaN"):
        region.project_()


def test_a_state_with_other_settings_or_parts_is_refused_and_changes_nothing() -> None:
    weight = torch.ones(3)
    saved = FlatRegion([weight], 0.5).state_dict()
    region = FlatRegion([weight], 0.01)
    region.sample()
    before = region.state_dict()
    for state, message in (
        (saved, r"saved with bound=0.5; this FlatRegion has bound=0.01"),
        (FlatRegion([weight], 0.01, relative=True).state_dict(), "saved with relative=True"),
        (FlatRegion([weight], 0.01, noise="beta_grid").state_dict(), "saved with noise='beta_grid'"),
        (FlatRegion([torch.ones(2)], 0.01).state_dict(), "shapes"),
        ({}, "not a state saved by FlatRegion: it has no 'center'"),
        ({k: v for k, v in before.items() if k != "generator"}, "it has no 'generator'"),
        ({**before, "generator": torch.zeros(3)}, "state of the noise"),
        ({**before, "low": []}, "shapes"),
        ({**before, "half": []}, "not all there"),
    ):
        with pytest.raises(ValueError, match=message):
            region.load_state_dict(state)
        for name, value in region.state_dict().items():
            assert torch.equal(torch.stack(value), torch.stack(before[name])) if name in ("center", "low") else True
        assert torch.equal(region.state_dict()["generator"], before["generator"])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_centre_that_is_not_finite_is_refused(value: float) -> None:
    weight = torch.ones(3)
    region = FlatRegion([weight], 0.5)
    weight[1] = value
    with pytest.raises(ValueError, match=r"number 0 of shape \(3,\) is not finite"):
        region.recenter()
    with pytest.raises(ValueError, match="not finite"):
        FlatRegion([weight], 0.5)
    weight[1] = 9.0
    assert region.project_() == Clamped(0, 1)
    assert weight[1] == 1.5
