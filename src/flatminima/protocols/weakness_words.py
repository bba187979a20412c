"""What the weakness reproduction says in words: answer, details, and what to be careful of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from flatminima.measures import MEASURES
from flatminima.protocols.claims import Claim
from flatminima.study import caveats
from flatminima.study.association import Association, measure_label
from flatminima.study.preregister import CLASSICAL_RIVALS, INVARIANT_SHARPNESS
from flatminima.study.run_table import RunTable
from flatminima.study.statistics import LEVEL, benjamini_hochberg


def study_cautions(table: RunTable, correlations: Sequence[Mapping[str, Any]], outcome: str) -> list[str]:
    """What to know about one study, computed from its networks and their correlations.

    Args:
        table: all records of the study.
        correlations: estimates for each measure: ``{"name", "raw", "orbit"}``.
        outcome: name of the value that is predicted.
    """
    finished = table.finished
    if not len(finished):
        return []
    known = [entry for entry in correlations if entry["raw"] is not None]
    association = Association(finished, outcome, 100, 0, LEVEL)  # nothing is resampled here
    rows: list[dict[str, Any]] = [
        {
            "label": measure_label(entry["name"], association.names.get(entry["name"], entry["name"])),
            "n": entry["raw"]["n"], "units": entry["raw"]["units"], "raw": entry["raw"], "within": None,
            "orbit": entry["orbit"], "reliability": association.reliability(entry["name"]), "p": entry["raw"]["p"],
        }
        for entry in known
    ]  # fmt: skip
    tested = [row for row in rows if row["p"] is not None]
    for row, p in zip(tested, benjamini_hochberg([row["p"] for row in tested]), strict=True):
        row["p_bh"] = p
    found = [*caveats.of_design(table), *caveats.of_data(association, rows, [])]
    return [sentence.removeprefix(f"{table.data_sets[0]}: ") for sentence in found]


def summary(
    claims: Sequence[Claim], studies: Sequence[Mapping[str, Any]], verdicts: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """``answer`` in a sentence, one sentence for each study and verdict, and what to be careful of in all of it."""
    good = sum(not claim.failures for claim in claims)
    if not claims:
        answer = "Nothing of the abstract is tested here: this is a smoke run on digits, or nothing has been run."
    elif good == len(claims):
        answer = f"Reproduced: all {good} correlations of the abstract lie within the 95 % intervals found here."
    else:
        answer = f"Reproduced in part: {good} of {len(claims)} correlations of the abstract."
    if claims and any(study["counts"]["not run"] for study in studies if study["name"].startswith("pair-proxy")):
        answer = f"Not complete; so far: {answer[0].lower()}{answer[1:]}"
    for outcome in ("supported", "refuted", "undecided"):
        if these := [_clause(v) for v in verdicts if v["outcome"] == outcome]:
            answer += f" {outcome.capitalize()}: {'; '.join(these)}."
    details = [line for study in studies if (line := _rivals(study))]
    details += [f"{v['name']}: {v['statement']} {v['outcome'].capitalize()}. {v['reason']}" for v in verdicts]
    return {"answer": answer, "details": details, "cautions": _cautions(studies, verdicts)}


def _clause(verdict: Mapping[str, Any]) -> str:
    return f"{verdict['statement'].rstrip('.')} ({verdict['name']})"


def _rivals(study: Mapping[str, Any]) -> str:
    """How the pair proxy stands among cheap and invariant measures."""
    found = {entry["name"]: entry["raw"] for entry in study["correlations"] if entry["raw"] is not None}
    if "pair_proxy" not in found:
        return ""
    own = found["pair_proxy"]
    rivals = {name: found[name] for name in (*INVARIANT_SHARPNESS, *CLASSICAL_RIVALS) if name in found}
    larger = [name for name, entry in rivals.items() if abs(entry["value"]) > abs(own["value"])]
    said = "none of the rivals has" if not larger else f"{len(larger)} of {len(rivals)} rivals have"
    best = max(rivals, key=lambda name: abs(rivals[name]["value"]), default=None)
    tail = f"; the largest is {MEASURES[best].label}, {_interval(rivals[best])}" if best else ""
    return (
        f"{study['name']}: the pair proxy has ρ = {_interval(own)} over {own['n']} networks; {said} a larger "
        f"correlation in size{tail}."
    )


def _interval(entry: Mapping[str, Any]) -> str:
    low, high = (math.nan if entry[end] is None else entry[end] for end in ("low", "high"))
    return f"{entry['value']:+.3f} [{low:+.3f}, {high:+.3f}]".replace("-", "−")


def _cautions(studies: Sequence[Mapping[str, Any]], verdicts: Sequence[Mapping[str, Any]]) -> list[str]:
    found = []
    for study in studies:
        counts = study["counts"]
        if counts["not run"]:
            found.append(f"{study['name']}: {counts['not run']} of {counts['networks']} networks were not run.")
        if counts["missed"] or counts["failed"]:
            found.append(
                f"{study['name']}: {counts['missed']} of {counts['networks']} networks missed their stop criterion and "
                f"{counts['failed']} failed; they are left out, but for the missed ones beside the abstract, which does not "
                "leave them out."
            )
    names = [study["name"] for study in studies if study["networks"]["seed"]]
    if {"pair-proxy-mnist", "pair-proxy-fashion-mnist"} <= set(names):
        found.append(
            "Both pair-proxy studies use seeds 0 to 99, as the source does: the initial weights are the same, so they are no "
            "independent replications."
        )
    if any(name.startswith("pair-proxy") for name in names):
        found.append(
            "Networks of the pair-proxy studies stop at an accuracy that is looked at every ten epochs, so training loss, "
            "norm and stopping time differ between them; the head-to-head studies stop all at one loss."
        )
        found.append(
            "The order of rows in the source came from a GPU's generator: accuracies are reproduced in distribution, not by "
            "seed."
        )
    if not verdicts:
        found.append(
            "That a correlation is found does not say that it is larger than another, or that it is no confounder's; "
            "the rules for that are decided by the head-to-head studies (--full), once all of their networks have been tried."
        )
    return found
