r"""What makes a decision certain: a witness for "it can win here", a certificate for "it cannot", and their checks.

A linear layer scores a point z by :math:`w_k \cdot z`, k = 0, ..., K-1. "Training point i has its label" and "class c
wins at the probe" are strict inequalities :math:`(w_a - w_b) \cdot z > 0`, one for each pair of the winner a and a
loser b. Exactly one of the following exists (Gordan's theorem of the alternative, 1873):

*Witness.* Weights under which all inequalities hold.

*Certificate.* Multipliers :math:`\lambda \ge 0`, not all zero, with :math:`\sum_s \lambda_s\,(e_{a_s} - e_{b_s})
\otimes z_s = 0`. It excludes a witness: the same combination of the left-hand sides would be positive and zero. (That
one of the two must exist is not used; only that a certificate which was checked excludes every witness.)

How they are checked, in double precision with every rounding accounted for (:math:`\gamma_n = n u / (1 - n u)`, Higham,
*Accuracy and Stability of Numerical Algorithms*, 2002, section 3.1; u = 2^-53):

- A witness: each margin must exceed the bound on its own rounding error. Where that fails, the float64 weights are
  rational numbers, and the margins are computed in exact integer arithmetic.
- A certificate found in floating point satisfies the equations up to rounding only. Let B be their matrix and :math:`C
  = B\,\mathrm{diag}(\lambda)`, so that the residual is :math:`r = C 1`. If X is a computed right inverse of C with
  :math:`\|I - C X\|_\infty \le \epsilon < 1`, then C has full row rank and :math:`\delta = X (C X)^{-1} r` solves
  :math:`C \delta = r`, so :math:`\lambda' = \lambda (1 - \delta)` satisfies the equations exactly, and it is positive
  when :math:`\|X\|_\infty \|r\|_\infty / (1 - \epsilon) < 1`. That is a proof that an exact certificate exists
  (``"exact"``). It needs more multipliers than equations; coordinates in which every point used is exactly zero are no
  equations, and one class is left out, because the equations of all classes add up to zero.
- Where the points are in special position (a probe that repeats a training point) there are fewer multipliers than
  equations. A small system is then solved in exact rational arithmetic, again ``"exact"``.
- Otherwise the residual itself is a statement: any weights w satisfy :math:`\min_s \text{margin}_s \le 2 \|r\|_1
  \max|w|` when :math:`\sum \lambda = 1` (2, because a class was left out). The certificate is then a proof up to that
  ``resolution``, in a frame where each unit varies by about 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from flatminima.measures.weakness.features import BoolArray, FloatArray, IntArray
from flatminima.measures.weakness.frame import FeatureProblem
from flatminima.measures.weakness.rational import exact_margins_positive, exact_multipliers

#: A certificate whose residual exceeds this proves nothing worth the name.
RESOLUTION = 1e-9

_UNIT = 2.0**-53
_TINY = 1e-300  # more than any sum of underflows
# Exact elimination during the search only for systems this small (milliseconds); verify(rational=True) has no such limit.
_SMALL = 40


def _gamma(n: int) -> float:
    """Bound on n roundings, itself rounded up."""
    return n * _UNIT / (1.0 - n * _UNIT) * (1.0 + 1e-12)


@dataclass(frozen=True, eq=False)
class Certificate:
    r"""Multipliers that exclude a class at a probe, or show that the training labels contradict each other.

    Attributes:
        probe: index of the probe; ``None`` where the training rows alone are infeasible.
        target: the class that cannot win there; ``None`` likewise.
        points: of each inequality used: index of the training point, or -1 for the probe.
        winners: the class that has to win at that point (its label, or ``target``).
        losers: the class that it has to beat.
        multipliers: non-negative, summing to 1.
        proof: ``"exact"`` or ``"resolution"`` (see the module).
        resolution: bound on ``min margin / max|weight|``; 0 where the proof is exact.
    """

    probe: int | None
    target: int | None
    points: IntArray
    winners: IntArray
    losers: IntArray
    multipliers: FloatArray
    proof: str = "unchecked"
    resolution: float = float("inf")

    def explain(self) -> str:
        """The certificate in words.

        The classes that beat the target come from the inequalities at the probe; when there is one such class, it beats
        the target at the probe in every completion of the training labels.
        """
        here = self.points < 0
        if self.probe is None:
            rows = _listed(self.points)
            return f"no linear layer gives every training point its label: those of {rows} contradict each other"
        what = "" if self.proof == "exact" else f" by any margin above {self.resolution:.0e} of the largest weight"
        start = f"class {self.target} cannot win at probe {self.probe}{what}: "
        rivals = self.losers[here][np.argsort(-self.multipliers[here], kind="stable")].tolist()
        others = set(self.winners[~here].tolist())
        if len(rivals) > 1 or not others <= {rivals[0], self.target}:
            names = " or ".join(f"class {k}" for k in rivals)
            return f"{start}{names} always beats it there, by {_listed(self.points[~here])}"
        ahead = f"points of class {rivals[0]} ({_numbers(self.points[~here & (self.winners == rivals[0])])})"
        if self.target not in others:
            return f"{start}the probe lies between {ahead}"
        behind = f"points of class {self.target} ({_numbers(self.points[~here & (self.winners == self.target)])})"
        return f"{start}class {rivals[0]} beats it there, since the probe is a combination of {ahead} less {behind}"


def _listed(points: IntArray) -> str:
    return f"{len(np.unique(points))} training points ({_numbers(points)})"


def _numbers(points: IntArray, most: int = 12) -> str:
    rows = np.unique(points).tolist()
    return ", ".join(map(str, rows[:most])) + (f" and {len(rows) - most} more" if len(rows) > most else "")


def _points(problem: FeatureProblem, certificate: Certificate, exact: bool = False) -> FloatArray:
    """The points of a certificate, in the frame, or as given with a constant 1."""
    train = problem.train if exact else problem.z_train
    rows = train[np.maximum(certificate.points, 0)].copy()
    if certificate.probe is not None:
        probes = problem.probes if exact else problem.z_probes
        rows[certificate.points < 0] = probes[certificate.probe]
    return np.concatenate([rows[:, problem.frame.units], np.ones((len(rows), 1))], axis=1) if exact else rows


def _equations(z: FloatArray, winners: IntArray, losers: IntArray) -> FloatArray:
    """Matrix B: a column per inequality, a row per class (but one) and coordinate, without rows that are exactly zero."""
    used, counts = np.unique(np.concatenate([winners, losers]), return_counts=True)
    kept = np.delete(used, counts.argmax())  # the class that occurs most: its equations are the longest
    place = np.full(int(used.max()) + 1, -1)
    place[kept] = np.arange(len(kept))
    b = np.zeros((len(kept), z.shape[1], len(z)))
    for sign, classes in ((1.0, winners), (-1.0, losers)):
        here = place[classes]
        columns = np.flatnonzero(here >= 0)
        b[here[columns], :, columns] += sign * z[columns]
    flat = b.reshape(-1, len(z))
    rows: FloatArray = flat[np.any(flat != 0, axis=1)]
    return rows


def check_certificate(problem: FeatureProblem, certificate: Certificate) -> Certificate | None:
    """The certificate with its multipliers refined and what it proves; ``None`` when it proves nothing."""
    keep = certificate.multipliers > 0
    if not keep.any() or not np.isfinite(certificate.multipliers).all():
        return None
    certificate = _subset(certificate, keep)
    b = _equations(_points(problem, certificate), certificate.winners, certificate.losers)
    multipliers = certificate.multipliers / certificate.multipliers.sum()
    rounding = _gamma(len(multipliers) + 4)
    inverse = None
    for _ in range(3):  # Newton's method on linear equations: the second round removes what rounding left in the first
        c = b * multipliers
        r = c.sum(1)
        inverse = np.linalg.pinv(c, rcond=1e-13)
        step = inverse @ r
        if not np.abs(step).max(initial=0.0) < 0.5:
            break
        multipliers = multipliers * (1.0 - step)
        multipliers /= multipliers.sum()
        if np.abs(step).max(initial=0.0) < 1e-12:
            break
    c = b * multipliers
    r, noise = np.abs(c.sum(1)), rounding * np.abs(c).sum(1) + _TINY
    certificate = replace(certificate, multipliers=multipliers)
    if len(b) < len(multipliers) and inverse is not None:
        size = np.abs(inverse).sum(1).max() * (1.0 + 1e-12)
        defect = np.abs(np.eye(len(b)) - c @ inverse) + 2.0 * rounding * (np.abs(c) @ np.abs(inverse)) + _TINY
        epsilon = defect.sum(1).max(initial=0.0) * (1.0 + 1e-12)
        if epsilon < 0.5 and size * (r + noise).max(initial=0.0) / (1.0 - epsilon) < 0.9:
            return replace(certificate, proof="exact", resolution=0.0)
    if len(multipliers) <= _SMALL:
        exact = exact_certificate(problem, certificate)
        if exact is not None:
            return replace(certificate, proof="exact", resolution=0.0, multipliers=np.array([float(x) for x in exact]))
    resolution = 2.0 * float((r + noise).sum() * (1.0 + 1e-12))
    return replace(certificate, proof="resolution", resolution=resolution) if resolution <= RESOLUTION else None


def _subset(certificate: Certificate, keep: BoolArray) -> Certificate:
    return replace(
        certificate,
        points=certificate.points[keep],
        winners=certificate.winners[keep],
        losers=certificate.losers[keep],
        multipliers=certificate.multipliers[keep],
    )


def exact_certificate(problem: FeatureProblem, certificate: Certificate) -> list[Fraction] | None:
    """Rational multipliers near those given that satisfy the equations exactly and are not negative; or ``None``.

    The features are binary fractions, so the equations are integer equations; they are solved by elimination without
    rounding, and the solution is put back into them.
    """
    z = _points(problem, certificate, exact=True)
    return exact_multipliers(z, certificate.winners, certificate.losers, certificate.multipliers)


def check_witnesses(problem: FeatureProblem, weights: FloatArray, block: int = 64) -> BoolArray:
    """Which of the weights ``(B, K, dimension)`` give every training point its label; decided without a doubt."""
    good = np.empty(len(weights), dtype=bool)
    for start in range(0, len(weights), block):
        part = slice(start, start + block)
        good[part] = _surely(weights[part], problem.z_train, problem.labels).all(1)
    for i in np.flatnonzero(~good):
        good[i] = exact_margins_positive(weights[i], problem.frame, problem.train, problem.labels)
    return good


def wins(problem: FeatureProblem, weights: FloatArray, probes: IntArray, targets: IntArray) -> BoolArray:
    """At which probes the target strictly wins under the weights ``(K, dimension)``; decided without a doubt."""
    good: BoolArray = _surely(weights[None], problem.z_probes[probes], targets)[0]
    for i in np.flatnonzero(~good):
        phi = problem.probes[probes[i] : probes[i] + 1]
        good[i] = exact_margins_positive(weights, problem.frame, phi, targets[i : i + 1])
    return good


def _surely(weights: FloatArray, z: FloatArray, winners: IntArray) -> BoolArray:
    """Whether the winner leads by more than rounding, ``(B, points)``; ``False`` is no answer."""
    count, classes, size = weights.shape
    flat, points = weights.reshape(count * classes, size), np.arange(len(z))
    scores = (z @ flat.T).reshape(len(z), count, classes).transpose(1, 0, 2)
    errors = (
        (_gamma(size + 4) * (np.abs(z) @ np.abs(flat).T) + _TINY).reshape(len(z), count, classes).transpose(1, 0, 2)
    )
    lead = scores[:, points, winners][:, :, None] - scores
    sure = lead > (errors + errors[:, points, winners][:, :, None]) * (1.0 + 1e-12)
    sure[:, points, winners] = True
    out: BoolArray = np.all(sure, axis=2)
    return out
