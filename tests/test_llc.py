"""The local learning coefficient where its integral is known: quadratics, with the step's own bias, and a quartic."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

from flatminima import MeasureOptions, Objective, measure
from flatminima.measures import NotApplicableError
from flatminima.measures.llc import local_learning_coefficient_of
from quadratic_fixture import Point, quadratic, with_spectrum

pytestmark = pytest.mark.usefixtures("one_thread")
SPECTRUM = torch.tensor([8.0, 3.0, 1.0, 0.1, 0.0, 0.0]).double()
ROWS = 200
BETA = ROWS / math.log(ROWS)


def exact(gamma: float, step: float = 0.0) -> float:
    """sum_i n beta h_i / 2 * variance_i; with a step, the stationary variance of the discretised chain."""
    k = BETA * SPECTRUM + gamma
    return float((BETA * SPECTRUM / 2 / (k * (1 - step * k / 4))).sum())


def test_metropolis_chains_have_no_bias_of_the_step() -> None:
    f = quadratic(with_spectrum(SPECTRUM), rows=ROWS)
    found = local_learning_coefficient_of(f, burn_in=60, draws=400, localization=5.0)
    assert abs(found.value - exact(5.0)) <= 3 * found.error
    assert found.error < 0.06 * exact(5.0)
    assert 0.3 < found.accepted < 0.85
    assert found.beta == pytest.approx(BETA)


@pytest.mark.slow
def test_standard_errors_hold_what_they_say() -> None:
    f = quadratic(with_spectrum(SPECTRUM), rows=ROWS)
    inside = 0
    for seed in range(60):
        found = local_learning_coefficient_of(f, burn_in=60, draws=200, localization=5.0, seed=seed)
        inside += abs(found.value - exact(5.0)) <= 2 * found.error
    assert inside >= 51


def test_scaling_by_the_curvature_changes_the_speed_not_the_answer() -> None:
    values = torch.logspace(-2, 3, 8).double()
    f = quadratic(torch.diag(values), rows=ROWS)
    k = BETA * values + 1.0
    true = float((BETA * values / k / 2).sum())
    plain, scaled = (
        local_learning_coefficient_of(f, burn_in=100, draws=250, localization=1.0, curvature=c) for c in (None, values)
    )
    assert abs(scaled.value - true) <= 4 * scaled.error
    assert scaled.effective > 3 * plain.effective
    assert plain.r_hat > 1.05 > scaled.r_hat


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_sgld_has_the_bias_that_its_docstring_states(share: float) -> None:
    f = quadratic(with_spectrum(SPECTRUM), rows=ROWS)
    step = 4 * share / (BETA * 8.0 + 50.0)
    found = local_learning_coefficient_of(f, burn_in=50, draws=500, localization=50.0, step_size=step)
    assert abs(found.value - exact(50.0, step)) <= 4 * found.error
    assert found.accepted == 1.0
    if share == 0.5:
        assert found.value - exact(50.0) > 4 * found.error


def test_a_degenerate_minimum_has_half_the_coefficient() -> None:
    """L = x^4 / 4: n beta E[L] = 1/4 without localisation, whatever n beta is; a quadratic has 1/2."""

    def weight(x: float) -> float:
        return math.exp(-BETA * x**4 / 4 - x**2 / 2)

    top, bottom = (quad(g, -3, 3, epsabs=1e-13)[0] for g in (lambda x: BETA * x**4 / 4 * weight(x), weight))
    assert 0.2 < top / bottom < 0.25  # what is left of 1/4 under the restoring force

    def quartic(out: Tensor, y: Tensor) -> Tensor:
        return (out**4).mean() / 4

    f = Objective(Point(torch.zeros(1).double()), quartic, (torch.zeros(ROWS, 1), torch.zeros(ROWS)), check=False)
    found = local_learning_coefficient_of(f, burn_in=100, draws=500, localization=1.0)
    assert found.value == pytest.approx(top / bottom, abs=4 * found.error)
    assert found.error < 0.03


def test_chains_that_diverge_or_cannot_be_compared_are_refused() -> None:
    f = quadratic(with_spectrum(SPECTRUM), rows=ROWS)
    with pytest.raises(ValueError, match=r"the chain diverged after \d+ steps of size 1"):
        local_learning_coefficient_of(f, step_size=1.0)
    with pytest.raises(NotApplicableError, match="at least two rows"):
        local_learning_coefficient_of(quadratic(with_spectrum(SPECTRUM)))


def test_the_measure_says_how_its_chains_went() -> None:
    f = quadratic(with_spectrum(SPECTRUM), rows=ROWS)
    options = MeasureOptions(burn_in=50, chain_draws=200, localization=5.0)
    found = measure(f, ["local_learning_coefficient"], options=options)["local_learning_coefficient"]
    assert abs(found.value - exact(5.0)) <= 5 * float(found.error or 0)
    assert "4 chains, R-hat" in found.note
    assert "no bias of the step" in found.note
    sgld = measure(
        f, ["local_learning_coefficient"], options=MeasureOptions(burn_in=50, chain_draws=50, step_size=1e-3)
    )
    assert "whose bias is not in the error" in sgld["local_learning_coefficient"].note
    hill = quadratic(-with_spectrum(SPECTRUM) / 100, torch.ones(6).double(), rows=ROWS)
    assert (
        "no minimum"
        in measure(hill, ["local_learning_coefficient"], options=options)["local_learning_coefficient"].note
    )


def test_the_same_seed_gives_the_same_chains() -> None:
    f = quadratic(with_spectrum(SPECTRUM), rows=ROWS)
    a, b, c = (local_learning_coefficient_of(f, burn_in=5, draws=10, seed=seed).losses for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
