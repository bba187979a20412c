"""The geometric programme behind the orbit-minimal trace."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.sparse import csr_matrix

from flatminima.measures.balancing import balance

Matrix = NDArray[np.float64]


def random_matrix(nodes: int, seed: int, filled: float = 1.0, spread: float = 2.0) -> Matrix:
    rng = np.random.default_rng(seed)
    return np.exp(spread * rng.standard_normal((nodes, nodes))) * (rng.random((nodes, nodes)) < filled)


def value(c: Matrix, x: Matrix) -> float:
    return float((c * np.exp(2 * (x[:, None] - x[None, :]))).sum())


def moved(c: Matrix, x: Matrix) -> Matrix:
    found: Matrix = c * np.exp(2 * (x[:, None] - x[None, :]))
    return found


@pytest.mark.parametrize("seed", range(5))
def test_against_a_general_optimiser(seed: int) -> None:
    c = random_matrix(6, seed)
    plainly = minimize(lambda x: math.log(value(c, x)), np.zeros(6), method="BFGS", tol=1e-12)
    found = balance(csr_matrix(c))
    assert found.value <= value(c, plainly.x) * (1 + 1e-10)
    assert found.value == pytest.approx(value(c, found.x), rel=1e-12)
    assert 0 <= found.gap <= 1e-11 * found.value


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 12), st.floats(0.1, 1.0), st.floats(0.1, 6.0))
def test_the_value_belongs_to_the_orbit_and_is_a_lower_bound_on_it(
    seed: int, nodes: int, filled: float, spread: float
) -> None:
    c = random_matrix(nodes, seed, filled, spread)
    rng = np.random.default_rng(seed)
    first = balance(csr_matrix(c))
    x = 3 * rng.standard_normal(nodes)
    second = balance(csr_matrix(moved(c, x)))
    assert second.value == pytest.approx(first.value, rel=1e-8, abs=1e-8 * first.gap)
    for _ in range(5):  # no point of the orbit is below value - gap
        assert value(c, first.x + rng.standard_normal(nodes)) >= first.value - first.gap
    assert first.gap <= 1e-8 * first.value or first.value == 0


def test_one_hidden_layer_in_closed_form() -> None:
    rng = np.random.default_rng(0)
    incoming, outgoing = rng.random(7) * 10 ** rng.uniform(-6, 6, 7), rng.random(7)
    c = np.zeros((8, 8))
    c[0, 0], c[0, 1:], c[1:, 0] = 3.0, incoming, outgoing
    found = balance(csr_matrix(c))
    assert found.value == pytest.approx(3 + 2 * np.sqrt(incoming * outgoing).sum(), rel=1e-13)
    assert np.exp(found.x[1:] - found.x[0]) == pytest.approx((incoming / outgoing) ** 0.25, rel=1e-6)
    assert found.attained


def test_what_lies_on_no_cycle_costs_nothing() -> None:
    """0 -> 1 <-> 2 -> 3: only the pair in the middle has a positive minimum, and it is not attained."""
    c = np.zeros((4, 4))
    c[0, 1], c[1, 2], c[2, 1], c[2, 3], c[3, 3] = 5.0, 4.0, 9.0, 7.0, 1.0
    found = balance(csr_matrix(c))
    assert found.value == pytest.approx(1 + 2 * math.sqrt(4 * 9), rel=1e-13)
    assert not found.attained
    assert found.parts == 1
    assert balance(csr_matrix(np.zeros((3, 3)))).value == 0.0
    assert balance(csr_matrix(np.diag([1.0, 2.0]))).value == 3.0


def test_a_large_sparse_graph() -> None:
    rng = np.random.default_rng(1)
    size, edges = 5000, 60000
    c = csr_matrix((np.exp(3 * rng.standard_normal(edges)), rng.integers(0, size, (2, edges))), (size, size))
    found = balance(c)
    assert found.gap <= 1e-9 * found.value < found.value < c.sum()


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_impossible_coefficients_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="nonnegative and finite"):
        balance(csr_matrix([[0.0, bad], [1.0, 0.0]]))
