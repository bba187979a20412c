from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from flatminima.models import build
from flatminima.symmetries import Action, Member, Scale, Symmetry, find_symmetries, prove
from flatminima.symmetries.base import Findings
from flatminima.symmetries.network import Network
from flatminima.symmetries.sites import Rescaling, log_uniform

LAYER, UNIT = "relu-layer-rescaling", "relu-unit-rescaling"


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rescalings(model: nn.Module, x: Tensor) -> tuple[Symmetry, ...]:
    """Both kinds of ReLU rescaling, layer first; () where there is no site."""
    return find_symmetries(model, x, kinds=[LAYER, UNIT]).found


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights, biases, gains and running statistics away from zero and one, so that a forgotten one is seen."""
    g = generator(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point():
            noise = torch.rand(tensor.shape, generator=g) * 0.5
            tensor.data.add_(noise if "running_var" in name else (noise - 0.25))
    return model


class Mlp(nn.Module):
    def __init__(self, activation: Callable[[Tensor], Tensor] = F.relu) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3)])
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)


class Conv(nn.Module):
    """Convolution, batch norm, pools, an implicit flatten and a hidden layer."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4) if norm else nn.Identity()
        self.conv2 = nn.Conv2d(4, 6, 3, bias=False)
        self.bn2 = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.pool = nn.MaxPool2d(2)
        self.drop = nn.Dropout(0.5)
        self.fc1 = nn.Linear(6 * 3 * 3, 7)
        self.fc2 = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.bn1(self.conv1(x)), inplace=True))
        x = F.avg_pool2d(torch.relu(self.bn2(self.conv2(x))), 2, stride=1, padding=1)
        x = self.drop(x.view(x.size(0), -1))
        return self.fc2(self.fc1(x).relu())


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5)
        self.conv2, self.bn2 = nn.Conv2d(5, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.stem(x))).mean((2, 3)))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 2, 3, 3))
        self.kernel_bias = nn.Parameter(torch.randn(4))
        self.matrix = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(F.conv2d(x, self.kernel, self.kernel_bias, padding=1), 0.1)
        x = torch.flatten(F.adaptive_max_pool2d(x, 1), 1)
        return F.linear(x, self.matrix)


class FanOut(nn.Module):
    """One activation read by two layers; a third layer's activation is concatenated, a fourth's is returned."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(5, 3), nn.Linear(6, 2)
        self.head = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        return self.head(torch.cat([F.relu(self.b(h)), F.relu(self.c(h)), F.relu(self.d(x))], 1))


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(2, 6, 3)
        self.act1 = nn.PReLU(6)
        self.depthwise = nn.Conv1d(6, 12, 3, groups=6)
        self.grouped = nn.Conv1d(12, 4, 3, groups=2)
        self.head = nn.Linear(4 * 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(F.relu(self.depthwise(self.act1(self.first(x)))))
        return self.head(F.relu(x).flatten(1))


def volume() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(1, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool3d((1, 2, 2)), nn.Flatten(), nn.Linear(12, 4), nn.ReLU(),
        nn.Unflatten(1, (2, 2)), nn.Flatten(), nn.Linear(4, 2),
    )  # fmt: skip


def tokens() -> nn.Module:
    """Linear layers along the last axis of (rows, positions, features)."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.head = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.down(F.relu(self.up(x)))).mean(dim=1))

    return Tokens()


class Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        h += F.relu(self.b(h))
        return self.head(h)


