"""What the numbers of the protocol say, in words: claims of the paper, the answer, and what to be careful of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flatminima.protocols.claims import PAPER, Claim, signed
from flatminima.protocols.domains_settings import NO_WEIGHTS, DomainSettings
from flatminima.protocols.domains_table import FALLING, FLATNESS_ORDER, FLATNESS_PAIRS, METHODS, Results

Row = Mapping[str, Any]

_MORE_ACCURATE = {
    ("erm/swad", "erm/selected"): "SWAD is more accurate on the unseen domain than ERM selected on the source domains",
    (
        "erm/swad",
        "erm/tail",
    ): "SWAD is more accurate than the mean of the last 20 % of the iterates: the valley matters",
    ("erm/tail", "erm/selected"): "a dense average of the tail is more accurate than selected ERM",
}


def claims(compared: Sequence[Row], flat: Mapping[str, Any]) -> list[Claim]:
    """The paper's claims that these runs can test; an interval that includes zero reproduces none."""
    by_pair = {(row["method"], row["baseline"]): row for row in compared}
    found = []
    for pair, statement in _MORE_ACCURATE.items():
        if pair in by_pair:
            found.append(_claim(statement, by_pair[pair], sign=1))
    if ("sam/swad", "erm/swad") in by_pair:
        statement = "the gains of SAM and SWAD do not add up: together they are less accurate than SWAD alone"
        found.append(_claim(statement, by_pair["sam/swad", "erm/swad"], sign=-1))
    names = {name: short(name) for name in FLATNESS_ORDER}
    for flatter, sharper in FLATNESS_PAIRS:
        rows = [row for row in flat["order"] if (row["flatter"], row["sharper"]) == (flatter, sharper)]
        if not rows or not {flatter, sharper} <= names.keys():
            continue
        a, b = names[flatter], names[sharper]
        statement = f"{a} ends in a flatter minimum than {b} (the paper's order is {' < '.join(names.values())})"
        about = {"intervals of": f"F_γ({a}) − F_γ({b})", "targets": rows[0]["targets"], "runs": rows[0]["cells"]}
        claim = Claim(statement, about, PAPER)
        for row in rows:
            _interval(claim, f"γ = {row['radius']:g}, {row['where']}", row, sign=-1, digits=".2g")
        claim.failures[:] = _not_below_zero(rows)  # one sentence instead of one per radius
        found.append(claim)
    return found


def _claim(statement: str, row: Row, sign: int) -> Claim:
    """A claim about one comparison, with what it rests on; ``sign`` says which way the difference should be."""
    rests_on = {
        "targets better": f"{row['wins']} of {row['targets']}",
        "sign-flip p over targets": row["p"],
        "smallest possible": row["smallest_p"],
    }
    claim = Claim(statement, rests_on, PAPER)
    claim.expected["difference (points)"] = "above 0" if sign > 0 else "below 0"
    claim.measured["difference (points)"] = row["difference"]
    _interval(claim, "its 95 % interval", row, sign, digits=".2f")
    return claim


def _interval(claim: Claim, name: str, row: Row, sign: int, digits: str) -> None:
    low, high = row["low"], row["high"]
    claim.expected[name] = "above 0" if sign > 0 else "below 0"
    known = math.isfinite(low) and math.isfinite(high)
    shown = f"[{signed(low, digits)}, {signed(high, digits)}]" if known else "none"
    claim.measured[name] = shown
    if not (low > 0 if sign > 0 else high < 0):
        other = high < 0 if sign > 0 else low > 0
        why = "lies on the other side of zero" if other else "does not exclude zero"
        claim.failures.append(f"the interval {shown} {why}")


def _not_below_zero(rows: Sequence[Row]) -> list[str]:
    failing = [row for row in rows if not row["high"] < 0]
    if not failing:
        return []
    if len(failing) == len(rows):
        return ["the interval is below zero at no distance, neither on the sources nor on the target"]
    places = []
    for where in dict.fromkeys(row["where"] for row in failing):
        radii = ", ".join(f"{row['radius']:g}" for row in failing if row["where"] == where)
        places.append(f"γ = {radii} on the {where}")
    return [f"the interval is not below zero at {' and '.join(places)}"]


def short(method: str) -> str:
    """The label without its explanation: ``ERM, selected on the sources`` is ``ERM``."""
    return METHODS[method].split(",")[0]


def difference_in_words(row: Row) -> str:
    """Effect, interval and what can be said of it."""
    low, high = row["low"], row["high"]
    effect = f"{signed(row['difference'])} points"
    if not (math.isfinite(low) and math.isfinite(high)):
        return f"{effect}; one target says nothing about others"
    word = "more accurate" if low > 0 else "less accurate" if high < 0 else "no difference detected"
    return f"{effect} [{signed(low)}, {signed(high)}], {word}"


def answer(compared: Sequence[Row]) -> str:
    """One sentence on SWAD against ERM and against the dense tail."""
    by_pair = {(row["method"], row["baseline"]): row for row in compared}
    named = {
        "ERM selected on the source domains": ("erm/swad", "erm/selected"),
        "the plain average of the last 20 % of the run": ("erm/swad", "erm/tail"),
    }
    parts = [f"against {name}: {difference_in_words(by_pair[pair])}" for name, pair in named.items() if pair in by_pair]
    return f"SWAD on the unseen domain, {'; '.join(parts)}." if parts else "No pair of runs is finished yet."


