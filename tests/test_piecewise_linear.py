"""The exact diagonal and trace against dense Hessians in float64, and the networks they must refuse."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flatminima.curvature import output_curvature as output_module
from flatminima.curvature import piecewise_linear, row_squares
from flatminima.curvature.output_curvature import output_curvature
from flatminima.curvature.piecewise_linear import NotAffineError, exact_diagonal, exact_sums, exact_trace, why_not
from flatminima.objective import NonFiniteLossError, Objective
from flatminima.problems import DeepMatrixFactorization

VECTORS = json.loads((Path(__file__).parent / "vectors" / "weakness_relu.json").read_text())
ROWS, CLASSES = 7, 3


def doubles(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def labels() -> Tensor:
    return torch.arange(ROWS) * 5 % CLASSES


def randomise(model: nn.Module) -> nn.Module:
    """Double precision, away from zero biases, unit gains and fresh running statistics."""
    model.double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
        for module in model.modules():
            if getattr(module, "running_var", None) is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
    return model


def dense_diagonal(f: Objective) -> Tensor:
    return f.hvp(torch.eye(f.n, dtype=torch.float64)).diagonal()


# ----- networks it applies to -----------------------------------------------------------------------------------------


class Residual(nn.Module):
    """In-place activations, a residual sum in place, concatenation, functional pooling, grouped and padded convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3, padding="same", groups=2, padding_mode="reflect")
        self.act, self.slope = nn.ReLU(inplace=True), nn.PReLU(4)
        self.head = nn.Linear(8 * 4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.first(x)))
        y = self.second(x)
        y += x
        y = self.slope(y)
        y = torch.cat([F.max_pool2d(y, 2), 0.5 * F.avg_pool2d(y, 2)], dim=1)
        out: Tensor = self.head(y.view(y.size(0), -1))
        return out


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(3, 4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        h = torch.maximum(self.a(x), self.b(input=y))
        if mask is not None:
            h = h * mask
        out: Tensor = self.head(F.dropout(h, 0.5, training=self.training) * (x.sum(1, keepdim=True) > 0))
        return out


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4, bias=False), nn.LeakyReLU(), nn.Linear(4, 3)),
        lambda: doubles(ROWS, 5),
    ),
    "residual": (Residual, lambda: doubles(ROWS, 2, 4, 4)),
    "1d, transposed": (
        lambda: nn.Sequential(
            nn.Conv1d(2, 4, 3, stride=2, dilation=2),
            nn.BatchNorm1d(4),
            nn.ReLU6(),
            nn.ConvTranspose1d(4, 6, 4, stride=3, padding=1, output_padding=2, groups=2, dilation=2),
            nn.Hardtanh(),
            nn.AdaptiveAvgPool1d(1),
            nn.Flatten(),
            nn.PReLU(),
            nn.Dropout(0.5),
            nn.BatchNorm1d(6),
            nn.Linear(6, 3),
        ),
        lambda: doubles(ROWS, 2, 11),
    ),
    "2d, transposed, many positions": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(2, 2, 3, stride=2, bias=False), nn.ReLU(), nn.Conv2d(2, 3, 2), nn.ReLU(),
            nn.AdaptiveMaxPool2d(1), nn.Flatten(),
        ),
        lambda: doubles(ROWS, 2, 3, 4),
    ),
    "3d": (
        lambda: nn.Sequential(
            nn.Conv3d(2, 4, (2, 3, 1), padding=(1, 0, 2), groups=2, padding_mode="circular"), nn.ReLU(),
            nn.BatchNorm3d(4, affine=False), nn.MaxPool3d(2), nn.ConvTranspose3d(4, 3, 2), nn.LeakyReLU(),
            nn.AdaptiveAvgPool3d(1), nn.Flatten(),
        ),
        lambda: doubles(ROWS, 2, 4, 5, 3),
    ),
    "tokens": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3), nn.Flatten(), nn.Linear(12, 3)),
        lambda: doubles(ROWS, 4, 4),
    ),
    "tokens packed into rows": (
        lambda: nn.Sequential(
            nn.Flatten(0, 1), nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.PReLU(5), nn.Linear(5, 3),
            nn.Unflatten(0, (-1, 4)), nn.Flatten(), nn.Linear(12, 3),
        ),
        lambda: doubles(ROWS, 4, 4),
    ),
    "frames packed into rows": (
        lambda: nn.Sequential(
            nn.Flatten(0, 1), nn.Conv1d(2, 2, 2), nn.BatchNorm1d(2), nn.ReLU(), nn.ConvTranspose1d(2, 1, 2),
            nn.Unflatten(0, (-1, 3)), nn.Flatten(), nn.Linear(9, 3),
        ),
        lambda: doubles(ROWS, 3, 2, 3),
    ),
    "two inputs": (TwoInputs, lambda: (doubles(ROWS, 3), doubles(ROWS, 3))),
}  # fmt: skip


