"""The audit in plain words."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from flatminima.audit.judge import MOVED, Change
from flatminima.audit.law import TraceLaw
from flatminima.measures import MEASURES
from flatminima.symmetries import KINDS

if TYPE_CHECKING:
    from flatminima.audit.report import AuditReport

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

#: Cautions that hold for every audit.
GENERAL = (
    "A number that depends on coordinates is not refuted by that: training may always reach similar ones. But a difference in "
    "it alone is no evidence about the function, and no factor means anything without its scale.",
    "A number that no symmetry found here moves need not predict generalisation, nor be a property of the function: two "
    "networks may compute the same without a symmetry that leads from one to the other.",
)

#: Share of the loss that a step along the gradient may take away at what is called a minimum.
NO_MINIMUM = 0.05

#: What is said of symmetries that keep less than the outputs.
NO_VERDICT = "no verdict rests on it"


def answer(report: AuditReport) -> str:
    """Which numbers can be trusted, in one sentence or two."""
    tested = [name for name, verdict in report.verdicts.items() if verdict not in ("not applicable", "not tested")]
    if not report.coordinates:
        return (
            "No number was put to the test: no change of coordinates that keeps this function was found. "
            "What was looked at and refused is listed with the reason."
        )
    if not tested:
        return "No number was put to the test: none of the measures is defined here."
    clauses = []
    broken = report.by_verdict("broken")
    if broken:
        clauses.append(f"BROKEN: {labels(broken)} moved although declared invariant, which is a bug, not a result")
    function = report.by_verdict("invariant", "nearly")
    if function:
        clauses.append(
            f"{len(function)} survive every change of coordinates found ({labels(function)}): {_held(report, function)}"
        )
    moved = report.by_verdict("changes", "found to change")
    if moved:
        ratios = [report.largest_ratio(name) or 1.0 for name in moved]
        finite = [ratio for ratio in ratios if math.isfinite(ratio)]
        how = [f"moved by up to {factor(max(finite))}"] * bool(finite) + ["changed sign or vanished"] * (
            len(finite) < len(ratios)
        )
        change = max(o.max_change for o in report.orbits if o.function_preserving)
        clauses.append(
            f"{len(moved)} depend on coordinates ({some(labels_of(moved))}): they {' or '.join(how)} while the "
            f"outputs agree to {number(change, 1)} of the largest"
        )
    for verdict, meaning in (
        ("survived", "did not move on these members, without a theorem that says why"),
        ("undecided", "cannot be judged, because their errors would hide a change by a factor of two"),
    ):
        names = report.by_verdict(verdict)
        if names:
            clauses.append(f"{len(names)} {meaning} ({labels(names)})")
    return f"Of {len(tested)} numbers, {'; '.join(clauses)}."


def verdict(report: AuditReport, name: str) -> str:
    """What the audit says about one measure."""
    found = report.verdicts[name]
    changes = report.of(name)
    if found == "not applicable":
        return f"Not defined here: {report.measurements[name].note or 'no reason was given'}."
    if found == "not tested":
        return "Not tested: no change of coordinates was found."
    theorem = [c for c in changes if c.status == "invariant"]
    if found == "invariant":
        return f"Invariant by theorem under {_kinds(theorem)}, and it held.{_elsewhere(report, name)}"
    if found == "nearly":
        near = [c for c in changes if c.status == "nearly"]
        largest = max(c.max_ratio for c in near)
        others = f", and by theorem under the other {len(theorem)} kinds" if theorem else ""
        return (
            f"Invariant up to the epsilon of a normalisation under {_list(near)} "
            f"({factor(largest)}){others}, and it held."
        )
    if found == "survived":
        open_ = [c for c in changes if c.status == "survived"]
        return f"Survived these members, but no theorem says that {_list(open_)} cannot move it."
    if found == "undecided":
        hidden = [c for c in changes if c.status == "undecided"]
        proved = " It is invariant by theorem." if all(c.declared == "invariant" for c in hidden) else ""
        return (
            f"Undecided: under {_list(hidden)} its error would have hidden a change by a factor of two.{proved} Measure it "
            "more accurately, or on more rows."
        )
    moved = [c for c in changes if c.status in MOVED]
    if found == "broken":
        wrong = [c for c in moved if c.status == "broken"]
        return (
            f"BROKEN: declared invariant under {_list(wrong)}, it moved by {factor(max(c.max_ratio for c in wrong))} there. "
            "That is a bug in the measure, in its declaration or in the symmetry, and no result; please report it."
        )
    worst = max(moved, key=lambda c: c.max_ratio)
    less = [c.symmetry for c in moved if c is not worst]
    also = f", and by less under {join(less) if len(less) < 4 else f'{len(less)} other kinds'}" if less else ""
    held = [c.symmetry for c in changes if c.status in ("invariant", "nearly")]
    survives = f" It survives {join(held) if len(held) < 4 else f'{len(held)} other kinds'} by theorem." if held else ""
    how = "changes sign or vanishes" if math.isinf(worst.max_ratio) else f"changes by up to {factor(worst.max_ratio)}"
    undeclared = "" if worst.status == "changes" else " (which it did not declare)"
    return f"It {how} under {worst.symmetry}{also}{undeclared}, with every output unchanged.{survives} {_instead(report, name)}"


def details(report: AuditReport) -> list[str]:
    """What was proved, and the laws of the trace."""
    lines = []
    if report.orbits:
        count = sum(o.members for o in report.orbits)
        exact = [o for o in report.orbits if o.symmetry.exact]
        change = max((o.max_change for o in exact), default=0.0)
        lines.append(
            f"{count} members of {len(report.orbits)} kinds of symmetry were drawn and proved in double precision; those of "
            f"exact kinds change the outputs by at most {number(change, 1)} of the largest."
        )
    return lines + [law(found) for found in report.laws]


def law(found: TraceLaw) -> str:
    """The law of the trace under one kind of symmetry, for the member that changes it most."""
    measured, most = found.measured[found.most], found.most
    if not found.parts and found.exact:
        return f"{found.symmetry}: no curvature lies in the weights that it moves (Hessian trace {number(found.trace, 3)})."
    if not found.parts:
        return (
            f"{found.symmetry}: the error of random probes hides the law of the Hessian trace ({number(found.trace, 3)}); ask "
            "for more of them (max_probes)."
        )
    beside = f"{factor(measured / found.trace)} measured, " if math.isfinite(measured) and found.trace else ""
    head = f"{found.symmetry}: the Hessian trace changes by {beside}{factor(found.factor)} predicted"
    if not found.exact:
        head += (
            f" (± {number(found.predicted_errors[most] / abs(found.trace), 1)}, from random probes)"
            if found.trace
            else ""
        )
    lead = found.parts[0]
    scaled = "its units by different factors" if lead.scale is None else f"it by {number(lead.scale, 3)}"
    share = (
        f"{number(100 * lead.share, 3)} % of it lies in {lead.name}; the map multiplies {scaled}, its part by "
        f"{number(lead.factor)}"
    )
    grows = f"{number(100 * found.growing, 3)} % lies in weights that become smaller and whose curvature grows"
    return f"{head}: {share}; {grows}." + (
        "" if found.agrees else " PREDICTION AND MEASUREMENT DISAGREE: one is wrong."
    )


def cautions(report: AuditReport) -> list[str]:
    """What a careful reader should know."""
    lines = [report.sentences[name].join((f"{MEASURES[name].label}: ", "")) for name in report.by_verdict("broken")]
    lines += [
        f"{found.symmetry}: the trace predicted from the network is not the one that was measured."
        for found in report.laws
        if not found.agrees
    ]
    if report.descent > NO_MINIMUM:
        gain = (
            f"would lower the loss by about {number(100 * report.descent, 2)} %"
            if math.isfinite(report.descent)
            else "meets no positive curvature"
        )
        lines.append(
            f"This is no minimum: a step along the gradient {gain}. Curvature and sharpness here are not those of a minimum."
        )
    lines += [f"Not analysed at {site}: {reason}." for site, reason in report.unanalysed]
    if report.coordinates and all(o.symmetry.orthogonal for o in report.orbits if o.function_preserving):
        lines.append(
            f"All changes of coordinates that were found ({join(report.coordinates)}) keep distances: that a number survives "
            "them says little."
        )
    for orbit in report.orbits:
        if not orbit.symmetry.exact:
            lines.append(
                f"{orbit.kind} holds up to the epsilon of a normalisation: its members change the outputs by up to "
                f"{number(orbit.max_change, 1)} of the largest."
            )
    for orbit in report.orbits:
        moved = [c.measure for c in report.changes if c.symmetry == orbit.kind and c.significant]
        if moved and not orbit.function_preserving:
            keeps = {
                "probabilities": "keeps the loss and every probability, but not the outputs",
                "predictions": "keeps every predicted class, but neither the loss nor the outputs",
            }[orbit.preserves]
            lines.append(f"{orbit.kind} {keeps}; {NO_VERDICT}. It moves {some(labels_of(moved))}.")
    if report.by_verdict("changes", "found to change"):
        lines.append(GENERAL[0])
    if report.by_verdict("invariant", "nearly"):
        lines.append(GENERAL[1])
    return lines


def text(report: AuditReport) -> str:
    """A table and the sentences, for ``print``."""
    head = ["measure", "value", "error", "range over the orbit", "max ratio", "verdict"]
    rows = []
    for name, m in report.measurements.items():
        low, high = report.range(name)
        ratio = report.largest_ratio(name)
        rows.append(
            [
                name, number(m.value), "" if m.error is None else number(m.error, 1),
                f"{number(low)} .. {number(high)}" if m.applies else "", "" if ratio is None else factor(ratio),
                report.verdicts[name],
            ]
        )  # fmt: skip
    lines = [*aligned(head, rows), "", answer(report)]
    lines += [f"- {sentence}" for sentence in (*details(report), *cautions(report))]
    return "\n".join(lines)


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    table = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]]
    return [table[0], "-" * max(map(len, table)), *table[1:]]


def labels(names: Collection[str]) -> str:
    """The measures' labels as a list in words."""
    return join(labels_of(names))


