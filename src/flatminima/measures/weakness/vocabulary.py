r"""Weakness in a finite vocabulary: programs, statements, and how many statements complete a given one.

A *program* is a set of states, a *vocabulary* v a finite set of programs, a *statement* a set of programs of v that
hold together in at least one state, and :math:`L_v` the set of all statements (the embodied language). The *extension*
of a statement l is every statement that contains it, and its *weakness* is how many those are:

.. math:: w(l) = |\{\,y \in L_v : l \subseteq y\,\}|

After M. T. Bennett, "Are Flat Minima an Illusion?" (arXiv:2605.05209).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import TypeVar

from flatminima.names import unknown

Statement = frozenset[str]
State = TypeVar("State", bound=Hashable)

#: Statements or search nodes beyond which enumeration is refused.
LIMIT = 2_000_000


class VocabularyError(ValueError):
    """A vocabulary, statement or task that is not one, or one too large to enumerate."""


class FiniteVocabulary:
    r"""A finite environment and a finite set of programs over it.

    Args:
        states: the environment :math:`\Phi`, mutually exclusive states.
        programs: name -> the states in which the program holds.
        limit: nodes of the search beyond which a count or an enumeration is refused.

    Raises:
        VocabularyError: no states, a state given twice, a program with unknown states, or two names for one program (a
            vocabulary is a set; a synonym would be counted twice).

    Example:
        >>> v = FiniteVocabulary(range(4), {"A": [0, 1], "B": [1, 2], "C": [2, 3]})
        >>> v.size                                          # {}, A, B, C, AB and BC; A and C never hold together
        6
        >>> v.weakness(["B"]), v.weakness(["A"])
        (3, 2)
        >>> v.weakness(["A", "C"])
        Traceback (most recent call last):
        flatminima.measures.weakness.vocabulary.VocabularyError: A, C is not a statement: no state satisfies all of it
    """

    def __init__(self, states: Iterable[State], programs: Mapping[str, Iterable[State]], *, limit: int = LIMIT) -> None:
        self.states: tuple[Hashable, ...] = tuple(states)
        place: dict[Hashable, int] = {state: i for i, state in enumerate(self.states)}
        if not self.states:
            raise VocabularyError("no states: expected at least one")
        if len(place) < len(self.states):
            raise VocabularyError("a state is given twice: states are mutually exclusive")
        if limit < 1:
            raise VocabularyError(f"limit must be at least 1, got {limit}")
        self.limit = limit
        self.programs: tuple[str, ...] = tuple(programs)
        self._index = {name: i for i, name in enumerate(self.programs)}
        self._everywhere = (1 << len(self.states)) - 1
        self._holds: list[int] = []
        seen: dict[int, str] = {}
        for name, where in programs.items():
            bits = 0
            for state in where:
                if state not in place:
                    raise VocabularyError(f"program {name!r} holds in state {state!r}, which the environment has not")
                bits |= 1 << place[state]
            if bits in seen:
                raise VocabularyError(
                    f"programs {seen[bits]!r} and {name!r} hold in the same states: a vocabulary is a set, keep one of them"
                )
            seen[bits] = name
            self._holds.append(bits)
        self._counts: dict[tuple[int, int], int] = {}

    def truth_set(self, statement: Iterable[str]) -> frozenset[Hashable]:
        r"""States in which all programs hold, :math:`T(l) = \bigcap_{p \in l} p`; all states for no program."""
        bits = self._truth(self._members(statement))
        return frozenset(state for i, state in enumerate(self.states) if bits >> i & 1)

    def __contains__(self, statement: Iterable[str]) -> bool:
        """Whether the programs form a statement, that is, hold together somewhere."""
        return self._truth(self._members(statement)) != 0

    @property
    def size(self) -> int:
        """Number of statements of the embodied language, the empty one included."""
        return self.weakness(())

    def weakness(self, statement: Iterable[str]) -> int:
        """Number of statements that contain this one, itself included.

        Exact, and not by listing them: programs are taken in order, and what remains to be counted depends only on the
        position and on the states that are left, so each such pair is counted once.

        Raises:
            VocabularyError: not a statement; more than ``limit`` pairs of position and states.
        """
        members = self._members(statement)
        return self._count(self._require(members), members)

    def description_length(self, statement: Iterable[str]) -> int:
        """Number of programs in the statement, the source's proxy of simplicity."""
        members = self._members(statement)
        self._require(members)
        return len(members)

    def statements(self, completing: Iterable[str] = ()) -> Iterator[Statement]:
        """All statements that contain the given one, depth first in the order of the programs.

        Raises:
            VocabularyError: not a statement; more than ``limit`` of them, which is known before the first is made.
        """
        members = self._members(completing)
        bits = self._require(members)
        count = self._count(bits, members)
        if count > self.limit:
            raise VocabularyError(
                f"{count} statements are more than the limit of {self.limit}: weakness() counts them without making them"
            )
        base = frozenset(self.programs[i] for i in members)
        free = [i for i in range(len(self.programs)) if i not in members]
        stack: list[tuple[int, int, Statement]] = [(0, bits, base)]
        while stack:
            start, left, found = stack.pop()
            yield found
            for position in range(len(free) - 1, start - 1, -1):
                both = left & self._holds[free[position]]
                if both:
                    stack.append((position + 1, both, found | {self.programs[free[position]]}))

    def extension(self, statement: Iterable[str]) -> set[Statement]:
        """Every statement that contains this one."""
        return set(self.statements(statement))

    def policy_of_state(self, state: Hashable) -> Statement:
        """All programs that hold in a state; its weakness is 1 wherever each other program excludes it."""
        if state not in self.states:
            raise VocabularyError(f"no state {state!r} in the environment")
        at = self.states.index(state)
        return frozenset(name for name, bits in zip(self.programs, self._holds, strict=True) if bits >> at & 1)

    def _members(self, statement: Iterable[str]) -> frozenset[int]:
        names = [statement] if isinstance(statement, str) else list(statement)
        for name in names:
            if name not in self._index:
                raise VocabularyError(unknown("program", name, self.programs))
        return frozenset(self._index[name] for name in names)

    def _truth(self, members: frozenset[int]) -> int:
        bits = self._everywhere
        for i in members:
            bits &= self._holds[i]
        return bits

    def _require(self, members: frozenset[int]) -> int:
        bits = self._truth(members)
        if not bits:
            names = ", ".join(self.programs[i] for i in sorted(members))
            raise VocabularyError(f"{names} is not a statement: no state satisfies all of it")
        return bits

    def _count(self, bits: int, members: frozenset[int]) -> int:
        # A member restricts nothing further, so it would be counted as chosen and as left out: it is skipped.
        programs = [holds for i, holds in enumerate(self._holds) if i not in members]
        known: dict[tuple[int, int], int] = {} if members else self._counts

        # Depth first without recursion, which a long vocabulary would exhaust. A pair waits until both of its
        # successors (program left out, program added) are known.
        root = (0, bits)
        stack = [root]
        while stack:
            pair = stack[-1]
            position, left = pair
            if pair in known:
                stack.pop()
                continue
            if position == len(programs):
                known[pair] = 1
                stack.pop()
                continue
            both = left & programs[position]
            wanted = [(position + 1, left)] + ([(position + 1, both)] if both else [])
            missing = [p for p in wanted if p not in known]
            if missing:
                stack.extend(missing)
                continue
            known[pair] = sum(known[p] for p in wanted)
            stack.pop()
            if len(known) > self.limit:
                raise VocabularyError(
                    f"more than {self.limit} search nodes for {len(programs)} programs over {len(self.states)} states: raise "
                    "limit= or take fewer programs"
                )
        return known[root]
