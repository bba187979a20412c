"""Live units counted by hand, and the participation ratio against its formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatminima import Objective, measure
from flatminima.measures.simplicity import activation_ranges
from test_relative_flatness import mlp, objective

pytestmark = pytest.mark.usefixtures("one_thread")


def kill(layer: nn.Linear | nn.Conv1d, *units: int) -> None:
    """Units that are negative for all data, or constant."""
    with torch.no_grad():
        for unit in units:
            layer.weight[unit] = 0.0
            layer.bias[unit] = -1.0


def test_dead_units_are_counted_layer_by_layer() -> None:
    model = mlp()
    f = objective(model)
    kill(model[0], 0, 3)
    with torch.no_grad():
        model[2].weight[1], model[2].bias[1] = 0.0, 2.0  # always on, always the same
    found = measure(f, ["live_units"])["live_units"]
    x = f._pieces.first().inputs
    alive = [int((h.amax(0) > h.amin(0)).sum()) for h in (model[:2](x), model[:4](x))]
    assert alive == [3, 3] == [r.live for r in activation_ranges(f)]
    assert found.value == 6.0
    assert found.error == 0.0
    assert found.note == "1. relu: 3 of 5; 2. relu: 3 of 4"
    assert found.cost == pytest.approx(1 / 3)


class Mixed(nn.Module):
    """Activations as modules, functions and methods; channels first and last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.token, self.head = nn.Conv1d(2, 4, 2), nn.Linear(3, 5), nn.Linear(5, 3)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.conv(x.reshape(-1, 2, 4)))  # (rows, 4 channels, 3 positions)
        h = self.act(self.token(h))  # (rows, 4 tokens, 5 units)
        return self.head(h.mean(1).tanh())


def test_channels_and_tokens_are_told_apart() -> None:
    torch.manual_seed(0)
    model = Mixed()
    f = objective(model)
    kill(model.conv, 2)
    found = activation_ranges(f)
    assert [(r.function, len(r.low)) for r in found] == [("relu", 4), ("gelu", 5), ("tanh", 5)]
    assert [r.live for r in found] == [3, 5, 5]
    h = F.relu(model.conv(f._pieces.first().inputs.reshape(-1, 2, 4)))
    assert torch.allclose(found[0].high, h.amax((0, 2)))
    assert torch.allclose(found[0].low, h.amin((0, 2)))


def test_ranges_are_over_all_batches() -> None:
    model = mlp()
    f = objective(model)
    x, y = f._pieces.first().inputs, f._pieces.first().targets
    cut = Objective(model, F.cross_entropy, [(x[i : i + 1], y[i : i + 1]) for i in range(10)])
    for one, other in zip(activation_ranges(f), activation_ranges(cut), strict=True):
        assert torch.allclose(one.low, other.low)
        assert torch.allclose(one.high, other.high)


class Moody(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        return torch.relu(h) if float(x[0, 0].detach()) > 0 else h


def test_activations_that_depend_on_the_data_or_do_not_exist_are_refused() -> None:
    x = torch.randn(4, 8).double()
    x[:, 0] = torch.tensor([1.0, 1.0, -1.0, -1.0])
    y = torch.arange(4) % 3
    f = Objective(Moody().double(), F.cross_entropy, [(x[:2], y[:2]), (x[2:], y[2:])], check=False)
    assert "depend on the data" in measure(f, ["live_units"])["live_units"].note
    linear = objective(nn.Sequential(nn.Linear(8, 3)))
    assert "no activation function" in measure(linear, ["live_units"])["live_units"].note


def test_the_participation_ratio_is_that_of_the_covariance() -> None:
    model = mlp()
    f = objective(model)
    x, y = f._pieces.first().inputs, f._pieces.first().targets
    features = model[:4](x).detach().numpy()
    values = np.linalg.eigvalsh(np.cov(features.T))
    cut = Objective(model, F.cross_entropy, [(x[:7], y[:7]), (x[7:], y[7:])])
    for objective_ in (f, cut):
        found = measure(objective_, ["participation_ratio"])["participation_ratio"]
        assert found.value == pytest.approx(values.sum() ** 2 / (values**2).sum(), rel=1e-12)
        assert found.note == "of 4 features of layer '4'"
    assert 1 <= found.value <= 4


def test_features_of_known_dimension() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Identity(), nn.Linear(4, 3)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0])))
        net[0].bias.fill_(100.0)
    x = torch.cat([torch.eye(4), -torch.eye(4)]).double()
    f = Objective(net, F.cross_entropy, (x, torch.arange(8) % 3))
    assert measure(f, ["participation_ratio"])["participation_ratio"].value == pytest.approx(3.0)
    with torch.no_grad():
        net[0].weight.zero_()
    assert "the same for all rows" in measure(f, ["participation_ratio"])["participation_ratio"].note
