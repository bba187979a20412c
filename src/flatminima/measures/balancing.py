r"""The smallest sum that rescaling can reach: matrix balancing in the Frobenius norm, with a bound on the error.

.. math:: \min_x f(x), \qquad f(x) = \sum_{uv} c_{vu}\, e^{2(x_v - x_u)}, \qquad c \ge 0

is a geometric programme. On each strongly connected part of the graph of the positive coefficients the minimum is attained
at a point that is unique up to a constant; coefficients between such parts can be made as small as one likes, so the
infimum is the sum over the parts (Osborne 1960; Schneider and Zenios 1990). Weak duality bounds the error: for every
circulation :math:`\nu \ge 0` of sum 1 on the part's edges, :math:`\log \min f \ge -\sum \nu \log(\nu / c)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_matrix, csr_matrix
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import LinearOperator, cg

_Array = NDArray[np.float64]
_WARM = 30  # sweeps of the diagonal iteration before Newton's method
_STEPS = 100


@dataclass(frozen=True)
class Balanced:
    """The infimum and where it is approached.

    Attributes:
        value: a value of *f* that is attained, or, where nothing attains the infimum, approached.
        gap: ``value - gap`` is not above the infimum, by weak duality.
        x: ``(nodes,)``, the minimiser on each strongly connected part, zero mean there.
        parts: how many parts have more than one node.
        attained: whether no coefficient lies between two parts.
    """

    value: float
    gap: float
    x: _Array
    parts: int
    attained: bool


def balance(coefficients: csr_matrix) -> Balanced:
    r"""Minimise :math:`\sum c_{vu} e^{2(x_v - x_u)}` over *x*.

    Args:
        coefficients: ``(nodes, nodes)``, nonnegative; entry ``(v, u)`` is :math:`c_{vu}`, the diagonal is constant.

    Raises:
        ValueError: a negative or non-finite coefficient.

    Example:
        >>> found = balance(csr_matrix([[5.0, 8.0], [2.0, 0.0]]))          # 5 + 8/d^2 + 2 d^2, smallest at d^2 = 2
        >>> round(found.value, 12), found.gap < 1e-12
        (13.0, True)
    """
    c = coo_matrix(coefficients)
    c.sum_duplicates()
    rows, columns, values = c.row, c.col, np.asarray(c.data, dtype=np.float64)
    if not np.isfinite(values).all() or (values < 0).any():
        raise ValueError("coefficients must be nonnegative and finite")
    loops = rows == columns
    value = math.fsum(values[loops].tolist())
    keep = ~loops & (values > 0)
    rows, columns, values = rows[keep], columns[keep], values[keep]
    nodes = c.shape[0]
    _, part = connected_components(csr_matrix((values, (rows, columns)), (nodes, nodes)), connection="strong")
    inside = part[rows] == part[columns]
    attained = bool(inside.all())
    rows, columns, values = rows[inside], columns[inside], values[inside]
    x, gap, parts = np.zeros(nodes), 0.0, 0
    for label in np.unique(part[rows]):
        members = np.flatnonzero(part == label)
        mine = part[rows] == label
        local = np.searchsorted(members, rows[mine]), np.searchsorted(members, columns[mine])
        found = _Part(len(members), *local, values[mine]).minimise()
        value, gap, parts = value + found[0], gap + found[1], parts + 1
        x[members] = found[2]
    return Balanced(value, gap, x, parts, attained)


class _Part:
    """One strongly connected part: edges ``v -> u`` with coefficients."""

    def __init__(self, nodes: int, v: NDArray[np.int64], u: NDArray[np.int64], c: _Array) -> None:
        self.nodes, self.v, self.u, self.log = nodes, v, u, np.log(c)

    def terms(self, x: _Array) -> _Array:
        """The terms of *f*."""
        with np.errstate(over="ignore"):
            found: _Array = np.exp(self.log + 2 * (x[self.v] - x[self.u]))
        return found

    def minimise(self) -> tuple[float, float, _Array]:
        """Value, duality gap and minimiser."""
        x = self._warm()
        terms = self.terms(x)
        for _ in range(_STEPS):
            # Newton's method on log f, whose derivatives are those of f over f.
            out, into = self._flows(terms)
            slope = 2 * (out - into) / terms.sum()
            step = self._solve(terms, (out - into) / terms.sum()) / 2
            decrement = float(slope @ step)
            if decrement <= 1e-28:
                break
            moved = self._search(x, step, decrement, float(np.log(terms.sum())))
            if moved is None:
                break
            x = moved
            terms = self.terms(x)
        return math.fsum(terms.tolist()), self._gap(terms), x - x.mean()

    def _warm(self) -> _Array:
        """Every node balanced by itself, half the way at once, for as long as that lowers the sum."""
        x = np.zeros(self.nodes)
        terms = self.terms(x)
        for _ in range(_WARM):
            out, into = self._flows(terms)
            trial = x + np.log(into / out) / 8
            moved = self.terms(trial)
            if not moved.sum() < terms.sum() * (1 - 1e-6):
                break
            x, terms = trial, moved
        return x

    def _flows(self, terms: _Array) -> tuple[_Array, _Array]:
        """Sums of the terms that leave and that enter each node."""
        out: _Array = np.bincount(self.v, terms, self.nodes).astype(np.float64)
        into: _Array = np.bincount(self.u, terms, self.nodes).astype(np.float64)
        return out, into

    def _search(self, x: _Array, step: _Array, decrement: float, start: float) -> _Array | None:
        size = 1.0
        while size > 1e-10:
            trial: _Array = x - size * step
            total = self.terms(trial).sum()
            if np.isfinite(total) and math.log(total) <= start - 0.25 * size * decrement:
                return trial
            size /= 2
        return None

    def _solve(self, terms: _Array, right: _Array) -> _Array:
        """``y`` with ``L y = right``, L the graph Laplacian with the weights ``terms / sum``, by conjugate gradients."""
        weights = terms / terms.sum()
        degrees = np.bincount(self.v, weights, self.nodes) + np.bincount(self.u, weights, self.nodes)
        between = csr_matrix((weights, (self.v, self.u)), (self.nodes, self.nodes))
        between = between + between.T

        def multiply(z: _Array) -> _Array:
            product: _Array = degrees * z - between @ z
            return product

        shape = (self.nodes, self.nodes)
        found: _Array = cg(
            LinearOperator(shape, multiply), right - right.mean(), rtol=1e-13, maxiter=20 * self.nodes,
            M=LinearOperator(shape, lambda z: z / degrees),
        )[0]  # fmt: skip
        return found

    def _gap(self, terms: _Array) -> float:
        """Value minus the dual bound of the nearest circulation, the rounding of both included."""
        total = math.fsum(terms.tolist())
        flow = terms / total
        out, into = self._flows(flow)
        for _ in range(3):  # the correction is a Newton step too; rounding is all that later ones change
            y = self._solve(flow, out - into)
            flow = flow * (1 + y[self.u] - y[self.v])
            if not (flow > 0).all():
                return total  # no bound: zero is below the minimum
            flow = flow / flow.sum()
            out, into = self._flows(flow)
        left = float(np.abs(out - into).max())
        bound = math.exp(-math.fsum((flow * (np.log(flow) - self.log)).tolist()))
        # What is left of the imbalance acts on the distance between the nodes.
        reach = float(np.ptp(self.log)) + 1
        rounding = left * self.nodes * reach + 8 * float(np.finfo(np.float64).eps)
        return max(0.0, total - bound) + total * rounding