def gaussian(output: Tensor, target: Tensor) -> Tensor:
    """No common form; its curvature has negative eigenvalues."""
    return (output.sin().prod(1) + output.square().sum(1).add(0.1).sqrt() * target).mean()


LOSSES: dict[str, tuple[Callable[[Any, Any], Tensor], Callable[[], Tensor]]] = {
    "cross entropy": (F.cross_entropy, labels),
    "label smoothing": (nn.CrossEntropyLoss(label_smoothing=0.1), labels),
    "soft targets": (F.cross_entropy, lambda: doubles(ROWS, CLASSES).softmax(1)),
    "squared error": (F.mse_loss, lambda: doubles(ROWS, CLASSES)),
    "binary cross entropy": (F.binary_cross_entropy_with_logits, lambda: doubles(ROWS, CLASSES).sigmoid()),
    "no common form": (gaussian, labels),
}


@pytest.fixture(params=list(NETWORKS))
def network(request: pytest.FixtureRequest) -> tuple[nn.Module, Any]:
    torch.manual_seed(list(NETWORKS).index(request.param))
    build, inputs = NETWORKS[request.param]
    return randomise(build()), inputs()


@pytest.mark.parametrize(("loss", "micro_batch"), [("cross entropy", None), *((loss, 3) for loss in LOSSES)])
def test_diagonal_and_trace_match_the_dense_hessian(network: Any, loss: str, micro_batch: int | None) -> None:
    model, inputs = network
    loss_fn, targets = LOSSES[loss]
    f = Objective(model, loss_fn, (inputs, targets()), micro_batch=micro_batch)  # 3, 3 and 1 rows
    assert why_not(f) is None
    expected = dense_diagonal(f)
    scale = float(expected.abs().max())
    assert scale > 1e-4
    diagonal = exact_diagonal(f)
    assert diagonal.values.dtype == torch.float64
    torch.testing.assert_close(diagonal.values, expected, rtol=1e-10, atol=1e-12 * scale)
    trace = exact_trace(f)
    assert trace.value == pytest.approx(float(expected.sum()), rel=1e-10, abs=1e-12 * scale)
    assert trace.method == "exact"
    assert trace.error < 1e-12 * float(expected.abs().sum())
    traces = exact_sums(f, diagonal=False).traces
    for name, block in f.split(expected).items():
        assert traces[name] == pytest.approx(float(block.sum()), rel=1e-10, abs=1e-12 * scale)


