"""How far a study is, from its database: plain, for JSON and for the terminal."""

from __future__ import annotations

from collections import Counter
from typing import Any

from flatminima.study.database import StudyDatabase
from flatminima.study.versions import differences

_STATUSES = ("waiting", "finished", "missed", "failed")


def study_status(database: StudyDatabase) -> dict[str, Any]:
    """Counts, cells, reasons, processes and versions.

    Returns:
        ``study``, ``description``, ``counts`` and ``cells`` (networks by status; of cells also the factors), ``reasons`` (why
        networks missed their criterion or failed, most frequent first), ``seconds`` (computing time in all), ``processes``
        (owner -> claimed runs), ``versions`` (number of runs and what changed from the version before), ``extended``,
        ``rules`` (the hash of the rules of decision, or ``None``).
    """
    records = {record.id: record for record in database.records()}
    cells: dict[str, dict[str, Any]] = {}
    for spec in database.specs():
        record = records.get(spec.id)
        cell = cells.setdefault(repr(spec.cell), {"factors": spec.to_dict()["cell"], **dict.fromkeys(_STATUSES, 0)})
        cell["waiting" if record is None else record.status] += 1
    reasons = Counter((record.status, record.reason) for record in records.values() if record.reason)
    made = Counter(database.run_versions().values())
    versions = database.versions()
    rules = database.meta("rules")
    return {
        "study": database.meta("study"),
        "description": database.meta("description") or "",
        "counts": database.counts(),
        "cells": list(cells.values()),
        "reasons": [{"status": status, "reason": why, "count": n} for (status, why), n in reasons.most_common()],
        "seconds": database.timing()[0],
        "processes": database.claims.living(),
        "versions": [
            {"runs": made.get(number, 0), "changes": differences(versions[number - 2], version) if number > 1 else []}
            for number, version in enumerate(versions, start=1)
        ],
        "extended": database.meta("extended") or [],
        "rules": None if rules is None else rules.get("digest"),
    }


def cautions(database: StudyDatabase) -> list[str]:
    """What the history of a study's file says against its results; nothing for one made in one go."""
    found = study_status(database)
    said = [
        f"{found['study']}: {step['added']} networks were added when {step['recorded']} had a record. If those had been looked "
        "at, this is optional stopping, and intervals and p-values are too good."
        for step in found["extended"]
        if step["recorded"]
    ]
    used = [version for version in found["versions"] if version["runs"]]
    if len(used) > 1:
        changes = "; ".join(change for version in used[1:] for change in version["changes"])
        said.append(
            f"{found['study']}: the networks were made with {len(used)} versions of code, packages or data ({changes}); "
            "the column version of the export tells them apart."
        )
    return said