class Transposed(nn.Module):
    """The reader's input axis is the position, not the unit."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Conv1d(2, 4, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.fc(x))).flatten(1)


class MeanOverUnits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Conv1d(2, 4, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.fc(x)).mean(1))


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.fc(x))
        return self.head(h * h)


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[str, ...]]] = {
    "ModuleList": (Mlp, (7, 6), ("layers.0 -> layers.1", "layers.1 -> layers.2")),
    "torch.relu": (lambda: Mlp(torch.relu), (7, 6), ("layers.0 -> layers.1", "layers.1 -> layers.2")),
    "leaky": (lambda: Mlp(nn.LeakyReLU(0.2)), (7, 6), ("layers.0 -> layers.1", "layers.1 -> layers.2")),
    "linear": (lambda: Mlp(nn.Identity()), (7, 6), ("layers.0 -> layers.1", "layers.1 -> layers.2")),
    "conv": (lambda: Conv(False), (3, 2, 8, 8), ("conv1 -> conv2", "conv2 -> fc1", "fc1 -> fc2")),
    "conv, batch norm": (lambda: Conv(True), (3, 2, 8, 8), ("bn1 -> conv2", "bn2 -> fc1", "fc1 -> fc2")),
    "residual": (
        Residual,
        (3, 2, 6, 6),
        (
            "stem, blocks.0.bn2, blocks.1.bn2 -> blocks.0.conv1, blocks.1.conv1, head",
            "blocks.0.bn1 -> blocks.0.conv2",
            "blocks.1.bn1 -> blocks.1.conv2",
        ),
    ),
    "functional": (Functional, (3, 2, 5, 5), ("kernel -> matrix",)),
    "fan-out": (FanOut, (7, 6), ("a -> b, c", "b -> head", "c -> head", "d -> head")),
    "skip": (Skip, (7, 6), ("a, b -> b, head",)),
    "square of relu": (lambda: Mlp(lambda z: F.relu(z) ** 2), (7, 6), ("layers.0 -> layers.1", "layers.1 -> layers.2")),
    "gate of itself": (Gate, (4, 6), ("fc -> head",)),
    "transposed": (Transposed, (4, 2, 8), ("fc -> head",)),
    "mean over units": (MeanOverUnits, (4, 2, 8), ("fc -> head",)),
    "grouped": (
        Grouped,
        (3, 2, 8),
        ("first -> depthwise", "depthwise -> grouped", "grouped -> head"),
    ),
    "conv3d": (volume, (3, 1, 4, 4, 4), ("0 -> 4", "4 -> 8")),
    "tokens": (tokens, (3, 5, 6), ("up -> down", "down -> head")),
    "one row": (lambda: Conv(True), (1, 2, 8, 8), ("bn1 -> conv2", "bn2 -> fc1", "fc1 -> fc2")),
    "mlp": (lambda: build("mlp", (1, 8, 8), 10, seed=0), (3, 1, 8, 8), ("1 -> 3", "3 -> 5")),
    "convnet": (lambda: build("convnet", (1, 8, 8), 10, seed=0), (3, 1, 8, 8), ("0 -> 3", "3 -> 7", "7 -> 9")),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, tuple[str, ...]]:
    make, shape, sites = CASES[request.param]
    torch.manual_seed(3)
    return randomise(make()), torch.randn(shape, generator=generator(1)), sites


def test_finds_exactly_the_sites_and_preserves_the_function(case: tuple[nn.Module, Tensor, tuple[str, ...]]) -> None:
    model, x, sites = case
    search = find_symmetries(model, x, kinds=[LAYER, UNIT])
    assert [(s.kind, s.sites) for s in search.found] == [(LAYER, sites), (UNIT, sites)], search.rejected
    reference = copy.deepcopy(model).double().eval()
    fresh = torch.randn(x.shape, generator=generator(9), dtype=torch.float64)  # not the input that it was found with
    for symmetry in search.found:
        member = symmetry.member(generator(5))
        changed = member.apply(reference)
        assert any(not torch.equal(p, q) for p, q in zip(reference.parameters(), changed.parameters(), strict=True))
        expected, actual = reference(fresh), changed(fresh)
        assert float(((actual - expected).abs().max() / expected.abs().max()).detach()) <= 1e-12
        proof = prove(model, member, fresh)
        assert proof.preserved
        assert proof.max_change <= 1e-12
        assert proof.kind == symmetry.kind


def test_inverse_undoes_apply_in_place(case: tuple[nn.Module, Tensor, tuple[str, ...]]) -> None:
    model, x, _ = case
    model = model.double()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    identities = [(id(p), p.data_ptr()) for p in model.parameters()]
    for symmetry in rescalings(model.float(), x):
        model.double()
        model.load_state_dict(before)
        member = symmetry.member(generator(5))
        member.apply_(model)
        member.inverse().apply_(model)
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, before[name], rtol=1e-12, atol=0)
    assert [i for i, _ in identities] == [id(p) for p in model.parameters()]


def test_every_sampled_tensor_is_needed(case: tuple[nn.Module, Tensor, tuple[str, ...]]) -> None:
    """Leaving out any single action (a bias, a gain, one reader) must be seen by the proof."""
    model, x, _ = case
    for symmetry in rescalings(model, x):
        member = symmetry.member(generator(5))
        for left_out in range(len(member.actions)):
            wrong = Member(member.kind, "wrong", member.actions[:left_out] + member.actions[left_out + 1 :])
            assert not prove(model, wrong, x).preserved, member.actions[left_out].names


def test_model_and_random_state_are_left_untouched() -> None:
    model = randomise(Conv(True)).train()
    model.fc1.eval()
    x = torch.randn(3, 2, 8, 8)
    model(x).sum().backward()
    values = {name: t.clone() for name, t in model.state_dict().items()}
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    modes = [m.training for m in model.modules()]
    state, inputs = torch.get_rng_state(), x.clone()
    search = find_symmetries(model, x)
    prove(model, search.found[0].member(generator()), x)
    search.found[0].member(generator()).apply(model)
    assert all(torch.equal(t, values[name]) for name, t in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert modes == [m.training for m in model.modules()]
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(x, inputs)


def test_models_that_write_into_their_input() -> None:
    class InPlace(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(2.0))

    model, x = InPlace().double(), torch.randn(4, 6, dtype=torch.float64)
    before = x.clone()
    found = rescalings(model, x)
    assert len(found) == 2
    assert prove(model, found[1].member(generator()), x).preserved
    assert torch.equal(x, before)


def test_proof_is_of_evaluation_mode_with_common_random_numbers() -> None:
    class Noisy(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                return super().forward(x) + self.layers[0].bias.sum()
            return F.dropout(super().forward(x), 0.5, training=True)

    model, x = randomise(Noisy()).train(), torch.randn(4, 6)
    unit = rescalings(model, x)[1]
    assert len(unit.sites) == 2
    member = unit.member(generator())
    assert prove(model, member, x).max_change <= 1e-12
    wrong = Member(UNIT, "", member.actions[:1])
    changes = set()
    for seed in range(4):  # the verdict does not depend on the global random state
        torch.manual_seed(seed)
        changes.add(prove(model, wrong, x).max_change)
    assert len(changes) == 1


def test_actions_run_in_order_and_are_undone_in_reverse() -> None:
    @dataclass(frozen=True)
    class Shift:
        name: str
        by: float

        @property
        def names(self) -> tuple[str, ...]:
            return (self.name,)

        def __call__(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {self.name: values[self.name] + self.by}

        def inverse(self) -> Action:
            return Shift(self.name, -self.by)

    model = nn.Linear(2, 1).double()
    model.bias.data.fill_(3.0)
    member = Member("affine", "", (Shift("bias", 1.0), Scale("bias", torch.tensor(2.0))))
    member.apply_(model)
    assert model.bias.item() == 8.0
    member.inverse().apply_(model)
    assert model.bias.item() == 3.0


def test_apply_in_place_keeps_tensors_and_dtypes() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = Mlp().to(dtype)
        pointers = [p.data_ptr() for p in model.parameters()]
        member = rescalings(model, torch.randn(4, 6, dtype=dtype))[1].member(generator())
        copied = member.apply(model)
        member.apply_(model)
        assert pointers == [p.data_ptr() for p in model.parameters()]
        assert all(p.dtype == dtype for p in model.parameters())
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), copied.parameters(), strict=True))


# ---------------------------------------------------------------------- the law, against closed forms and brute force


def source_network() -> tuple[nn.Module, Tensor, Tensor]:
    """A 2-3-2 network whose traces and top eigenvalues were computed independently."""
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    values = (
        [[1.0, -0.5], [0.25, 0.75], [-0.8, 0.4]], [0.1, -0.2, 0.3],
        [[0.6, -0.4, 0.2], [-0.3, 0.9, -0.7]], [0.05, -0.15],
    )  # fmt: skip
    for parameter, value in zip(net.parameters(), values, strict=True):
        parameter.data.copy_(torch.tensor(value, dtype=torch.float64))
    x = torch.tensor([[1, 0], [0, 1], [-1, 0.5], [0.5, -1], [1.5, 1], [-0.5, -0.75]], dtype=torch.float64)
    return net, x, torch.tensor([0, 1, 1, 0, 1, 0])


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def derivatives(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Dense gradient and Hessian of the mean cross-entropy."""
    shapes = [(name, p.shape) for name, p in model.named_parameters()]

    def loss(theta: Tensor) -> Tensor:
        pieces = theta.split([math.prod(shape) for _, shape in shapes])
        values = {name: piece.reshape(shape) for (name, shape), piece in zip(shapes, pieces, strict=True)}
        return F.cross_entropy(functional_call(model, values, (x,)), y)

    return torch.func.grad(loss)(flat(model)), torch.func.hessian(loss)(flat(model))