def test_small_chunks_change_nothing(network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = network
    f = Objective(
        model, nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0, 0.5]).double()), (inputs, labels()), micro_batch=ROWS
    )
    whole = exact_diagonal(f).values
    monkeypatch.setattr(row_squares, "_CHUNK", 1)
    torch.testing.assert_close(exact_diagonal(f).values, whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(whole, dense_diagonal(f), rtol=1e-10, atol=1e-12 * float(whole.max()))


@pytest.mark.parametrize("point", list(VECTORS["points"]))
def test_published_vectors(point: str) -> None:
    setup, expected = VECTORS["setup"], VECTORS["points"][point]
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    w1, b1, w2, b2 = (torch.tensor(setup["params"][k], dtype=torch.float64) for k in ("W1", "b1", "W2", "b2"))
    kind, _, number = point.partition("=")
    if kind == "layer_alpha":
        w1, b1, w2 = float(number) * w1, float(number) * b1, w2 / float(number)
    elif kind == "neuron_D":
        scales = torch.tensor(json.loads(number), dtype=torch.float64)
        w1, b1, w2 = scales[:, None] * w1, scales * b1, w2 / scales
    elif kind == "temperature_x3":
        w2, b2 = 3 * w2, 3 * b2
    with torch.no_grad():
        for p, value in zip(model.parameters(), (w1, b1, w2, b2), strict=True):
            p.copy_(value)
    x, y = torch.tensor(setup["X"], dtype=torch.float64), torch.tensor(setup["y"])
    f = Objective(model, F.cross_entropy, (x, y))
    assert f.loss() == pytest.approx(expected["loss"], rel=1e-9)
    assert exact_trace(f).value == pytest.approx(expected["trace"], rel=1e-9)
    traces = exact_sums(f, diagonal=False).traces
    names = {"0.weight": "tr_W1", "0.bias": "tr_b1", "2.weight": "tr_W2", "2.bias": "tr_b2"}
    assert {names[k]: v for k, v in traces.items()} == pytest.approx({k: expected[k] for k in names.values()}, rel=1e-9)
    weighted = f.point().square() @ exact_diagonal(f).values
    assert float(weighted) == pytest.approx(expected["sum_w2_Hii"], rel=1e-9)


@given(
    sizes=st.lists(st.integers(1, 4), min_size=2, max_size=4),
    rows=st.integers(1, 6),
    classes=st.integers(1, 4),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_any_small_relu_network(sizes: list[int], rows: int, classes: int, seed: int) -> None:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b, bias=seed % 2 == 0), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(sizes[-1], classes)).double()
    f = Objective(
        model, F.cross_entropy, (doubles(rows, sizes[0]), torch.randint(classes, (rows,))), micro_batch=4, check=False
    )
    torch.testing.assert_close(exact_diagonal(f).values, dense_diagonal(f), rtol=1e-10, atol=1e-14)


# ----- selection, weighting, precision --------------------------------------------------------------------------------


def mlp() -> nn.Sequential:
    torch.manual_seed(3)
    return randomise(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, CLASSES)))


@pytest.mark.parametrize("chosen", [("0.bias",), ("0.weight", "2.bias"), ("2.weight",)])
def test_only_the_selected_parameters(chosen: tuple[str, ...]) -> None:
    f = Objective(mlp(), F.cross_entropy, (doubles(ROWS, 4), labels()), parameters=lambda name, _: name in chosen)
    torch.testing.assert_close(exact_diagonal(f).values, dense_diagonal(f), rtol=1e-10, atol=1e-14)
    assert exact_trace(f).value == pytest.approx(float(dense_diagonal(f).sum()), rel=1e-10)
    assert tuple(exact_sums(f).traces) == chosen


def test_a_frozen_trunk_may_be_anything() -> None:
    trunk = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 5))
    model = randomise(nn.Sequential(trunk, nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, CLASSES)))
    trunk.requires_grad_(False)
    f = Objective(model, F.cross_entropy, (doubles(ROWS, 4), labels()))
    assert why_not(f) is None
    torch.testing.assert_close(exact_diagonal(f).values, dense_diagonal(f), rtol=1e-10, atol=1e-14)
    trunk.requires_grad_(True)
    assert (
        why_not(Objective(model, F.cross_entropy, (doubles(ROWS, 4), labels()))) == "layer norm: nn.LayerNorm at '0.1'"
    )


def test_parameters_that_are_not_used_have_zero_curvature() -> None:
    model = TwoInputs().double()
    model.add_module("spare", nn.Linear(2, 2).double())
    f = Objective(model, F.cross_entropy, ((doubles(ROWS, 3), doubles(ROWS, 3)), labels()))
    assert exact_sums(f).traces["spare.weight"] == 0.0
    torch.testing.assert_close(exact_diagonal(f).values, dense_diagonal(f), rtol=1e-10, atol=1e-14)


def test_masked_targets_count_nothing() -> None:
    targets = labels()
    targets[[0, 1, 5]] = -100
    f = Objective(mlp(), F.cross_entropy, (doubles(ROWS, 4), targets), micro_batch=3)
    torch.testing.assert_close(exact_diagonal(f).values, dense_diagonal(f), rtol=1e-10, atol=1e-14)


