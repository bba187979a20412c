r"""Random completions: uniform points of the version space in the unit ball, by hit-and-run reflected at the walls.

The version space is a cone, so what a completion says depends on the direction of its weights only. Directions are
isotropic in the coordinates in which training points and probes together have mean 0 and covariance 1, the same for
every affine image of the features, and in the K - 1 dimensions in which the scores of the classes differ.

Plain hit-and-run needs about dimension^2 steps for one independent point: 180,000 steps in the 81 dimensions of a small
MNIST network are worth 13. Reflecting the line at the walls instead of ending there (the billiard walk of Gryazina and
Polyak, "Random sampling: billiard walk algorithm", 2014) makes each path worth about one. A path has a random direction
and a fixed length; the billiard preserves the uniform distribution for any metric in which directions are drawn and
reflected, so the metric is that of the shape of the version space. A path that is reflected too often is given up and
its start counts again, which preserves it too.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import helmert

from flatminima.measures.weakness.features import FloatArray, IntArray

#: Length of a path in multiples of the square root of the dimension, where the shape is the covariance of the body.
PATH = 2.5
_REFLECTIONS = 100  # per path, in multiples of the dimension
_FLOOR = 1e-300


class Cone:
    r"""Points u of the unit ball whose weights w have :math:`(w_{y_i} - w_c) \cdot x_i \ge -\text{level}`.

    The training points are scaled so that a margin of a random direction u has the variance of one coordinate of u.

    Args:
        points: search coordinates of the training points, ``(n, D)``.
        labels: their classes.
        classes: K.
    """

    def __init__(self, points: FloatArray, labels: IntArray, classes: int) -> None:
        self.unit = points / np.linalg.norm(points, axis=1, keepdims=True) / np.sqrt(2.0)
        self.labels, self.classes, self.dim = labels, classes, points.shape[1]
        self.size = (classes - 1) * self.dim
        self.basis = helmert(classes)  # (K-1, K): orthonormal rows that add up to zero
        self._rows = np.arange(len(points))

    def weights(self, u: FloatArray) -> FloatArray:
        """Weights ``(..., K, D)`` of coordinates ``(..., size)``; they add up to zero over classes."""
        out: FloatArray = np.matmul(self.basis.T, u.reshape(*u.shape[:-1], self.classes - 1, self.dim))
        return out

    def coordinates(self, weights: FloatArray) -> FloatArray:
        """Coordinates ``(size,)`` of weights ``(K, D)``, up to a shift of all classes."""
        out: FloatArray = (self.basis @ weights).ravel()
        return out

    def margins(self, u: FloatArray, own: float = np.inf) -> FloatArray:
        """Margins ``(chains, n, K)`` of points ``(chains, size)``; ``own`` stands at the label itself."""
        scores = np.matmul(self.unit, self.weights(u).transpose(0, 2, 1))
        out: FloatArray = scores[:, self._rows, self.labels][:, :, None] - scores
        out[:, self._rows, self.labels] = own
        return out

    def normals(self, flat: IntArray) -> FloatArray:
        """Gradients ``(chains, size)`` of the margins with these flat indices into ``(n, K)``."""
        point, loser = np.divmod(flat, self.classes)
        ahead = self.basis[:, self.labels[point]] - self.basis[:, loser]
        out: FloatArray = (ahead.T[:, :, None] * self.unit[point][:, None, :]).reshape(len(flat), self.size)
        return out

    def barrier_shape(self, u: FloatArray) -> FloatArray:
        """Shape of the version space around an inner point: the inverse Hessian of its barrier, ``(size, size)``."""
        margins = self.margins(u[None])[0].ravel()
        walls = np.flatnonzero(np.isfinite(margins))
        normals = self.normals(walls) / margins[walls][:, None]
        hessian = normals.T @ normals / len(walls) + np.eye(self.size)
        out: FloatArray = np.linalg.inv(hessian)
        return out

    def walk(
        self, u: FloatArray, level: float, length: float, shape: FloatArray, rng: np.random.Generator
    ) -> tuple[FloatArray, int]:
        """One path of every chain.

        Args:
            u: ``(chains, size)``, inside; not changed.
            level: how far a margin may be violated.
            length: of the path, in the metric of ``shape``.
            shape: covariance whose ellipsoid resembles the body, ``(size, size)``.
            rng: of the directions.

        Returns:
            The ends of the paths, and how many were given up.
        """
        chains = np.arange(len(u))
        direction = rng.standard_normal(u.shape)
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        v = direction @ np.linalg.cholesky(shape).T
        here, left = u, np.full(len(u), length)
        slack = self.margins(here) + level
        change = self.margins(v, own=0.0)
        reflections = 0
        while True:
            rate = (change / np.maximum(slack, _FLOOR)).reshape(len(u), -1)
            wall = rate.argmin(1)
            fall = rate[chains, wall]
            to_wall = np.where(fall < 0, -1.0 / np.minimum(fall, -_FLOOR), np.inf)
            to_ball = _to_sphere(here, v)
            step = np.minimum(np.minimum(to_wall, to_ball), left)
            here = here + step[:, None] * v
            slack = slack + step[:, None, None] * change
            left = left - step
            going = left > 0
            if not going.any():
                return here, 0
            reflections += 1
            if reflections > _REFLECTIONS * self.size:
                return np.where(going[:, None], u, here), int(going.sum())
            normal = np.where((to_wall <= to_ball)[:, None], self.normals(wall), here)
            pushed = normal @ shape
            turn = 2.0 * (normal * v).sum(1) / np.maximum((normal * pushed).sum(1), _FLOOR)
            v = np.where(going[:, None], v - turn[:, None] * pushed, 0.0)
            change = self.margins(v, own=0.0)


def _to_sphere(u: FloatArray, v: FloatArray) -> FloatArray:
    """Time until a point inside the unit ball leaves it."""
    a, b = (v * v).sum(1), (u * v).sum(1)
    c = np.minimum((u * u).sum(1) - 1.0, 0.0)
    root = np.sqrt(b * b - a * c)
    # Of the two forms of the root, the one without cancellation.
    out: FloatArray = np.where(b > 0, -c / np.maximum(b + root, _FLOOR), (root - b) / np.maximum(a, _FLOOR))
    return out


def covariance(u: FloatArray, prior: FloatArray) -> FloatArray:
    """Covariance of draws ``(count, size)``, mixed with an earlier one in proportion to how few draws there are."""
    centred = u - u.mean(0)
    share = u.shape[1] / (u.shape[1] + len(u))
    out: FloatArray = (1.0 - share) * (centred.T @ centred) / max(len(u) - 1, 1) + share * prior
    return out


def uniform_ball(count: int, size: int, rng: np.random.Generator) -> FloatArray:
    """Uniform points of the unit ball, ``(count, size)``."""
    directions = rng.standard_normal((count, size))
    radius = rng.random(count) ** (1.0 / size)
    out: FloatArray = directions * (radius / np.linalg.norm(directions, axis=1))[:, None]
    return out
