r"""A second opinion, where the linear program gives no answer that can be proved: the nearest point of a convex hull.

Let a_s be the inequalities, scaled to unit length, and :math:`r = \sum_s \lambda_s a_s` the point of their convex hull
that is nearest to the origin (Wolfe, "Finding the nearest point in a polytope", 1976). If r is not zero, then
:math:`a_s \cdot r \ge \|r\|^2 > 0` for all s, so r is a witness, the one of maximal margin. If r is zero,
:math:`\lambda` is a certificate. Points in special position, on which a simplex method can end without a verdict, are
no difficulty for it.

It is a non-negative least-squares problem, min :math:`\|\sum_s \lambda_s a_s\|^2 + (\sum_s \lambda_s - 1)^2`, whose
solution is a multiple of that point. Training rows enter when they are violated.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import nnls

from flatminima.measures.weakness.features import FloatArray, IntArray
from flatminima.measures.weakness.simplex import Ray

_AT_ONCE = 60
_ZERO = 1e-14  # of a point between unit vectors


def nearest_point(
    points: FloatArray, labels: IntArray, classes: int, probe: FloatArray | None = None, target: int = -1
) -> tuple[FloatArray, Ray] | None:
    """Weights ``(K, D)`` and multipliers of the nearest point; one of the two is a proof unless rounding hides it.

    Args:
        points: search coordinates of the training points, ``(n, D)``.
        labels: their classes.
        classes: K.
        probe: search coordinates of a probe that ``target`` has to win.
        target: its class.

    Returns:
        ``None`` where the least-squares solver gave up.
    """
    n, dim = points.shape
    lengths = np.linalg.norm(points, axis=1)
    units = points / lengths[:, None]
    present = np.zeros((n, classes), dtype=bool)
    present[np.arange(n), labels] = True
    rivals = np.delete(np.arange(classes), target if probe is not None else labels[0])
    if probe is None:
        first, winner, scale, unit = 0, int(labels[0]), float(lengths[0]), units[:1]
        present[0] = True
    else:
        first, winner, scale = -1, target, float(np.linalg.norm(probe))
        unit = probe[None] / scale
    where, winners, losers = np.full(len(rivals), first), np.full(len(rivals), winner), rivals
    scales, system = np.full(len(rivals), scale), _columns(np.repeat(unit, len(rivals), 0), winners, losers, classes)
    while True:
        right = np.zeros(len(system))
        right[-1] = 1.0
        try:
            multipliers, _ = nnls(system, right)
        except RuntimeError:
            return None
        point = system[:-1] @ multipliers
        weights = np.concatenate([point.reshape(classes - 1, dim), np.zeros((1, dim))])
        scores = units @ weights.T
        slack = scores[np.arange(n), labels][:, None] - scores
        slack[present] = np.inf
        flat = slack.ravel()
        worst = np.argpartition(flat, min(_AT_ONCE, flat.size - 1))[:_AT_ONCE]
        worst = np.sort(worst[flat[worst] < 0.5 * float(point @ point)])
        if not len(worst) or float(np.linalg.norm(point)) < _ZERO:
            return weights, Ray(where, winners, losers, multipliers / scales)
        rows, against = np.unravel_index(worst, slack.shape)
        present[rows, against] = True
        where, winners = np.concatenate([where, rows]), np.concatenate([winners, labels[rows]])
        losers, scales = np.concatenate([losers, against]), np.concatenate([scales, lengths[rows]])
        system = np.concatenate([system, _columns(units[rows], labels[rows], against, classes)], axis=1)


def _columns(units: FloatArray, winners: IntArray, losers: IntArray, classes: int) -> FloatArray:
    """One column per inequality, ending in the 1 that holds the sum of the multipliers."""
    each = np.arange(len(units))
    rows = np.zeros((len(units), classes, units.shape[1]))
    rows[each, winners] += units
    rows[each, losers] -= units
    return np.concatenate([rows[:, :-1].reshape(len(units), -1), np.ones((len(units), 1))], axis=1).T
