"""Trunk and tail: which layers form the region, and that cutting changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flatminima.models import build
from flatminima.optim.flat_region import FlatRegion
from flatminima.protocols.fewshot_base import on_outputs, picked
from flatminima.protocols.fewshot_network import EmbeddingNetwork
from flatminima.protocols.fewshot_released import released_loss
from flatminima.protocols.fewshot_settings import FewShotSettings
from flatminima.study.settings import SettingsError


def test_the_region_of_the_papers_networks() -> None:
    network = EmbeddingNetwork(build("resnet20", (3, 32, 32), 60), 4)
    assert network.names == ["10.conv1.weight", "10.conv2.weight", "11.conv1.weight", "11.conv2.weight"]
    assert len(network.trunk) == 10
    large = EmbeddingNetwork(build("resnet18", (3, 84, 84), 60, width=4, stem="imagenet"), 8)
    assert len(large.names) == 8
    assert not any("shortcut" in name or "norm" in name for name in large.names)
    assert large.names[0] == "8.conv1.weight"  # stages 3 and 4
    chosen = EmbeddingNetwork(build("resnet20", (3, 32, 32), 60, blocks=1), 4, ["5.norm*.weight", "5.conv2*"])
    assert chosen.names == ["5.norm1.weight", "5.conv2.weight", "5.norm2.weight"]


def test_cutting_a_network_changes_nothing() -> None:
    model = build("resnet20", (3, 16, 16), 5, blocks=1, width=4, seed=0).eval()
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = model(x)
    network = EmbeddingNetwork(model, 3).eval()
    z, outputs = network(x)
    torch.testing.assert_close(outputs, expected, rtol=0, atol=0)
    torch.testing.assert_close(network.embed(x), z, rtol=0, atol=0)
    torch.testing.assert_close(z, model[:-1](x), rtol=0, atol=0)
    assert sum(p.numel() for p in network.parameters()) == sum(p.numel() for p in model.parameters())
    assert len(network.features) + 2 == len(list(model.parameters()))


def test_other_models_and_names_that_match_nothing_are_refused() -> None:
    model = build("resnet20", (3, 8, 8), 5, blocks=1, width=4)
    with pytest.raises(
        SettingsError, match=r"--layer-names 'conv5\*' matches no parameter below the classifier; there are 0.w"
    ):
        EmbeddingNetwork(model, 2, ["conv5*"])
    with pytest.raises(SettingsError, match="--layers 9: the model has 7 convolutions larger than one pixel"):
        EmbeddingNetwork(model, 9)
    with pytest.raises(
        SettingsError, match="must be a sequence that ends in a linear layer, to have an embedding; got ReLU"
    ):
        EmbeddingNetwork(nn.ReLU(), 1)


class Small(nn.Module):
    """A convolution below a noised convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.low, self.high, self.head = nn.Conv2d(1, 3, 3), nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def tail(self, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z = self.high(h).tanh().mean((2, 3))
        return z, self.head(z)


class TailOf(nn.Module):
    def __init__(self, model: Small) -> None:
        super().__init__()
        self.high, self.head = model.high, model.head

    def forward(self, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z = self.high(h).tanh().mean((2, 3))
        return z, self.head(z)


def test_gradients_below_a_noised_convolution_are_those_of_finite_differences() -> None:
    """Noise through functional_call, the trunk's graph shared by all passes; the released swap is far off."""
    model = Small().double()
    x = torch.randn(6, 1, 7, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = torch.arange(6) % 2
    region = FlatRegion([model.high.weight], 0.2)
    noise = region.sample(2)
    tail = TailOf(model)

    def value() -> torch.Tensor:
        return region.loss(
            tail, torch.tanh(model.low(x)), y, on_outputs, prototype_weight=1.0, embedding=picked, noise=noise
        ).value

    found = torch.autograd.grad(value(), model.low.weight)[0]
    expected = torch.zeros_like(found)
    for index in range(found.numel()):
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                model.low.weight.view(-1)[index] += sign * 1e-6
                ends.append(value().item())
                model.low.weight.view(-1)[index] -= sign * 1e-6
        expected.view(-1)[index] = (ends[0] - ends[1]) / 2e-6
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    region.sample = lambda draws: noise  # type: ignore[method-assign]
    settings = FewShotSettings(swap_weights=True)
    before = model.high.weight.detach().clone()
    swapped = released_loss(region, tail, torch.tanh(model.low(x)), y, settings)
    assert swapped.item() == pytest.approx(value().item(), rel=1e-12)  # the value is right,
    wrong = torch.autograd.grad(swapped, model.low.weight)[0]
    assert (wrong - expected).norm() > 0.03 * expected.norm()  # the gradient below is not
    assert torch.equal(model.high.weight, before)
    right = released_loss(region, tail, torch.tanh(model.low(x)), y, FewShotSettings(constant_prototypes=True))
    plain = torch.stack(
        [F.cross_entropy(region.forward(tail, torch.tanh(model.low(x)), eps)[1], y) for eps in noise]
    ).mean()
    torch.testing.assert_close(
        *(torch.autograd.grad(v, model.low.weight)[0] for v in (right, plain)), rtol=1e-9, atol=1e-12
    )
