"""Is one of two minima flatter, or only written in other coordinates?"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from flatminima.audit import pair_words
from flatminima.audit.function import FunctionComparison, compare_functions
from flatminima.audit.judge import ERRORS, error_of, rounding
from flatminima.audit.orbit import LOSS_TOLERANCE
from flatminima.audit.report import AuditReport
from flatminima.audit.single import Clock, Progress, audit
from flatminima.batches import batches
from flatminima.measures import MEASURES, MeasureOptions
from flatminima.measures.invariance import LINEAR
from flatminima.objective import LossFn, ObjectiveError, unwrapped

Basis = Literal["invariant", "nearly invariant", "survived", "coordinates", "undecided", "broken", "not tested"]
_BASIS: dict[str, Basis] = {
    "invariant": "invariant", "nearly": "nearly invariant", "survived": "survived", "changes": "coordinates",
    "found to change": "coordinates", "undecided": "undecided", "broken": "broken", "not tested": "not tested",
}  # fmt: skip
_BASES = ("invariant", "nearly invariant", "survived", "not tested", "undecided", "coordinates", "broken")


@dataclass(frozen=True)
class Difference:
    """One measure at two minima.

    Attributes:
        measure: its name.
        first, second: the values.
        difference: second minus first.
        error: of the difference: the two errors combined; the spread of ascents counts, because their maxima are unknown.
        resolved: whether the difference exceeds three times its error.
        flatter: index of the minimum that is flatter by this number, 0 or 1; ``None`` where the difference is not resolved or
            the measure is none of flatness.
        basis: what stands behind the number in both networks: "invariant" (by theorem, and held), "nearly invariant",
            "survived", "coordinates", "undecided", "broken" or "not tested".
        within_orbit: whether some member of the first's orbit goes as far in that direction as the second does.
    """

    measure: str
    first: float
    second: float
    difference: float
    error: float
    resolved: bool
    flatter: int | None
    basis: Basis
    within_orbit: bool

    @property
    def trusted(self) -> bool:
        """Whether the difference is one of functions: invariant by theorem, up to an epsilon at most, and held."""
        return self.basis in ("invariant", "nearly invariant")

    @property
    def of_flatness(self) -> bool:
        """Whether the measure is one of flatness."""
        return MEASURES[self.measure].flatter_when is not None


@dataclass(frozen=True)
class MinimaComparison:
    """Result of :func:`compare_minima`; prints as a table with its verdict.

    Attributes:
        names: of the two minima.
        audits: of both.
        function: how their outputs differ.
        differences: one entry for each measure that is defined at both.
        flatter: index of the minimum that may be called flatter, 0 or 1, or ``None``: refused.
    """

    names: tuple[str, str]
    audits: tuple[AuditReport, AuditReport]
    function: FunctionComparison
    differences: tuple[Difference, ...]

    @property
    def flatter(self) -> int | None:
        """Decided by the trusted measures of flatness alone: one must be resolved, and all that are must agree."""
        votes = {d.flatter for d in self.votes}
        return votes.pop() if len(votes) == 1 and self.function.relation == "different" else None

    @property
    def votes(self) -> tuple[Difference, ...]:
        """The trusted measures of flatness whose difference exceeds its error."""
        return tuple(d for d in self.differences if d.trusted and d.flatter is not None)

    @property
    def verdict(self) -> str:
        """Which of the two is flatter, or why that cannot be said, in one sentence or two."""
        return pair_words.verdict(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON; docs/audit.md documents the fields."""
        return {
            "names": list(self.names),
            "verdict": self.verdict,
            "details": pair_words.details(self),
            "cautions": pair_words.cautions(self),
            "flatter": None if self.flatter is None else self.names[self.flatter],
            "function": vars(self.function),
            "differences": [
                vars(d)
                | {
                    "label": MEASURES[d.measure].label, "trusted": d.trusted,
                    "of_flatness": d.of_flatness, "sentence": pair_words.sentence(self, d),
                    "flatter": None if d.flatter is None else self.names[d.flatter],
                }
                for d in self.differences
            ],
        }  # fmt: skip

    def __str__(self) -> str:
        return pair_words.text(self)


