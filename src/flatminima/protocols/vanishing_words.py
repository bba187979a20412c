"""What the reproduction of the vanishing advantage says in words: answer, details, and what to be careful of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flatminima.protocols.claims import Claim, signed

#: Of the abstract: accuracy with large minus accuracy with small batches, in percentage points, by training rows.
PUBLISHED: Mapping[int, float] = {2000: 1.6, 60_000: 0.02}
GRID = "batch-rate-rows"
_RELIABLE = 0.7  # rank correlation of two estimates on the same networks


def summary(
    claims: Sequence[Claim], differences: Sequence[Mapping[str, Any]], verdicts: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """``answer`` in a sentence, and a sentence for each difference and verdict."""
    good = sum(not claim.failures for claim in claims)
    if not claims:
        answer = "Nothing of the abstract has been run."
    elif good == len(PUBLISHED):
        answer = "Reproduced: both differences of the abstract lie within the 95 % intervals found here."
    else:
        answer = (
            f"{good} of the abstract's {len(PUBLISHED)} differences reproduced, {len(claims) - good} not, "
            f"{len(PUBLISHED) - len(claims)} not run."
        )
    matched = [e["difference"] for e in differences if e["kind"] != "as the source" and e["low"] is not None]
    if matched:
        answer += (
            f" With one learning rate for both, large minus small batches is {signed(min(matched))} to {signed(max(matched))} "
            "points."
        )
    details = [_words(entry) for entry in differences if entry["low"] is not None]
    details += [f"{v['name']}: {v['statement']} {v['outcome'].capitalize()}. {v['reason']}" for v in verdicts]
    return {"answer": answer, "details": details}


def _words(entry: Mapping[str, Any]) -> str:
    at = "at the source's learning rates" if entry["kind"] == "as the source" else f"both at the {entry['kind']}"
    return (
        f"{entry['rows']:,} rows, {at}: large minus small batches {entry['difference']:+.2f} points "
        f"[{entry['low']:+.2f}, {entry['high']:+.2f}], {entry['outcome']} (margin {entry['margin']:g})."
    ).replace("-", "−")


def slope_words(slope: Mapping[str, Any]) -> str:
    """The trend of the matched difference over rows."""
    value, low, high = (signed(100 * slope[name]) for name in ("value", "low", "high"))
    return (
        f"{GRID}: at matched learning rates large minus small batches change by {value} points [{low}, {high}] whenever the "
        f"number of rows, {', '.join(f'{rows:,}' for rows in slope['rows'])}, is multiplied by e = 2.72 ({slope['n']} seeds)."
    )


def critique(
    differences: Sequence[Mapping[str, Any]],
    traces: Sequence[Mapping[str, Any]],
    shared: Sequence[Mapping[str, Any]],
) -> list[str]:
    """What to know about the source's comparisons, where there are any."""
    found = []
    own = [entry for entry in differences if entry["kind"] == "as the source" and entry["low"] is not None]
    if own:
        found.append(
            "The source's two regimes differ in learning rate as well as in batch size; only a comparison at one learning rate "
            "is about batches."
        )
    if len(own) > 1:
        found.append(
            "As in the source, learning rate, schedule and stop rule change with the number of rows, so a trend over rows is "
            f"not one of rows alone; {GRID} keeps one protocol for all."
        )
    if traces:
        found.append(
            "A correlation pooled over two regimes has an effective n of about 2 (Simpson); read the one within regimes."
        )
    weak = [
        f"{entry['rows']:,} rows ({signed(entry['reliability']['value'])})"
        for entry in traces
        if entry["reliability"] is not None and not (entry["reliability"]["value"] or 0.0) >= _RELIABLE
    ]
    if weak:
        found.append(
            f"Measured again on the same networks, the source's trace hardly repeats at {', '.join(weak)}: that it shows no "
            "correlation there shows nothing."
        )
    if shared:
        found.append(
            "How often others are right where a network is wrong is conditioned on that network's own errors: it says little "
            "that their number does not."
        )
    return found


def cautions(differences: Sequence[Mapping[str, Any]], studies: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was not run, missed or failed."""
    found = []
    missing = sorted({e["rows"] for e in differences if e["kind"] == "as the source" and e["low"] is None})
    if missing:
        found.append(f"Not run, or not enough of it: {', '.join(f'{rows:,}' for rows in missing)} rows.")
    for study in studies:
        counts = study["counts"]
        if counts["not run"]:
            found.append(f"{study['name']}: {counts['not run']} of {counts['networks']} networks were not run.")
        if counts["missed"] or counts["failed"]:
            found.append(
                f"{study['name']}: {counts['missed']} networks missed their stop criterion and {counts['failed']} failed; they "
                "are in no comparison."
            )
    return found