def test_single_precision_keeps_its_digits_at_confident_outputs() -> None:
    model = mlp()
    with torch.no_grad():
        model[2].weight.mul_(8)
    x, y = doubles(ROWS, 4), labels()
    expected = exact_diagonal(Objective(model, F.cross_entropy, (x, y))).values
    f = Objective(model.float(), F.cross_entropy, (x.float(), y))
    found = exact_diagonal(f)
    assert float((found.values - expected).norm() / expected.norm()) < 1e-4


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_loss_has_no_natural_unit(scale: float) -> None:
    model, data = mlp(), (doubles(ROWS, 4), labels())
    plain = exact_diagonal(Objective(model, F.cross_entropy, data)).values
    scaled = exact_diagonal(Objective(model, lambda o, t: scale * F.cross_entropy(o, t), data)).values
    torch.testing.assert_close(scaled, scale * plain, rtol=1e-10, atol=0)


def test_a_loss_without_curvature() -> None:
    f = Objective(mlp(), lambda o, _: o.mean(), (doubles(ROWS, 4), labels()))
    assert not exact_diagonal(f).values.any()
    assert exact_trace(f).value == 0.0


# ----- the curvature of the loss --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("loss", "form", "count"), [
    ("cross entropy", "_Softmax", 2), ("label smoothing", "_Softmax", 2), ("soft targets", "_Softmax", 2),
    ("squared error", "_Diagonal", 3), ("binary cross entropy", "_Diagonal", 3), ("no common form", "_Dense", 3),
])  # fmt: skip
def test_factors_add_up_to_the_hessian_of_the_loss(loss: str, form: str, count: int) -> None:
    torch.manual_seed(5)
    loss_fn, targets = LOSSES[loss]
    y, at = targets(), doubles(ROWS, CLASSES)
    found = output_curvature(lambda o: loss_fn(o, y), at)
    assert (type(found).__name__, found.count) == (form, count)
    assert isinstance(found, getattr(output_module, form))
    dense = torch.autograd.functional.hessian(lambda o: loss_fn(o, y), at)
    total = torch.zeros(ROWS, CLASSES, CLASSES, dtype=torch.float64)
    for vector, signs in found.factors(slice(0, ROWS)):
        squares = vector[:, :, None] * vector[:, None, :]
        total += squares if signs is None else squares * signs[:, None, None]
    for i in range(ROWS):
        torch.testing.assert_close(total[i], dense[i, :, i], rtol=1e-10, atol=1e-14)


def test_factors_at_certain_outputs_are_finite() -> None:
    outputs = torch.tensor([[800.0, 0.0, -800.0], [0.0, 0.0, 800.0], [0.0, 1.0, 2.0]], dtype=torch.float64)
    found = output_curvature(lambda o: F.cross_entropy(o, torch.tensor([0, 2, 1])), outputs)
    for vector, _ in found.factors(slice(0, 3)):
        assert vector.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("margin", [15.0, 20.0, 25.0, 40.0])
def test_rows_of_a_network_that_is_certain_are_not_taken_for_coupled(margin: float, dtype: torch.dtype) -> None:
    # As a network that fits its few rows to a loss of 1e-9: what is left of the curvature is rounding.
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        y = torch.randint(0, 10, (4,), generator=generator)
        outputs = (3 * torch.randn(4, 10, generator=generator) + margin * F.one_hot(y, 10)).to(dtype)
        found = output_curvature(lambda o, y=y: F.cross_entropy(o, y), outputs)
        dense = torch.autograd.functional.hessian(lambda o, y=y: F.cross_entropy(o, y), outputs.double())
        total = sum(
            (v[:, :, None] * v[:, None, :] * (1.0 if s is None else s[:, None, None])).double()
            for v, s in found.factors(slice(0, 4))
        )
        for i in range(4):
            torch.testing.assert_close(total[i], dense[i, :, i], rtol=1e-3, atol=1e3 * torch.finfo(dtype).eps)


def test_focal_loss_is_not_taken_for_cross_entropy() -> None:
    def focal(output: Tensor, target: Tensor) -> Tensor:
        p = output.softmax(1).gather(1, target[:, None])[:, 0]
        return -((1 - p) ** 2 * p.log()).mean()

    f = Objective(mlp(), focal, (doubles(ROWS, 4), labels()))
    torch.testing.assert_close(exact_diagonal(f).values, dense_diagonal(f), rtol=1e-10, atol=1e-12)


# ----- refusals -------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, CLASSES)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.b(self.a(x).relu()).relu())
        return out


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.a(self.a(x).relu()).relu())
        return out


