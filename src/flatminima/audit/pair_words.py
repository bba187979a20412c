"""The comparison of two minima in plain words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flatminima.audit import words
from flatminima.audit.orbit import LOSS_TOLERANCE
from flatminima.audit.words import number
from flatminima.measures import MEASURES

if TYPE_CHECKING:
    from flatminima.audit.pair import Difference, MinimaComparison


def verdict(found: MinimaComparison) -> str:
    """Which is flatter, or why that cannot be said."""
    a, b = found.names
    function = found.function
    if function.relation in ("same", "same within rounding"):
        rounded = function.relation == "same within rounding"
        why = f", which rounding their weights explains ({number(function.rounding, 1)})" if rounded else ""
        return (
            f"{a} and {b} are the same function on these rows: outputs agree to {number(function.max_change, 1)} of the "
            f"largest{why}. Every difference between them is coordinates; neither is flatter."
        )
    if function.relation == "same probabilities":
        return (
            f"{a} and {b} give the same probabilities on these rows: their outputs differ by one number a row, which the "
            "softmax does not see. Every difference between them is coordinates; neither is flatter."
        )
    if function.relation == "same up to temperature":
        return (
            f"{b} is {a} at another temperature: its outputs are {number(function.factor or 1.0)} times those of {a}, every "
            "prediction is the same, and the loss is another one. Refused: what differs is confidence, and neither is flatter."
        )
    if found.flatter is not None:
        return _flatter(found)
    return f"Refused to call one of them flatter: {_refusal(found)}"


def details(found: MinimaComparison) -> list[str]:
    """What stands behind the verdict."""
    a, b = found.names
    losses = [audit.loss for audit in found.audits]
    slopes = [audit.gradient_norm for audit in found.audits]
    lines = []
    if found.function.agreement is not None:
        lines.append(
            f"They predict the same class for {number(100 * found.function.agreement)} % of the rows; the outputs differ by up "
            f"to {number(found.function.max_change, 2)} of the largest."
        )
    lines.append(
        f"Loss {number(losses[0])} ({a}) and {number(losses[1])} ({b}); length of the gradient {number(slopes[0], 2)} and "
        f"{number(slopes[1], 2)}."
    )
    trusted = [d for d in found.differences if d.trusted and d.of_flatness]
    if trusted:
        lines.append(f"Invariant measures of flatness: {'; '.join(_difference(found, d) for d in trusted)}.")
    moving = [d for d in found.differences if d.basis == "coordinates" and d.flatter is not None]
    if moving:
        inside = [d for d in moving if d.within_orbit]
        says = [
            f"{words.some(words.labels_of([d.measure for d in moving if d.flatter == i]))} would say {found.names[i]}"
            for i in (0, 1)
            if any(d.flatter == i for d in moving)
        ]
        lines.append(
            f"Measures that depend on coordinates: {'; '.join(says)}. For {len(inside)} of these {len(moving)}, changing the "
            f"coordinates of {a} alone goes as far."
        )
    return lines


def cautions(found: MinimaComparison) -> list[str]:
    """What a careful reader should know."""
    lines = []
    apart = [d.measure for d in found.differences if d.trusted and d.resolved]
    if found.function.same_loss and apart:
        lines.append(
            f"{words.labels(apart)} differ although they are invariant: no symmetry found here leads from one network to the "
            "other. A unit that nothing reads, or two equal ones, can do that."
        )
    losses = sorted(audit.loss for audit in found.audits)
    if found.function.relation == "same" and losses[1] - losses[0] > LOSS_TOLERANCE * max(map(abs, losses)):
        lines.append(
            f"The outputs are the same and the losses are not ({number(losses[0], 6)} and {number(losses[1], 6)}): the loss "
            "sees more than the outputs, a penalty on the weights for instance, and that part does depend on coordinates."
        )
    if found.function.relation == "different" and losses[1] > 1.1 * losses[0] > 0:
        lines.append(
            f"The losses differ ({number(losses[0])} and {number(losses[1])}): under cross-entropy a better fit alone makes "
            "most curvature smaller. Compare minima at equal training loss."
        )
    if any(audit.partial for audit in found.audits):
        lines.append(
            "Not every kind of symmetry was looked for, or not everywhere: only measures that no linear one can move count."
        )
    lines.append("The differences are on these rows; whether the flatter one predicts better is another question.")
    for index, audit in enumerate(found.audits):
        own = [c for c in words.cautions(audit) if not c.startswith(words.GENERAL) and words.NO_VERDICT not in c]
        lines += [f"{found.names[index]}: {caution}" for caution in own]
    return lines


def sentence(found: MinimaComparison, d: Difference) -> str:
    """What one measure says, and whether it counts."""
    if not d.of_flatness:
        return "No measure of flatness."
    if not d.resolved:
        return "The difference is within its error."
    says = f"Smaller curvature at {found.names[d.flatter]}" if d.flatter is not None else ""
    if found.function.relation == "same up to temperature":
        return f"{says}; that is the temperature."
    if found.function.same_loss:
        return f"{says}, though it is invariant." if d.trusted else f"{says}; that is coordinates."
    if d.trusted:
        agrees = found.flatter is not None
        return f"{says}; invariant, so it counts{'' if agrees else ', but others contradict it'}."
    against = found.flatter is not None and found.flatter != d.flatter
    if d.basis == "coordinates":
        reach = (
            "a change of coordinates alone goes as far"
            if d.within_orbit
            else "coordinates alone did not go as far here"
        )
        return f"{says}; it depends on coordinates ({reach}){' and contradicts the verdict' if against else ''}."
    return f"{says}; not counted, because it is {d.basis}."


def text(found: MinimaComparison) -> str:
    """A table and the sentences, for ``print``."""
    head = ["measure", *found.names, "difference", "error", "stands on", "flatter"]
    rows = [
        [
            d.measure, number(d.first), number(d.second), number(d.difference, sign=True), number(d.error, 1), d.basis,
            found.names[d.flatter] if d.flatter is not None else "-",
        ]
        for d in found.differences
    ]  # fmt: skip
    lines = [*words.aligned(head, rows), "", verdict(found)]
    return "\n".join([*lines, *(f"- {line}" for line in (*details(found), *cautions(found)))])


def _flatter(found: MinimaComparison) -> str:
    assert found.flatter is not None
    flat, sharp = found.names[found.flatter], found.names[1 - found.flatter]
    votes = found.votes
    silent = [d for d in found.differences if d.trusted and d.of_flatness and not d.resolved]
    rest = f"; {words.labels([d.measure for d in silent])} cannot tell" if silent else ""
    against = [d.measure for d in found.differences if not d.trusted and d.flatter == 1 - found.flatter]
    contradiction = (
        f" {words.some(words.labels_of(against))} would say the opposite, which is coordinates." if against else ""
    )
    every = "the one invariant measure" if len(votes) == 1 else f"all {len(votes)} invariant measures"
    return (
        f"{flat} may be called flatter than {sharp} on these rows, by {every} whose difference exceeds its error "
        f"({'; '.join(_difference(found, d) for d in votes)}{rest}).{contradiction}"
    )


def _refusal(found: MinimaComparison) -> str:
    trusted = [d for d in found.differences if d.trusted and d.of_flatness]
    if found.votes:
        sides = [[d.measure for d in found.votes if d.flatter == i] for i in (0, 1)]
        return (
            f"invariant measures contradict each other. {words.labels(sides[0])} would say {found.names[0]}, "
            f"{words.labels(sides[1])} would say {found.names[1]}."
        )
    resolved = [d.measure for d in found.differences if d.flatter is not None]
    moving = (
        f" What differs by more than its error depends on coordinates: {words.some(words.labels_of(resolved))}."
        if resolved
        else ""
    )
    if trusted:
        return (
            "no invariant measure of flatness differs by more than its error "
            f"({'; '.join(_difference(found, d) for d in trusted)}).{moving}"
        )
    if not any(audit.coordinates for audit in found.audits):
        return "no symmetry of these networks was found, so that no number was put to the test."
    closest = min(
        (d.measure for d in found.differences if d.of_flatness), key=lambda m: len(_moved(found, m)), default=None
    )
    under = words.join(_moved(found, closest)) if closest else ""
    nearest = f" Closest is {MEASURES[closest].label}, which moves under {under}." if closest else ""
    return f"no measure of flatness here is invariant under all symmetries of these networks.{moving}{nearest}"


def _moved(found: MinimaComparison, measure: str) -> list[str]:
    """The kinds under which a measure is not known to be invariant, or was not seen to be."""
    changes = [c for audit in found.audits for c in (*audit.of(measure), *audit.hidden(measure))]
    return list(dict.fromkeys(c.symmetry for c in changes if c.status not in ("invariant", "nearly")))


def _difference(found: MinimaComparison, d: Difference) -> str:
    return f"{MEASURES[d.measure].label} {number(d.difference, 3, sign=True)} ± {number(d.error, 1)}"
