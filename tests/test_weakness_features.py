"""Features of ordinary models, activation regions and leverages."""

from __future__ import annotations

import math
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

from flatminima.measures.weakness import FeatureError, features, leverage, patterns, region_weakness
from flatminima.models import build


class TwoReaders(nn.Module):
    """A body, an auxiliary head called first, and the head that is called last; defined in the other order."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.unused = nn.Linear(2, 2)
        self.body = nn.Linear(5, 4)
        self.auxiliary = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        hidden = torch.tanh(self.body(x))
        self.auxiliary(hidden)
        hidden = hidden if scale is None else hidden * scale[:, None]
        return self.head(hidden)


def test_the_last_linear_layer_that_is_called() -> None:
    model = TwoReaders()
    x = torch.randn(7, 5)
    expected = torch.tanh(x.double() @ model.body.weight.double().T + model.body.bias.double())
    torch.testing.assert_close(features(model, x), expected, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(features(model, x, batch_size=3), expected, rtol=1e-13, atol=1e-15)
    scale = torch.arange(7.0)
    scaled = expected * scale.double()[:, None]
    torch.testing.assert_close(features(model, (x, scale)), scaled, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(features(model, {"x": x, "scale": scale}), scaled, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(features(model, x, layer="body"), x.double())


def test_features_times_the_head_are_the_logits_of_a_convolutional_network_with_batchnorm() -> None:
    model = build("convnet", (1, 8, 8), 5, seed=0, norm="batch").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.randn(4, 1, 8, 8)
    phi = features(model, x)
    head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    logits = phi @ head.weight.double().T + head.bias.double()
    assert model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    torch.testing.assert_close(logits, model.double().eval()(x.double()).detach(), rtol=1e-12, atol=1e-12)


def test_a_layer_that_is_not_linear_is_flattened() -> None:
    model = build("convnet", (1, 8, 8), 5, seed=0)
    name = next(name for name, m in model.named_modules() if isinstance(m, nn.ReLU))
    phi = features(model, torch.randn(2, 1, 8, 8), layer=name)
    assert phi.ndim == 2
    assert phi.min() < 0  # before the ReLU


def test_tokens_are_not_cast() -> None:
    model = nn.Sequential(nn.EmbeddingBag(10, 4), nn.Linear(4, 2))
    assert features(model, torch.tensor([[1, 2], [3, 4]])).shape == (2, 4)


class PerToken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.head.weight.new_ones(len(x), 6, 3))


class Repeated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.step(self.step(x))


def overflowing() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight[1] = float("nan")
    return model


@pytest.mark.parametrize(
    ("model", "x", "options", "message"),
    [
        (nn.Sequential(nn.Conv2d(1, 1, 1)), torch.zeros(1, 1, 2, 2), {}, "no nn.Linear, only Conv2d, Sequential"),
        (TwoReaders(), torch.zeros(1, 5), {"layer": "heads"}, "unknown layer 'heads': expected one of head, "),
        (TwoReaders(), torch.zeros(1, 5), {"layer": "unused"}, "does not call layer 'unused'"),
        (PerToken(), torch.zeros(1, 3), {}, r"layer 'head' reads a tensor of shape \(1, 6, 3\)"),
        (Repeated(), torch.zeros(1, 3), {}, "layer 'step' is called 2 times"),
        (overflowing(), torch.ones(2, 3), {}, r"features hold 2 values .* row 0, unit 1 \(nan\)"),
        (TwoReaders(), torch.zeros(0, 5), {}, "same number of rows, at least one"),
        (TwoReaders(), (torch.zeros(2, 5), torch.zeros(3)), {}, r"same number of rows, at least one; got \[2, 3\]"),
        (TwoReaders(), [1.0], {}, "inputs must be a tensor, or a tuple or dictionary of tensors"),
        (TwoReaders(), torch.zeros(1, 5), {"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_what_has_no_features(model, x, options, message) -> None:
    with pytest.raises(FeatureError, match=message):
        features(model, x, **options)


# --- regions -------------------------------------------------------------------------------------------------------

activations = arrays(np.float64, st.tuples(st.integers(1, 12), st.just(3)), elements=st.sampled_from([-1.0, 0.0, 0.5]))


@given(activations, activations, st.integers(1, 5))
def test_regions_against_sets_of_tuples(train: np.ndarray, unseen: np.ndarray, classes: int) -> None:
    known, met = ({tuple(row > 0) for row in part} for part in (train, unseen))
    found = region_weakness(train, unseen, classes, labels=np.arange(len(train)) % classes)
    assert patterns(train) == patterns(np.maximum(train, 0))  # of the ReLU, too
    assert (found.train_regions, found.unseen_regions) == (len(known), len(met))
    assert found.free_regions == len(met - known)
    assert found.log_weakness == pytest.approx(len(met - known) * math.log(classes + 1))
    assert found.log_language == pytest.approx(len(met | known) * math.log(classes + 1))
    labels = [{i % classes for i, row in enumerate(train) if tuple(row > 0) == region} for region in known]
    assert found.mixed_regions == sum(len(group) > 1 for group in labels)


def test_regions_of_a_network_do_not_change_with_its_scales() -> None:
    net = build("mlp", (4,), 3, seed=0, hidden=(16, 12))
    x, unseen = torch.randn(30, 4), torch.randn(60, 4)
    before = region_weakness(features(net, x), features(net, unseen), 3)
    with torch.no_grad():
        net[3].weight.mul_(17.0)
        net[3].bias.mul_(17.0)
        net[5].weight.div_(17.0)
    assert region_weakness(features(net, x), features(net, unseen), 3) == before
    assert region_weakness(features(net, x, layer="4"), features(net, unseen, layer="4"), 3) == before


def test_regions_of_wide_layers_do_not_overflow() -> None:
    rng = np.random.default_rng(0)
    found = region_weakness(rng.normal(size=(3, 500)), rng.normal(size=(4000, 500)), 10)
    assert found.log_weakness == 4000 * math.log(11)


def test_bad_regions() -> None:
    with pytest.raises(FeatureError, match="3 units, unseen ones 2"):
        region_weakness(np.zeros((1, 3)), np.zeros((1, 2)), 2)
    with pytest.raises(FeatureError, match="classes must be at least 1"):
        region_weakness(np.zeros((1, 3)), np.zeros((1, 3)), 0)
    with pytest.raises(FeatureError, match="unseen activations hold 1 values"):
        region_weakness(np.zeros((1, 1)), [[math.nan]], 2)


# --- leverage ------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1))
def test_leverage_is_the_formula_and_affine_invariant(seed: int) -> None:
    rng = np.random.default_rng(seed)
    train, probes = rng.normal(size=(12, 3)), rng.normal(size=(5, 3))
    f, g = (np.hstack([part, np.ones((len(part), 1))]) for part in (train, probes))
    h = np.diag(g @ np.linalg.inv(f.T @ f) @ g.T)
    found = leverage(train, probes)
    np.testing.assert_allclose(found.values, h, rtol=1e-9)
    assert found.total == pytest.approx(np.log1p(h).sum(), rel=1e-9)
    assert (found.rank, found.outside) == (4, 0)
    a, b = rng.normal(size=(3, 3)) * 1e3, rng.normal(size=3)
    np.testing.assert_allclose(leverage(train @ a + b, probes @ a + b).values, h, rtol=1e-6)


def test_leverage_of_training_points_adds_up_to_the_rank() -> None:
    train = np.random.default_rng(0).normal(size=(20, 6))
    assert leverage(train, train).values.sum() == pytest.approx(7.0, rel=1e-12)


def test_probes_outside_the_span_are_counted() -> None:
    found = leverage([[0.0, 1.0], [2.0, 1.0]], [[1.0, 1.0], [1.0, 4.0], [5.0, 1.0]])
    assert (found.rank, found.outside) == (2, 1)
    with pytest.raises(FeatureError, match="2 units, probes 1"):
        leverage([[0.0, 1.0]], [[1.0]])


# --- the documented example ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_example_prints_what_the_documentation_shows(one_thread: None, capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(__file__).parents[1]
    example, page = root / "examples" / "weakness.py", root / "docs" / "weakness.md"
    if not (example.exists() and page.exists()):
        pytest.skip(f"{example} and {page} are part of the repository, not of the source distribution")
    runpy.run_path(str(example))
    printed = capsys.readouterr().out
    assert "certificates hold, 0 fail" in printed
    shown = page.read_text(encoding="utf-8")
    block = shown[shown.index("    activation patterns") : shown.index("\n## The three")]
    assert len(block.splitlines()) == len(printed.splitlines())
    assert "".join(re.findall(r"[a-z]+", block)) == "".join(re.findall(r"[a-z]+", printed))  # all but the numbers
