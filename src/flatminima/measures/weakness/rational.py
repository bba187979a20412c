"""Exact arithmetic on float64 data: every finite float is an integer times a power of two."""

from __future__ import annotations

from fractions import Fraction
from math import gcd
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flatminima.measures.weakness.features import FloatArray, IntArray
from flatminima.measures.weakness.frame import Frame

# Object arrays of Python integers.
Integers = NDArray[Any]


def integers(values: FloatArray) -> tuple[Integers, int]:
    """Integers N and an exponent e with ``values = N * 2**e`` exactly.

    Example:
        >>> numbers, exponent = integers(np.array([0.5, 3.0, 0.0]))
        >>> numbers.tolist(), exponent
        ([1, 6, 0], -1)
    """
    mantissa, exponent = np.frexp(values)
    whole = np.ldexp(mantissa, 53).astype(np.int64)
    power = exponent.astype(np.int64) - 53
    nonzero = whole != 0
    if not nonzero.any():
        return np.full(values.shape, 0, dtype=object), 0
    low = whole & -whole  # lowest set bit, so that small integers stay small
    trailing = np.where(nonzero, np.rint(np.log2(np.where(nonzero, low, 1))).astype(np.int64), 0)
    whole, power = whole >> trailing, power + trailing
    least = int(power[nonzero].min())
    shifts = np.where(nonzero, power - least, 0)
    shifted = [int(n) << int(k) for n, k in zip(whole.ravel(), shifts.ravel(), strict=True)]
    out = np.empty(values.size, dtype=object)
    out[:] = shifted
    return out.reshape(values.shape), least


def exact_margins_positive(weights: FloatArray, frame: Frame, phi: FloatArray, labels: IntArray) -> bool:
    """Whether the label strictly wins at every point, in exact arithmetic.

    ``weights`` ``(K, dimension)`` act on the frame's exact coordinates, ``(phi - shift) / 2**exponent`` and 1; no
    coordinate is rounded.
    """
    units = len(frame.units)
    # Every score is multiplied by one common power of two: 2**-least.
    exponents, columns = [], []
    for j in range(units):
        both = np.concatenate([phi[:, frame.units[j]], frame.shift[j : j + 1]])
        points, low = integers(both)
        slopes, slope_low = integers(weights[:, j])
        columns.append((points[:-1] - points[-1], slopes))
        exponents.append(low + slope_low - int(frame.exponent[j]))
    biases, bias_low = integers(weights[:, -1])
    exponents.append(bias_low)
    least = min(exponents)
    scores = np.empty((len(phi), len(weights)), dtype=object)
    scores[:] = 0
    for (points, slopes), exponent in zip(columns, exponents, strict=False):
        scores = scores + points[:, None] * (slopes * (1 << (exponent - least)))[None, :]
    scores = scores + biases * (1 << (bias_low - least))
    own = scores[np.arange(len(phi)), labels]
    beaten = own[:, None] > scores
    beaten[np.arange(len(phi)), labels] = True
    return bool(beaten.all())


def exact_multipliers(
    points: FloatArray, winners: IntArray, losers: IntArray, multipliers: FloatArray
) -> list[Fraction] | None:
    """Rational multipliers >= 0, not all zero, with ``sum_s m_s (e_winner - e_loser) (x) z_s = 0`` exactly.

    Elimination chooses as many multipliers as there are independent equations, the largest first; the others keep their
    float value, and the equations determine the chosen ones.

    Args:
        points: ``(s, d)``, a constant 1 included.
        winners: class of the positive block of each inequality.
        losers: class of its negative block.
        multipliers: approximate solution, ``(s,)``, positive.

    Returns:
        The multipliers, summing to about 1; ``None`` where the equations have no solution of that kind near the one
        given.
    """
    order = np.argsort(-multipliers, kind="stable")
    rows = _integer_rows(points, winners, losers, order)
    pivots = _eliminate(rows, len(order))
    solution: list[Fraction] = [Fraction(0)] * len(order)
    chosen = {column for _, column in pivots}
    for column in range(len(order)):
        if column not in chosen:
            solution[column] = Fraction(float(multipliers[order[column]]))
    for index, column in reversed(pivots):
        row = rows[index]
        rest = sum((row[j] * solution[j] for j in range(column + 1, len(order)) if row[j]), Fraction(0))
        solution[column] = -rest / row[column]
    if not any(solution) or any(value < 0 for value in solution):
        return None
    for original in _integer_rows(points, winners, losers, order):
        if sum((a * x for a, x in zip(original, solution, strict=True) if a), Fraction(0)) != 0:
            return None
    back: list[Fraction] = [Fraction(0)] * len(order)
    for position, index in enumerate(order):
        back[int(index)] = solution[position]
    return back


def _integer_rows(points: FloatArray, winners: IntArray, losers: IntArray, order: IntArray) -> list[list[int]]:
    used = sorted({*winners.tolist(), *losers.tolist()})[:-1]  # the equations of the last class follow from the others
    rows = []
    for unit in range(points.shape[1]):
        column, _ = integers(points[order, unit])  # one equation may be multiplied by a constant
        for k in used:
            sign = (winners[order] == k).astype(int) - (losers[order] == k).astype(int)
            row = [int(s) * int(v) for s, v in zip(sign, column, strict=True)]
            divisor = gcd(*row)
            if divisor:
                rows.append([v // divisor for v in row])
    return rows


def _eliminate(rows: list[list[int]], columns: int) -> list[tuple[int, int]]:
    """Fraction-free elimination in place (Bareiss, 1968); returns the (row, column) of every pivot."""
    pivots: list[tuple[int, int]] = []
    previous, start = 1, 0
    for column in range(columns):
        candidates = [i for i in range(start, len(rows)) if rows[i][column]]
        if not candidates:
            continue
        best = min(candidates, key=lambda i: abs(rows[i][column]))
        rows[start], rows[best] = rows[best], rows[start]
        pivot = rows[start]
        head = pivot[column]
        for i in range(start + 1, len(rows)):
            row = rows[i]
            factor = row[column]
            rows[i] = [
                (head * a - factor * b) // previous if j > column else 0
                for j, (a, b) in enumerate(zip(row, pivot, strict=True))
            ]
        pivots.append((start, column))
        previous = head
        start += 1
        if start == len(rows):
            break
    return pivots
