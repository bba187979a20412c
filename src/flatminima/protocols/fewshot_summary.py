"""The results of the protocol as one JSON-ready dictionary, from the records that are there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import flatminima
from flatminima.protocols import fewshot_table as table
from flatminima.protocols import fewshot_verdict as verdict
from flatminima.protocols.claims import finite
from flatminima.protocols.fewshot_settings import PROTOCOLS, FewShotSettings, preset
from flatminima.protocols.fewshot_views import data_and_split

if TYPE_CHECKING:
    from flatminima.protocols.fewshot import Plan


def summarise(made: Plan, records: Mapping[str, Mapping[str, Any]], command: str) -> dict[str, Any]:
    """Tables, tests, verdicts and curves.

    Args:
        made: the plan.
        records: of its tasks that are finished, by name.
        command: that makes the results.

    Returns:
        What ``results.json`` holds; documented in ``docs/reproductions/f2m.md``.
    """
    settings = made.settings
    results = table.Results(records.values(), made.methods, made.seeds, made.draws)
    needed = made.second_stage()
    names = [*made.base_cells(), *needed]
    # What needs a base training that diverged can never be done: it is not missing.
    lost = {(r["base"], r["seed"]) for r in results.bases if r["failure"] is not None}
    missing = [name for name in names if name not in records and needed.get(name) not in lost]
    data, split = data_and_split(settings, 0, made.draws)
    rows = [table.method_row(results, name, settings) for name in results.methods()]
    compared = table.comparisons(results)
    flat = table.flatness(results)
    beside = comparable(settings, len(split.base), [len(group) for group in split.sessions], split.shot)
    content = {
        "schema": 1,
        "experiment": "f2m",
        "flatminima": flatminima.__version__,
        "command": command,
        "settings": settings.to_dict(),
        "protocol": PROTOCOLS[settings.protocol],
        "data": {
            "name": data.name, "note": data.note, "classes": len(data.classes), "train": len(split.train),
            "held_out": len(split.held_out), "test": [len(rows) for rows in split.test],
        },
        "plan": {
            "methods": list(made.methods), "seeds": made.seeds, "draws": made.draws, "sessions": len(split.sessions) + 1,
            "base": len(split.base), "way": [len(group) for group in split.sessions], "shot": split.shot,
        },
        "finished": {
            "runs": len(names) - len(missing), "planned": len(names), "missing": missing, "partial": bool(missing),
        },
        "answer": verdict.answer(compared),
        "details": verdict.details(results, compared, rows, flat),
        "cautions": verdict.cautions(settings, results, len(missing), len(names)),
        "methods": rows,
        "published": table.published(settings.data) if beside else {},
        "comparisons": compared,
        "claims": [claim.to_dict() for claim in verdict.claims(compared, flat)],
        "flatness": flat,
        "movement": table.movement(results),
        "defects": [list(row) for row in verdict.defects(settings, made.methods)],
        "bases": [_base(record) for record in results.bases],
        "streams": [_stream(record) for record in results.streams],
        "unmeasured": [{name: r[name] for name in ("base", "seed", "failure")} for r in results.unmeasured],
        "quantities": {name: {"label": label, "more_is_better": more} for name, (label, more) in table.QUANTITIES.items()},
        "ablations": [name for name in table.ABLATIONS if name in results.methods()],
    }  # fmt: skip
    plain: dict[str, Any] = finite(content)
    return plain


def comparable(settings: FewShotSettings, base: int, way: Sequence[int], shot: int) -> bool:
    """Whether sessions are cut as in the published tables of the data set: fewer shots or classes make another problem."""
    if settings.validate or not table.published(settings.data):
        return False
    paper = preset(settings.data, "paper")
    return (base, shot) == (paper.base, paper.shot) and all(new == paper.way for new in way)


def _base(record: Mapping[str, Any]) -> dict[str, Any]:
    names = (
        "base", "seed", "failure", "fingerprint", "region", "parameters", "history", "held_out_accuracy", "average", "weights",
    )  # fmt: skip
    return {name: record[name] for name in names if name in record} | {"seconds": round(record["seconds"], 1)}


def _stream(record: Mapping[str, Any]) -> dict[str, Any]:
    names = ("base", "arm", "seed", "draw", "failure", "counts", "correct", "sessions", "drift")
    seconds = {name: round(value, 2) for name, value in record["seconds"].items()}
    return {name: record[name] for name in names if name in record} | {"seconds": seconds}