def diagonal(model: nn.Module, member: Member) -> Tensor:
    """D, read off as the image of the point of all ones."""
    ones = copy.deepcopy(model)
    for parameter in ones.parameters():
        parameter.data.fill_(1.0)
    return flat(member.apply(ones))


@pytest.mark.parametrize("kind", [LAYER, UNIT])
@pytest.mark.parametrize("norm", [False, True])
def test_gradient_and_hessian_follow_the_law(kind: str, norm: bool) -> None:
    net, x, y = source_network()
    if norm:
        net = randomise(nn.Sequential(net[0], nn.BatchNorm1d(3), net[1], net[2]).double()).eval()
    symmetry = next(s for s in find_symmetries(net, x).found if s.kind == kind)
    member = symmetry.member(generator(2), max_scale=5.0)
    d = diagonal(net, member)
    gradient, hessian = derivatives(net, x, y)
    gradient_image, hessian_image = derivatives(member.apply(net), x, y)
    torch.testing.assert_close(gradient_image, gradient / d, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(hessian_image, hessian / d[:, None] / d[None, :], rtol=1e-10, atol=1e-13)
    assert not torch.allclose(hessian_image.trace(), hessian.trace(), rtol=0.05)


@pytest.mark.parametrize(
    ("scales", "trace", "largest"),
    [
        ([1.0, 1.0, 1.0], 1.87141730116, 1.18015177279),
        ([0.1, 0.1, 0.1], 96.877125737, 62.5743093497),
        ([2.0, 2.0, 2.0], 2.61268101437, 1.59963990239),
        ([10.0, 10.0, 10.0], 49.2504913766, 29.2056834553),
        ([0.5, 2.0, 4.0], 4.3093574506, 2.66778446936),
    ],
)
def test_hessian_of_given_members_against_recorded_values(scales: list[float], trace: float, largest: float) -> None:
    net, x, y = source_network()
    place = rescalings(net, x)[1].places[0]
    assert isinstance(place, Rescaling)
    member = Member(UNIT, "given", place.actions(torch.tensor(scales, dtype=torch.float64)))
    _, hessian = derivatives(member.apply(net), x, y)
    assert float(hessian.trace()) == pytest.approx(trace, rel=1e-9)
    assert float(torch.linalg.eigvalsh(hessian)[-1]) == pytest.approx(largest, rel=1e-9)


# ----------------------------------------------------------------------------------------------------------- refusals


def gelu() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 3))


