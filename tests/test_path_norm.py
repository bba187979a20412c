"""Path norms against sums over paths: matrices of single coefficients, multiplied, and plain enumeration."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatminima import Objective, find_symmetries, measure
from flatminima.measures import NotApplicableError
from flatminima.measures.path_norm import path_norm_of
from flatminima.models.convnet import convnet
from flatminima.models.resnet import resnet18
from test_orbit import randomised

pytestmark = pytest.mark.usefixtures("one_thread")


def objective(model: nn.Module, *shape: int) -> Objective:
    x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0)).double()
    return Objective(model.double(), F.cross_entropy, (x, torch.arange(4) % 3))


def matrix(layer: Callable[[Tensor], Tensor], *shape: int) -> tuple[Tensor, Tensor]:
    """The affine map as a matrix of single coefficients and a vector, in row-major order."""
    zero = torch.zeros(1, *shape).double()
    constant = layer(zero).detach().reshape(-1)
    jacobian = torch.autograd.functional.jacobian(lambda x: layer(x).reshape(-1), zero).reshape(len(constant), -1)
    return jacobian, constant


def paths(maps: list[tuple[Tensor, Tensor]], power: int) -> float:
    """Summed powers of all paths through a chain of affine maps."""
    size = torch.ones(maps[0][0].shape[1]).double()
    for jacobian, constant in maps:
        size = jacobian.abs() ** power @ size + constant.abs() ** power
    return float(size.sum()) ** (1 / power)


@pytest.mark.parametrize("power", [1, 2])
def test_every_path_of_a_perceptron_enumerated(power: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 3, bias=False)).double()
    (w1, b1), (w2, b2), (w3, _) = ((layer.weight, layer.bias) for layer in (net[0], net[2], net[4]))
    total = 0.0
    for i, j, k, o in itertools.product(range(2), range(3), range(2), range(3)):
        total += abs(float(w1[j, i] * w2[k, j] * w3[o, k])) ** power
    for j, k, o in itertools.product(range(3), range(2), range(3)):
        total += abs(float(b1[j] * w2[k, j] * w3[o, k])) ** power
    for k, o in itertools.product(range(2), range(3)):
        total += abs(float(b2[k] * w3[o, k])) ** power
    assert path_norm_of(objective(net, 2), power) == pytest.approx(total ** (1 / power), rel=1e-12)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("pool", ["max", "average", "global", "mean"])
def test_convolutions_batch_norm_and_pooling(pool: str, power: int) -> None:
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(2, 3, 3, padding=1, stride=1), nn.BatchNorm2d(3)

    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((2, 3))

    pools = {
        "max": (nn.MaxPool2d(2), lambda x: 4 * F.avg_pool2d(x, 2), 12),
        "average": (nn.AvgPool2d(2), nn.AvgPool2d(2), 12),
        "global": (nn.AdaptiveAvgPool2d(1), nn.AdaptiveAvgPool2d(1), 3),
        "mean": (Mean(), Mean(), 3),
    }
    layer, linear, features = pools[pool]
    net = randomised(nn.Sequential(conv, norm, nn.ReLU(), layer, nn.Flatten(), nn.Linear(features, 3)))
    with torch.no_grad():
        norm.weight[1] = -0.7
    maps = [matrix(conv, 2, 4, 4), matrix(norm, 3, 4, 4), matrix(linear, 3, 4, 4), matrix(net[5], features)]
    assert path_norm_of(objective(net, 2, 4, 4), power) == pytest.approx(paths(maps, power), rel=1e-12)


class Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        g = h - 0.5 * self.b(h)
        return self.c(torch.cat([g, h / 4], 1))


@pytest.mark.parametrize("power", [1, 2])
def test_branches_add_up(power: int) -> None:
    torch.manual_seed(0)
    model = Skip().double()
    a, b, c = (matrix(layer, n) for layer, n in ((model.a, 3), (model.b, 4), (model.c, 8)))
    h = a[0].abs() ** power @ torch.ones(3).double() + a[1].abs() ** power
    g = h + 0.5**power * (b[0].abs() ** power @ h + b[1].abs() ** power)
    out = c[0].abs() ** power @ torch.cat([g, h / 4**power]) + c[1].abs() ** power
    assert path_norm_of(objective(model, 3), power) == pytest.approx(float(out.sum()) ** (1 / power), rel=1e-12)


@pytest.mark.parametrize(
    "build",
    [lambda: convnet((1, 8, 8), 3, channels=(2, 3), hidden=4, norm="batch"), lambda: resnet18((1, 8, 8), 3, width=2)],
)
def test_reference_networks_have_path_norms_that_rescaling_keeps(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = randomised(build())
    f = objective(model, 1, 8, 8)
    x = f._pieces.first().inputs
    found = find_symmetries(model, x, kinds=["relu-layer-rescaling", "relu-unit-rescaling"]).found
    assert len(found) == 2
    for symmetry in found:
        twin = objective(symmetry.member(torch.Generator().manual_seed(0)).apply(model), 1, 8, 8)
        for power in (1, 2):
            assert path_norm_of(twin, power) == pytest.approx(path_norm_of(f, power), rel=1e-9)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.GELU(), "GELU at '1'"),
        (nn.LayerNorm(4), "LayerNorm at '1'"),
        (nn.AvgPool1d(3, padding=1), "AvgPool1d at '1'"),
        (nn.Softmax(1), "Softmax at '1'"),
        (nn.PReLU(init=1.5), "PReLU at '1'"),
    ],
)
def test_what_is_no_sum_over_paths_is_refused(layer: nn.Module, reason: str) -> None:
    net = nn.Sequential(nn.Linear(4, 4), layer, nn.LazyLinear(3))
    net(torch.randn(2, 4))
    f = objective(net, 4)
    with pytest.raises(NotApplicableError, match=reason):
        path_norm_of(f)
    assert reason in measure(f, ["path_norm"])["path_norm"].note


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * self.b(x)


def test_products_tokens_and_train_mode_are_refused() -> None:
    with pytest.raises(NotApplicableError, match="mul is not known"):
        path_norm_of(objective(Gated(), 4))
    tokens = Objective(
        nn.Sequential(nn.Embedding(5, 3)), lambda out, y: out.square().mean(), (torch.arange(4), torch.zeros(4))
    )
    with pytest.raises(NotApplicableError, match="not one tensor of numbers"):
        path_norm_of(tokens)
    net = nn.Sequential(nn.Linear(4, 3)).double()
    f = Objective(net, F.cross_entropy, (torch.randn(4, 4).double(), torch.arange(4) % 3), mode="train")
    with pytest.raises(NotApplicableError, match="train mode"):
        path_norm_of(f)
    with pytest.raises(ValueError, match="power must be 1 or 2"):
        path_norm_of(objective(net, 4), 3)