def labels_of(names: Collection[str]) -> list[str]:
    """The measures' labels."""
    return [MEASURES[name].label for name in names]


def join(names: Sequence[str]) -> str:
    """``a, b and c``."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else ""


def join_or(names: Sequence[str]) -> str:
    """``a, b or c``."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def factor(ratio: float) -> str:
    """A change factor.

    Example:
        >>> factor(385.2), factor(1.0000001), factor(1.002), factor(81100.0), factor(float("inf"))
        ('×385', '×1', '×1.002', '×8.11 × 10⁴', 'without bound')
    """
    return "without bound" if math.isinf(ratio) else f"×{number(ratio, 4 if ratio < 10 else 3)}"


def number(value: float, digits: int = 4, sign: bool = False) -> str:
    """A number with so many digits.

    Example:
        >>> number(-0.000012345), number(5.0, sign=True)
        ('−1.234 × 10⁻⁵', '+5')
    """
    text = f"{value:{'+' if sign else ''}.{digits}g}"
    text = re.sub(r"e([+-])0*(\d+)", lambda m: f" × 10{(m[1].strip('+') + m[2]).translate(_SUPERSCRIPTS)}", text)
    return text.replace("-", "\N{MINUS SIGN}")


def _instead(report: AuditReport, name: str) -> str:
    repair = report.repair(name)
    if repair is None:
        return "No measure here asks the same and survives all of these."
    label = MEASURES[repair.name].label
    value = "" if repair.measurement is None else f" ({number(repair.measurement.value, 4)} here)"
    if repair.moves_under:
        return f"{_capital(label)}{value} asks the same and survives more of these, but not {join(list(repair.moves_under))}."
    if not repair.same_intention:
        return f"Nothing that asks the same survives all of these; {label}{value} is curvature that does."
    return f"Use {label}{value} instead: it asks the same and is invariant under all of these by theorem."


