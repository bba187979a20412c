r"""Tasks in a finite vocabulary: which policies are correct, and how likely each is to survive demands not seen yet.

A task is a pair :math:`(I, O)` of statements that may be met and completions of them that are right. A policy
:math:`\pi \in L_v` is correct when the completions it shares with the inputs are exactly the outputs,
:math:`\mathrm{Ext}(I) \cap \mathrm{Ext}(\pi) = O`. Outside the inputs it leaves a *buffer* :math:`B_\pi =
\mathrm{Ext}(\pi) \setminus \mathrm{Ext}(I)` of further completions, so that :math:`w(\pi) = |O| + |B_\pi|`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from functools import cached_property

from flatminima.measures.weakness.vocabulary import FiniteVocabulary, Statement, VocabularyError

#: A distribution over the number of further demands: ``p[k]``, or a mapping of the k with positive probability.
Sizes = Sequence[float] | Mapping[int, float]


class Task:
    r"""Inputs and outputs in the language of a vocabulary.

    Args:
        vocabulary: of all statements.
        inputs: statements that may be met, :math:`I \subseteq L_v`.
        outputs: the right completions, :math:`O \subseteq \mathrm{Ext}(I)`.

    Raises:
        VocabularyError: an input or output that is not a statement, or an output that completes no input.

    Example:
        >>> v = FiniteVocabulary(range(5), {"A": [0, 1, 2], "B": [1, 2, 3], "C": [3, 4], "D": [0, 4]})
        >>> task = Task(v, inputs=[["B"]], outputs=[["A", "B"]])
        >>> sorted("".join(sorted(policy)) for policy in task.correct_policies)
        ['A', 'AB']
        >>> task.survival_probability(["A"]), task.survival_probability(["A", "B"])       # the weaker one survives
        (0.0625, 0.015625)
    """

    def __init__(
        self, vocabulary: FiniteVocabulary, inputs: Iterable[Iterable[str]], outputs: Iterable[Iterable[str]]
    ) -> None:
        self.vocabulary = vocabulary
        self.inputs = self._statements("inputs", inputs)
        self.outputs = self._statements("outputs", outputs)
        for statement in self.outputs:
            if not any(given <= statement for given in self.inputs):
                raise VocabularyError(f"output {_shown(statement)} completes none of the inputs")

    def _statements(self, name: str, given: Iterable[Iterable[str]]) -> frozenset[Statement]:
        statements = frozenset(frozenset([s]) if isinstance(s, str) else frozenset(s) for s in given)
        for statement in statements:
            if statement not in self.vocabulary:
                raise VocabularyError(f"{_shown(statement)} of the {name} is no statement: no state satisfies it")
        return statements

    @cached_property
    def demands(self) -> frozenset[Statement]:
        r"""Completions of the inputs, :math:`\mathrm{Ext}(I)`."""
        return frozenset(y for given in self.inputs for y in self.vocabulary.statements(given))

    @cached_property
    def unseen(self) -> frozenset[Statement]:
        r"""Statements outside the inputs' extension, :math:`U = L_v \setminus \mathrm{Ext}(I)`."""
        return frozenset(self.vocabulary.statements()) - self.demands

    @cached_property
    def correct_policies(self) -> tuple[Statement, ...]:
        r"""All :math:`\pi` with :math:`\mathrm{Ext}(I) \cap \mathrm{Ext}(\pi) = O`, weakest first.

        Each program is one bit set over the demands (those that contain it), so a policy costs one intersection a
        program.
        """
        demands = list(self.demands)
        containing = {
            program: sum(1 << i for i, y in enumerate(demands) if program in y) for program in self.vocabulary.programs
        }
        everything = (1 << len(demands)) - 1
        wanted = sum(1 << i for i, y in enumerate(demands) if y in self.outputs)
        found = []
        for policy in self.vocabulary.statements():
            shared = everything
            for program in policy:
                shared &= containing[program]
            if shared == wanted:
                found.append(policy)
        return tuple(sorted(found, key=lambda policy: -self.vocabulary.weakness(policy)))

    @property
    def weakest_policies(self) -> tuple[Statement, ...]:
        """The correct policies of greatest weakness; Bayes optimal under exchangeable demands."""
        if not self.correct_policies:
            return ()
        best = self.vocabulary.weakness(self.correct_policies[0])
        return tuple(policy for policy in self.correct_policies if self.vocabulary.weakness(policy) == best)

    def buffer(self, policy: Iterable[str]) -> frozenset[Statement]:
        r""":math:`B_\pi = \mathrm{Ext}(\pi) \cap U`: what the policy still allows where nothing has been asked."""
        return frozenset(y for y in self.vocabulary.statements(policy) if y not in self.demands)

    def is_correct(self, policy: Iterable[str]) -> bool:
        """Whether the policy shares exactly the outputs with the demands."""
        return {y for y in self.vocabulary.statements(policy) if y in self.demands} == self.outputs

    def survival_probability(self, policy: Iterable[str], sizes: Sizes | None = None) -> float:
        r"""Chance that the policy is still correct after a random set S of unseen statements is demanded as well.

        Uniform S (the default, every subset of U equally likely):

        .. math:: P(S \subseteq B_\pi) = 2^{|B_\pi| - |U|}

        Exchangeable S (given its size k, all k-subsets of U are equally likely; ``sizes[k]`` is the chance of k):

        .. math:: P(S \subseteq B_\pi) = \sum_k p_k \binom{|B_\pi|}{k} \Big/ \binom{|U|}{k}

        Both increase with the buffer, hence, among correct policies of one task, with weakness. They are statements
        about *compatibility with arbitrary demands*, not about the accuracy of a prediction.

        Args:
            policy: a correct policy of this task.
            sizes: probabilities of the number of demands, summing to 1.

        Raises:
            VocabularyError: a policy that is not correct (it has already failed), or sizes that are no distribution on
                0, ..., |U|.
        """
        names = frozenset([policy] if isinstance(policy, str) else policy)
        if not self.is_correct(names):
            raise VocabularyError(f"policy {_shown(names)} is not correct for this task: it has nothing to survive")
        unseen, buffer = len(self.unseen), len(self.buffer(names))
        if sizes is None:
            return 2.0 ** (buffer - unseen)
        chances = dict(sizes) if isinstance(sizes, Mapping) else dict(enumerate(sizes))
        total = math.fsum(chances.values())
        if any(not (isinstance(k, int) and 0 <= k <= unseen) for k, p in chances.items() if p):
            raise VocabularyError(
                f"sizes give weight to numbers of demands outside 0, ..., {unseen} (unseen statements)"
            )
        if any(not p >= 0 for p in chances.values()) or not math.isclose(total, 1.0, abs_tol=1e-9):
            raise VocabularyError(f"sizes must be probabilities that sum to 1, got a sum of {total:g}")
        return math.fsum(
            p * float(Fraction(math.comb(buffer, k), math.comb(unseen, k))) for k, p in chances.items() if p
        )

    def is_child_of(self, parent: Task) -> bool:
        r""":math:`\alpha \sqsubset \omega`: fewer inputs, and outputs that are outputs of the parent too."""
        return self.inputs < parent.inputs and self.outputs <= parent.outputs


def _shown(statement: Iterable[str]) -> str:
    return "{" + ", ".join(sorted(statement)) + "}"
