"""What the numbers of the protocol say, in words: claims of the paper, the answer, and what to be careful of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flatminima.protocols.claims import PAPER, Claim, signed
from flatminima.protocols.fewshot_methods import METHODS
from flatminima.protocols.fewshot_settings import DEFECTS, RELEASED, FewShotSettings
from flatminima.protocols.fewshot_table import Results

Row = Mapping[str, Any]

#: (method, baseline) -> statements: (words, quantity, sign the difference should have).
_STATEMENTS: Sequence[tuple[tuple[str, str], str, str, int]] = (
    (("f2m", "baseline"), "F2M is more accurate than the frozen Baseline, over all sessions", "average", 1),
    (("f2m", "baseline"), "F2M drops less than the frozen Baseline from the first session to the last", "drop", -1),
    (
        ("f2m", "f2m-no-noise"),
        "after the same clamped fine-tuning, a network trained in a flat region keeps more of the base classes",
        "base", 1,
    ),
    (
        ("f2m", "f2m-no-noise"),
        "and serves base and novel classes together better (harmonic mean, last session)", "harmonic", 1,
    ),
    (
        ("f2m-wide", "f2m-no-noise"),
        "with noise in a box four times as wide as the clamp, the flat network keeps more of the base classes", "base", 1,
    ),
    (("f2m", "f2m-no-clamp"), "clamping to the box keeps base classes from being forgotten", "forgetting", -1),
    (("baseline", "ft"), "the frozen Baseline is more accurate than naive fine-tuning", "average", 1),
    (("f2m", "f2m-no-pf"), "prototype fixing makes F2M more accurate", "average", 1),
    (("f2m", "f2m-no-pn"), "normalising prototypes makes F2M more accurate", "average", 1),
)  # fmt: skip


def claims(compared: Sequence[Row], flat: Mapping[str, Any]) -> list[Claim]:
    """The paper's claims that these runs can test; an interval that includes zero reproduces none."""
    by_pair = {(row["method"], row["baseline"]): row for row in compared}
    found = []
    for pair, statement, quantity, sign in _STATEMENTS:
        if pair in by_pair:
            row = by_pair[pair]["quantities"][quantity]
            about = {"base seeds": row["n"], "streams": row["cells"], "sign-flip p over seeds": row["p"]}
            claim = Claim(statement, {**about, "smallest possible": row["smallest_p"]}, PAPER)
            claim.measured["difference (points)"] = row["mean"]
            claim.expected["difference (points)"] = "above 0" if sign > 0 else "below 0"
            _interval(claim, row, sign, ".2f")
            found.append(claim)
    for part in ("train", "test"):
        rows = [
            row
            for row in flat["differences"]
            if (row["base"], row["part"], row["quantity"]) == ("flat", part, "indicator")
        ]
        for row in rows:
            statement = (
                f"the loss of F2M's network changes less in the box (indicator I, {part} images of base classes)"
            )
            claim = Claim(statement, {"base seeds": row["n"]}, PAPER)
            claim.measured["difference of I"] = row["mean"]
            claim.expected["difference of I"] = "below 0"
            _interval(claim, row, -1, ".2g")
            found.append(claim)
    return found


def _interval(claim: Claim, row: Row, sign: int, digits: str) -> None:
    claim.expected["its 95 % interval"] = "above 0" if sign > 0 else "below 0"
    low, high = row["low"], row["high"]
    if low is None or high is None:
        claim.measured["its 95 % interval"] = "none"
        claim.failures.append("one base seed has no interval")
        return
    shown = f"[{signed(low, digits)}, {signed(high, digits)}]"
    claim.measured["its 95 % interval"] = shown
    if not (low > 0 if sign > 0 else high < 0):
        other = high < 0 if sign > 0 else low > 0
        why = "lies on the other side of zero" if other else "does not exclude zero"
        claim.failures.append(f"the interval {shown} {why}")


def in_words(row: Row, more: str, less: str) -> str:
    """Effect, interval and what can be said of it."""
    low, high = row["low"], row["high"]
    effect = f"{signed(row['mean'])} points"
    if low is None or high is None:
        return f"{effect}; one base seed says nothing about others"
    word = more if low > 0 else less if high < 0 else "no difference detected"
    return f"{effect} [{signed(low)}, {signed(high)}], {word}"


def answer(compared: Sequence[Row]) -> str:
    """The headline and the mechanism, in one sentence each."""
    by_pair = {(row["method"], row["baseline"]): row["quantities"] for row in compared}
    parts = []
    if (found := by_pair.get(("f2m", "baseline"))) is not None:
        parts.append(
            f"F2M against the frozen Baseline, mean accuracy over sessions: {in_words(found['average'], 'better', 'worse')}."
        )
    if (found := by_pair.get(("f2m", "f2m-no-noise"))) is not None:
        kept = in_words(found["base"], "the flat network keeps more", "the flat network keeps less")
        parts.append(f"Base accuracy after the last session, flat against plain training under the same clamp: {kept}.")
    return " ".join(parts) or "No pair of F2M and a method to compare it with is finished yet."


