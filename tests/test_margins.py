"""Margins row by row, in every layout of logits, and the targets that have none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatminima import MeasureOptions, Objective, measure
from flatminima.measures import NotApplicableError
from flatminima.measures.margins import margins
from flatminima.measures.norms import spectral_product_of

pytestmark = pytest.mark.usefixtures("one_thread")


def plainly(logits: Tensor, targets: Tensor) -> list[float]:
    found = []
    for row, y in zip(logits.tolist(), targets.tolist(), strict=True):
        found.append(row[y] - max(value for c, value in enumerate(row) if c != y))
    return found


def classifier(rows: int = 40) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    return net, torch.randn(rows, 4).double(), torch.randint(0, 3, (rows,))


def test_quantiles_of_the_margins() -> None:
    net, x, y = classifier()
    f = Objective(net, F.cross_entropy, [(x[:25], y[:25]), (x[25:], y[25:])])
    rows = plainly(net(x).detach(), y)
    assert margins(f).tolist() == pytest.approx(rows)
    found = measure(f, ["minimum_margin", "margin_quantile", "median_margin", "normalised_margin"])
    assert found["minimum_margin"].value == pytest.approx(min(rows))
    assert found["margin_quantile"].value == pytest.approx(float(np.quantile(rows, 0.1)))
    assert found["median_margin"].value == pytest.approx(float(np.median(rows)))
    product = spectral_product_of(f).value
    assert found["normalised_margin"].value == pytest.approx(float(np.quantile(rows, 0.1)) / product)
    right = 100 * sum(m > 0 for m in rows) / len(rows)
    assert f"of 40 targets, {right:.4g} % predicted rightly" in found["median_margin"].note
    assert found["minimum_margin"].cost == pytest.approx(1 / 3)
    assert found["median_margin"].cost == 0  # shared
    other = measure(f, ["margin_quantile"], options=MeasureOptions(margin_quantile=0.25))["margin_quantile"]
    assert other.value == pytest.approx(float(np.quantile(rows, 0.25)))


def test_scaling_the_last_layer_scales_margins_and_leaves_the_normalised_one() -> None:
    net, x, y = classifier()
    f = Objective(net, F.cross_entropy, (x, y))
    before = measure(f, ["median_margin", "normalised_margin"])
    with torch.no_grad():
        net[2].weight *= 3
        net[2].bias *= 3
    after = measure(f, ["median_margin", "normalised_margin"])
    assert after["median_margin"].value == pytest.approx(3 * before["median_margin"].value)
    assert after["normalised_margin"].value == pytest.approx(before["normalised_margin"].value)


class Positions(nn.Module):
    """Logits at every position, classes second (as cross entropy takes them) or last."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.last, self.layer = last, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer(x)
        return z if self.last else z.mT


@pytest.mark.parametrize("last", [False, True])
def test_positions_and_ignored_targets(last: bool) -> None:
    torch.manual_seed(0)
    model, x, y = Positions(last).double(), torch.randn(6, 5, 4).double(), torch.randint(0, 3, (6, 5))
    y[0, :2] = -100
    loss = (lambda out, t: F.cross_entropy(out.flatten(0, 1), t.flatten())) if last else F.cross_entropy
    f = Objective(model, loss, (x, y))
    keep = y.flatten() != -100
    rows = plainly(model.layer(x).detach().flatten(0, 1)[keep], y.flatten()[keep])
    assert margins(f).tolist() == pytest.approx(rows)
    y[:] = -100
    assert len(rows) == 28


def test_binary_cross_entropy_has_the_margin_of_two_classes() -> None:
    torch.manual_seed(0)
    net, x = nn.Linear(3, 1).double(), torch.randn(10, 3).double()
    y = (torch.arange(10) % 2).double()[:, None]
    f = Objective(net, nn.BCEWithLogitsLoss(), (x, y))
    expected = ((2 * y - 1) * net(x)).detach()[:, 0]
    assert margins(f).tolist() == pytest.approx(expected.tolist())
    soft = Objective(net, F.binary_cross_entropy_with_logits, (x, torch.full((10, 1), 0.3).double()))
    with pytest.raises(NotApplicableError, match="soft targets"):
        margins(soft)


@pytest.mark.parametrize(
    ("outputs", "loss", "targets", "reason"),
    [
        (1, F.cross_entropy, torch.zeros(6).long(), "there is one class"),
        (2, F.mse_loss, torch.zeros(6, 2).double(), "the targets are not classes: torch.float64"),
        (3, F.cross_entropy, torch.full((6, 3), 1 / 3).double(), "the targets are not classes: torch.float64"),
        (
            4,
            lambda out, y: (out[:, : y.shape[1]] - y).square().mean(),
            torch.zeros(6, 2).long(),
            "are not logits of classes",
        ),
    ],
)
def test_targets_without_margins_are_refused_with_the_reason(
    outputs: int, loss: object, targets: Tensor, reason: str
) -> None:
    assert callable(loss)
    net = nn.Linear(4, outputs).double()
    f = Objective(net, loss, (torch.randn(6, 4).double(), targets))
    with pytest.raises(NotApplicableError, match=reason):
        margins(f)
    found = measure(f, ["minimum_margin", "normalised_margin"])
    assert all(reason in m.note and not m.applies for m in found.values())


class OwnLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(self.layer(x), labels)}


def test_a_model_that_computes_its_own_loss_hides_its_outputs() -> None:
    batch = {"x": torch.randn(6, 4).double(), "labels": torch.arange(6) % 3}
    f = Objective(OwnLoss().double(), None, [batch])
    found = measure(
        f, ["minimum_margin", "fisher_rao", "participation_ratio", "logit_normalised_sharpness", "relative_flatness"]
    )
    assert all("loss_fn=None" in m.note for m in found.values())


def test_a_layer_that_vanishes_has_no_normalised_margin() -> None:
    net, x, y = classifier()
    nn.init.zeros_(net[2].weight)
    f = Objective(net, F.cross_entropy, (x, y))
    assert "the spectral product is zero" in measure(f, ["normalised_margin"])["normalised_margin"].note
