"""Relative flatness against its definition on a dense Hessian, layer by layer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatminima import MeasureOptions, Objective, measure
from flatminima.measures import NotApplicableError
from flatminima.measures.relative_flatness import relative_flatness_of

pytestmark = pytest.mark.usefixtures("one_thread")


def by_definition(f: Objective, layer: str) -> float:
    """sum over s, s' of <w_s, w_s'> tr H_(s)(s'), every entry of the Hessian formed."""
    block = f.restricted([f"{layer}.weight"])
    weight = block.point().reshape(f.model.get_submodule(layer).weight.shape).double().flatten(1)
    rows, columns = weight.shape
    hessian = block.hvp(torch.eye(block.n, dtype=f.dtype)).double().reshape(rows, columns, rows, columns)
    return float((torch.einsum("sjtj->st", hessian) * (weight @ weight.T)).sum())


class Sequence(nn.Module):
    """A layer that is used at every position, and a tied one."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.head = nn.Linear(4, 3), nn.Linear(3, 3)
        self.again = nn.Linear(3, 3)
        self.again.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.token(x.reshape(-1, 2, 4))).mean(1)
        return self.again(torch.relu(self.head(h)))


def objective(model: nn.Module, loss: object = F.cross_entropy) -> Objective:
    generator = torch.Generator().manual_seed(1)
    assert callable(loss)
    return Objective(model.double(), loss, (torch.randn(10, 8, generator=generator).double(), torch.arange(10) % 3))


def mlp(*, head: nn.Module | None = None, act: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(8, 5), act(), nn.Linear(5, 4), act(), nn.Linear(4, 3)]
    return nn.Sequential(*layers, *([] if head is None else [head]))


@pytest.mark.parametrize("act", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize(("layer", "method"), [("0", "row products"), ("2", "row products"), ("4", "closed form")])
def test_dense_layers(act: type[nn.Module], layer: str, method: str) -> None:
    f = objective(mlp(act=act))
    found = relative_flatness_of(f, layer)
    assert found.value == pytest.approx(by_definition(f, layer), rel=1e-11)
    assert (found.method, found.layer, found.converged) == (method, layer, True)
    assert found.error <= 1e-12 * abs(found.value)


def test_the_closed_form_of_the_last_layer_for_cross_entropy() -> None:
    model = mlp()
    f = objective(model)
    (x, _), w = (f._pieces.first().inputs, None), model[4].weight.detach()
    features = model[:4](x).detach()
    p = model(x).detach().softmax(1)
    h = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    plainly = float(((h * (w @ w.T)).sum((1, 2)) * (features**2).sum(1)).mean())
    assert relative_flatness_of(f).value == pytest.approx(plainly, rel=1e-12)


@pytest.mark.parametrize(
    ("model", "layer", "method"),
    [
        (mlp(head=nn.LogSoftmax(1)), "4", "row products"),
        (
            nn.Sequential(nn.Unflatten(1, (2, 4)), nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(9, 3)),
            "1", "weight products",
        ),
        (Sequence(), "token", "weight products"),
        (Sequence(), "head", "weight products"),
    ],
    ids=["log softmax", "convolution", "positions", "tied"],
)  # fmt: skip
def test_other_layers(model: nn.Module, layer: str, method: str) -> None:
    f = objective(model, F.nll_loss if isinstance(list(model.children())[-1], nn.LogSoftmax) else F.cross_entropy)
    found = relative_flatness_of(f, layer)
    assert found.value == pytest.approx(by_definition(f, layer), rel=1e-11)
    assert found.method == method


def test_batches_add_up() -> None:
    model = mlp()
    whole = objective(model)
    x, y = whole._pieces.first().inputs, whole._pieces.first().targets
    cut = Objective(model, F.cross_entropy, [(x[:7], y[:7]), (x[7:], y[7:])], micro_batch=4)
    for layer in ("0", "2", "4"):
        assert relative_flatness_of(cut, layer).value == pytest.approx(
            relative_flatness_of(whole, layer).value, rel=1e-12
        )


def test_probes_where_unit_vectors_are_too_many() -> None:
    model = nn.Sequential(nn.Unflatten(1, (2, 4)), nn.Conv1d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3))
    f = objective(model)
    exact = by_definition(f, "1")
    inside = 0
    for seed in range(20):
        found = relative_flatness_of(f, "1", dense_limit=1, max_products=20, rtol=1e-3, seed=seed)
        assert found.method == "probes"
        inside += abs(found.value - exact) <= 3 * found.error
    assert inside >= 19


def test_mixing_the_rows_of_a_layer_leaves_it_and_scaling_its_columns_does_not() -> None:
    """A two-layer linear network admits any invertible matrix between its layers."""
    torch.manual_seed(0)
    first, second = nn.Linear(8, 3, bias=False), nn.Linear(3, 3)
    f = objective(nn.Sequential(first, second))
    before = [relative_flatness_of(f, layer).value for layer in ("0", "1")]
    a = torch.randn(3, 3).double() + 2 * torch.eye(3).double()
    with torch.no_grad():
        first.weight.copy_(a @ first.weight)
        second.weight.copy_(second.weight @ torch.linalg.inv(a))
    after = [relative_flatness_of(f, layer).value for layer in ("0", "1")]
    assert after[0] == pytest.approx(before[0], rel=1e-9)
    assert abs(after[1] / before[1] - 1) > 0.05


def test_the_measure_takes_a_layer_by_name() -> None:
    f = objective(mlp())
    for layer in (None, "0"):
        found = measure(f, ["relative_flatness"], options=MeasureOptions(relative_flatness_layer=layer))[
            "relative_flatness"
        ]
        assert found.value == pytest.approx(relative_flatness_of(f, layer).value, rel=1e-14)
        assert f"layer {layer or '4'}," in found.note
    with pytest.raises(ValueError, match="unknown linear layer '3': expected one of"):
        relative_flatness_of(f, "3")


class Ends(nn.Module):
    """Ends in something else than a linear layer."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.layer = how, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "scaled":
            return 2 * self.layer(x)
        if self.how == "functional":
            return F.linear(x, self.layer.weight)
        return self.layer(torch.cat([self.layer(x), x[:, 3:]], 1))


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("scaled", "does not end in a linear layer: its output is not that of 'layer'"),
        ("functional", "no nn.Linear layer"),
        ("twice", "'layer' is used 2 times"),
    ],
)
def test_a_model_without_a_linear_last_layer_is_refused(how: str, reason: str) -> None:
    f = objective(Ends(how))
    with pytest.raises(NotApplicableError, match=reason):
        relative_flatness_of(f)
    for name in ("relative_flatness", "participation_ratio"):
        assert reason in measure(f, [name])[name].note
    # The layer by its name has a value all the same: its block of the Hessian.
    assert relative_flatness_of(f, "layer").value == pytest.approx(by_definition(f, "layer"), rel=1e-11)


def test_a_tied_last_layer_is_refused_without_a_name() -> None:
    f = objective(Sequence())
    with pytest.raises(NotApplicableError, match=r"again.weight is tied to head.weight"):
        relative_flatness_of(f)


def test_a_frozen_last_layer_is_refused_and_the_features_are_there_all_the_same() -> None:
    f = objective(mlp()).restricted(["0.weight"])
    with pytest.raises(NotApplicableError, match="the last layer '4' is not among the selected"):
        relative_flatness_of(f)
    assert measure(f, ["participation_ratio"])["participation_ratio"].applies
