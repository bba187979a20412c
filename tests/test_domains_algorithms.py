from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from domains_fixture import tiny_settings
from flatminima.models import build
from flatminima.protocols.domains_algorithms import batch_loss, coral_loss, mixup_loss, split_model
from flatminima.study.settings import SettingsError

Parts = list[tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture
def parts() -> Parts:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(7, 5, generator=generator).double() * (i + 1), torch.randint(3, (7,), generator=generator))
        for i in range(3)
    ]


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def test_erm_is_the_mean_over_domains(parts: Parts, model: nn.Sequential) -> None:
    for algorithm in ("erm", "sam"):
        loss = batch_loss(algorithm, tiny_settings(), model, parts, np.random.default_rng(0))()
        assert loss.item() == pytest.approx(np.mean([F.cross_entropy(model(x), y).item() for x, y in parts]))


def test_coral_is_the_formula(parts: Parts, model: nn.Sequential) -> None:
    penalties = []
    features = [model[1](model[0](x)).detach().numpy() for x, _ in parts]
    for a in range(3):
        for b in range(a + 1, 3):
            means = np.mean((features[a].mean(0) - features[b].mean(0)) ** 2)
            covariances = np.mean((np.cov(features[a].T) - np.cov(features[b].T)) ** 2)
            penalties.append(means + covariances)
    plain = batch_loss("erm", tiny_settings(), model, parts, np.random.default_rng(0))().item()
    assert coral_loss(model, parts, 2.5).item() == pytest.approx(plain + 2.5 * np.mean(penalties))
    assert coral_loss(model, parts[:1], 2.5).item() == pytest.approx(
        F.cross_entropy(model(parts[0][0]), parts[0][1]).item()
    )


def test_mixup_is_the_formula(parts: Parts, model: nn.Sequential) -> None:
    rng = np.random.default_rng(4)
    order, shares = rng.permutation(3), rng.beta(0.2, 0.2, 3)
    expected = 0.0
    for place, share in enumerate(shares):
        (x_a, y_a), (x_b, y_b) = parts[order[place]], parts[order[(place + 1) % 3]]
        logits = model(share * x_a + (1 - share) * x_b)
        expected += share * F.cross_entropy(logits, y_a).item() + (1 - share) * F.cross_entropy(logits, y_b).item()
    loss = mixup_loss(model, parts, 0.2, np.random.default_rng(4))
    assert loss().item() == pytest.approx(expected / 3)
    assert loss().item() == loss().item()  # SAM-like second passes see the same mix


def test_only_a_sequence_with_a_linear_end_has_features() -> None:
    features, classifier = split_model(build("resnet-gn", (3, 16, 16), 4, width=8))
    assert classifier(features(torch.zeros(2, 3, 16, 16))).shape == (2, 4)
    with pytest.raises(SettingsError, match=r"coral needs the features before the classifier.*not VisionTransformer"):
        split_model(build("vit", (3, 16, 16), 4))
