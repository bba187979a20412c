"""Basin volumes of quadratics: probabilities of normal variables, in closed form or integrated."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.special import gammaln, hyp1f1
from scipy.stats import chi2, norm
from torch import Tensor

from flatminima import MeasureOptions, Objective, measure
from flatminima.measures.volume import _Radial, basin_volume
from quadratic_fixture import Point, quadratic, rotation

pytestmark = pytest.mark.usefixtures("one_thread")


def log_chi2(x: float, n: int) -> float:
    """log P(chi^2_n <= x), by its series where SciPy's underflows."""
    plainly = float(chi2.logcdf(x, n))
    if plainly > -100:
        return plainly
    half = n / 2
    return half * math.log(x / 2) - x / 2 - float(gammaln(half + 1)) + math.log(float(hyp1f1(1, half + 1, x / 2)))


@pytest.mark.parametrize("n", [1, 2, 7, 400])
@pytest.mark.parametrize("height", [0.01, 1.0, 300.0])
def test_a_round_basin_at_the_centre_of_the_prior_is_exact_from_one_direction(n: int, height: float) -> None:
    f = quadratic(torch.eye(n).double())
    for tau in (0.5, 2.0):
        found = basin_volume(f, height=height, prior_std=tau, directions=2)
        assert found.log_volume == pytest.approx(log_chi2(2 * height / tau**2, n), abs=2e-3)
        assert found.error < 1e-3
        assert found.effective == pytest.approx(2, rel=1e-3)


@pytest.mark.parametrize("start", [0.0, 0.8, -3.0])
def test_one_dimension_is_an_interval(start: float) -> None:
    """L = x^2 / 2 around w: the ray stays below L(w) + c between two points."""
    f = quadratic(torch.ones(1, 1).double(), torch.tensor([start]).double())
    edge = math.sqrt(start**2 + 2 * 0.3)
    exact = math.log(norm.cdf(edge) - norm.cdf(-edge))
    found = basin_volume(f, height=0.3, directions=400)
    assert abs(found.log_volume - exact) <= 4 * found.error + 1e-4


def integrated(hessian: Tensor, height: float) -> float:
    """log P(x'Hx / 2 <= c) for two standard normal variables, by angles."""
    h = hessian.numpy()

    def ray(angle: float) -> float:
        v = np.array([math.cos(angle), math.sin(angle)])
        return (1 - math.exp(-height / float(v @ h @ v))) / (2 * math.pi)

    return math.log(quad(ray, 0, 2 * math.pi, epsabs=1e-13)[0])


def test_an_oblong_basin_with_and_without_the_shape_of_its_curvature() -> None:
    q = rotation(2, 0)
    hessian = q @ torch.diag(torch.tensor([40.0, 0.5]).double()) @ q.T
    f = quadratic((hessian + hessian.T) / 2)
    exact = integrated(hessian, 0.2)
    for curvature in (None, hessian.diagonal()):
        found = basin_volume(f, height=0.2, directions=300, curvature=curvature)
        assert abs(found.log_volume - exact) <= 4 * found.error


def test_the_shape_makes_directions_equal_where_axes_are_those_of_the_parameters() -> None:
    values = torch.logspace(-2, 3, 30).double()
    f = quadratic(torch.diag(values))
    blind, shaped = (basin_volume(f, height=0.1, directions=64, curvature=c) for c in (None, values))
    assert blind.effective < 5 < 40 < shaped.effective
    assert shaped.error < 0.2 < blind.error


def test_the_logarithm_is_a_lower_bound_in_expectation() -> None:
    """Thirty axes of very different lengths, and eight directions."""
    values = torch.logspace(-1, 3, 30).double()
    f = quadratic(torch.diag(values))
    exact = basin_volume(f, height=0.1, directions=300, curvature=values, seed=1).log_volume  # to 0.1
    found = [basin_volume(f, height=0.1, directions=8, seed=seed).log_volume for seed in range(15)]
    assert sum(x < exact for x in found) >= 13
    assert sum(found) / len(found) < exact - 1


@pytest.mark.slow
def test_standard_errors_hold_when_directions_are_equal() -> None:
    values = torch.logspace(-1, 1, 6).double()
    f = quadratic(torch.diag(values))
    exact = basin_volume(f, height=0.5, directions=6000, curvature=values, seed=99).log_volume
    inside = 0
    for seed in range(40):
        found = basin_volume(f, height=0.5, directions=64, curvature=values, seed=seed)
        inside += abs(found.log_volume - exact) <= 2 * found.error
    assert inside >= 34


def test_the_basin_ends_where_the_loss_first_exceeds_the_level() -> None:
    """A ridge at 1, and a valley behind it that does not belong to the basin; and a wall of infinity."""

    def ridge(out: Tensor, y: Tensor) -> Tensor:
        return (10 * torch.exp(-20 * (out.square() - 1) ** 2)).mean()

    f = Objective(Point(torch.zeros(1).double()), ridge, (torch.zeros(1, 1), torch.zeros(1)))
    edge = math.sqrt(1 - math.sqrt(-math.log(0.01 + math.exp(-20)) / 20))
    assert basin_volume(f, height=0.1, directions=4).radii.tolist() == pytest.approx([edge] * 4, rel=1e-3)

    def wall(out: Tensor, y: Tensor) -> Tensor:
        return torch.where(out.abs() < 0.7, 0.0 * out, torch.full_like(out, math.inf)).mean()

    f = Objective(Point(torch.zeros(1).double()), wall, (torch.zeros(1, 1), torch.zeros(1)), check=False)
    assert basin_volume(f, height=0.1, directions=4).radii.tolist() == pytest.approx([0.7] * 4, rel=1e-6)


@pytest.mark.parametrize(
    ("m", "a", "b", "radius"), [(0, 1.0, 0.5, 2.0), (3, 2.0, -4.0, 0.3), (9, 0.1, 3.0, 50.0), (50, 4.0, 0.0, 3.0)]
)
def test_the_radial_integral_is_that_of_a_general_integrator(m: int, a: float, b: float, radius: float) -> None:
    def integrand(t: float) -> float:
        return float(t**m * math.exp(-b * t - a * t**2 / 2))

    plainly = quad(integrand, 0, radius, epsabs=0, epsrel=1e-11, limit=200)[0]
    radial = _Radial(m, a, b)
    assert radial.log_integral(min(radius, radial.end)) == pytest.approx(math.log(plainly), abs=1e-9)


def test_the_measure_and_its_bad_input() -> None:
    f = quadratic(torch.diag(torch.logspace(-1, 2, 10)).double())
    found = measure(f, ["basin_volume"], options=MeasureOptions(directions=16))["basin_volume"]
    assert found.error_kind == "standard error of a lower bound"
    assert "a lower bound in expectation" in found.note
    assert found.value < 0
    for bad in ({"height": 0.0}, {"prior_std": math.inf}, {"directions": 1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            basin_volume(f, **bad)  # type: ignore[arg-type]
