r"""The pair proxy: how many (probe, class) pairs a linear layer on frozen features can still realise.

Given frozen features :math:`\phi`, n training points with labels and m probes, let

.. math:: \mathrm{ext}(x_j) = |\{ c : \exists\, W, b \text{ that give every training point its label and } x_j
    \text{ class } c \}|,

with strict inequalities throughout. The pair proxy is :math:`PP = \sum_j \mathrm{ext}(x_j)`. It is bounded by, and
bounds, the weakness of the training-label policy in the feature-classifier vocabulary:

.. math:: 1 + PP \le |\mathrm{Ext}(\pi)| \le \prod_j (1 + \mathrm{ext}(x_j)).

It measures the *features* (how large a version space they leave to a last layer), not the trained last layer, which it
ignores, and not the function: two networks that agree on every input can differ in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from flatminima.measures.weakness.decisions import FEASIBLE, INFEASIBLE, UNDECIDED, Decider, one_thread
from flatminima.measures.weakness.features import ArrayLike, FloatArray, IntArray, class_labels
from flatminima.measures.weakness.frame import FeatureProblem
from flatminima.measures.weakness.proofs import Certificate
from flatminima.measures.weakness.verification import Verification, verify

# Probes decided together. Each completion is looked at from all of them, so a longer block shares more and compares
# more; a fixed length keeps the cost linear in the number of probes.
_BLOCK = 128


@dataclass(frozen=True, eq=False)
class PairProxy:
    """The decisions about all pairs, with a proof of each.

    Attributes:
        value: pairs proved feasible, the pair proxy; a lower bound while ``undecided`` is not empty.
        feasible: ``(m, K)``: 1 feasible, 0 infeasible, -1 undecided.
        training_feasible: whether a last layer can give every training point its label. If not, ``value`` is 0 and
            ``conflict`` says why; ``None``: undecided, and so is every pair.
        conflict: certificate over training rows alone.
        undecided: (probe, class) -> reason.
        true_feasible: probes whose true class is feasible; ``None`` without probe labels.
        witnesses: weights ``(K, r + 1)`` on the coordinates of ``problem.frame``, bias last; each gives every training
            point its label, strictly.
        certificates: of the infeasible pairs.
        proof: ``(m, K)``: index into ``witnesses`` where feasible, into ``certificates`` where infeasible.
        rank: directions in which the features vary.
        cost: work in steps of each kind. Equal runs have equal costs; there are no times in it.
        notes: what a reader of the number must know.
        problem: the checked features.
    """

    value: int
    feasible: IntArray
    training_feasible: bool | None
    conflict: Certificate | None
    undecided: dict[tuple[int, int], str]
    true_feasible: int | None
    witnesses: tuple[FloatArray, ...]
    certificates: tuple[Certificate, ...]
    proof: IntArray
    rank: int
    cost: dict[str, int]
    notes: tuple[str, ...]
    problem: FeatureProblem

    @property
    def upper(self) -> int:
        """The pair proxy if every undecided pair were feasible; equal to ``value`` where all are decided."""
        return self.value + int((self.feasible == UNDECIDED).sum())

    @property
    def extensions(self) -> IntArray:
        """``ext`` of every probe: the number of classes proved feasible there, ``(m,)``."""
        found: IntArray = (self.feasible == FEASIBLE).sum(1)
        return found

    @property
    def wrong_feasible(self) -> int | None:
        """Feasible pairs whose class is not the true one, which is most of what the proxy counts."""
        return None if self.true_feasible is None else self.value - self.true_feasible

    @property
    def log_bounds(self) -> tuple[float, float]:
        """Bounds on the log of the weakness: ``log(1 + PP)`` and ``sum(log(1 + ext))``."""
        possible = (self.feasible != INFEASIBLE).sum(1)
        return math.log1p(self.value), float(np.log1p(possible).sum())

    def why(self, probe: int, target: int) -> FloatArray | Certificate | str:
        """The proof of one decision: weights, a certificate, or why it is undecided."""
        decided = self.feasible[probe, target]
        if decided == UNDECIDED:
            return self.undecided[probe, target]
        if self.conflict is not None:
            return self.conflict
        index = int(self.proof[probe, target])
        return self.witnesses[index] if decided == FEASIBLE else self.certificates[index]

    def verify(self, *, rational: bool = False, sample: int | None = None, seed: int = 0) -> Verification:
        """Check the proofs again, from the features alone: :func:`flatminima.measures.weakness.verification.verify`."""
        return verify(self, rational=rational, sample=sample, seed=seed)

    def to_dict(self) -> dict[str, Any]:
        """Numbers only, JSON-ready: without the proofs themselves."""
        exact = sum(certificate.proof == "exact" for certificate in self.certificates)
        return {
            "pair_proxy": self.value,
            "upper": self.upper,
            "probes": len(self.feasible),
            "classes": self.problem.classes,
            "extensions": self.extensions.tolist(),
            "true_feasible": self.true_feasible,
            "wrong_feasible": self.wrong_feasible,
            "training_feasible": self.training_feasible,
            "conflict": self.conflict.explain() if self.conflict is not None else None,
            "undecided": [[j, c, reason] for (j, c), reason in self.undecided.items()],
            "log_bounds": list(self.log_bounds),
            "rank": self.rank,
            "proofs": {
                "witnesses": len(self.witnesses),
                "certificates": len(self.certificates),
                "exact": exact,
                "resolution": len(self.certificates) - exact,
            },
            "cost": dict(self.cost),
            "notes": list(self.notes),
        }


def pair_proxy(
    train: ArrayLike,
    labels: ArrayLike,
    probes: ArrayLike,
    *,
    classes: int | None = None,
    probe_labels: ArrayLike | None = None,
    search: bool = True,
) -> PairProxy:
    r"""Count the (probe, class) pairs that a linear layer on these features can realise beside all training labels.

    Unchanged by invertible affine maps of feature space, hence by every rescaling and permutation of hidden units. It
    depends on the features at the training points and probes only.

    Every decision is proved: feasible pairs by weights whose margins exceed their rounding error, infeasible ones by
    Farkas multipliers (:mod:`flatminima.measures.weakness.proofs`). What could not be proved is in ``undecided``.

    Args:
        train: features of the training points, ``(n, d)``, for instance from
            :func:`flatminima.measures.weakness.features`.
        labels: their classes, ``(n,)``.
        probes: features of unseen points, ``(m, d)``.
        classes: K; by default the largest training label plus one. A class without training points is a class all the
            same.
        probe_labels: true classes of the probes, only to count for how many the truth is feasible.
        search: ``False`` decides every pair by a linear program; slower, and used to check.

    Raises:
        FeatureError: shapes that do not fit, no rows, NaN or infinity (the first is named), labels out of range.

    Cost: no gradients. 0.4 s of one core for n = 250, d = 8, K = 10 and m = 100; linear in m, about cubic in d K.

    Example:
        >>> found = pair_proxy([[-1.0], [1.0]], [0, 1], [[-0.5], [0.0], [2.0]])
        >>> found.value, found.extensions.tolist()        # between the points both classes are possible, beyond them one
        (5, [2, 2, 1])
        >>> print(found.why(2, 0).explain())        # doctest: +NORMALIZE_WHITESPACE
        class 0 cannot win at probe 2: class 1 beats it there, since the probe is a combination of points of class 1 (1) less
        points of class 0 (0)
        >>> pair_proxy([[0.0], [0.0]], [0, 1], [[1.0]]).conflict.explain()
        'no linear layer gives every training point its label: those of 2 training points (0, 1) contradict each other'
    """
    problem = FeatureProblem.of(train, labels, probes, classes)
    truth = None
    if probe_labels is not None:
        truth = class_labels(probe_labels, "probe_labels", len(problem.probes), problem.classes)
    with one_thread():
        return _decided(problem, truth, search)


def _decided(problem: FeatureProblem, truth: IntArray | None, search: bool) -> PairProxy:
    decider = Decider(problem, search=search)
    shape = len(problem.probes), problem.classes
    feasible, proof = np.full(shape, UNDECIDED), np.full(shape, -1)
    undecided: dict[tuple[int, int], str] = {}
    possible: bool | None = decider.train()
    if possible:
        places: dict[bytes, int] = {}
        first = np.array([places.setdefault(row.tobytes(), j) for j, row in enumerate(problem.probes + 0.0)])
        distinct = np.unique(first)
        for start in range(0, len(distinct), _BLOCK):
            part = distinct[start : start + _BLOCK]
            found = decider.decide(part)
            feasible[part], proof[part] = found.feasible, found.proof
            undecided |= {(int(part[j]), c): reason for (j, c), reason in found.reasons.items()}
        feasible, proof = feasible[first], proof[first]
        open_pairs = zip(*np.nonzero(feasible == UNDECIDED), strict=True)
        undecided = {(int(j), int(c)): undecided[int(first[j]), int(c)] for j, c in open_pairs}
    elif decider.conflict is not None:
        feasible[:] = INFEASIBLE
    else:
        possible = None
        undecided = {(j, c): decider.trouble for j in range(shape[0]) for c in range(shape[1])}
    return PairProxy(
        value=int((feasible == FEASIBLE).sum()),
        feasible=feasible,
        training_feasible=possible,
        conflict=decider.conflict,
        undecided=undecided,
        true_feasible=None if truth is None else int((feasible[np.arange(len(truth)), truth] == FEASIBLE).sum()),
        witnesses=tuple(decider.witnesses),
        certificates=tuple(decider.certificates),
        proof=proof,
        rank=problem.rank,
        cost=decider.cost,
        notes=_notes(problem, decider, len(undecided)),
        problem=problem,
    )


def _notes(problem: FeatureProblem, decider: Decider, undecided: int) -> tuple[str, ...]:
    notes = []
    constant = problem.train.shape[1] - len(problem.frame.units)
    if constant:
        notes.append(f"{constant} of {problem.train.shape[1]} units are constant on all points and were left out")
    if problem.rank < len(problem.frame.units):
        notes.append(
            f"the {len(problem.frame.units)} units that vary span {problem.rank} directions beyond rounding; only those count"
        )
    missing = sorted(set(range(problem.classes)) - set(problem.labels.tolist()))
    if missing:
        notes.append(
            f"no training point has class {', '.join(map(str, missing))}: such a class is bounded by the others only"
        )
    if decider.conflict is not None:
        notes.append(f"infeasible training rows: {decider.conflict.explain()}")
    limited = sum(certificate.proof == "resolution" for certificate in decider.certificates)
    if limited:
        worst = max(c.resolution for c in decider.certificates if c.proof == "resolution")
        notes.append(
            f"{limited} pairs are excluded up to a margin of {worst:.0e} of the largest weight, not exactly: the points are in "
            "special position within rounding"
        )
    if undecided:
        notes.append(f"{undecided} pairs are undecided and not counted")
    return tuple(notes)