class Gated(nn.Module):
    def __init__(self, gate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.head, self.gate = nn.Linear(4, 4), nn.Linear(4, CLASSES), gate

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        out: Tensor = self.head(h * self.gate(h))
        return out


class Loose(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(CLASSES, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.w), self.w.T).matmul(self.w.T)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None].expand(-1, 3, -1)
        out: Tensor = self.head(self.attention(x, x, x)[0].mean(1))
        return out


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.a(x)
        return out if out.sum() > 0 else -out


class Quotient(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return 1.0 / (3.0 + self.a(x).relu())


class MeanOverRows(nn.Module):
    """Subtracts the mean of the batch: every row depends on all."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.a(x)
        return h - h.mean(0)


class RowsSecond(nn.Module):
    """Tokens first, rows second, inside."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(2, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.a(x.reshape(-1, 2, 2).transpose(0, 1).reshape(-1, 2))
        return h.reshape(2, -1, CLASSES).sum(0)


def head(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), *layers, nn.Linear(4, CLASSES))


def hooked() -> nn.Module:
    model = mlp()
    model[0].register_forward_hook(lambda module, args, output: output.tanh())
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "GELU": (lambda: head(nn.GELU()), r"smooth activation: nn\.GELU at '1'"),
    "SiLU": (lambda: head(nn.SiLU()), r"smooth activation: nn\.SiLU at '1'"),
    "tanh": (lambda: head(nn.Tanh()), r"smooth activation: nn\.Tanh at '1'"),
    "ELU": (lambda: head(nn.ELU()), r"nn\.ELU at '1'"),
    "Hardswish": (lambda: head(nn.Hardswish()), r"nn\.Hardswish at '1'"),
    "LayerNorm": (lambda: head(nn.LayerNorm(4)), r"layer norm: nn\.LayerNorm at '1'"),
    "GroupNorm": (lambda: head(nn.GroupNorm(2, 4)), r"group norm: nn\.GroupNorm at '1'"),
    "tied": (Tied, r"the weight of 'a' is also the weight of 'b'"),
    "twice": (Twice, r"'a' are used 2 times"),
    "sigmoid gate": (lambda: Gated(torch.sigmoid), r"sigmoid"),
    "product of branches": (lambda: Gated(torch.relu), r"multiplies two results"),
    "square": (lambda: Gated(lambda h: h), r"multiplies two results"),
    "loose parameter": (Loose, r"'w' is used outside a layer"),
    "attention": (Attention, r"attention: nn\.MultiheadAttention at 'attention'"),
    "softmax": (lambda: head(nn.Softmax(1)), r"softmax: nn\.Softmax at '1'"),
    "softmax output": (lambda: nn.Sequential(nn.Linear(4, CLASSES), nn.LogSoftmax(1)), r"softmax: nn\.LogSoftmax at '1'"),
    "statistics of the batch": (lambda: head(nn.BatchNorm1d(4, track_running_stats=False)), r"statistics of the batch"),
    "quotient": (Quotient, r"divides by a result"),
    "branch on a value": (Branching, r"untraceable: torch\.fx cannot follow Branching"),
    "hook": (hooked, r"hooks may change"),
    "weight norm": (lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, CLASSES))), r"at '0'"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(REFUSED))
def test_false_friends_are_refused_by_name(name: str) -> None:
    build, reason = REFUSED[name]
    torch.manual_seed(0)
    f = Objective(build().double(), F.cross_entropy, (doubles(ROWS, 4), labels()), check=False)
    found = why_not(f)
    assert found is not None
    assert re.search(reason, found), found
    for call in (exact_diagonal, exact_trace):
        with pytest.raises(NotAffineError, match=r"does not apply: .*estimate it with diagonal"):
            call(f)


