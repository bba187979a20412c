"""Confident classifiers: losses next to zero, whose second derivatives rounding eats, and logits too large for differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatminima import Objective, audit, measure
from flatminima.audit import single
from flatminima.curvature import exact_trace
from flatminima.measures import MEASURES
from flatminima.objective import ObjectiveError

pytestmark = pytest.mark.usefixtures("one_thread")


def trained(scale: float, activation: type[nn.Module] = nn.ReLU) -> tuple[nn.Module, Tensor, Tensor]:
    """A classifier that fits its data, and its last layer then multiplied."""
    torch.manual_seed(0)
    x, y = torch.randn(40, 5), torch.randint(0, 3, (40,))
    net = nn.Sequential(nn.Linear(5, 8), activation(), nn.Linear(8, 3))
    optimiser = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(300):
        optimiser.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimiser.step()
    with torch.no_grad():
        for p in net[2].parameters():
            p *= scale
    return net.double(), x.double(), y


def true_trace(net: nn.Module, x: Tensor) -> float:
    """Of the Gauss-Newton matrix, from differences of logits: no probability next to one is subtracted from one."""
    total = 0.0
    for row in x:
        jacobian = torch.autograd.functional.jacobian
        parameters = {n: p.detach() for n, p in net.named_parameters()}

        def logits(*values: Tensor, row: Tensor = row, names: tuple[str, ...] = tuple(parameters)) -> Tensor:
            return torch.func.functional_call(net, dict(zip(names, values, strict=True)), (row[None],))[0]

        z, parts = logits(*parameters.values()), jacobian(logits, tuple(parameters.values()))
        j = torch.cat([part.reshape(3, -1) for part in parts], 1)
        p = z.softmax(0)
        for a in range(3):
            for b in range(a):
                total += float(p[a] * p[b] * (j[a] - j[b]).square().sum())
    return total / len(x)


@pytest.mark.parametrize("scale", [30, 100, 500, 800])
def test_the_trace_of_a_confident_network_is_exact_and_its_audit_ends(scale: float) -> None:
    net, x, y = trained(scale)
    expected = true_trace(net, x)
    assert 0 < expected < 1e-5
    found = exact_trace(Objective(net, F.cross_entropy, (x, y)))
    assert found.value == pytest.approx(expected, rel=1e-9)
    report = audit(net, F.cross_entropy, (x, y), measures=["trace", "w_hessian_w", "lambda_max"], members=2)
    assert report.measurements["trace"].value == pytest.approx(expected, rel=1e-9)
    assert report.verdicts["trace"] == "changes"
    assert "broken" not in report.verdicts.values()
    assert any("near zero" in note for note in report.notes) is (scale > 30)


def test_products_that_are_rounding_say_so() -> None:
    net, x, y = trained(100)
    f = Objective(net, F.cross_entropy, (x, y))
    found = measure(f, ["lambda_max", "w_hessian_w", "hutchinson_trace"])
    assert f.rounding > 0.1
    assert not found["lambda_max"].converged
    for m in found.values():
        assert m.error is not None
        assert m.error > 0.1 * abs(m.value)
    ordinary = Objective(*trained(1)[:1], F.cross_entropy, (x, y))
    ordinary.verify()
    assert ordinary.rounding == torch.finfo(torch.float64).eps


def test_a_tiny_trace_without_an_exact_form_ends() -> None:
    net, x, y = trained(400, nn.Tanh)
    found = measure(Objective(net, F.cross_entropy, (x, y)), ["trace"])["trace"]
    assert abs(found.value) < 1e-100
    assert not found.converged


def test_a_squared_error_next_to_zero_loses_nothing() -> None:
    torch.manual_seed(0)
    net, x = nn.Linear(3, 2).double(), torch.randn(8, 3).double()
    f = Objective(net, F.mse_loss, (x, net(x).detach() + 1e-12))
    f.verify()
    assert f.loss() < 1e-20
    assert f.rounding < 1e-14


@pytest.mark.parametrize("scale", [1e3, 1e6, 1e9])
def test_huge_logits_are_not_taken_for_a_wrong_derivative(scale: float) -> None:
    torch.manual_seed(0)
    net, x, y = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(40, 5), torch.arange(40) % 3
    with torch.no_grad():
        net[2].weight *= scale
    f = Objective(net.double(), F.cross_entropy, (x.double(), y))
    assert f.loss() > scale / 100
    f.verify()


class Wrong(torch.autograd.Function):
    """The square with a derivative whose derivative is three times too large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return 2 * g * (3 * x - 2 * x.detach())


@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_a_wrong_derivative_is_still_found_at_any_scale(scale: float) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return scale * Wrong.apply(self.layer(x))

    torch.manual_seed(0)
    f = Objective(Net().double(), F.mse_loss, (torch.randn(20, 5).double(), torch.randn(20, 3).double()))
    with pytest.raises(ObjectiveError, match="the second derivative of some operation is wrong"):
        f.verify()


@pytest.mark.parametrize("error", [ZeroDivisionError("float division by zero"), ValueError("no"), OverflowError()])
def test_a_measure_that_fails_at_the_network_does_not_end_an_audit(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    from dataclasses import replace

    def failing(bench: Any) -> Any:
        raise error

    monkeypatch.setitem(MEASURES, "lambda_max", replace(MEASURES["lambda_max"], compute=failing))
    net, x, y = trained(1)
    report = single.audit(net, F.cross_entropy, (x, y), measures=["lambda_max", "w_hessian_w"], members=1)
    assert report.verdicts == {"lambda_max": "not applicable", "w_hessian_w": "invariant"}
    assert report.measurements["lambda_max"].note == (str(error) or "OverflowError")
