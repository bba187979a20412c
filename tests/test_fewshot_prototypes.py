"""Classification by prototypes, the session's loss and the released code's rounding against the specification's vectors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from flatminima.optim.flat_region import FlatRegion
from flatminima.optim.flat_region_parts import prototypes
from flatminima.protocols.fewshot_prototypes import (
    class_means,
    harmonic,
    metric_logits,
    on_grid,
    predict,
    session_loss,
    session_numbers,
)

VECTORS = json.loads((Path(__file__).parent / "vectors" / "f2m.json").read_text(encoding="utf-8"))


def double(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_logits_and_predictions() -> None:
    v = VECTORS["prototypes"]
    z, p, y = double(v["embeddings"]), double(v["prototypes"]), torch.tensor(v["labels"])
    torch.testing.assert_close(metric_logits(z, p), double(v["neg_sq_euclid_raw"]), rtol=0, atol=1e-9)
    torch.testing.assert_close(metric_logits(z, p, distance="cosine") + 1, double(v["cosine"]), rtol=0, atol=1e-9)
    normalised = F.normalize(p, dim=1)
    torch.testing.assert_close(normalised, double(v["prototypes_l2_normalised"]), rtol=0, atol=1e-9)
    expected = double(v["neg_sq_euclid_to_normalised"])
    torch.testing.assert_close(metric_logits(z, normalised), expected, rtol=0, atol=1e-9)
    assert predict(z, p, "euclidean").tolist() == v["pred_sq_euclid_raw"]
    assert predict(z, p, "cosine").tolist() == v["pred_cosine"] == v["pred_sq_euclid_to_normalised"]
    assert F.cross_entropy(metric_logits(z, p), y).item() == pytest.approx(v["ce_sq_euclid_raw"], abs=1e-9)
    for scale in (1, 16):
        found = F.cross_entropy(metric_logits(z, p, distance="cosine", temperature=scale), y).item()
        assert found == pytest.approx(v[f"ce_cosine_scale{scale}"], abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 6), st.integers(1, 5), st.integers(0, 10**6))
def test_cosine_ranks_as_distance_to_normalised_prototypes(classes: int, rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    z, p = (torch.rand(n, 4, generator=generator, dtype=torch.float64) for n in (rows, classes))
    assert torch.equal(predict(z, p, "cosine"), metric_logits(z, F.normalize(p, dim=1)).argmax(1))
    assert torch.equal(predict(z, p, "euclidean"), metric_logits(z, p).argmax(1))


def test_the_loss_of_a_session() -> None:
    v = VECTORS["incremental_metric_loss"]
    z = double(v["novel_embeddings"]).requires_grad_()
    stored = double(v["base_prototypes"])
    classes = torch.tensor(v["labels"]) + len(stored)
    torch.testing.assert_close(class_means(z, classes - 2, 2), double(v["novel_prototypes"]), rtol=0, atol=1e-12)
    loss = session_loss(z, classes, stored)
    (gradient,) = torch.autograd.grad(loss, z)
    assert loss.item() == pytest.approx(v["loss"], abs=1e-9)
    torch.testing.assert_close(gradient, double(v["grad_wrt_embeddings"]), rtol=0, atol=1e-9)


def test_exemplars_of_stored_classes_meet_their_stored_prototypes() -> None:
    stored = double([[2.0, 2.0], [-1.0, 0.5]])
    z, classes = double([[1.9, 2.1], [0.0, 1.0], [0.2, 1.2]]), torch.tensor([0, 2, 2])
    prototypes = torch.cat([stored, z[1:].mean(0, keepdim=True)])
    expected = F.cross_entropy(-torch.cdist(z, prototypes).square(), classes)
    assert session_loss(z, classes, stored).item() == pytest.approx(expected.item(), rel=1e-12)


def test_rounding_of_the_released_code() -> None:
    v = VECTORS["grid_rounding_released_code"]
    gradient, lr, q = double(v["grad"]), v["lr"], v["q"]
    torch.testing.assert_close(on_grid(gradient, lr, q), double(v["replaced_grad"]), rtol=0, atol=1e-12)
    torch.testing.assert_close(-lr * on_grid(gradient, lr, q), double(v["plain_step_no_momentum"]), rtol=0, atol=1e-12)


def test_session_metrics() -> None:
    v = VECTORS["session_metrics"]
    example = v["example"]
    base, novel = 10 * example["n_base_test"], 10 * example["n_novel_test"]  # so that counts are whole
    correct = [[50000], [round(base * example["acc_base"] / 100), round(novel * example["acc_novel"] / 100)]]
    found = session_numbers(correct, [base, novel])
    assert found["accuracy"][1] == pytest.approx(example["overall"], abs=1e-9)
    assert found["base"][1] == pytest.approx(example["acc_base"], abs=1e-9)
    assert found["novel"][0] == pytest.approx(example["acc_novel"], abs=1e-9)
    assert harmonic(example["acc_base"], example["acc_novel"]) == pytest.approx(example["harmonic"], abs=1e-9)
    assert harmonic(80.0, 0.0) == 0.0
    # Overall accuracy is the mean of base and novel, weighted by their images.
    assert found["accuracy"][1] == pytest.approx((base * found["base"][1] + novel * found["novel"][0]) / (base + novel))


class Quadratic(nn.Module):
    """The specification's toy: its output is theta itself and the embedding (theta * x)^2."""

    def __init__(self, theta: list[float]) -> None:
        super().__init__()
        self.theta = nn.Parameter(double(theta))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (self.theta * x) ** 2, self.theta


def test_the_released_objective_has_a_constant_prototype_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from flatminima.protocols import fewshot_released
    from flatminima.protocols.fewshot_settings import FewShotSettings

    v, expected = VECTORS["objective"], VECTORS["released"]
    a, c = double(v["A"]), double(v["c"])
    monkeypatch.setattr(
        fewshot_released.F, "cross_entropy", lambda theta, _: 0.5 * theta @ a @ theta - c @ theta + v["d"]
    )
    noise = [[double(eps)] for eps in v["noise"]]
    settings = replace(FewShotSettings(), prototype_weight=0.5, std_weight=2.0, constant_prototypes=True, draws=3)
    model = Quadratic(v["theta"])
    region = FlatRegion(model, 0.1)
    monkeypatch.setattr(region, "sample", lambda draws: noise)
    x, y = double(v["samples"]), torch.tensor(v["classes"])
    torch.testing.assert_close(prototypes(model(x)[0], y), double(v["clean_prototypes"]))
    for constant, gradient in ((True, expected["grad"]), (False, v["cases"][3]["grad"])):
        loss = fewshot_released.released_loss(region, model, x, y, replace(settings, constant_prototypes=constant))
        assert loss.item() == pytest.approx(expected["objective"], abs=1e-9)
        (found,) = torch.autograd.grad(loss, model.theta)
        assert found.tolist() == pytest.approx(gradient, abs=1e-9)
