r"""The exact weakness of the training-label policy on a few probes, by going through all labelings.

In the feature-classifier vocabulary a statement that completes the training policy adds classes to some probes. So

.. math:: |\mathrm{Ext}(\pi)| = \sum_{A \subseteq \text{probes}} \#\{\text{restrictions to } A
    \text{ of feasible labelings of all probes}\},

where a labeling is feasible if one linear layer gives every training point its label and every probe its class. The
labelings are found depth first, one probe after the other; each node is a version space with the probes labelled so far
as training points, and each decision is proved as in :func:`flatminima.measures.weakness.pair_proxy`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from flatminima.measures.weakness.decisions import FEASIBLE, UNDECIDED, Decider, one_thread
from flatminima.measures.weakness.features import ArrayLike, FeatureError, FloatArray, IntArray
from flatminima.measures.weakness.frame import FeatureProblem

#: Probes beyond which the sum over subsets is refused.
MOST_PROBES = 12


@dataclass(frozen=True, eq=False)
class Extension:
    """The extension of the training-label policy on some probes.

    Attributes:
        size: ``|Ext|``, an exact integer; 0 where the training labels contradict each other.
        labelings: the feasible labelings of all probes, ``(count, m)``, in lexicographic order.
        extensions: number of classes possible at each probe, ``(m,)``.
        undecided: decisions that could not be proved; labelings behind them are not counted, and ``size`` is then a
            lower bound.
        decisions: pairs (partial labeling, class) decided.
    """

    size: int
    labelings: IntArray
    extensions: IntArray
    undecided: int
    decisions: int

    @property
    def log_size(self) -> float:
        """``log |Ext|``, the exact log-weakness."""
        return math.log(self.size) if self.size else -math.inf

    @property
    def bounds(self) -> tuple[int, int]:
        """``1 + PP`` and ``prod(1 + ext)``, between which the size lies."""
        return 1 + int(self.extensions.sum()), math.prod(1 + int(e) for e in self.extensions)


def exact_extension(
    train: ArrayLike, labels: ArrayLike, probes: ArrayLike, *, classes: int | None = None, max_labelings: int = 20_000
) -> Extension:
    """Count every statement that completes the training policy on these probes.

    Args:
        train: features of the training points, ``(n, d)``.
        labels: their classes.
        probes: features of the probes, at most 12.
        classes: K; by default the largest training label plus one.
        max_labelings: give up beyond so many feasible labelings; there can be K^m.

    Raises:
        FeatureError: as :func:`flatminima.measures.weakness.pair_proxy`; too many probes or labelings.

    Cost: per labeling about the pair proxy of one probe, milliseconds; memory for the labelings.

    Example:
        >>> found = exact_extension([[-1.0], [1.0]], [0, 1], [[-0.5], [0.0], [2.0]])
        >>> found.size, found.bounds, found.labelings.tolist()
        (16, (6, 18), [[0, 0, 1], [0, 1, 1], [1, 1, 1]])
    """
    problem = FeatureProblem.of(train, labels, probes, classes)
    m = len(problem.probes)
    if m > MOST_PROBES:
        raise FeatureError(f"{m} probes are too many to go through all labelings: expected at most {MOST_PROBES}")
    if max_labelings < 1:
        raise FeatureError(f"max_labelings must be at least 1, got {max_labelings}")
    with one_thread():
        root = Decider(problem)
        if not root.train():
            if root.conflict is None:
                raise FeatureError(f"the training rows could not be decided: {root.trouble}")
            return Extension(0, np.empty((0, m), dtype=np.int64), np.zeros(m, dtype=np.int64), 0, 0)
        walk = _Walk(max_labelings)
        found = list(walk.labelings(root, 0))
    labelings = np.array(found, dtype=np.int64).reshape(-1, m)
    each = np.array([len(np.unique(labelings[:, j])) for j in range(m)])
    return Extension(_statements(labelings), labelings, each, walk.undecided, walk.decisions)


class _Walk:
    def __init__(self, most: int) -> None:
        self.most, self.found, self.undecided, self.decisions = most, 0, 0, 0

    def labelings(self, node: Decider, probe: int) -> Iterator[tuple[int, ...]]:
        """Feasible labelings of the probes from this one on, given the training points of the node."""
        decided = node.decide(np.array([probe]))
        self.decisions += node.problem.classes
        self.undecided += int((decided.feasible == UNDECIDED).sum())
        last = probe + 1 == len(node.problem.probes)
        for c in np.flatnonzero(decided.feasible[0] == FEASIBLE):
            if last:
                self.found += 1
                if self.found > self.most:
                    raise FeatureError(
                        f"more than {self.most} feasible labelings: take fewer probes, or raise max_labelings="
                    )
                yield (int(c),)
                continue
            start: FloatArray = node.starts[int(decided.proof[0, c])]
            child = Decider(node.problem.with_point(node.problem.probes[probe], int(c)))
            child.train(start)
            for rest in self.labelings(child, probe + 1):
                yield (int(c), *rest)


def _statements(labelings: IntArray) -> int:
    """Distinct restrictions to every subset of the probes, added up; to the empty subset there is one."""
    count, m = labelings.shape
    if not count:
        return 0
    total = 0
    for subset in range(1 << m):
        columns = [j for j in range(m) if subset >> j & 1]
        total += len(np.unique(labelings[:, columns], axis=0)) if columns else 1
    return total
