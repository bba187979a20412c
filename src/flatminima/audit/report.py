"""What an audit of one minimum found."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from flatminima.audit import words
from flatminima.audit.judge import MOVED, Change, Status, spread, worst
from flatminima.audit.law import TraceLaw
from flatminima.audit.orbit import UNUSED, Orbit
from flatminima.audit.repair import Repair, repair_of
from flatminima.measures import MEASURES, Measurement
from flatminima.symmetries.search import may_hide

Verdict = Status | Literal["not tested", "not applicable"]


@dataclass(frozen=True)
class AuditReport:
    """Result of :func:`~flatminima.audit.audit`; prints as a table with its verdicts.

    Attributes:
        measurements: the measures at the network itself.
        changes: one entry per measure and symmetry.
        orbits: the symmetries with the members that were drawn, each proved.
        laws: of the Hessian trace, predicted from the network and measured at the members.
        rejected: ``(site, reason)`` of what was looked at and refused, or not analysed.
        loss: at the network.
        gradient_norm: at the network; 0 at a minimum.
        descent: by how much the best step along the gradient would lower the loss, as a share of it, to second order; 0 at a
            minimum, infinite where the curvature along the gradient is not positive.
        parameters: of the objective.
        rows: of the data.
        classifies: whether the targets are classes.
        members: random members per symmetry, for measures that are not declared invariant under it.
        checks: the same, for those that are.
        defined: all registered measures that apply here, measured or not.
        kinds: of symmetry that were looked for; ``None``: all.
        notes: what a reader of the numbers must know.
        cost: in gradient evaluations.
        times: part -> seconds of the clock; not part of the result.
    """

    measurements: dict[str, Measurement]
    changes: tuple[Change, ...]
    orbits: tuple[Orbit, ...]
    laws: tuple[TraceLaw, ...]
    rejected: tuple[tuple[str, str], ...]
    loss: float
    gradient_norm: float
    descent: float
    parameters: int
    rows: int
    classifies: bool
    members: int
    checks: int
    defined: tuple[str, ...] = ()
    kinds: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    cost: float = 0.0
    times: dict[str, float] = field(default_factory=dict, compare=False, repr=False)

    @property
    def coordinates(self) -> tuple[str, ...]:
        """Kinds that change no output; a shift of all logits or a change of temperature is not among them."""
        return tuple(orbit.kind for orbit in self.orbits if orbit.function_preserving)

    @property
    def loss_preserving(self) -> tuple[str, ...]:
        """Kinds that change no loss: `coordinates`, and shifts of all logits where the loss sees probabilities alone."""
        return tuple(orbit.kind for orbit in self.orbits if orbit.preserves != "predictions")

    @property
    def unanalysed(self) -> tuple[tuple[str, str], ...]:
        """``(site, reason)`` of parts of the model in which symmetries may have been missed."""
        return tuple((site, reason) for site, reason in self.rejected if may_hide(site, reason))

    @property
    def unused(self) -> tuple[str, ...]:
        """Kinds that the network admits and that moved no measure here, because a member could not be proved."""
        return tuple(kind for kind, reason in self.rejected if reason.startswith(UNUSED))

    @property
    def partial(self) -> bool:
        """Whether the network may have kinds of symmetry that were not looked for, or could not be found."""
        return self.kinds is not None or bool(self.unanalysed)

    @property
    def proofs(self) -> dict[str, float]:
        """Symmetry -> largest relative change of an output over its members, in double precision."""
        return {orbit.kind: orbit.max_change for orbit in self.orbits}

    def of(self, name: str) -> tuple[Change, ...]:
        """The changes of one measure under changes of coordinates."""
        return tuple(c for c in self.changes if c.measure == name and c.symmetry in self.coordinates)

    def hidden(self, name: str) -> tuple[Change, ...]:
        """The changes of one measure under maps that move outputs which its loss does not see."""
        beyond = set(self.loss_preserving) - set(self.coordinates)
        return tuple(c for c in self.changes if c.measure == name and c.symmetry in beyond)

    @cached_property
    def verdicts(self) -> dict[str, Verdict]:
        """Measure -> the worst status over all changes of coordinates (:data:`~flatminima.audit.judge.MEANING`)."""
        return {name: self._verdict(name) for name in self.measurements}

    @property
    def sentences(self) -> dict[str, str]:
        """Measure -> its verdict in plain words."""
        return {name: words.verdict(self, name) for name in self.measurements}

    def by_verdict(self, *verdicts: str) -> list[str]:
        """The measures with one of these verdicts, in order."""
        return [name for name, verdict in self.verdicts.items() if verdict in verdicts]

    def range(self, name: str) -> tuple[float, float]:
        """Smallest and largest value of a measure over the network and all its members of function-preserving kinds."""
        values = [self.measurements[name].value, *(v for c in self.of(name) for v in c.values)]
        known = [v for v in values if not math.isnan(v)]
        return (min(known), max(known)) if known else (math.nan, math.nan)

    def max_ratio(self) -> dict[str, dict[str, float]]:
        """Measure -> symmetry -> largest change factor."""
        table: dict[str, dict[str, float]] = {name: {} for name in self.measurements}
        for change in self.changes:
            table[change.measure][change.symmetry] = change.max_ratio
        return table

    def largest_ratio(self, name: str) -> float | None:
        """The largest change factor of a measure over all changes of coordinates: over those that moved it, if any did."""
        changes = self.of(name)
        return max((c.max_ratio for c in [c for c in changes if c.significant] or changes), default=None)

    def spread(self, name: str) -> float | None:
        """Geometric standard deviation factor over the network and all its members; see :class:`Change`."""
        values = [v for c in self.of(name) for v in c.values]
        return spread([self.measurements[name].value, *values]) if values else None

    def repair(self, name: str) -> Repair | None:
        """What to use instead of a measure that moved; ``None`` where it did not, or there is nothing."""
        if self.verdicts[name] not in MOVED:
            return None
        return repair_of(name, self.coordinates, self.measurements, self.defined)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON; docs/audit.md documents the fields."""
        changes: dict[str, dict[str, Any]] = {name: {} for name in self.measurements}
        for c in self.changes:
            own = {k: v for k, v in vars(c).items() if k not in ("measure", "symmetry")}
            changes[c.measure][c.symmetry] = own | {"values": list(c.values), "significant": c.significant}
        return {
            "answer": words.answer(self),
            "details": words.details(self),
            "cautions": words.cautions(self),
            "notes": list(self.notes),
            "loss": self.loss,
            "gradient_norm": self.gradient_norm,
            "descent": self.descent,
            "parameters": self.parameters,
            "rows": self.rows,
            "measures": {name: self._measure_fields(name) for name in self.measurements},
            "changes": changes,
            "symmetries": [_orbit_fields(orbit) for orbit in self.orbits],
            "laws": [_law_fields(law) for law in self.laws],
            "rejected": [list(pair) for pair in self.rejected],
            "members": self.members,
            "checks": self.checks,
            "cost": self.cost,
        }

    def __str__(self) -> str:
        return words.text(self)

    def _verdict(self, name: str) -> Verdict:
        if not self.measurements[name].applies:
            return "not applicable"
        return worst(self.of(name)) or "not tested"

    def _measure_fields(self, name: str) -> dict[str, Any]:
        m, repair = self.measurements[name], self.repair(name)
        low, high = self.range(name)
        return {
            **{k: v for k, v in vars(m).items() if k != "name"},
            "label": MEASURES[name].label,
            "flatter_when": MEASURES[name].flatter_when,
            "verdict": self.verdicts[name],
            "sentence": words.verdict(self, name),
            "low": low,
            "high": high,
            "max_ratio": self.largest_ratio(name),
            "spread": self.spread(name),
            "repair": None
            if repair is None
            else {
                "name": repair.name, "label": MEASURES[repair.name].label, "moves_under": list(repair.moves_under),
                "same_intention": repair.same_intention,
            },
        }  # fmt: skip


def _orbit_fields(orbit: Orbit) -> dict[str, Any]:
    s = orbit.symmetry
    return {
        "kind": s.kind, "law": s.law, "hessian_law": s.hessian_law, "preserves": s.preserves, "exact": s.exact,
        "sites": list(s.sites), "members": orbit.members, "max_scale": orbit.max_scale, "max_change": orbit.max_change,
        "loss_change": orbit.loss_change,
    }  # fmt: skip


def _law_fields(law: TraceLaw) -> dict[str, Any]:
    return {
        **vars(law), "parts": [vars(part) for part in law.parts], "factor": law.factor, "agrees": law.agrees,
        "sentence": words.law(law),
        **{k: list(getattr(law, k)) for k in ("predicted", "predicted_errors", "measured", "measured_errors")},
    }  # fmt: skip
