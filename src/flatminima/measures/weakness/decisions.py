r"""Which classes can a linear layer still give to each probe: every pair decided, every decision proved.

From cheap to dear, each step leaving fewer pairs to the next:

1. a probe that repeats a training point can only have its label;
2. completions met on the way, looked at from every probe (:mod:`.interior`);
3. a few Newton steps towards the pair;
4. a rival that dominates (:mod:`.dominance`), among those that no completion has contradicted so far;
5. more Newton steps;
6. a linear program (:mod:`.simplex`), and where its answer cannot be proved, a second opinion (:mod:`.margin`).

What a step finds is a candidate. It becomes a decision when :mod:`.proofs` has checked it; what cannot be proved stays
undecided, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from threadpoolctl import ThreadpoolController

from flatminima.measures.weakness.dominance import Domination
from flatminima.measures.weakness.features import FeatureError, FloatArray, IntArray
from flatminima.measures.weakness.frame import FeatureProblem
from flatminima.measures.weakness.interior import CLEAR, Interior
from flatminima.measures.weakness.margin import nearest_point
from flatminima.measures.weakness.proofs import Certificate, check_certificate, check_witnesses, wins
from flatminima.measures.weakness.simplex import DualSimplex, Ray

UNDECIDED, INFEASIBLE, FEASIBLE = -1, 0, 1

_FIRST_STEPS = 5
_MORE_STEPS = 25
_TROUBLE = "neither the weights nor the multipliers of the linear program pass the check"
#: Variables, (K - 1) (rank + 1), beyond which a problem is refused: one Hessian would take gigabytes.
MOST_VARIABLES = 6000


def one_thread() -> AbstractContextManager[object]:
    """One thread for the matrices of this package: they are small, and threads only wait for each other."""
    context: AbstractContextManager[object] = _controller().limit(limits=1, user_api="blas")
    return context


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()  # looks through the libraries of the process, which takes longer than a small problem


@dataclass(eq=False)
class Decisions:
    """What was decided about some probes.

    Attributes:
        feasible: ``(m, K)``: :data:`FEASIBLE`, :data:`INFEASIBLE` or :data:`UNDECIDED`.
        proof: ``(m, K)``: index of the witness or of the certificate, -1 where undecided.
        reasons: (probe, class) -> why it is undecided.
    """

    feasible: IntArray
    proof: IntArray
    reasons: dict[tuple[int, int], str] = field(default_factory=dict)


class Decider:
    """Decides pairs (probe, class) for one training set, and keeps the proofs.

    Args:
        problem: training points, labels and probes.
        search: ``False`` leaves everything to linear programs; for comparison.

    Attributes:
        conflict: a certificate that the training labels contradict each other, or ``None``.
        trouble: why the training rows could not be decided; empty otherwise.
        witnesses: weights ``(K, dimension)`` on the problem's frame; each gives every training point its label.
        starts: the same weights on search coordinates.
        certificates: of the infeasible pairs.
        known: bytes of a training point -> its first row.
    """

    def __init__(self, problem: FeatureProblem, *, search: bool = True) -> None:
        self.problem = problem
        self.conflict: Certificate | None = None
        self.trouble = ""
        self.witnesses: list[FloatArray] = []
        self.starts: list[FloatArray] = []
        self.certificates: list[Certificate] = []
        self.x = problem.whiten(problem.z_train)
        self.nearest_points = 0
        self._simplex: DualSimplex | None = None
        self._interior: Interior | None = None
        self._domination = Domination(self.x, problem.labels)
        self._search = search
        variables = (problem.classes - 1) * self.x.shape[1]
        if variables > MOST_VARIABLES:
            raise FeatureError(
                f"{problem.classes} classes and {problem.rank} directions make {variables} variables, more than "
                f"{MOST_VARIABLES}: take a narrower layer, fewer classes, or fewer points, which span fewer directions"
            )
        self.known = {row.tobytes(): i for i, row in reversed(list(enumerate(problem.train + 0.0)))}

    @property
    def simplex(self) -> DualSimplex:
        """The linear program, made when it is first needed."""
        if self._simplex is None:
            self._simplex = DualSimplex(self.x, self.problem.labels, self.problem.classes)
        return self._simplex

    @property
    def centre(self) -> FloatArray:
        """Search weights well inside the version space: its analytic centre, or what was found first."""
        interior = self._interior
        return self.start if interior is None or interior.weights is None else interior.weights

    @property
    def cost(self) -> dict[str, int]:
        """Work so far, in steps of each kind; the same on every run."""
        return {
            "newton_steps": self._interior.newton_steps if self._interior else 0,
            "domination_tests": self._domination.tests,
            "linear_programs": self._simplex.programs if self._simplex else 0,
            "simplex_iterations": self._simplex.iterations if self._simplex else 0,
            "nearest_points": self.nearest_points,
        }

    def train(self, start: FloatArray | None = None) -> bool:
        """Whether the training labels can be satisfied at all; prepares the search.

        Args:
            start: search weights that are known to satisfy them; otherwise a search or a linear program finds them.
        """
        self.conflict = self._repeated()
        if self.conflict is not None:
            return False
        interior = Interior(self.x, self.problem.labels, self.problem.classes) if self._search else None
        if start is None and interior is not None:
            found = interior.start()
            start = found if found is not None and self._trains(found) else None
        if start is None:
            start = self._first()
        if start is None:
            return False
        self.start = start
        if interior is not None and interior.centre(start):
            self._interior = interior
        return True

    def decide(self, probes: IntArray) -> Decisions:
        """Decide all classes at these probes; :meth:`train` has to have succeeded."""
        block = _Block(self, probes)
        block.known_points()
        block.look(self.start)
        if self._interior is not None:
            block.search(_FIRST_STEPS)
        block.dominate()
        if self._interior is not None:
            block.search(_MORE_STEPS)
        block.settle()
        block.solve()
        return block.decisions

    def _trains(self, weights: FloatArray) -> bool:
        """Whether search weights give every training point its label."""
        return bool(check_witnesses(self.problem, self.problem.to_frame(weights)[None])[0])

    def _first(self) -> FloatArray | None:
        """Search weights that give every training point its label; otherwise sets the conflict or the trouble."""
        self.trouble = _TROUBLE
        for answer in self.answers():
            if isinstance(answer, str):
                self.trouble = answer
            elif isinstance(answer, Ray):
                self.conflict = self.certify(answer, None, None)
                if self.conflict is not None:
                    return None
            elif self._trains(answer):
                return answer
        return None

    def answers(self, probe: FloatArray | None = None, target: int = -1) -> Iterator[FloatArray | Ray | str]:
        """Weights, multipliers or a reason from the linear program; and where they are not accepted, a second opinion."""
        yield self.simplex.feasible(probe, target)
        self.nearest_points += 1
        yield from nearest_point(self.x, self.problem.labels, self.problem.classes, probe, target) or ()

    def _repeated(self) -> Certificate | None:
        """A training point that is there twice with different labels."""
        for i, row in enumerate(self.problem.train + 0.0):
            first = self.known[row.tobytes()]
            a, b = int(self.problem.labels[first]), int(self.problem.labels[i])
            if a != b:
                points, winners, losers = np.array([first, i]), np.array([a, b]), np.array([b, a])
                return self.certify(Ray(points, winners, losers, np.ones(2)), None, None)
        return None

    def certify(self, ray: Ray, probe: int | None, target: int | None) -> Certificate | None:
        """The multipliers as a certificate, if they prove anything."""
        found = Certificate(probe, target, ray.points, ray.winners, ray.losers, ray.multipliers)
        return check_certificate(self.problem, found)


class _Block:
    """Probes that are decided together, so that each completion is looked at from all of them."""

    def __init__(self, owner: Decider, probes: IntArray) -> None:
        problem = owner.problem
        self.owner, self.probes = owner, probes
        self.x = problem.whiten(problem.z_probes[probes])
        self.length = np.linalg.norm(self.x, axis=1)
        shape = len(probes), problem.classes
        self.decisions = Decisions(np.full(shape, UNDECIDED), np.full(shape, -1))
        self.candidate = np.full(shape, -1)  # index into self.visited
        self.visited: list[FloatArray] = []
        # [j, k, c]: whether c was above k at j in some completion
        self.beaten = np.zeros((*shape, problem.classes), dtype=bool)
        self.states: dict[tuple[int, int], FloatArray] = {}  # where the search of each pair ended
        self._first: FloatArray | None = None
        self._each = np.arange(len(probes))

    @property
    def open(self) -> list[tuple[int, int]]:
        """Pairs with neither a decision nor a candidate witness."""
        left = (self.decisions.feasible == UNDECIDED) & (self.candidate < 0)
        return [(int(j), int(c)) for j, c in zip(*np.nonzero(left), strict=True)]

    def known_points(self) -> None:
        """Probes that repeat a training point."""
        problem = self.owner.problem
        for j, probe in enumerate(self.probes):
            i = self.owner.known.get((problem.probes[probe] + 0.0).tobytes())
            if i is None:
                continue
            label = int(problem.labels[i])
            for c in range(problem.classes):
                if c != label:
                    ray = Ray(np.array([i, -1]), np.array([label, c]), np.array([c, label]), np.ones(2))
                    self._exclude(j, c, ray)

    def look(self, weights: FloatArray) -> None:
        """Take a completion for a witness wherever it shows something new."""
        scores = self.x @ weights.T
        self.beaten |= scores[:, None, :] > scores[:, :, None]
        label = scores.argmax(1)
        new = (self.candidate[self._each, label] < 0) & (self.decisions.feasible[self._each, label] == UNDECIDED)
        if new.any():
            where = np.flatnonzero(new)
            top = np.partition(scores[where], -2, axis=1)
            where = where[top[:, -1] - top[:, -2] > CLEAR * np.linalg.norm(weights) * self.length[where]]
            if len(where):
                self.candidate[where, label[where]] = len(self.visited)
                self.visited.append(weights)

    def search(self, steps: int) -> None:
        """Newton steps towards every open pair, from where the last ones ended."""
        interior = self.owner._interior
        assert interior is not None
        if self._first is None:
            self.look(self.owner.centre)
            self._first = interior.first_steps(self.x)
        for j, c in self.open:
            if self.candidate[j, c] >= 0:
                continue
            visited, _ = interior.search(self.x[j], c, self._first[j], self.states.get((j, c)), steps)
            for weights in visited:
                self.look(weights)
            if visited:
                self.states[j, c] = visited[-1]

    def dominate(self) -> None:
        """Open pairs that one rival excludes, among rivals that were above the class in every completion met."""
        for j, c in self.open:
            for k in np.flatnonzero(~self.beaten[j, :, c]):
                if k == c:
                    continue
                ray = self.owner._domination.excludes(int(k), c, self.x[j])
                if ray is not None and self._exclude(j, c, ray):
                    break

    def settle(self) -> None:
        """Prove the candidate witnesses; those that fail are open again."""
        problem = self.owner.problem
        used = np.unique(self.candidate[self.candidate >= 0])
        if not len(used):
            return
        weights = problem.to_frame(np.stack([self.visited[i] for i in used]))
        weights /= np.abs(weights).max((1, 2), keepdims=True)
        good = check_witnesses(problem, weights)
        for weight, index, trained in zip(weights, used, good, strict=True):
            where, classes = np.nonzero(self.candidate == index)
            self.candidate[where, classes] = -1
            proved = wins(problem, weight, self.probes[where], classes) if trained else np.zeros(len(where), dtype=bool)
            if proved.any():
                self.decisions.feasible[where[proved], classes[proved]] = FEASIBLE
                self.decisions.proof[where[proved], classes[proved]] = len(self.owner.witnesses)
                self.owner.witnesses.append(weight)
                self.owner.starts.append(self.visited[index])

    def solve(self) -> None:
        """Linear programs for what is left, and a second opinion where their answer cannot be proved."""
        for j, c in self.open:
            if self.decisions.feasible[j, c] != UNDECIDED:
                continue
            reason = _TROUBLE
            for answer in self.owner.answers(self.x[j], c):
                if isinstance(answer, str):
                    reason = answer
                elif self._accept(j, c, answer):
                    break
            else:
                self.decisions.reasons[j, c] = reason

    def _accept(self, j: int, c: int, answer: FloatArray | Ray) -> bool:
        if isinstance(answer, Ray):
            return self._exclude(j, c, answer)
        self.look(answer)
        if self.candidate[j, c] < 0:
            self.candidate[j, c] = len(self.visited)
            self.visited.append(answer)
        self.settle()
        return bool(self.decisions.feasible[j, c] == FEASIBLE)

    def _exclude(self, j: int, c: int, ray: Ray) -> bool:
        certificate = self.owner.certify(ray, int(self.probes[j]), c)
        if certificate is None:
            return False
        self.decisions.feasible[j, c] = INFEASIBLE
        self.decisions.proof[j, c] = len(self.owner.certificates)
        self.owner.certificates.append(certificate)
        return True
