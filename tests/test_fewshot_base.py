"""Base training: what each kind does, that all kinds are paired, and that nothing but base train images is ever read."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fewshot_fixture import tiny, tiny_data, tiny_settings  # noqa: F401
from flatminima.data import ClassData
from flatminima.data.splits import IntArray, LabelledImages, PixelArray
from flatminima.protocols import fewshot_views
from flatminima.protocols.fewshot_base import BaseCell, Trainer, base_prototypes, load_network, new_network, run_base
from flatminima.protocols.fewshot_methods import BASES, base_settings
from flatminima.protocols.fewshot_network import EmbeddingNetwork
from flatminima.protocols.fewshot_settings import FewShotSettings
from flatminima.protocols.fewshot_views import View, balanced_batches, data_and_split
from flatminima.study.settings import SettingsError

pytestmark = pytest.mark.usefixtures("tiny", "one_thread")


def trained(base: str, **changes: Any) -> tuple[dict[str, Any], EmbeddingNetwork, torch.Tensor]:
    settings = tiny_settings(**changes)
    result = run_base(BaseCell(settings, base, 0))
    data, split = data_and_split(settings, 0, 1)
    view = View(settings, data.train, split.train)
    return result.record, *load_network(base_settings(settings, base), data, split, view, result.files[".safetensors"])


@pytest.mark.parametrize("base", BASES)
def test_every_kind_trains_and_can_be_repeated(base: str) -> None:
    record, network, prototypes = trained(base)
    assert record["failure"] is None
    assert record["history"]["step"][-1] == (36 if base == "plain-long" else 12)
    assert all(np.isfinite(record["history"]["loss"]))
    assert prototypes.shape == (3, 16)
    assert set(record["held_out_accuracy"]) == {"head", "cosine"}
    assert not network.training
    again = run_base(BaseCell(tiny_settings(), base, 0))
    assert again.record["weights"] == record["weights"]
    assert again.record["fingerprint"] == trained("plain")[0]["fingerprint"]
    assert run_base(BaseCell(tiny_settings(), base, 1)).record["fingerprint"] != record["fingerprint"]
    if base in ("swa", "flat-swad"):
        assert record["average"]["n"] >= 1


def test_bases_differ_where_they_should() -> None:
    weights = {base: trained(base)[0]["weights"] for base in BASES}
    assert len(set(weights.values())) == len(BASES)


def test_plain_training_is_ordinary_sgd_on_class_balanced_batches() -> None:
    settings = tiny_settings(batchnorm="running", milestones=(0.5,), gamma=0.5)
    data, split = data_and_split(settings, 0, 1)
    view = View(settings, data.train, split.train)
    network, twin = (new_network(settings, data, split, view, 0) for _ in range(2))
    trainer = Trainer(settings, "plain", network, view, data.train, split, 0)
    batches = trainer.batches("training")
    sgd = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    twin.train()
    for step in range(12):
        x, y = next(batches)
        assert torch.bincount(y).tolist() == [4, 4, 4]
        sgd.param_groups[0]["lr"] = 0.1 if step < 6 else 0.05
        sgd.zero_grad()
        F.cross_entropy(twin(x)[1], y).backward()
        sgd.step()
    trainer.run(lambda fraction: None)
    for a, b in zip(network.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("weight", "detach"), [(0.0, False), (3.0, False), (3.0, True)])
def test_the_flat_objective_is_the_formula(weight: float, detach: bool) -> None:
    """Mean over noise of cross entropy and squared shift of class means, by functional_call on the whole network."""
    settings = tiny_settings(prototype_weight=weight, detach_clean=detach, bound=0.05, draws=3)
    data, split = data_and_split(settings, 0, 1)
    view = View(settings, data.train, split.train)
    network = new_network(settings, data, split, view, 0).train()
    trainer = Trainer(settings, "flat", network, view, data.train, split, 0)
    x, y = next(trainer.batches("training"))
    region = trainer._region
    assert region is not None
    state = region.state_dict()
    noise = region.sample(3)
    region.load_state_dict(state)
    names = {id(p): name for name, p in network.named_parameters()}

    def means(z: torch.Tensor) -> torch.Tensor:
        return torch.stack([z[y == c].mean(0) for c in range(3)])

    clean = means(network(x)[0])
    expected = torch.zeros(())
    for eps in noise:
        moved = {names[id(p)]: p + e for p, e in zip(network.region, eps, strict=True)}
        z, outputs = torch.func.functional_call(network, moved, (x,))
        shift = (means(z) - (clean.detach() if detach else clean)).square().sum(1).mean()
        expected = expected + (F.cross_entropy(outputs, y) + weight * shift) / 3
    found = trainer._flat(region, x, y)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    parameters = list(network.parameters())
    for ours, theirs in zip(*(torch.autograd.grad(v, parameters) for v in (found, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5 * float(theirs.abs().max()) + 1e-7)


def test_batches_take_every_class_and_image_once_a_round() -> None:
    classes = [np.arange(10 * c, 10 * c + 6) for c in range(5)]
    batches = balanced_batches(classes, 2, 3, seed=0)
    seen: list[int] = []
    labels: list[int] = []
    for _ in range(5):
        rows, y = next(batches)
        assert all(row // 10 == label for row, label in zip(rows, y, strict=True))
        seen += rows.tolist()
        labels += y[::3].tolist()
    assert sorted(labels) == [c for c in range(5) for _ in range(2)]
    assert sorted(seen) == sorted(np.concatenate(classes).tolist())


def test_prototypes_are_means_of_clean_base_images() -> None:
    settings = tiny_settings()
    data, split = data_and_split(settings, 0, 1)
    view = View(settings, data.train, split.train)
    network = new_network(settings, data, split, view, 0).eval()
    found = base_prototypes(network, view, data, split)
    for index, label in enumerate(split.base):
        rows = split.train[data.train.labels[split.train] == label]
        expected = network.embed(view.clean(data.train, rows)).mean(0)
        torch.testing.assert_close(found[index], expected, rtol=1e-5, atol=1e-6)


def test_statistics_are_those_of_the_clean_weights() -> None:
    """After noisy passes BatchNorm is re-estimated; with "running" it keeps what training left."""
    states = {}
    for kind in ("reestimate", "running"):
        _, network, _ = trained("flat", batchnorm=kind)
        states[kind] = dict(network.named_buffers())
        for name, parameter in network.named_parameters():
            states[kind][name] = parameter
    names = [name for name, _ in trained("flat")[1].named_parameters()]
    assert all(torch.equal(states["reestimate"][n], states["running"][n]) for n in names)
    assert not torch.equal(states["reestimate"]["trunk.1.running_mean"], states["running"]["trunk.1.running_mean"])


def test_a_training_that_diverges_is_a_record_without_weights() -> None:
    result = run_base(BaseCell(tiny_settings(lr=1e12), "plain", 0))
    assert result.files == {}
    assert "the training loss became" in result.record["failure"]["reason"]


@pytest.mark.parametrize("base", ["plain", "flat", "sam"])
def test_a_last_step_that_diverges_leaves_no_weights_either(base: str) -> None:
    """The loss that a step begins with says nothing about the weights it ends with."""
    result = run_base(BaseCell(tiny_settings(lr=1e38, iterations=1), base, 0))
    assert result.files == {}
    assert "after the last step" in result.record["failure"]["reason"]


def test_few_steps_have_an_average() -> None:
    for steps in (1, 2, 3, 5):
        record = run_base(BaseCell(tiny_settings(iterations=steps), "swa", 0)).record
        assert record["average"] == {
            "start_step": min(math.ceil(0.75 * steps), steps - 1),
            "n": max(1, steps - math.ceil(0.75 * steps)),
        }


def poisoned(data: ClassData, allowed: set[int]) -> ClassData:
    """The same data, of which nothing but the allowed train rows can be read."""

    def train(rows: IntArray) -> PixelArray:
        assert set(rows.tolist()) <= allowed, "a train image was read that base training must not see"
        return data.train.pixels(rows)

    def test(rows: IntArray) -> PixelArray:
        raise AssertionError("a test image was read")

    return replace(data, train=LabelledImages(data.train.labels, train), test=LabelledImages(data.test.labels, test))


@pytest.mark.parametrize("base", ["plain", "flat", "flat-swad"])
def test_base_training_reads_base_train_images_alone(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = tiny_settings()
    data, split = data_and_split(settings, 0, 1)
    allowed = {int(row) for row in (*split.train, *split.held_out)}
    expected = run_base(BaseCell(settings, base, 0)).record["weights"]
    monkeypatch.setattr(fewshot_views, "loaded", lambda *_: poisoned(data, allowed))
    assert run_base(BaseCell(settings, base, 0)).record["weights"] == expected


def test_validation_reads_no_test_image_and_no_later_class(monkeypatch: pytest.MonkeyPatch) -> None:
    data = tiny_data(9)
    settings = tiny_settings(base=5, way=1, validate=True)
    monkeypatch.setattr(fewshot_views, "loaded", lambda *_: data)
    _, split = data_and_split(replace(settings, validate=False), 0, 2)
    allowed = {int(row) for row in (*split.train, *split.held_out)}
    monkeypatch.setattr(fewshot_views, "loaded", lambda *_: poisoned(data, allowed))
    pseudo, cut = data_and_split(settings, 0, 2)
    assert len(pseudo.classes) == 5
    assert len(cut.base) == 3
    assert len(cut.sessions) == 2
    assert run_base(BaseCell(settings, "plain", 0)).record["failure"] is None
    for rows in cut.test:  # its test images are base train images
        pseudo.test.pixels(rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bound": 0.0}, "--bound must be finite and > 0, got 0.0"),
        ({"bound": -1.0}, "--bound must be finite and > 0, got -1.0"),
        ({"bound": float("nan")}, "--bound must be finite and > 0, got nan"),
        ({"clamp_bound": 0.0}, "--clamp-bound must be finite and > 0"),
        ({"draws": 1, "std_weight": 2.0}, "--std-weight 2 needs at least 2 --draws-per-step, got 1"),
        ({"draws": 3, "antithetic": True}, "--draws-per-step must be even, got 3"),
        (
            {"noise": "beta_grid_released", "antithetic": True},
            "beta_grid_released is not symmetric: leave out --antithetic",
        ),
        ({"noise": "gauss"}, "unknown noise 'gauss': expected one of"),
        ({"replay": "old"}, "unknown replay 'old': expected one of"),
        ({"held_out": 1.0}, "--held-out must lie between 0 and 1"),
        ({"layers": 0}, "--layers must be at least 1"),
        ({"model": "resnet"}, "unknown model 'resnet'"),
        ({"shots": 3}, "unknown setting 'shots': expected one of shot"),
        ({"milestones": (1.5,)}, "milestones are parts of base training"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        tiny_settings(**changes)


def test_bases_have_settings_that_fit_together() -> None:
    settings = tiny_settings(clamp_bound=0.00125, antithetic=True)
    wide, relative = (base_settings(settings, name) for name in ("flat-wide", "flat-relative"))
    assert (wide.bound, wide.clamp_bound) == (0.005, 0.00125)  # four times the clamp, as its name says
    assert (relative.relative, relative.bound, relative.clamp_bound) == (True, 0.1, None)  # not 0.00125 of RMS(w)
    assert not base_settings(settings, "flat-released").antithetic
    absolute = base_settings(tiny_settings(relative=True, bound=0.1), "flat-released")
    assert absolute.relative  # the box stays the experiment's


def test_the_released_preset_names_its_defects() -> None:
    from flatminima.protocols.fewshot_settings import DEFECTS, RELEASED, preset

    released, paper = preset("cifar100", "released"), preset("cifar100", "paper")
    changed = {name for name in paper.to_dict() if getattr(released, name) != getattr(paper, name)}
    assert changed - {"protocol"} == set(RELEASED)
    assert set(RELEASED) - {"order", "held_out"} <= set(DEFECTS)
    assert {"- regulariser", "- index files"} <= set(DEFECTS)
    assert (paper.std_weight, paper.noise, paper.constant_prototypes) == (0.0, "uniform", False)
    cub = preset("cub-200", "paper")
    assert (cub.base, cub.way, cub.bound, cub.layers, cub.classifier_lr) == (100, 10, 1e-4, 8, 1e-2)
    with pytest.raises(SettingsError, match="the paper has no experiment on digits: use --protocol small"):
        preset("digits", "paper")
    assert isinstance(released, FewShotSettings)