class Tied(nn.Module):
    """Two names for one matrix, used as decoder and encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.mid, self.dec = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.dec.weight = self.enc.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.dec(F.relu(self.mid(F.relu(self.enc(x)))))


class SharedStorage(Tied):
    """Two parameters that are different objects over the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.dec.weight = nn.Parameter(self.enc.weight.data.t())


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.fc(F.relu(self.fc(x)))))


class Penalised(nn.Module):
    """The weight is also read as a number of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.fc(x))) * self.fc.weight.norm()


class SharedMatrix(nn.Module):
    """One matrix in two functional calls."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.head = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(3, 6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.relu(F.linear(F.relu(F.linear(x, self.matrix)), self.matrix)), self.head)


class UnitsAsSlope(nn.Module):
    """Units enter a homogeneous operation, but not as its data."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.other, self.head = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.prelu(self.other(x), F.relu(self.fc(x)).mean(0)))


class Standardised(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight / self.weight.norm(), self.bias)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.head = nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.fc(x))))


@pytest.mark.parametrize(
    ("make", "shape", "site", "reason"),
    [
        (gelu, (4, 6), "0", "1 (GELU)"),
        (lambda: Mlp(F.silu), (4, 6), "layers.0", "silu"),
        (lambda: Mlp(F.relu6), (4, 6), "layers.0", "relu6"),
        (lambda: Mlp(torch.tanh), (4, 6), "layers.0", "tanh"),
        (Twice, (4, 6), "fc", "'fc.weight' is used 2 times"),
        (Penalised, (4, 6), "fc", "'fc.weight' is used 2 times"),
        (lambda: nn.Sequential(Standardised(6, 5), nn.ReLU(), nn.Linear(5, 3)), (4, 6), "0", "is computed"),
        (lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), Standardised(5, 3)), (4, 6), "0", "is computed"),
        (
            lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)), nn.ReLU(), nn.Linear(5, 3)),
            (4, 6), "0", "is computed",
        ),
        (Normed, (4, 6), "fc", "norm (LayerNorm)"),
        (SharedMatrix, (4, 6), "matrix", "'matrix' is used 2 times"),
        (UnitsAsSlope, (4, 6), "fc", "prelu"),
        (lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU()), (4, 6), "0", "reach the output"),
    ],
)  # fmt: skip
def test_refused_sites_name_the_reason(
    make: Callable[[], nn.Module], shape: tuple[int, ...], site: str, reason: str
) -> None:
    search = find_symmetries(make(), torch.randn(shape, generator=generator()), kinds=[LAYER, UNIT])
    assert reason in dict(search.rejected)[site]
    assert all(not found.startswith(f"{site} ->") for symmetry in search.found for found in symmetry.sites)


def test_networks_without_homogeneous_units_admit_nothing() -> None:
    for model, x in ((gelu(), torch.randn(4, 6)), (build("vit", (1, 8, 8), 10, seed=0), torch.randn(2, 1, 8, 8))):
        assert rescalings(model, x) == ()


def test_resnet18_admits_its_inner_sites_and_its_stream() -> None:
    model = randomise(build("resnet18", (3, 16, 16), 10, seed=0, width=4))
    layer, unit = rescalings(model, torch.randn(2, 3, 16, 16))
    assert len(layer.sites) == len(unit.sites) == 12  # eight inside the blocks, four of the stream
    assert all(
        prove(model, s.member(generator(4)), torch.randn(2, 3, 16, 16)).max_change <= 1e-12 for s in (layer, unit)
    )


def test_layers_inside_a_transformer_layer_are_seen() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Flatten(), nn.Linear(24, 3))
    layer, unit = rescalings(randomise(model), torch.randn(2, 3, 8))
    assert layer.sites == unit.sites == ("0.linear1 -> 0.linear2",)


def test_tied_weights_move_only_where_all_their_uses_agree() -> None:
    """W is encoder and decoder: its rows grow as the columns shrink, so that one scale is left for the whole; transposed, one
    for each unit."""
    model, x = randomise(Tied()).double(), torch.randn(4, 6).double()
    layer, _ = rescalings(model, x)
    assert layer.sites == ("enc, mid -> mid, enc",)  # one parameter, under its first name
    assert prove(model, layer.member(generator()), x).max_change <= 1e-12
    scaled = layer.member(generator()).apply(model)
    assert scaled.dec.weight is scaled.enc.weight
    factor = (scaled.enc.weight / model.enc.weight).detach()
    assert factor.min() == pytest.approx(factor.max())
    torch.testing.assert_close(scaled.mid.weight, model.mid.weight / factor[0, 0] ** 2)
    model = randomise(SharedStorage())  # in float32: a conversion would copy the memory
    before = model.enc.weight.detach().clone()
    _, unit = rescalings(model, x.float())
    unit.member(generator()).apply_(model)
    torch.testing.assert_close(model.dec.weight, model.enc.weight.t(), rtol=0, atol=0)
    assert len((model.enc.weight / before)[:, 0].detach().unique()) == 6


def test_untraceable_model_gives_the_reason() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 0:
                return self.fc(x)
            return -self.fc(x)

    search = find_symmetries(Branching(), torch.randn(4, 6))
    assert search.found == ()
    site, reason = search.rejected[0]
    assert site == "model"
    assert "control flow" in reason
    assert "if x.sum() > 0:" in reason
    assert "/" not in reason


def test_hooks_are_seen() -> None:
    class Hooked(Mlp):
        """A hook that is no layer: the unit is not homogeneous after all."""

        def __init__(self) -> None:
            super().__init__()
            self.layers[0].register_forward_hook(lambda module, args, output: output + 1.0)

    search = find_symmetries(randomise(Hooked()), torch.randn(4, 6), kinds=[LAYER, UNIT])
    assert [s.sites for s in search.found] == [("layers.1 -> layers.2",)] * 2
    assert "add" in dict(search.rejected)["layers.0"]


def test_casts_inside_and_other_outputs_do_not_hide_a_symmetry() -> None:
    class FixedDtype(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.half()).float()

    class Dictionary(Mlp):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": super().forward(x)}

    for model in (FixedDtype(), Dictionary()):
        assert {s.kind for s in find_symmetries(model, torch.randn(4, 6)).found} >= {LAYER, UNIT}


def test_a_wrong_finder_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kind whose map forgets the bias is proposed, and does not come back."""
    from flatminima.symmetries import relu, search

    def find(network: Network) -> Findings:
        right = relu.find(network).proposed[1]
        place = right.places[0]
        assert isinstance(place, Rescaling)
        forgetful = Rescaling(place.name, place.units, (place.entries[0], *place.entries[2:]), log_uniform)
        return Findings((Symmetry(UNIT, "", (forgetful, right.places[1])),), ())

    monkeypatch.setattr(search, "FINDERS", (search.Finder((UNIT,), find),))
    found = find_symmetries(randomise(Mlp()), torch.randn(4, 6))
    assert [(s.kind, s.sites) for s in found.found] == [(UNIT, ("layers.1 -> layers.2",))]
    site, reason = found.rejected[0]
    assert site == "layers.0 -> layers.1"
    assert reason.startswith(f"not function preserving: {UNIT} changes the outputs by")


