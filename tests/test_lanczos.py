"""Lanczos on matrices whose eigenvalues were chosen."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flatminima import top_eigenpair
from flatminima.curvature.lanczos import EigenResult
from quadratic_fixture import quadratic, with_spectrum


def random_problem(seed: int) -> Tensor:
    """An indefinite symmetric matrix: Gaussian, a decaying or a clustered spectrum, of any scale and sign."""
    generator = torch.Generator().manual_seed(seed)
    n = int(torch.randint(2, 60, (), generator=generator))
    kind = seed % 4
    if kind == 0:
        values = torch.randn(n, generator=generator)
    elif kind == 1:
        values = 0.7 ** torch.arange(n)
    elif kind == 2:
        values = torch.cat([torch.rand(n - 1, generator=generator) * 0.1, torch.ones(1)])
    else:
        values = -torch.rand(n, generator=generator) - 0.1
    scale = 10 ** float(torch.randint(-4, 5, (), generator=generator))
    return scale * with_spectrum(values, seed)


def tridiagonal_spectrum(found: EigenResult, hessian: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(found.basis.T @ hessian @ found.basis)


@pytest.mark.parametrize("seed", range(200))
def test_the_top_eigenvalue_is_within_its_bound(seed: int) -> None:
    hessian = random_problem(seed)
    spectrum = torch.linalg.eigvalsh(hessian)
    rounding = 1e-13 * float(spectrum.abs().max())
    f = quadratic(hessian)
    for rtol in (1e-2, 1e-3, 1e-8):
        found = top_eigenpair(f, rtol=rtol, seed=seed)
        # What the residual proves: an eigenvalue is near.
        assert float((spectrum - found.value).abs().min()) <= found.error + rounding
        assert found.value <= float(spectrum[-1]) + rounding
        assert found.converged == (found.error <= rtol * abs(found.value))
        assert found.products <= len(hessian) + 1
        # The bound is measured, not extrapolated.
        residual = hessian @ found.vector - found.value * found.vector
        assert found.error == pytest.approx(float(residual.norm()), rel=1e-3, abs=10 * rounding)
    # What a Gaussian start makes generic: it is the largest one.
    assert found.converged
    assert abs(float(spectrum[-1]) - found.value) <= found.error + rounding


@pytest.mark.parametrize("rtol", [1e-2, 1e-3, 1e-5])
def test_the_accuracy_asked_for_is_reached_with_fewer_products_than_dimensions(rtol: float) -> None:
    values = torch.cat([torch.tensor([10.0, 5.0]), torch.linspace(0, 1, 198)])
    found = top_eigenpair(quadratic(with_spectrum(values)), rtol=rtol)
    assert found.converged
    assert found.value == pytest.approx(10.0, rel=rtol)
    assert found.error <= rtol * 10
    assert found.products < 20


def test_eighty_steps_show_no_ghosts() -> None:
    values = torch.cat([torch.tensor([10.0, 8.0, 6.0, 5.0, 4.0]), torch.linspace(3, 0, 115)])
    hessian = with_spectrum(
        -values
    )  # the largest eigenvalue is zero, so that the iteration goes on; 10 converges early
    found = top_eigenpair(quadratic(hessian), max_products=81)
    basis = found.basis
    assert basis.shape == (120, 80)
    assert float((basis.T @ basis - torch.eye(80)).abs().max()) < 1e-13
    ritz = tridiagonal_spectrum(found, hessian)
    assert ritz[:5].tolist() == pytest.approx([-10.0, -8.0, -6.0, -5.0, -4.0], rel=1e-12)
    assert float(ritz[5]) > -3.001  # without orthogonalisation copies of 10 and 8 stand here
    assert found.diagonal.tolist() == pytest.approx((basis.T @ hessian @ basis).diagonal().tolist(), abs=1e-12)


def test_degenerate_eigenvalues() -> None:
    hessian = with_spectrum(torch.tensor([3.0] * 5 + [1.0] * 10 + [-2.0] * 5))
    found = top_eigenpair(quadratic(hessian), rtol=1e-10)
    assert found.value == pytest.approx(3.0, rel=1e-12)
    assert found.products <= 6  # the Krylov space of three distinct eigenvalues is three-dimensional
    assert float((hessian @ found.vector - 3 * found.vector).norm()) < 1e-10


@pytest.mark.parametrize("c", [2.0, -2.0])
def test_a_multiple_of_the_identity_takes_one_step(c: float) -> None:
    found = top_eigenpair(quadratic(c * torch.eye(7, dtype=torch.float64)))
    assert found.value == pytest.approx(c, rel=1e-14)
    assert (found.converged, found.products) == (True, 2)


def test_negative_definite_gives_the_algebraically_largest() -> None:
    found = top_eigenpair(quadratic(with_spectrum(torch.tensor([-9.0, -4.0, -1.0]))), rtol=1e-10)
    assert found.value == pytest.approx(-1.0, rel=1e-10)


def test_an_indefinite_hessian_with_a_dominant_negative_eigenvalue() -> None:
    values = torch.cat([torch.tensor([-100.0, 2.0]), torch.linspace(-1, 1, 50)])
    found = top_eigenpair(quadratic(with_spectrum(values)), rtol=1e-8)
    assert found.value == pytest.approx(2.0, rel=1e-8)


def test_zero_hessian() -> None:
    found = top_eigenpair(quadratic(torch.zeros(5, 5, dtype=torch.float64), slope=torch.ones(5, dtype=torch.float64)))
    assert (found.value, found.error, found.converged, found.products) == (0.0, 0.0, True, 2)
    assert float(found.vector.norm()) == pytest.approx(1.0)


@pytest.mark.parametrize("value", [4.0, -4.0, 0.0])
def test_one_dimension(value: float) -> None:
    found = top_eigenpair(quadratic(torch.tensor([[value]], dtype=torch.float64)))
    assert (found.value, found.error, found.converged) == (pytest.approx(value), pytest.approx(0.0), True)
    assert found.basis.shape == (1, 1)


def test_the_largest_may_be_zero() -> None:
    found = top_eigenpair(quadratic(with_spectrum(torch.tensor([0.0, -1.0, -2.0, -3.0]))), rtol=1e-3)
    assert found.value == pytest.approx(0.0, abs=1e-12)


def test_a_budget_that_is_too_small_is_admitted() -> None:
    hessian = with_spectrum(torch.linspace(0, 1, 100))
    found = top_eigenpair(quadratic(hessian), rtol=1e-6, max_products=5)
    assert not found.converged
    assert found.products == 5
    assert float((torch.linalg.eigvalsh(hessian) - found.value).abs().min()) <= found.error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_objectives(dtype: torch.dtype) -> None:
    hessian = with_spectrum(torch.cat([torch.tensor([10.0]), torch.linspace(0, 1, 30)])).to(dtype)
    found = top_eigenpair(quadratic(hessian), rtol=0.05)
    exact = float(torch.linalg.eigvalsh(hessian.double())[-1])
    assert found.converged
    assert abs(found.value - exact) <= found.error + torch.finfo(dtype).eps * exact
    assert found.vector.dtype == dtype
    assert found.basis.dtype == torch.float64


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.floats(-4, 4), st.floats(0.1, 10))
def test_shifting_and_scaling_the_matrix_shifts_and_scales_the_value(seed: int, shift: float, scale: float) -> None:
    hessian = with_spectrum(torch.randn(8, generator=torch.Generator().manual_seed(seed)), seed)
    base = top_eigenpair(quadratic(hessian), rtol=1e-12, seed=seed).value
    changed = scale * hessian + shift * torch.eye(8, dtype=torch.float64)
    assert top_eigenpair(quadratic(changed), rtol=1e-12, seed=seed).value == pytest.approx(
        scale * base + shift, abs=1e-10 * (scale + abs(shift))
    )


def test_the_same_seed_gives_the_same_bits_and_draws_nothing_from_the_global_state() -> None:
    f = quadratic(with_spectrum(torch.linspace(0, 1, 40)))
    before = torch.get_rng_state()
    a, b, c = (top_eigenpair(f, rtol=1e-2, seed=s) for s in (1, 1, 2))
    assert a.value == b.value
    assert torch.equal(a.vector, b.vector)
    assert not torch.equal(a.vector, c.vector)
    assert torch.equal(torch.get_rng_state(), before)


def test_bad_arguments_are_refused_before_any_product() -> None:
    f = quadratic(torch.eye(2))
    for options in ({"rtol": 0.0}, {"rtol": -1.0}, {"max_products": 1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            top_eigenpair(f, **options)
    assert f.evaluations.hvp == 0