def details(results: Results, compared: Sequence[Row], rows: Sequence[Row], flat: Mapping[str, Any]) -> list[str]:
    """What lies behind the answer."""
    found = []
    by_pair = {(row["method"], row["baseline"]): row["quantities"] for row in compared}
    for pair in (
        ("f2m", "baseline"),
        ("f2m", "f2m-no-clamp"),
        ("f2m-frozen", "baseline"),
        ("sam-clamp", "f2m-no-noise"),
    ):
        if pair in by_pair:
            both = by_pair[pair]
            words = ", ".join(
                f"{name} {signed(both[key]['mean'])}" + ("" if both[key]["low"] is None else
                f" [{signed(both[key]['low'])}, {signed(both[key]['high'])}]")
                for key, name in (("last", "last session"), ("drop", "PD"), ("base", "base"), ("novel", "novel"))
            )  # fmt: skip
            found.append(f"{METHODS[pair[0]].label} minus {METHODS[pair[1]].label}: {words} points.")
    known = {row["name"]: row for row in rows}
    if (gap := by_pair.get(("f2m", "crt"))) is not None:
        found.append(f"F2M ends {signed(gap['last']['mean'])} points from cRT, which sees all images in every session.")
    if "baseline" in known:
        floor, last = (known["baseline"]["numbers"][name]["mean"] for name in ("floor", "last"))
        found.append(
            f"Knowing no new class at all would leave the Baseline at {floor:.1f} % in the last session; it has {last:.1f} %."
        )
    for row in flat["differences"]:
        if (row["base"], row["part"], row["quantity"]) == ("flat", "test", "worst_drift"):
            mean, low, high = (
                None if row[name] is None else signed(100 * row[name], ".1f") for name in ("mean", "low", "high")
            )
            found.append(
                f"At the worst point of the box class means move by {mean} % of their length"
                + ("" if low is None else f" [{low}, {high}]")
                + ", F2M's network minus the plain one (test images)."
            )
    return found


def cautions(settings: FewShotSettings, results: Results, missing: int, planned: int) -> list[str]:
    """What a careful reader should know; every sentence is about these runs."""
    found = []
    if missing:
        found.append(
            f"Partial: {planned - missing} of {planned} tasks are finished. Every number here is over those alone."
        )
    if settings.validate:
        found.append("Validation: base images alone, some base classes playing the new ones. These are no results.")
    if broken := unpaired(results):
        found.append(
            f"Base networks of seed {', '.join(broken)} do not share split and initial weights: do not compare them."
        )
    if failed := results.failed():
        first = failed[0]
        found.append(
            f"{len(failed)} tasks failed and are in no mean; the first is {first['base']}: {first['failure']['reason']}."
        )
    if settings.protocol == "small":
        found.append(
            "Reduced networks and schedules: published accuracies are of longer training, and the paper's draws of shots were "
            "never published. Only differences between methods here can be read against differences there."
        )
    bounds = [label for name, label in (("joint", "Joint"), ("crt", "cRT")) if name in results.methods()]
    if settings.joint == "base" and bounds:
        steps = settings.joint_iterations
        starts = (
            f"goes on from the base network ({steps} steps a session)" if steps else "keeps the base network's features"
        )
        found += [
            f"{bound} {starts} instead of training anew in every session, which the paper does: the bound is that of these "
            "features."
            for bound in bounds
        ]
    if settings.split is not None:
        found.append(
            "All seeds have the class order and the shots of one split: intervals are over base networks alone and say nothing "
            "about other classes or shots."
        )
    if results.seeds < 6:
        nested = "" if settings.split is not None else " and contain the scatter of the draws"
        found.append(
            f"With {results.seeds} base seeds the sign-flip test cannot give a p below {2 / 2**results.seeds:.3g}. Intervals "
            f"are Student intervals over base seeds{nested}; draws alone say nothing about another base network."
        )
    found.append("PD rewards a weak first session: read it beside the first and the last session, never alone.")
    return found


def unpaired(results: Results) -> list[str]:
    """Seeds whose base networks differ in split or initial weights, although they should be paired."""
    prints: dict[int, set[str]] = {}
    for record in results.bases:
        prints.setdefault(record["seed"], set()).add(record["fingerprint"])
    return [str(seed) for seed, found in prints.items() if len(found) > 1]


def defects(settings: FewShotSettings, methods: Sequence[str]) -> list[tuple[str, str, str]]:
    """Defects of the released code: (name, what it does, whether these runs have it)."""
    everywhere = {name for name in RELEASED if getattr(settings, name) == RELEASED[name]}
    rows = []
    for name, text in DEFECTS.items():
        if name.startswith("- "):
            rows.append((name.removeprefix("- "), text, "not copied"))
            continue
        where = "all methods" if name in everywhere else "F2M as released" if "f2m-released" in methods else "none"
        rows.append((name, text, where))
    return rows
