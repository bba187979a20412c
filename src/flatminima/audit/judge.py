"""How a measure's values over the members of one symmetry are judged, against what is declared and against their errors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from flatminima.measures import Measurement
from flatminima.measures.invariance import Invariance

Status = Literal["invariant", "nearly", "changes", "found to change", "broken", "survived", "undecided"]

#: What each status says, from the best to the worst; the worst over all kinds of symmetry is the verdict on a measure.
MEANING: dict[Status, str] = {
    "invariant": "invariant by theorem, and held",
    "nearly": "invariant up to the epsilon of a normalisation, and held to that",
    "survived": "did not move on these members; no theorem says that it cannot",
    "undecided": "its error would have hidden a change by a factor of two",
    "found to change": "changes; nothing was declared",
    "changes": "changes, as declared",
    "broken": "moved although it is declared invariant: a bug in the measure, in its declaration or in the symmetry",
}
MOVED = frozenset({"changes", "found to change", "broken"})

RESOLVED = 2.0  # a measure whose error hides a change by this factor has not been shown to survive
ERRORS = 3.0  # a difference counts beyond so many combined errors
CONTRADICTION = 5.0  # and contradicts a theorem beyond so many: an audit makes hundreds of comparisons
ROUNDING = 1e-6  # relative slack where numbers of double precision must agree
NEARLY = 1.1  # what is invariant up to an epsilon may move by this factor


@dataclass(frozen=True)
class Change:
    """How one measure moved over the members of one symmetry.

    Attributes:
        measure: its name.
        symmetry: kind of reparameterisation.
        declared: what the measure declares: "invariant", "almost", "changes" or "unknown".
        status: a key of :data:`MEANING`.
        values: the measure at each member; NaN where it has none there.
        max_ratio: largest ``max(|new/old|, |old/new|)``; infinite when the sign changes or a value vanishes.
        spread: geometric standard deviation factor of the network's own value and the members'; ``None`` if their signs
            differ or one is zero.
        resolution: relative change that the errors would have hidden; 0 is none.
    """

    measure: str
    symmetry: str
    declared: Invariance
    status: Status
    values: tuple[float, ...]
    max_ratio: float
    spread: float | None
    resolution: float

    @property
    def significant(self) -> bool:
        """Whether any member moved it by more than its errors allow."""
        return self.status in MOVED


def judge(
    measure: str, symmetry: str, declared: Invariance, base: Measurement, members: Sequence[Measurement]
) -> Change:
    """Compare a measure at the members with its value at the network itself.

    Example:
        >>> base = Measurement("trace", 10.0, 0.1, "standard error", True)
        >>> moved = Measurement("trace", 30.0, 0.3, "standard error", True)
        >>> found = judge("trace", "relu-unit-rescaling", "changes", base, [moved])
        >>> found.status, found.max_ratio
        ('changes', 3.0)
    """
    errors = CONTRADICTION if declared in ("invariant", "almost") else ERRORS
    moved, ratio, hidden = False, 1.0, 0.0
    for m in members:
        if not m.applies:  # a number that exists here and not there
            moved, ratio = True, math.inf
            continue
        slack = errors * math.hypot(error_of(m), error_of(base)) + rounding(base.value, m.value)
        gap = 0.0 if m.value == base.value else abs(m.value - base.value)  # both may be infinite
        moved |= not gap <= slack
        ratio = max(ratio, _ratio(base.value, m.value))
        hidden = max(hidden, slack)
    values = tuple(m.value for m in members)
    resolution = hidden / abs(base.value) if base.value else math.inf if hidden else 0.0
    undecided = not moved and (ratio >= RESOLVED or resolution >= RESOLVED - 1)
    return Change(
        measure, symmetry, declared, _status(declared, moved, undecided, ratio), values, ratio,
        spread([base.value, *values]), resolution,
    )  # fmt: skip


def worst(changes: Iterable[Change]) -> Status | None:
    """The worst status; ``None`` of nothing."""
    found = {change.status for change in changes}
    return next((status for status in reversed(MEANING) if status in found), None)


def spread(values: Sequence[float]) -> float | None:
    r""":math:`\exp(\mathrm{sd} \log|v|)`, the factor by which values of one sign typically differ from their geometric mean.

    Example:
        >>> round(spread([1.0, 100.0]), 9), spread([1.0, -1.0])
        (10.0, None)
    """
    if not all(math.isfinite(v) and v for v in values) or len({v > 0 for v in values}) != 1:
        return None
    logs = [math.log(abs(v)) for v in values]
    mean = math.fsum(logs) / len(logs)
    return math.exp(math.sqrt(math.fsum((x - mean) ** 2 for x in logs) / len(logs)))


def rounding(a: float, b: float) -> float:
    """How far two numbers of double precision may be apart that must agree; infinity agrees with itself alone."""
    size = max(abs(a), abs(b))
    return ROUNDING * size if math.isfinite(size) else 0.0


def error_of(m: Measurement) -> float:
    """The error of a measurement; 0 where none is given, which is what single deterministic ascents give."""
    return 0.0 if m.error is None else m.error


def _ratio(base: float, value: float) -> float:
    if value == base:  # both may be zero, or infinite
        return 1.0
    ratio = value / base if base else math.inf
    return max(ratio, 1 / ratio) if 0 < ratio < math.inf else math.inf


def _status(declared: Invariance, moved: bool, undecided: bool, ratio: float) -> Status:
    if undecided:
        return "undecided"
    if declared == "almost":
        return "nearly" if not moved or ratio <= NEARLY else "found to change"
    if not moved:
        return "invariant" if declared == "invariant" else "survived"
    return {"invariant": "broken", "changes": "changes", "unknown": "found to change"}[declared]  # type: ignore[return-value]