def compare_minima(
    first: nn.Module,
    second: nn.Module,
    loss_fn: LossFn | None,
    data: Any,
    *,
    names: tuple[str, str] = ("the first", "the second"),
    measures: Iterable[str] | None = None,
    kinds: Iterable[str] | None = None,
    members: int = 2,
    checks: int = 1,
    max_scale: float = 20.0,
    options: MeasureOptions | None = None,
    mode: str = "eval",
    probes: Any = None,
    seed: int = 0,
    progress: Progress = lambda what, done, total: None,
) -> MinimaComparison:
    """Audit two minima of one architecture on the same data, and say whether one of them is flatter.

    That is said only where a measure of flatness which is invariant by theorem under every symmetry found in both networks,
    and held on their members, differs by more than its error, and no other such measure contradicts it. A second network that
    is the first in other coordinates is recognised by its outputs; nothing is flatter then, whatever the numbers do.

    Args:
        first, second: networks with the same names and shapes of parameters.
        loss_fn, data: as for :func:`audit`; the same for both.
        names: of the two, for people.
        measures, kinds, members, checks, max_scale: of both audits, see :func:`audit`.
        options, mode, probes, seed, progress: likewise.

    Raises:
        ValueError: networks of different architectures; whatever :func:`audit` refuses.

    Cost: two audits.

    Example:
        >>> import torch
        >>> from flatminima import find_symmetries
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).double()
        >>> data = torch.randn(8, 2).double(), torch.randint(0, 2, (8,))
        >>> unit = next(s for s in find_symmetries(net, data[0]).found if s.kind == "relu-unit-rescaling")
        >>> twin = unit.member(torch.Generator().manual_seed(0)).apply(net)
        >>> found = compare_minima(net, twin, nn.functional.cross_entropy, data, measures=["trace", "w_hessian_w"])
        >>> found.function.relation, found.flatter
        ('same', None)
    """
    _same_architecture(first, second)
    pairs = batches(data)
    wanted = None if measures is None else list(measures)
    clock = Clock()
    audits = []
    for name, model in zip(names, (first, second), strict=True):
        found = audit(
            model, loss_fn, pairs, measures=wanted, kinds=kinds, members=members, checks=checks, max_scale=max_scale,
            options=options, mode=mode, probes=probes, seed=seed,
            progress=lambda what, done, total, name=name: progress(f"{name}: {what}", done, total),  # type: ignore[misc]
        )  # fmt: skip
        audits.append(found)
    a, b = audits
    with clock("functions compared"):
        function = compare_functions(first, second, pairs, mode=mode, classes=a.classifies, seed=seed)
    if function.relation == "same probabilities" and not same_loss(a, b):
        function = replace(function, relation="different")  # this loss sees what a softmax would hide
    shared = [n for n, m in a.measurements.items() if m.applies and b.measurements[n].applies]
    return MinimaComparison(names, (a, b), function, tuple(_difference(n, a, b) for n in shared))


def same_loss(a: AuditReport, b: AuditReport) -> bool:
    """Whether two losses are equal, up to what the rounding of nearly equal outputs makes of them."""
    return abs(a.loss - b.loss) <= LOSS_TOLERANCE * max(abs(a.loss), abs(b.loss))


def invariant_beyond(name: str) -> bool:
    """Whether a measure is invariant under every linear symmetry, those included that were not found."""
    return all(MEASURES[name].invariance(kind) in ("invariant", "almost") for kind in LINEAR)


def _same_architecture(first: nn.Module, second: nn.Module) -> None:
    shapes = [
        {n: tuple(p.shape) for n, p in unwrapped(model)[0].named_parameters(remove_duplicate=False)}
        for model in (first, second)
    ]
    if shapes[0] == shapes[1]:
        return
    apart = [
        f"{name}: {' and '.join(str(own.get(name, 'absent')) for own in shapes)}"
        for name in dict.fromkeys([*shapes[0], *shapes[1]])
        if shapes[0].get(name) != shapes[1].get(name)
    ]
    more = f", and {len(apart) - 3} more" if len(apart) > 3 else ""
    raise ObjectiveError(
        f"the two networks have different architectures ({'; '.join(apart[:3])}{more}): they have no coordinates in common"
    )


def _difference(name: str, a: AuditReport, b: AuditReport) -> Difference:
    one, other = a.measurements[name], b.measurements[name]
    gap = 0.0 if other.value == one.value else other.value - one.value  # both may be infinite
    error = math.hypot(error_of(one), error_of(other))
    resolved = abs(gap) > ERRORS * error + rounding(one.value, other.value)
    direction = {"lower": 1, "higher": -1}.get(str(MEASURES[name].flatter_when), 0)
    flatter = None if not resolved or not direction else int(gap * direction < 0)
    reached = [*a.range(name), *(v for change in a.hidden(name) for v in change.values if not math.isnan(v))]
    hidden = [change.status for report in (a, b) for change in report.hidden(name)]
    basis = max((_BASIS[status] for status in (a.verdicts[name], b.verdicts[name], *hidden)), key=_BASES.index)
    unsure = (a.partial or b.partial) and not invariant_beyond(name)
    unsure |= any(MEASURES[name].invariance(kind) not in ("invariant", "almost") for kind in (*a.unused, *b.unused))
    if _BASES.index(basis) < _BASES.index("survived") and unsure:
        basis = "survived"  # a symmetry that was not looked for, or not used, may move it
    return Difference(
        name, one.value, other.value, gap, error, resolved, flatter, basis,
        within_orbit=other.value <= max(reached) if gap > 0 else other.value >= min(reached),
    )  # fmt: skip
