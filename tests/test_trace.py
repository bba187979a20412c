"""The trace of matrices whose trace was chosen, and whether its standard error tells the truth."""

from __future__ import annotations

import math

import pytest
import torch

from flatminima import top_eigenpair, trace
from quadratic_fixture import quadratic, with_spectrum

DECAYING = 100 * 0.8 ** torch.arange(60.0)


@pytest.mark.parametrize("deflated", [False, True])
def test_the_interval_covers_the_truth_at_about_its_rate(deflated: bool) -> None:
    f = quadratic(with_spectrum(DECAYING))
    basis = top_eigenpair(f, rtol=0.1, max_products=8) if deflated else None
    exact, seeds, probes = float(DECAYING.sum()), 300, 40
    found = [trace(f, rtol=1e-9, max_probes=probes, deflate=basis, seed=s) for s in range(seeds)]
    assert all((r.probes, r.products, r.converged) == (probes, probes, False) for r in found)
    inside = sum(abs(r.value - exact) <= 2.023 * r.error for r in found)  # Student's t, 39 degrees of freedom
    assert 0.91 <= inside / seeds <= 0.985
    mean = sum(r.value for r in found) / seeds
    typical = math.sqrt(sum(r.error**2 for r in found) / seeds)
    assert abs(mean - exact) <= 3.5 * typical / math.sqrt(seeds)  # unbiased


def test_the_error_is_the_standard_error_of_rademacher_probes() -> None:
    hessian = with_spectrum(DECAYING)
    exact = math.sqrt(2 * float((hessian**2).sum() - (hessian.diagonal() ** 2).sum()))  # Hutchinson (1990)
    found = trace(quadratic(hessian), rtol=1e-9, max_probes=4000)
    assert found.error * math.sqrt(4000) == pytest.approx(exact, rel=0.05)


def test_deflation_shrinks_the_error() -> None:
    f = quadratic(with_spectrum(DECAYING))
    plain = trace(f, rtol=1e-9, max_probes=50)
    deflated = trace(f, rtol=1e-9, max_probes=50, deflate=top_eigenpair(f, rtol=1e-12, max_products=20))
    assert deflated.error < plain.error / 10
    assert abs(deflated.value - float(DECAYING.sum())) <= 4 * deflated.error


def test_a_full_basis_makes_the_trace_exact_and_free() -> None:
    values = torch.linspace(-1, 3, 12, dtype=torch.float64)
    f = quadratic(with_spectrum(values))
    basis = top_eigenpair(f, rtol=1e-300, max_products=50)
    assert basis.basis.shape == (12, 12)
    spent = f.evaluations.hvp
    found = trace(f, deflate=basis)
    assert found.value == pytest.approx(float(values.sum()), rel=1e-12)
    assert (found.error, found.converged, found.products, found.probes) == (0.0, True, 0, 0)
    assert f.evaluations.hvp == spent


def test_a_basis_that_ended_early_leaves_its_complement_to_the_probes() -> None:
    f = quadratic(with_spectrum(torch.tensor([3.0] * 6 + [1.0] * 4)))
    basis = top_eigenpair(f, rtol=1e-10)
    assert basis.basis.shape[1] < 10
    found = trace(f, deflate=basis, rtol=1e-9, max_probes=2000)
    assert abs(found.value - 22.0) <= 4 * found.error
    identity = quadratic(5 * torch.eye(9, dtype=torch.float64))
    assert trace(identity, deflate=top_eigenpair(identity), max_probes=3000, rtol=1e-3).value == pytest.approx(
        45, rel=5e-3
    )


@pytest.mark.parametrize("rtol", [0.1, 0.03])
def test_it_stops_when_the_error_asked_for_is_reached(rtol: float) -> None:
    found = trace(quadratic(with_spectrum(DECAYING)), rtol=rtol, max_probes=5000)
    assert found.converged
    assert 10 < found.probes < 5000
    assert found.error <= rtol * abs(found.value)
    assert found.error > 0.7 * rtol * abs(found.value)


def test_a_diagonal_matrix_needs_no_more_than_the_least_probes() -> None:
    found = trace(quadratic(torch.diag(torch.tensor([9.0, 1.0, -4.0], dtype=torch.float64))))
    assert found.value == pytest.approx(6.0, rel=1e-14)
    assert found.error == pytest.approx(0.0, abs=1e-14)
    assert found.probes == 10


@pytest.mark.parametrize("n", [1, 3])
def test_zero_hessian(n: int) -> None:
    f = quadratic(torch.zeros(n, n, dtype=torch.float64), slope=torch.ones(n, dtype=torch.float64))
    for basis in (None, top_eigenpair(f)):
        found = trace(f, deflate=basis)
        assert (found.value, found.error, found.converged) == (0.0, 0.0, True)


def test_the_same_seed_gives_the_same_bits() -> None:
    f = quadratic(with_spectrum(DECAYING))
    before = torch.get_rng_state()
    a, b, c = (trace(f, max_probes=12, seed=s) for s in (1, 1, 2))
    assert a == b
    assert a.value != c.value
    assert torch.equal(torch.get_rng_state(), before)


def test_bad_arguments_are_refused_before_any_product() -> None:
    f = quadratic(torch.eye(2))
    for options in ({"rtol": 0.0}, {"min_probes": 1}, {"max_probes": 5}):
        with pytest.raises(ValueError, match=next(iter(options))):
            trace(f, **options)
    with pytest.raises(ValueError, match=r"3 parameters.*this one has 2"):
        trace(f, deflate=top_eigenpair(quadratic(torch.eye(3))))
    assert f.evaluations.hvp == 0