# ------------------------------------------------------------------------------------------------------------- errors


def test_bad_example_inputs_are_refused() -> None:
    with pytest.raises(TypeError, match="example_input is list; expected one tensor"):
        find_symmetries(Mlp(), [1.0])
    with pytest.raises(ValueError, match="at least one row"):
        find_symmetries(Mlp(), torch.empty(0, 6))
    with pytest.raises(ValueError, match=r"Mlp fails on example_input of shape \(4, 5\)"):
        find_symmetries(Mlp(), torch.randn(4, 5))


def test_member_of_another_network_is_refused_with_nothing_written() -> None:
    member = rescalings(Mlp(), torch.randn(4, 6))[1].member(generator())
    other = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    with pytest.raises(ValueError, match="unknown to Sequential"):
        member.apply_(other)
    wider = Mlp()
    wider.layers[2] = nn.Linear(9, 3)
    before = flat(wider)
    with pytest.raises(ValueError, match=r"'layers.2.weight' has shape \(3, 9\)"):
        member.apply_(wider)
    assert torch.equal(flat(wider), before)


def test_overflow_is_named_with_nothing_written() -> None:
    model = Mlp().half()
    model.layers[0].weight.data.fill_(6e4)
    before = flat(model)
    member = Member(UNIT, "", (Scale("layers.0.bias", torch.tensor(2.0)), Scale("layers.0.weight", torch.tensor(2.0))))
    with pytest.raises(OverflowError, match=r"'layers.0.weight' out of the range of torch.float16"):
        member.apply_(model)
    assert torch.equal(flat(model), before)