def _held(report: AuditReport, names: Sequence[str]) -> str:
    nearly = any(report.verdicts[name] == "nearly" for name in names)
    count = len(report.coordinates)
    under = f"under all {count} kinds of symmetry found" if count > 1 else "under the one kind of symmetry found"
    return f"invariant by theorem {under}{', or up to an epsilon,' if nearly else ','} and held"


def _elsewhere(report: AuditReport, name: str) -> str:
    """Exact changes of coordinates that would move the measure, but are none of this network."""
    would = [
        k for k in KINDS.values() if k.exact and k.preserves == "outputs" and k.name in MEASURES[name].changes_under
    ]
    others = [k.name for k in would if k.name not in report.coordinates]
    return f" In a network that admits it, {join_or(others)} would move it." if others else ""


def _kinds(changes: Sequence[Change]) -> str:
    if len(changes) == 1:
        return changes[0].symmetry
    return f"all {len(changes)} kinds of symmetry found here"


def _list(changes: Sequence[Change]) -> str:
    return join([c.symmetry for c in changes])


def some(names: Sequence[str], shown: int = 6) -> str:
    """The first of them and how many more there are."""
    return join(names) if len(names) <= shown + 1 else join([*names[:shown], f"{len(names) - shown} more"])


def _capital(label: str) -> str:
    return label[:1].upper() + label[1:] if label[1:2].isalpha() else label
