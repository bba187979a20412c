from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from flatminima.measures import local_flatness
from flatminima.objective import Objective


def quadratic(eigenvalues: torch.Tensor, slope: float = 0.0) -> Objective:
    """``L(w) = sum_i e_i w_i**2 / 2 + slope * sum_i w_i`` at w = 1, as the mean loss of a linear model on one row per axis."""
    n = len(eigenvalues)
    model = nn.Linear(n, 1, bias=False).double()
    nn.init.ones_(model.weight)
    x = torch.eye(n, dtype=torch.float64)

    def loss(output: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        return (n * (e * output.square() / 2 + slope * output)).mean()

    return Objective(model, loss, (x, eigenvalues.double()[:, None]))


def test_the_rise_of_a_quadratic_is_the_formula_for_each_direction() -> None:
    eigenvalues = torch.tensor([5.0, 1.0, 0.1, 0.1])
    objective = quadratic(eigenvalues, slope=3.0)
    found = local_flatness(objective, [0.1, 2.0], pairs=7, seed=5)
    generator = torch.Generator().manual_seed(5)
    directions = [torch.randn(4, dtype=torch.float64, generator=generator) for _ in range(7)]
    curvatures = torch.stack([u @ (eigenvalues.double() * u) / (u @ u) for u in directions])  # the slope cancels
    for radius, rise, error in zip(found.radii, found.rise, found.error, strict=True):
        rises = radius**2 * curvatures / 2
        assert rise == pytest.approx(rises.mean().item(), rel=1e-9)
        assert error == pytest.approx(rises.std().item() / 7**0.5, rel=1e-6)
    assert found.norm == pytest.approx(2.0)
    assert found.loss == pytest.approx(6.2 / 2 + 12)
    assert found.cost == pytest.approx((1 + 2 * 2 * 7) / 3)
    assert found.to_dict()["rise"] == list(found.rise)


def test_the_mean_is_the_trace_and_the_error_covers_it() -> None:
    eigenvalues = torch.linspace(0.0, 4.0, 30)
    objective = quadratic(eigenvalues)
    expected = 0.5**2 * eigenvalues.sum().item() / (2 * 30)
    misses = 0
    for seed in range(40):
        found = local_flatness(objective, [0.5], pairs=20, seed=seed)
        assert found.error[0] is not None
        misses += abs(found.rise[0] - expected) > 2.093 * found.error[0]  # t, 19 degrees of freedom, 95 %
    assert misses <= 7  # 1 in 20 expected; more than 7 of 40 happens once in 500


def test_directions_are_shared_so_that_differences_are_exact_and_the_model_is_only_read() -> None:
    a, b = quadratic(torch.ones(5) * 2.0), quadratic(torch.ones(5) * 6.0)
    before = [p.clone() for p in a.model.parameters()]
    first, second = (local_flatness(f, [1.0], pairs=3, seed=1) for f in (a, b))
    assert (first.rise[0], second.rise[0]) == (pytest.approx(1.0), pytest.approx(3.0))
    assert all(torch.equal(p, q) for p, q in zip(a.model.parameters(), before, strict=True))
    repeated = local_flatness(a, [1.0], pairs=3, seed=1)
    assert repeated.rise == first.rise


def test_an_infinite_loss_is_an_infinite_rise_and_null_in_json() -> None:
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.ones_(model.weight)
    objective = Objective(
        model, lambda out, y: (out - y).exp().mean(), (torch.ones(1, 1).double(), torch.zeros(1, 1).double())
    )
    found = local_flatness(objective, [1.0, 1e4], pairs=2)
    assert math.isfinite(found.rise[0])
    assert found.rise[1] == math.inf
    assert found.error[1] is None
    assert found.to_dict()["rise"][1] is None


@pytest.mark.parametrize(
    ("radii", "pairs", "message"),
    [
        ([], 5, r"radii are \[\]"),
        ([0.0], 5, "all positive"),
        ([math.nan], 5, "all positive"),
        ([1.0], 1, "pairs is 1: expected at"),
    ],
)
def test_bad_arguments_are_refused(radii: list[float], pairs: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        local_flatness(quadratic(torch.ones(2)), radii, pairs=pairs)