@pytest.mark.parametrize("max_scale", [1.0, 0.5, -2.0, math.inf, math.nan])
def test_max_scale_is_checked(max_scale: float) -> None:
    symmetry = rescalings(Mlp(), torch.randn(4, 6))[0]
    with pytest.raises(ValueError, match="expected a finite number above 1"):
        symmetry.member(generator(), max_scale)


def test_proof_names_outputs_that_cannot_be_compared() -> None:
    model = Mlp()
    member = rescalings(model, torch.randn(4, 6))[0].member(generator())
    with pytest.raises(ValueError, match="not finite"):
        prove(model, member, torch.full((4, 6), math.nan))
    with pytest.raises(ValueError, match="empty"):
        prove(model, member, torch.empty(0, 6))


def test_proof_of_a_constant_zero_model() -> None:
    model = nn.Linear(2, 1, bias=False)
    model.weight.data.zero_()
    shift = Member("scale of zero", "", (Scale("weight", torch.tensor(2.0)),))
    assert prove(model, shift, torch.ones(1, 2)).max_change == 0.0
    model.weight.data.fill_(1.0)
    assert prove(model, shift, torch.ones(1, 2)).max_change == 1.0


# --------------------------------------------------------------------------------------------------------------- laws


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), max_scale=st.floats(1.01, 1e3), units=st.integers(1, 200))
def test_scales_are_reproducible_and_within_bounds(seed: int, max_scale: float, units: int) -> None:
    scales = log_uniform(generator(seed), max_scale, units)
    assert torch.equal(scales, log_uniform(generator(seed), max_scale, units))
    assert bool((scales <= max_scale * (1 + 1e-12)).all())
    assert bool((scales >= (1 - 1e-12) / max_scale).all())