def details(compared: Sequence[Row], valley: Mapping[str, Any] | None, flat: Mapping[str, Any]) -> list[str]:
    """What lies behind the answer."""
    found = []
    for row in compared[:2]:
        worst = row["worst_target"]
        found.append(
            f"{METHODS[row['method']]} against {METHODS[row['baseline']]}: better on {row['wins']} of {row['targets']} "
            f"targets, worst on {worst} ({signed(row['per_target'][worst])}); exact sign-flip test over targets "
            f"p = {row['p']:.3g} (the smallest that {row['targets']} targets allow is {row['smallest_p']:.3g})."
        )
    if valley is not None:
        share, highest = valley["start_share"], valley["highest_ratio"]
        start = "" if share is None else f", at {share:.0%} of the run in the median"
        loss = "" if highest is None else f" (the highest loss was {highest:.2f} of the threshold)"
        found.append(
            f"SWAD's rule found the start of a valley in {valley['converged']} of {valley['runs']} runs{start}, and its end "
            f"in {valley['ended']}{loss}."
        )
    for where in ("source", "target"):
        rows = [
            row
            for row in flat["order"]
            if (row["flatter"], row["sharper"], row["where"]) == ("erm/swad", "erm/selected", where)
        ]
        if rows:
            signs = ", ".join(f"{signed(row['difference'], '.3g')} at γ = {row['radius']:g}" for row in rows)
            found.append(f"Local flatness on the {where}, SWAD minus selected ERM: {signs}.")
    return found


def cautions(
    settings: DomainSettings, results: Results, valley: Mapping[str, Any] | None, missing: int, planned: int
) -> list[str]:
    """What a careful reader should know; every sentence is about these runs."""
    found = []
    if missing:
        found.append(
            f"Partial: {planned - missing} of {planned} runs are finished. Every number here is over those alone."
        )
    failed = [record for record in results.records if record["failure"] is not None]
    if failed:
        first = failed[0]
        found.append(
            f"{len(failed)} runs failed and are in no mean; the first is {first['algorithm']}, target {first['target']}, seed "
            f"{first['seed']}: {first['failure']['reason']} at step {first['failure']['step']}."
        )
    if settings.weights == NO_WEIGHTS:
        found.append(
            "The networks begin with random weights. The paper fine-tunes a ResNet-50 trained on ImageNet, and SWAD is a "
            "recipe for fine-tuning: its margin there (+3.9 points over the authors' own ERM on PACS, +2.7 over five data "
            "sets) is neither confirmed nor refuted here."
        )
    if settings.data == "colored-mnist":
        found.append(
            "ColoredMNIST is a negative control: its third target turns the colour against the label, no averaging can help, "
            "and the choice of a checkpoint moves accuracies by several points."
        )
    if len(results.targets) < 6:
        found.append(
            f"With {len(results.targets)} targets the sign-flip test cannot give a p below "
            f"{2 / 2 ** len(results.targets):.3g}: it can never be significant at 5 %. The bootstrap interval is somewhat too "
            "narrow for so few."
        )
    if valley is not None:
        found += _valley_cautions(valley)
    worse = _worse_on_sources(results)
    if worse:
        found.append(worse)
    if "erm/oracle" in results.methods():
        found.append("The oracle row chooses its checkpoint by the target's own labels; it is a bound, not a method.")
    return found


def _valley_cautions(valley: Mapping[str, Any]) -> list[str]:
    found = []
    runs, converged, highest = valley["runs"], valley["converged"], valley["highest_ratio"]
    if not valley["ended"]:
        ratio = "" if highest is None else f", the highest validation loss being {highest:.2f} of the threshold"
        found.append(
            f"The end of the valley was found in none of {runs} runs{ratio}: nothing overfitted enough for the rule, so SWAD "
            "was an average from its start to the end of the run."
        )
    if converged < runs:
        found.append(
            f"In {runs - converged} of {runs} runs SWAD found no start of a valley; it is then the mean of the last segment."
        )
    if valley["still_falling"]:
        found.append(
            f"In {valley['still_falling']} of {converged} runs with a start the validation loss still fell by more than "
            f"{1 - FALLING:.0%} afterwards (last loss over the loss at the start: median {valley['final_ratio']:.2f}, smallest "
            f"{valley['smallest_final_ratio']:.2f}): the rule fired on noise, and early iterates are in the average."
        )
    return found


def _worse_on_sources(results: Results) -> str | None:
    """Whether SWAD's average is worse than a plainer one on the sources' held-out rows, where it shows before any test."""
    swad = results.table("erm/swad", "validation_loss", 1.0)
    plain = results.table("erm/tail", "validation_loss", 1.0)
    both = np.isfinite(swad) & np.isfinite(plain)
    worse = int((swad[both] > plain[both]).sum())
    if worse * 2 <= int(both.sum()):
        return None
    return (
        f"In {worse} of {int(both.sum())} runs SWAD's average has a higher loss than the dense tail on the held-out rows of "
        "the sources already: whoever looks there would not choose it."
    )
