"""The results of the protocol as one JSON-ready dictionary, from the records that are there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import flatminima
from flatminima.protocols import domains_table as table
from flatminima.protocols import domains_verdict as verdict
from flatminima.protocols.claims import finite
from flatminima.protocols.domains_cell import Cell
from flatminima.protocols.domains_settings import PROTOCOLS, DomainSettings, differences
from flatminima.protocols.domains_views import divided, domain_data
from flatminima.study.resampling import sign_flip

_DIGITS = 5  # of curves and grids: what a plot can show


def summarise(
    settings: DomainSettings,
    tasks: Mapping[str, Cell],
    records: Mapping[str, Mapping[str, Any]],
    command: str,
    beside: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Tables, tests, verdicts and curves.

    Args:
        settings, tasks: the plan.
        records: those of the plan that are finished.
        command: that makes the results.
        beside: results of other data sets, to be pooled in the sign-flip test.

    Returns:
        What ``results.json`` holds; documented in ``docs/reproductions/swad.md``.
    """
    targets = list(dict.fromkeys(cell.target for cell in tasks.values()))
    seeds = sorted({cell.seed for cell in tasks.values()})
    results = table.Results(records.values(), targets, seeds)
    missing = [name for name in tasks if name not in records]
    data = domain_data(settings)
    compared = table.comparisons(results)
    flat = table.flatness(results, settings.radii)
    found = table.valleys(results)
    summaries = {
        method: summary
        for method in table.METHODS
        if "/swad" in method and (summary := table.valley_summary(found, method, settings.run_steps)) is not None
    }
    valley = summaries.get("erm/swad")
    plan = {
        "targets": targets, "seeds": seeds, "algorithms": list(dict.fromkeys(cell.algorithm for cell in tasks.values())),
        "draws": 1 + max((cell.draw for cell in tasks.values()), default=0),
    }  # fmt: skip
    cautions = verdict.cautions(settings, results, valley, len(missing), len(tasks))
    strangers = unpaired(results)
    if strangers:
        cautions.insert(
            0, f"Runs of {'; '.join(strangers)} do not share split and initial weights: do not compare them."
        )
    content = {
        "schema": 1,
        "experiment": "swad",
        "flatminima": flatminima.__version__,
        "command": command,
        "settings": settings.to_dict(),
        "protocol": PROTOCOLS[settings.protocol],
        "steps": settings.run_steps,
        "data": {
            "name": data.name, "note": data.note, "classes": list(data.classes), "counts": data.counts(),
            "held_out": {d.name: len(d.held_out) for d in divided(data, settings.held_out, 0)},
        },
        "plan": plan,
        "finished": {"runs": len(tasks) - len(missing), "planned": len(tasks), "missing": missing, "partial": bool(missing)},
        "answer": verdict.answer(compared),
        "details": verdict.details(compared, valley, flat),
        "cautions": cautions,
        "methods": [table.accuracy_row(results, method) for method in results.methods()],
        "published": table.published(settings.data),
        "comparisons": compared,
        "pooled": pooled(settings.data, compared, beside),
        "claims": [claim.to_dict() for claim in verdict.claims(compared, flat)],
        "valley": {"summary": summaries, "runs": found},
        "flatness": flat,
        "planes": {r["target"]: _grid(r["plane"]) for r in results.finished if r["plane"] is not None},
        "runs": [_run(record) for record in results.records],
        "unpaired": strangers,
        "differences": [list(row) for row in differences(settings.data)],
    }  # fmt: skip
    plain: dict[str, Any] = finite(content)
    return plain


def unpaired(results: table.Results) -> list[str]:
    """Targets and seeds whose runs differ in split or initial weights, although they should be paired."""
    prints: dict[str, set[str]] = {}
    for record in results.records:
        prints.setdefault(f"{record['target']}, seed {record['seed']}", set()).add(record["fingerprint"])
    return [name for name, found in prints.items() if len(found) > 1]


def pooled(
    data: str, compared: Sequence[Mapping[str, Any]], beside: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The sign-flip test over the targets of several data sets, which are its strata."""
    found = []
    for row in compared if beside else ():
        strata = {data: list(row["per_target"].values())}
        for other in beside:
            match = [
                r for r in other["comparisons"] if (r["method"], r["baseline"]) == (row["method"], row["baseline"])
            ]
            if match:
                strata[other["data"]["name"]] = list(match[0]["per_target"].values())
        if len(strata) > 1:
            test = sign_flip(strata)
            found.append(
                {
                    "method": row["method"], "baseline": row["baseline"], "data": list(strata), "targets": test.n,
                    "difference": test.statistic, "p": test.p, "smallest_p": test.smallest,
                }
            )  # fmt: skip
    return found


def _run(record: Mapping[str, Any]) -> dict[str, Any]:
    """One run, its curves as means over the source domains."""
    history = record["history"]

    def means(rows: Sequence[Sequence[float]]) -> list[float]:
        return [_rounded(sum(row) / len(row)) for row in rows]

    return {
        **{name: record[name] for name in ("algorithm", "target", "seed", "draw", "hyperparameters", "fingerprint", "failure")},
        "seconds": {name: round(value, 1) for name, value in record["seconds"].items()},
        "history": {
            "step": history["step"],
            "train_loss": [_rounded(value) for value in history["train_loss"]],
            "validation_loss": means(history["validation_loss"]),
            "validation_accuracy": means(history["validation_accuracy"]),
            "oracle_accuracy": [_rounded(value) for value in record["oracle_curve"]],
        },
        "methods": {
            reader: {name: value for name, value in found.items() if name not in _IN_VALLEY}
            for reader, found in record["methods"].items()
        },
    }  # fmt: skip


_IN_VALLEY = ("notes", "votes", "threshold", "detected_at", "stopped_at", "final_ratio", "highest_ratio", "evaluations")


def _grid(plane: Mapping[str, Any]) -> dict[str, Any]:
    return {
        where: {**found, "loss": [[None if v is None else _rounded(v) for v in row] for row in found["loss"]]}
        for where, found in plane.items()
    }


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