def test_scales_are_log_uniform() -> None:
    logs = log_uniform(generator(), 20.0, 200_000).log() / math.log(20.0)
    # Uniform on [-1, 1]: mean 0, second moment 1/3, fourth 1/5; six standard errors.
    for power, moment in ((1, 0.0), (2, 1 / 3), (4, 1 / 5)):
        sample = logs**power
        assert float(sample.mean()) == pytest.approx(moment, abs=6 * float(sample.std()) / math.sqrt(200_000))


def test_search_is_readable() -> None:
    layer, _ = rescalings(Mlp(), torch.randn(4, 6))
    assert repr(layer) == (
        "Symmetry(kind='relu-layer-rescaling', sites=('layers.0 -> layers.1', 'layers.1 -> layers.2'))"
    )
    assert layer.member(generator()).description == f"{LAYER} at 2 sites, scales in [1/20, 20]"


def test_layer_kind_has_one_scale_and_unit_kind_one_per_unit() -> None:
    model, x = Mlp(), torch.randn(4, 6)
    layer, unit = rescalings(model, x)
    ones = copy.deepcopy(model).double()
    for parameter in ones.parameters():
        parameter.data.fill_(1.0)
    rows = {s.kind: s.member(generator()).apply(ones).get_parameter("layers.0.weight")[:, 0] for s in (layer, unit)}
    assert len(rows[LAYER].unique()) == 1
    assert len(rows[UNIT].unique()) == 5


@settings(max_examples=20, deadline=None)
@given(
    widths=st.lists(st.integers(1, 6), min_size=3, max_size=5),
    seed=st.integers(0, 10_000),
    max_scale=st.floats(1.5, 100.0),
    bias=st.booleans(),
)
def test_any_relu_chain_is_preserved(widths: list[int], seed: int, max_scale: float, bias: bool) -> None:
    torch.manual_seed(seed)
    modules: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        modules += [nn.Linear(fan_in, fan_out, bias=bias), nn.ReLU()]
    model = nn.Sequential(*modules[:-1])
    x = torch.randn(8, widths[0])
    found = rescalings(model, x)
    for symmetry in found:
        assert len(symmetry.sites) == len(widths) - 2
        assert prove(model, symmetry.member(generator(seed), max_scale), x).max_change <= 1e-12
    assert len(found) == 2


@settings(max_examples=30, deadline=None)
@given(
    channels=st.integers(1, 4),
    side=st.integers(2, 5),
    rows=st.integers(1, 3),
    seed=st.integers(0, 10_000),
    head=st.sampled_from(["flatten", "pool", "mean", "keepdim", "two means", "regroup"]),
)
def test_any_way_from_channels_to_columns(channels: int, side: int, rows: int, seed: int, head: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, channels, 1)
            self.fc = nn.LazyLinear(2)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.conv(x))
            if head == "flatten":
                x = x.flatten(1)
            elif head == "pool":
                x = F.max_pool2d(x, 2).reshape(x.shape[0], -1)
            elif head == "mean":
                x = x.mean((-1, -2))
            elif head == "keepdim":
                x = x.amax(dim=2, keepdim=True).flatten(1)
            elif head == "two means":
                x = x.sum(3).mean(2)
            else:
                x = x.view(x.size(0), channels * side, side).mean(2)
            return self.fc(x)

    torch.manual_seed(seed)
    model, x = Net(), torch.randn(rows, 2, side, side)
    model(x)
    found = rescalings(model, x)
    assert [s.sites for s in found] == [("conv -> fc",)] * 2
    fresh = torch.randn(rows, 2, side, side)
    assert all(prove(model, s.member(generator(seed)), fresh).preserved for s in found)
