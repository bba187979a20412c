"""Hypotheses decided by the rules that were written before: supported, refuted or undecided, with everything behind it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flatminima.study.batch_effect import batch_parts
from flatminima.study.bootstrap import Replicates
from flatminima.study.dependent import difference_of_sizes
from flatminima.study.equivalence import tost
from flatminima.study.joint_ranks import JointRanks, complete
from flatminima.study.preregister import Hypothesis, Preregistration
from flatminima.study.run_table import RunTable, resampling_units
from flatminima.study.statistics import holm
from flatminima.study.value_names import word

Part = dict[str, Any]
_LEAST = 10  # networks


@dataclass
class Verdict:
    """What became of one hypothesis.

    Attributes:
        hypothesis: it.
        parts: one for each comparison that the rule asks for, with ``outcome``.
        reasons: why it is undecided without looking at numbers; empty otherwise.
        data_sets: how many data sets the rule asks for.
        p_holm: corrected for the number of hypotheses.
    """

    hypothesis: Hypothesis
    parts: list[Part] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    p_holm: float = 1.0

    @property
    def p(self) -> float:
        """Of the whole: the largest of its parts, each against the hypothesis being false; 1 where something is missing."""
        if self.reasons or not self.parts:
            return 1.0
        return max(float(part["p"]) if part["p"] is not None else 1.0 for part in self.parts)

    def outcome(self, alpha: float) -> str:
        """Supported by all parts, refuted by one, or undecided."""
        outcomes = [part["outcome"] for part in self.parts]
        if "refuted" in outcomes:
            return "refuted"
        if self.reasons or not outcomes or any(o != "supported" for o in outcomes) or self.p_holm > alpha:
            return "undecided"
        return "supported"

    def reason(self, alpha: float) -> str:
        """Why, in a sentence."""
        against = [part["what"] for part in self.parts if part["outcome"] == "refuted"]
        open_parts = [part["what"] for part in self.parts if part["outcome"] == "undecided"]
        if against:
            return f"Contradicted by {_few(against)}."
        if self.reasons:
            return " ".join(self.reasons)
        if open_parts:
            return f"Neither shown nor excluded: {_few(open_parts)}."
        if self.p_holm > alpha:
            return f"Every part holds, but not after Holm's correction (p = {self.p_holm:.3g})."
        lost = [part["lost"] for part in self.parts if part.get("lost")]
        return f"Every part holds{', but nothing finished at ' if lost else ''}{'; '.join(lost)}."


def decide(table: RunTable, rules: Preregistration) -> list[dict[str, Any]]:
    """The verdict on every hypothesis, JSON-ready.

    Args:
        table: all records. Those that did not finish enter no number, but a data set or a number of rows on which nothing
            finished is one that the rule asks about, and leaves its hypothesis open.
        rules: written before.

    Returns:
        For each ``{"name", "kind", "statement", "rule", "outcome", "reason", "p", "p_holm", "parts"}``.
    """
    alpha = 1 - rules.level
    verdicts = [_KINDS[hypothesis.kind](table, hypothesis, rules) for hypothesis in rules.hypotheses]
    for verdict, p in zip(verdicts, holm([verdict.p for verdict in verdicts]), strict=True):
        verdict.p_holm = p
    return [
        {
            "name": v.hypothesis.name, "kind": v.hypothesis.kind, "statement": v.hypothesis.statement,
            "rule": rules.rule(v.hypothesis), "outcome": v.outcome(alpha), "reason": v.reason(alpha), "p": v.p,
            "p_holm": v.p_holm, "parts": v.parts,
        }
        for v in verdicts
    ]  # fmt: skip


def _few(names: Sequence[str]) -> str:
    return "; ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@dataclass(frozen=True)
class _Sample:
    """The networks of one data set that have every number a rule needs."""

    data: str
    columns: dict[str, Any]
    joint: JointRanks


def _samples(table: RunTable, verdict: Verdict, names: Sequence[str]) -> list[_Sample]:
    """One for each data set; what is missing becomes a reason."""
    found = []
    for data in table.data_sets:
        part = table.of_data(data).finished
        if not len(part):
            verdict.reasons.append(f"On {data} no network has finished.")
            continue
        absent = [word(name) for name in names if part.full_name(name) is None]
        if absent:
            verdict.reasons.append(f"On {data} there is no {', '.join(absent)}.")
            continue
        columns = {name: part.column(name) for name in names}
        rows = complete(columns)
        if len(rows) < _LEAST:
            verdict.reasons.append(f"On {data} only {len(rows)} networks have everything it needs.")
            continue
        kept = part.rows(rows)
        columns = {name: column[rows] for name, column in columns.items()}
        found.append(_Sample(data, columns, JointRanks(columns, kept.cells, resampling_units(kept)[0])))
    wanted = int(verdict.hypothesis.settings["data_sets"])
    if len(table.data_sets) < wanted:
        verdict.reasons.append(f"It asks for {wanted} data sets; here: {', '.join(table.data_sets) or 'none'}.")
    return found


def _part(sample: _Sample, what: str, found: Replicates, rules: Preregistration, margin: float, positive: bool) -> Part:
    """An estimate, its two intervals, and whether it is shown to be positive (or else within the margin)."""
    (outer,), (inner,) = found.estimates(level=rules.level), found.estimates(level=rules.inner)
    small = -margin < inner.low and inner.high < margin
    if positive:
        outcome = "supported" if outer.low > 0 else "refuted" if outer.high < 0 or small else "undecided"
        p = outer.p if outer.value > 0 else 1.0
    else:
        outside = outer.low > margin or outer.high < -margin
        outcome = "supported" if small else "refuted" if outside else "undecided"
        p = tost(outer.value, outer.se, margin).p if math.isfinite(outer.se) else math.nan
    return {
        "data": sample.data, "what": f"{what} on {sample.data}", **outer.to_dict(), "p": p if math.isfinite(p) else None,
        "inner_low": _finite(inner.low), "inner_high": _finite(inner.high), "margin": margin, "outcome": outcome,
    }  # fmt: skip


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _predicts(table: RunTable, hypothesis: Hypothesis, rules: Preregistration) -> Verdict:
    verdict, s = Verdict(hypothesis), hypothesis.settings
    given = list(s["given"])
    for sample in _samples(table, verdict, [rules.outcome, s["measure"], *given]):
        sample.joint.ask("partial", lambda pooled, within: within.rho(s["measure"], rules.outcome, given))
        found = sample.joint.answer(draws=rules.draws, seed=rules.seed)
        what = f"partial correlation of {word(s['measure'])}"
        verdict.parts.append(_part(sample, what, found["partial"], rules, s["margin"], True))
    return verdict


def _beats(table: RunTable, hypothesis: Hypothesis, rules: Preregistration) -> Verdict:
    verdict, s = Verdict(hypothesis), hypothesis.settings
    for sample in _samples(table, verdict, [rules.outcome, s["measure"], *s["rivals"]]):
        for name in (s["measure"], *s["rivals"]):
            sample.joint.ask(name, _rho(name, rules.outcome))
        found = sample.joint.answer(draws=rules.draws, seed=rules.seed)
        for rival in s["rivals"]:
            difference = difference_of_sizes(found[s["measure"]], found[rival])
            what = f"{word(s['measure'])} against {word(rival)}"
            verdict.parts.append(_part(sample, what, difference, rules, s["margin"], True))
    return verdict


def _indifferent(table: RunTable, hypothesis: Hypothesis, rules: Preregistration) -> Verdict:
    verdict, s = Verdict(hypothesis), hypothesis.settings
    chosen_on, told_on = f"{rules.outcome}.a", f"{rules.outcome}.b"
    for sample in _samples(table, verdict, [chosen_on, told_on, s["measure"], *s["rivals"]]):
        for name in (s["measure"], *s["rivals"]):
            sample.joint.ask(name, _rho(name, told_on))
            sample.joint.ask(f"chosen/{name}", _rho(name, chosen_on))
        found = sample.joint.answer(draws=rules.draws, seed=rules.seed)
        sizes = {rival: abs(float(found[f"chosen/{rival}"].value[0])) for rival in s["rivals"]}
        best = max(sizes, key=lambda rival: sizes[rival] if math.isfinite(sizes[rival]) else -1.0)
        difference = difference_of_sizes(found[s["measure"]], found[best])
        what = f"{word(s['measure'])} against {word(best)}, the best of {len(s['rivals'])} on half a, on half b"
        verdict.parts.append(_part(sample, what, difference, rules, s["margin"], False))
    return verdict


def _coordinates(table: RunTable, hypothesis: Hypothesis, rules: Preregistration) -> Verdict:
    verdict, s = Verdict(hypothesis), hypothesis.settings
    measure, outcome, moved = s["measure"], rules.outcome, f"orbit.{s['measure']}"
    for sample in _samples(table, verdict, [outcome, measure, moved, s["invariant"]]):
        for name in (measure, moved, s["invariant"]):
            sample.joint.ask(name, _rho(name, outcome))
        found = sample.joint.answer(draws=rules.draws, seed=rules.seed)
        (raw,) = found[measure].estimates(level=rules.level)
        kept = difference_of_sizes(found[s["invariant"]], found[measure], s["keeps"])
        shown = raw.low > 0 or raw.high < 0
        parts = [
            _part(sample, f"{word(measure)} after random moves", found[moved], rules, s["margin"], False),
            # No margin of its own: that it keeps less is what refutes it.
            _part(
                sample, f"{word(s['invariant'])} beyond {s['keeps']:.0%} of {word(measure)}", kept, rules, 1e-9, True
            ),
        ]
        if not shown:
            verdict.reasons.append(f"On {sample.data} {word(measure)} itself shows no correlation to explain.")
            parts = [part | {"outcome": "undecided"} for part in parts]
        verdict.parts += parts
    return verdict


def _batch(table: RunTable, hypothesis: Hypothesis, rules: Preregistration) -> Verdict:
    parts, reasons = batch_parts(table, rules.outcome, hypothesis.settings["margins"], rules.level)
    return Verdict(hypothesis, parts, reasons)


def _rho(measure: str, outcome: str) -> Callable[..., Any]:
    return lambda pooled, within: within.rho(measure, outcome)


_KINDS: Mapping[str, Callable[[RunTable, Hypothesis, Preregistration], Verdict]] = {
    "predicts": _predicts,
    "beats": _beats,
    "indifferent": _indifferent,
    "batch": _batch,
    "coordinates": _coordinates,
}