@pytest.mark.parametrize("build", [MeanOverRows, RowsSecond])
def test_rows_that_cannot_be_told_apart_are_refused(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    f = Objective(build().double(), F.cross_entropy, (doubles(ROWS, 4), labels()), check=False)
    with pytest.raises(NotAffineError, match=r"depends on the other rows, or rows do not come first"):
        exact_diagonal(f, prove=False)


def test_a_loss_that_couples_rows_is_refused() -> None:
    f = Objective(mlp(), lambda o, t: F.mse_loss(o, t).sqrt(), (doubles(ROWS, 4), doubles(ROWS, CLASSES)), check=False)
    with pytest.raises(NotAffineError, match=r"outputs of other rows"):
        exact_trace(f)


def test_train_mode() -> None:
    data = (doubles(ROWS, 4), labels())
    for layer, reason in ((nn.BatchNorm1d(4), "BatchNorm1d"), (nn.Dropout(0.3), "Dropout")):
        model = head(layer, nn.ReLU()).double()
        assert reason in str(why_not(Objective(model, F.cross_entropy, data, mode="train", check=False)))
        assert why_not(Objective(model, F.cross_entropy, data)) is None
    f = Objective(mlp(), F.cross_entropy, data, mode="train")
    torch.testing.assert_close(exact_diagonal(f).values, dense_diagonal(f), rtol=1e-10, atol=1e-14)


def test_a_model_that_returns_several_tensors_is_refused() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, CLASSES)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), x

    f = Objective(Two().double(), lambda o, t: F.cross_entropy(o[0], t), (doubles(ROWS, 4), labels()))
    assert why_not(f) == "the model returns a tuple, not one tensor"


def test_a_nan_loss_is_named() -> None:
    model = mlp()
    with torch.no_grad():
        model[0].bias[0] = float("inf")
    f = Objective(model, F.cross_entropy, (doubles(ROWS, 4), labels()), check=False)
    with pytest.raises(NonFiniteLossError, match="batch 0"):
        exact_trace(f)


# ----- the proof, and what is left behind -----------------------------------------------------------------------------


def test_the_proof_catches_what_the_list_lets_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(piecewise_linear, "why_not_affine", lambda *_: None)
    torch.manual_seed(0)
    data = (doubles(ROWS, 4), labels())
    for model in (head(nn.GELU()), Gated(torch.sigmoid), head(nn.Tanh())):
        f = Objective(model.double(), F.cross_entropy, data)
        with pytest.raises(NotAffineError, match="the proof failed"):
            exact_trace(f)
        exact_trace(f, prove=False)


def test_the_model_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp().train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    f = Objective(model, F.cross_entropy, (doubles(ROWS, 4), labels()))
    state = torch.get_rng_state()

    def untouched() -> bool:
        same = all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
        hooks = any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        grads = any(p.grad is not None for p in model.parameters())
        flags = all(m.training for m in model.modules())
        return same and not hooks and not grads and flags and torch.equal(torch.get_rng_state(), state)

    exact_diagonal(f)
    assert untouched()

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("in the middle")

    monkeypatch.setattr(row_squares, "squares", broken)
    with pytest.raises(RuntimeError, match="in the middle"):
        exact_diagonal(f)
    assert untouched()


def test_under_no_grad() -> None:
    f = Objective(mlp(), F.cross_entropy, (doubles(ROWS, 4), labels()))
    with torch.no_grad():
        value = exact_trace(f).value
    assert value == exact_trace(f).value > 0


def test_the_result_prints_and_says_what_it_cost() -> None:
    found = exact_trace(Objective(mlp(), F.cross_entropy, (doubles(ROWS, 4), labels())))
    assert (found.products, found.converged, found.probes) == (0, True, 0)
    assert found.gradient_equivalents == pytest.approx(1 / 3 + 2 / 3 * 2)
    assert "exact" in str(found)
    assert found.to_dict()["method"] == "exact"


def test_parameters_that_the_graph_does_not_show_are_refused() -> None:
    f = DeepMatrixFactorization([doubles(3, 2), doubles(2, 3)]).objective()
    assert "held outside a layer of torch.nn" in str(why_not(f))


def test_a_change_in_place_is_followed() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branches = nn.ModuleList([nn.Linear(4, CLASSES) for _ in range(6)])
            self.v = nn.Linear(4, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            out = sum(branch(x) for branch in self.branches)
            h = self.v(x)
            u = x[:, :CLASSES] * 0
            u.add_(h)
            result: Tensor = out + 3 * u * h
            return result

    f = Objective(InPlace().double(), F.cross_entropy, (doubles(ROWS, 4), labels()))
    assert "multiplies two results" in str(why_not(f))


def test_many_outputs_are_left_to_probes() -> None:
    f = Objective(nn.Sequential(nn.Linear(4, 200)).double(), F.mse_loss, (doubles(ROWS, 4), doubles(ROWS, 200)))
    assert why_not(f) is None
    assert piecewise_linear.trace_if_exact(f) is None
