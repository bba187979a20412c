r"""Classes that a single rival excludes: a theorem that decides most infeasible pairs without a linear program.

**Theorem (domination).** Let :math:`\tilde x = (x, 1)`, and let the features of class k's training points be
:math:`x_i` (i in k). If weights :math:`\alpha, \gamma \ge 0` exist with

.. math:: \tilde x = \sum_{i \in k} \alpha_i \tilde x_i \;-\; \sum_{j \in c} \gamma_j \tilde x_j ,

then class k scores higher than class c at x in every completion of the training labels, so c cannot win there.

*Proof.* In a completion :math:`f = w_k - w_c` is positive at the points of class k and negative at those of class c,
and linear in :math:`\tilde x`. Hence :math:`f \cdot \tilde x = \sum \alpha_i f \cdot \tilde x_i - \sum \gamma_j f \cdot
\tilde x_j > 0`, since not all weights are zero (the last coordinate of :math:`\tilde x` is 1). ∎

**Corollary (convex hull).** A probe in the convex hull of the training points of one class can only get that class
(:math:`\gamma = 0` for every c).

**Converse for two classes.** If x is not of that form, some f is positive on class k, negative on class c and not
positive at x (Farkas); moved slightly towards any strict separator it is negative at x. So for K = 2 the theorem is the
whole truth. For more classes it is not: c can be excluded because one of several rivals always beats it. Those cases,
one in twenty on small networks, are left to :mod:`.simplex`.

Whether such weights exist is a non-negative least-squares problem in as many equations as there are coordinates.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import nnls

from flatminima.measures.weakness.features import FloatArray, IntArray
from flatminima.measures.weakness.simplex import Ray

_RESIDUAL = 1e-9  # relative; what it lets through is proved or dropped by proofs.check_certificate


class Domination:
    """The cones of all pairs of classes of one training set.

    Args:
        points: search coordinates of the training points, ``(n, D)``.
        labels: their classes.
    """

    def __init__(self, points: FloatArray, labels: IntArray) -> None:
        self.x, self.y = points, labels
        self.tests = 0
        self._members: dict[int, IntArray] = {}

    def _of(self, k: int) -> IntArray:
        if k not in self._members:
            self._members[k] = np.flatnonzero(self.y == k)
        return self._members[k]

    def excludes(self, rival: int, target: int, probe: FloatArray) -> Ray | None:
        """Multipliers showing that ``rival`` beats ``target`` at the probe in every completion, or ``None``."""
        above, below = self._of(rival), self._of(target)
        if not len(above) + len(below):
            return None
        self.tests += 1
        generators = np.concatenate([self.x[above], -self.x[below]]).T
        scale = np.linalg.norm(generators, axis=0)
        try:
            found, residual = nnls(generators / scale, probe)
        except RuntimeError:  # the iteration limit: not decided here
            return None
        if residual > _RESIDUAL * np.linalg.norm(probe):
            return None
        used = np.flatnonzero(found > 1e-13 * found.max())
        points = np.concatenate([above, below])[used]
        ahead = used < len(above)
        winners = np.where(ahead, rival, target)
        losers = np.where(ahead, target, rival)
        multipliers = found[used] / scale[used]
        # The probe's own inequality, target above rival, with multiplier 1.
        return Ray(
            np.append(points, -1), np.append(winners, target), np.append(losers, rival), np.append(multipliers, 1.0)
        )
