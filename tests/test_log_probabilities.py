"""Models that return log-probabilities: the same function as logits with cross entropy has the same numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatminima import Objective, measure

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = (
    "fisher_rao", "logit_normalised_sharpness", "logit_normalised_average_sharpness", "logit_normalised_adaptive_sharpness",
)  # fmt: skip


class Logs(nn.Module):
    def __init__(self, inner: nn.Module, axis: int) -> None:
        super().__init__()
        self.inner, self.axis = inner, axis

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).log_softmax(self.axis)


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).mT


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


W = torch.tensor([0.5, 2.0, 1.0]).double()
SOFT = torch.rand(20, 3, generator=torch.Generator().manual_seed(2)).double()


@pytest.mark.parametrize(
    ("on_logs", "on_logits", "targets", "weight"),
    [
        (F.nll_loss, F.cross_entropy, torch.arange(20) % 3, "auto"),
        (nn.NLLLoss(weight=W), nn.CrossEntropyLoss(weight=W), torch.arange(20) % 3, "rows"),
        (lambda out, y: -out.gather(1, y[:, None]).mean(), F.cross_entropy, torch.arange(20) % 3, "auto"),
        (
            lambda out, y: -(out * y).sum(1).mean(),
            lambda out, y: -(out.log_softmax(1) * y).sum(1).mean(),
            SOFT,
            "auto",
        ),
    ],
)
def test_the_same_function_has_the_same_numbers(on_logs: Any, on_logits: Any, targets: Tensor, weight: str) -> None:
    net, x = network(), torch.randn(20, 5, generator=torch.Generator().manual_seed(1)).double()
    plain = measure(Objective(net, on_logits, (x, targets), weight=weight), NAMES)
    logs = measure(Objective(Logs(net, 1), on_logs, (x, targets), weight=weight), NAMES)
    for name in NAMES:
        assert logs[name].value == pytest.approx(plain[name].value, rel=1e-9), name
    assert plain["fisher_rao"].value > 1e-3


def test_classes_on_the_second_axis_and_single_precision() -> None:
    torch.manual_seed(0)
    net, x, y = Positions(), torch.randn(20, 4, 5), torch.randint(0, 3, (20, 4))
    plain = measure(Objective(net, F.cross_entropy, (x, y)), NAMES)
    logs = measure(Objective(Logs(net, 1), F.nll_loss, (x, y)), NAMES)
    for name in NAMES:
        assert logs[name].value == pytest.approx(plain[name].value, rel=1e-3), name


def test_a_linear_loss_of_anything_else_is_not_applicable_and_says_why() -> None:
    net, x = network(), torch.randn(20, 5).double()
    found = measure(Objective(net, F.nll_loss, (x, torch.arange(20) % 3)), NAMES)
    for name in NAMES:
        assert not found[name].applies
        assert "no log-probabilities" in found[name].note


def test_a_curved_loss_of_log_probabilities_is_left_as_it_is() -> None:
    net, x, y = Logs(network(), 1), torch.randn(20, 5).double(), torch.randn(20, 3).double()
    f = Objective(net, F.mse_loss, (x, y))
    w = f.point()
    assert measure(f, ["fisher_rao"])["fisher_rao"].value == pytest.approx(float(w @ f.ggnvp(w)), rel=1e-12)
