r"""Search for completions: weights that keep every training label and give a chosen class to a chosen probe.

All weights under which every training point has its label form an open convex cone,

.. math:: V = \{ w : M_{ic}(w) = (w_{y_i} - w_c) \cdot x_i > 0 \;\; \forall i, c \ne y_i \}.

To find a member that also has :math:`(w_c - w_k) \cdot x > 0` for all k, the search starts at the analytic centre of V
(the minimum of :math:`-\sum \log M_{ic} + \frac{\rho}{2}\|w\|^2`) and takes Newton steps of this barrier under the
condition that the margins at the probe become positive, each shortened to stay inside V. Every point it visits is a
completion, and is looked at from all probes, so one search often decides several.

One step costs one Hessian of size (K-1)(r+1), assembled from sums over the points of each class, and its Cholesky
factor; the first step of every search shares the factor of the centre. Three or four steps are typical, where a dual
simplex takes dozens of pivots. Nothing here has to be trusted: what is found is a candidate, and :mod:`.proofs`
decides.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from scipy.linalg.lapack import dposv, dpotrf, dpotrs

from flatminima.measures.weakness.features import FloatArray, IntArray

_TO_BOUNDARY = 0.95  # share of the way to the boundary that a step may go
_TARGET = 0.03  # margin asked for at the probe, relative to the largest score there
_LEAST = 0.01  # of |w||x|, which a score is taken for at least
#: A lead below this share of |w||x| is rounding: no win before it has been proved.
CLEAR = 1e-11
_RIDGE = 0.01  # of the search, relative to that of the centre: longer steps
_CENTRED = 1e-3  # Newton decrement at which the centre is good enough
_FREE = 1e-8  # ridge while a start is sought
_KEPT = 4_000_000  # numbers in outer products of points that are formed at once, and kept if they are all


class Interior:
    """Newton steps inside the version space of one training set.

    Args:
        points: search coordinates of the training points, ``(n, D)``, the last one 1.
        labels: their classes.
        classes: K.
    """

    def __init__(self, points: FloatArray, labels: IntArray, classes: int) -> None:
        order = np.argsort(labels, kind="stable")
        self.x, self.y, self.classes = points[order], labels[order], classes
        self.n, self.dim = points.shape
        self.rows = np.arange(self.n)
        starts = np.searchsorted(self.y, np.arange(classes + 1))
        self.size = (classes - 1) * self.dim  # the last class is fixed at zero: scores matter up to a common shift
        self.count = self.n * (classes - 1)
        self._others = [np.delete(np.arange(classes), k) for k in range(classes)]
        slices = [(k, slice(a, b)) for k, (a, b) in enumerate(pairwise(starts)) if b > a]
        most = max(_KEPT // self.dim**2, 1)  # points whose products are formed at once
        self._pieces = [
            (k, slice(i, min(i + most, part.stop))) for k, part in slices for i in range(part.start, part.stop, most)
        ]
        self._outer = [self._products(part) for _, part in self._pieces] if self.n <= most else None
        self.weights: FloatArray | None = None  # of the centre, (K, D), once found
        self.newton_steps = 0

    def start(self, most: int = 40) -> FloatArray | None:
        """A member of V, by Newton's method on ``-sum log(M + 1)`` from zero; ``None`` where it comes to rest outside V.

        On separable points the sum falls without bound as all margins grow.
        """
        w = np.zeros((self.classes, self.dim))
        ridge = _FREE * self.count
        for _ in range(most):
            found = self._barrier(w, shift=1.0)
            if found is None:
                return None
            margins, gradient, hessian = found
            if margins.min() > 1.0:
                return w
            factor = self._factor(hessian, ridge)
            if factor is None:
                return None
            gradient = gradient + ridge * w[:-1].ravel()
            step = -dpotrs(factor, gradient)[0]
            move = self._full(step)
            w = w + min(1.0, _TO_BOUNDARY * self._reach(margins, move)) * move
            if -gradient @ step < _CENTRED**2:
                return None
        return None

    def centre(self, start: FloatArray, most: int = 60) -> bool:
        """Move from a member of V to its analytic centre; ``False`` where double precision does not carry that far."""
        w = start - start[-1]
        w = w / np.linalg.norm(w)
        for _ in range(most):
            found = self._barrier(w)
            if found is None:
                return False
            margins, gradient, hessian = found
            gradient = gradient + self.count * w[:-1].ravel()
            factor = self._factor(hessian, self.count)
            if factor is None:
                return False
            step = -dpotrs(factor, gradient)[0]
            decrement = float(np.sqrt(max(-gradient @ step, 0.0)))
            move = self._full(step)
            limit = self._reach(margins, move)
            w = w + (1.0 if decrement < 0.3 else min(1.0, 0.9 * limit)) * move
            if decrement < _CENTRED:
                break
        found = self._barrier(w)
        if found is None:
            return False
        margins, gradient, hessian = found
        factor = self._factor(hessian, _RIDGE * self.count)
        if factor is None:
            return False
        self.weights, self._margins, self._chol = w, margins, factor
        self._pull = -dpotrs(factor, gradient + _RIDGE * self.count * w[:-1].ravel())[0]
        return True

    def first_steps(self, probes: FloatArray) -> FloatArray:
        """The Newton responses of the centre to every probe, ``(m, size, K-1)``, by one solve for :meth:`search`."""
        solved = dpotrs(self._chol, self._raise(probes))[0]
        responses: FloatArray = solved.reshape(self.size, len(probes), self.classes - 1).transpose(1, 0, 2)
        return responses

    def search(
        self, probe: FloatArray, target: int, first: FloatArray, state: FloatArray | None, steps: int
    ) -> tuple[list[FloatArray], bool]:
        """Up to so many steps towards a completion in which ``target`` wins at ``probe``.

        Args:
            probe: search coordinates, ``(D,)``.
            target: the class.
            first: of :meth:`first_steps`; used when the search starts at the centre.
            state: where to go on, a member of V; ``None`` is the centre.
            steps: at most.

        Returns:
            The members of V that were visited, ``(K, D)`` each, and whether the last one has the target winning.
        """
        assert self.weights is not None
        w = self.weights if state is None else state
        visited: list[FloatArray] = []
        for step in range(steps):
            if step == 0 and state is None:
                margins, pull, response = self._margins, self._pull, first
            else:
                found = self._barrier(w)
                if found is None:  # rounding has left V: the last point is dropped
                    return visited[:-1], False
                margins, gradient, hessian = found
                ridge = _RIDGE * self.count
                factor = self._factor(hessian, ridge)
                if factor is None:
                    return visited, False
                right = np.empty((self.size, self.classes), order="F")
                right[:, 0] = -gradient - ridge * w[:-1].ravel()
                right[:, 1:] = self._raise(probe[None])
                solved = dpotrs(factor, right, overwrite_b=1)[0]
                pull, response = solved[:, 0], solved[:, 1:]
            move = self._full(self._towards(w, probe, target, pull, response))
            limit = self._reach(margins, move)
            if not limit > 1e-9:
                return visited, False
            w = w + min(1.0, _TO_BOUNDARY * limit) * move
            visited.append(w)
            scores = w @ probe
            lead = scores[target] - scores[self._others[target]].max()
            if lead > CLEAR * float(np.linalg.norm(w) * np.linalg.norm(probe)):
                return visited, True
        return visited, False

    def _towards(
        self, w: FloatArray, probe: FloatArray, target: int, pull: FloatArray, response: FloatArray
    ) -> FloatArray:
        """Minimum of the barrier's quadratic model under margins at the probe of at least the target's.

        With H the Hessian and G the rows :math:`(e_c - e_k) \\otimes x`, the step is :math:`d = -H^{-1} g + H^{-1} G^T
        a`, where :math:`a \\ge 0` minimises :math:`a^T (G H^{-1} G^T) a / 2 - a^T (need)`.
        """
        k = self.classes
        gram = np.zeros((k, k))  # x' H^-1 x between classes; zero for the class that is fixed
        gram[:-1, :-1] = probe @ response.reshape(k - 1, self.dim, k - 1)
        scores = w @ probe
        after = scores.copy()
        after[:-1] += pull.reshape(k - 1, self.dim) @ probe
        others = self._others[target]
        # Scores near zero are possible: a probe outside the span of the training points is not scored at all at the centre.
        scale = max(float(np.abs(scores).max()), _LEAST * float(np.linalg.norm(w) * np.linalg.norm(probe)))
        need = _TARGET * scale - (after[target] - after[others])
        cross = gram[target, others]
        system = gram[others[:, None], others] - cross[None, :] - cross[:, None] + gram[target, target]
        push = _nonnegative(system, need)
        raised = np.zeros(k)
        raised[others] = -push
        raised[target] = push.sum()
        step: FloatArray = pull + response @ raised[:-1]
        return step

    def _barrier(self, w: FloatArray, shift: float = 0.0) -> tuple[FloatArray, FloatArray, FloatArray] | None:
        """M + shift, gradient and Hessian of ``-sum log(M + shift)`` in the free classes; ``None`` outside its domain."""
        self.newton_steps += 1
        k, d = self.classes, self.dim
        scores = self.x @ w.T
        margins = scores[self.rows, self.y][:, None] - scores + shift
        margins[self.rows, self.y] = np.inf
        if not margins.min() > 0:
            return None
        inverse = 1.0 / margins
        square = inverse * inverse
        inverse[self.rows, self.y] = -inverse.sum(1)
        gradient = (inverse.T @ self.x)[:-1].ravel()
        sums = np.zeros((k, k, d, d))  # [a, b]: sum of x x' / M^2 over the points of class a against class b
        for i, (a, part) in enumerate(self._pieces):
            products = self._products(part) if self._outer is None else self._outer[i]
            sums[a] += (square[part].T @ products).reshape(k, d, d)
        blocks = -(sums + sums.transpose(1, 0, 2, 3))
        each = np.arange(k)
        blocks[each, each] = sums.sum(0) + sums.sum(1)
        hessian = blocks[:-1, :-1].transpose(0, 2, 1, 3).reshape(self.size, self.size)
        return margins, gradient, hessian

    def _products(self, part: slice) -> FloatArray:
        x = self.x[part]
        return (x[:, :, None] * x[:, None, :]).reshape(len(x), self.dim**2)

    def _factor(self, hessian: FloatArray, ridge: float) -> FloatArray | None:
        hessian.flat[:: self.size + 1] += ridge
        factor, failed = dpotrf(hessian.T, lower=0, overwrite_a=1, clean=0)
        return None if failed else factor

    def _raise(self, probes: FloatArray) -> FloatArray:
        """Columns ``e_k (x) x`` of every probe and free class, ``(size, m (K-1))``."""
        k = self.classes - 1
        out = np.zeros((k, self.dim, len(probes), k))
        each = np.arange(k)
        out[each, :, :, each] = probes.T
        return out.reshape(self.size, len(probes) * k)

    def _reach(self, margins: FloatArray, move: FloatArray) -> float:
        """Length of the move at which the first margin vanishes."""
        change = self.x @ move.T
        shrink = change - change[self.rows, self.y][:, None]
        shrink[self.rows, self.y] = 0.0
        fastest = float((shrink / margins).max())
        return 1.0 / fastest if fastest > 0 else float("inf")

    def _full(self, step: FloatArray) -> FloatArray:
        return np.concatenate([step.reshape(self.classes - 1, self.dim), np.zeros((1, self.dim))])


def _nonnegative(system: FloatArray, need: FloatArray, rounds: int = 8) -> FloatArray:
    """Approximate minimiser of ``a' S a / 2 - a' need`` over a >= 0: active sets, good enough for a direction."""
    active = need > 0
    for _ in range(rounds):
        push = np.zeros(len(need))
        index = np.flatnonzero(active)
        if not len(index):
            return push
        part = system[index[:, None], index]
        part.flat[:: len(index) + 1] *= 1.0 + 1e-10  # keeps the factorisation alive where two classes respond alike
        _, solved, failed = dposv(part, need[index])
        if failed:
            return push
        push[index] = solved
        if solved.min() < 0:
            active = push > 0
            continue
        short = (system @ push < need - 1e-9 * np.abs(need)) & ~active
        if not short.any():
            break
        active = active | short
    result: FloatArray = np.maximum(push, 0.0)
    return result
