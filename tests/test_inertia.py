"""Numbers of positive and negative eigenvalues: exact where the Hessian is formed, within their interval where it is not."""

from __future__ import annotations

import math

import pytest
import torch

from flatminima import Measurement, MeasureOptions, Objective, measure
from flatminima.measures.inertia import eigenvalue_counts
from quadratic_fixture import quadratic, with_spectrum

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ("positive_eigenvalues", "negative_eigenvalues")


def both(f: Objective, **options: float) -> tuple[Measurement, Measurement]:
    found = measure(f, NAMES, options=MeasureOptions(**options))
    return found[NAMES[0]], found[NAMES[1]]


def test_a_prescribed_spectrum_is_counted() -> None:
    values = torch.tensor([5.0, 1.0, 1e-3, 0.0, 0.0, -1e-3, -2.0]).double()
    up, down = both(quadratic(with_spectrum(values)))
    assert (up.value, down.value) == (3.0, 2.0)
    assert up.error == down.error == 0.0
    assert up.converged
    assert up.cost == 2 * len(values)
    assert down.cost == 0  # shared
    assert "of 7 eigenvalues" in up.note


def test_the_threshold_is_relative_and_said_to_be_unclear_where_values_lie_close_to_it() -> None:
    f = quadratic(torch.diag(torch.tensor([1.0, 3e-10, 5e-11])).double())
    up, _ = both(f)
    assert up.value == 2.0
    assert not up.converged
    assert "a factor 6 parts" in up.note
    assert both(f, zero_threshold=1e-12)[0].value == 3.0
    assert both(f, zero_threshold=1e-12)[0].converged


def test_counts_of_a_matrix_without_zeros() -> None:
    found = eigenvalue_counts(torch.tensor([1.0, -1.0, 2.0]), 1e-6)
    assert math.isinf(found.gap)
    assert found.exact


def test_congruent_hessians_have_the_same_inertia_and_other_eigenvalues() -> None:
    """Sylvester's law, on the ReLU network of the vectors: see also test_measure_vectors."""
    a = with_spectrum(torch.tensor([4.0, 2.0, 0.0, -1.0, -3.0]).double())
    d = torch.diag(torch.tensor([0.2, 1.0, 3.0, 0.5, 7.0]).double())
    up, down = both(quadratic(d @ a @ d))
    assert (up.value, down.value) == (2.0, 2.0)


@pytest.mark.parametrize("seed", range(3))
def test_beyond_the_dense_limit_the_interval_holds_the_numbers(seed: int) -> None:
    """400 eigenvalues well away from zero and 200 zeros."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.cat(
        [1 + 4 * torch.rand(300, generator=generator), -1 - torch.rand(100, generator=generator), torch.zeros(200)]
    )
    f = quadratic(with_spectrum(values.double(), seed))
    for threshold, widest in ((1e-2, 60), (1e-10, 300)):  # the zeros are told from what is near them, or are not
        up, down = both(f, dense_limit=100, zero_threshold=threshold)
        for found, true in ((up, 300), (down, 100)):
            assert found.error_kind == "95 % interval"
            assert abs(found.value - true) <= float(found.error or 0) < widest
        assert not found.converged
        assert "dense_limit" in found.note
    exact_up, exact_down = both(f, dense_limit=600, zero_threshold=1e-9)
    assert (exact_up.value, exact_down.value) == (300, 100)
