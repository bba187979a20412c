"""From the records of a study to everything that its report says: one JSON-ready structure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import flatminima
from flatminima.study import caveats
from flatminima.study.along_axes import along_axes
from flatminima.study.association import Association, correlations, selection
from flatminima.study.batch_effect import slope_on_rows
from flatminima.study.bootstrap import DRAWS
from flatminima.study.preregister import Preregistration
from flatminima.study.run_spec import STATUSES, Record
from flatminima.study.run_table import RunTable
from flatminima.study.statistics import LEVEL, benjamini_hochberg
from flatminima.study.value_names import is_share, outcome_word
from flatminima.study.verdicts import decide

SCHEMA = 1


def analyse(
    records: Sequence[Record],
    rules: Preregistration | None = None,
    *,
    name: str = "",
    planned: int | None = None,
    outcome: str = "test.accuracy",
    draws: int = DRAWS,
    seed: int = 0,
    command: str = "",
) -> dict[str, Any]:
    """All figures of a study's report, from its records alone.

    Args:
        records: of one study, or of several whose data sets are to be judged together.
        rules: written before training; their ``draws`` and ``seed`` hold for the verdicts. There is none before every
            network has been tried: a rule that is looked at until it says what one likes is none.
        name: of the study; that of the records by default.
        planned: networks that there will be; as many as there are by default.
        outcome: the value to be predicted.
        draws: of bootstraps and permutations.
        seed: of these; the same seed gives the same figures.
        command: to be recorded.

    Returns:
        ``schema``, ``study``, ``command``, ``counts`` (networks by status), ``cells`` (of each: factors, counts, mean outcome),
        ``data`` (of each data set: ``correlations``, ``comparisons``, ``selection``, ``axes``, ``networks``), ``slopes``,
        ``verdicts`` (empty while networks wait), ``rules``, and in words ``answer``, ``details`` and ``cautions``.

    Cost: proportional to networks, measures and draws; 7 CPU seconds for 426 networks with 18 measures and 10,000 resamples.

    Raises:
        ValueError: a record that is given twice.

    Source: weakness specification, sections 4, 5.2 and 5.3.
    """
    table = RunTable(tuple(records))
    twice = [run for run, count in Counter(record.id for record in table.records).items() if count > 1]
    if twice:
        raise ValueError(f"{len(twice)} networks are given twice, first {twice[0][:12]}: expected each record once")
    finished = table.finished
    waiting = max((planned or 0) - len(table), 0)
    found: dict[str, Any] = {
        "schema": SCHEMA,
        "flatminima": flatminima.__version__,
        "command": command,
        "study": name or ", ".join(dict.fromkeys(table.spec("study"))),
        "outcome": outcome,
        "settings": {"draws": draws, "seed": seed, "level": LEVEL},
        "counts": _counts(table, planned),
        "cells": _cells(table, outcome),
        "data": [],
        "slopes": slope_on_rows(table, outcome) if is_share(outcome) else [],
        "rules": None
        if rules is None
        else rules.to_dict() | {"words": {h.name: rules.rule(h) for h in rules.hypotheses}},
        "verdicts": [] if rules is None or waiting else decide(table, rules),
    }
    cautions = caveats.of_design(table)
    for data in finished.data_sets:
        part = finished.of_data(data).where(lambda record: outcome in record.values)
        association = Association(part, outcome, draws, seed, LEVEL)
        rows, compared = correlations(association)
        _correct(rows)
        found["data"].append(
            {
                "name": data, "n": len(part), "correlations": rows, "comparisons": compared,
                "selection": selection(association), "axes": along_axes(association),
                "networks": _networks(association),
            }
        )  # fmt: skip
        cautions += caveats.of_data(association, rows, compared)
    if rules is None:
        cautions.insert(0, "No decision rule was written before training: everything here is exploration.")
    elif waiting:
        cautions.insert(
            0,
            f"{waiting} of {waiting + len(table)} networks have not been tried yet, so no rule is decided. To look now and "
            "stop where the figures please would make them worthless.",
        )
    return found | {"answer": _answer(found), "details": _details(found), "cautions": cautions}


def _counts(table: RunTable, planned: int | None) -> dict[str, int]:
    by_status = Counter(record.status for record in table.records)
    total = max(planned or 0, len(table))
    counts = {status: by_status[status] for status in STATUSES}
    return {"networks": total} | counts | {"not run": total - len(table)}


def _cells(table: RunTable, outcome: str) -> list[dict[str, Any]]:
    """Every cell with its counts: a cell that misses its criterion is shown, never dropped."""
    cells: dict[Any, list[Record]] = {}
    for record, cell in zip(table.records, table.cells, strict=True):
        cells.setdefault(cell, []).append(record)
    found = []
    for records in cells.values():
        spec = records[0].spec
        values = [r.values[outcome] for r in records if r.status == "finished" and outcome in r.values]
        epochs = [r.values["train.epochs"] for r in records if "train.epochs" in r.values]
        found.append(
            {
                "study": spec["study"], "data": spec["data"]["name"], "rows": spec["data"].get("rows"),
                "subset": spec["data"]["subset_seed"], "factors": dict(spec["cell"]),
                **{s: sum(r.status == s for r in records) for s in STATUSES},
                "mean": float(np.mean(values)) if values else None,
                "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None,
                "epochs": float(np.median(epochs)) if epochs else None,
                "reasons": [reason for reason, _ in Counter(r.reason for r in records if r.reason).most_common(2)],
            }
        )  # fmt: skip
    return found


def _correct(rows: Sequence[dict[str, Any]]) -> None:
    """Enter ``p``, of the correlation within cells where there are several, and ``p_bh`` over all measures."""
    for row in rows:
        main = row["within"] or row["raw"]
        row["p"] = row["permutation_p"] if row["permutation_p"] is not None else (main or {}).get("p")
    tested = [row for row in rows if row["p"] is not None]
    for row, p in zip(tested, benjamini_hochberg([row["p"] for row in tested]), strict=True):
        row["p_bh"] = p


def _networks(association: Association) -> list[dict[str, Any]]:
    """One point for each network, for the scatter plots."""
    table = association.table
    columns = {label: table.column(f"measure.{label}") for label in association.labels}
    outcome = table.column(association.outcome)
    return [
        {
            "id": record.id[:12], "seed": record.spec["seed"], "subset": record.spec["data"]["subset_seed"],
            "cell": {name: str(value) for name, value in record.spec["cell"].items()}, "outcome": float(outcome[i]),
            "measures": {label: float(c[i]) for label, c in columns.items() if math.isfinite(c[i])},
        }
        for i, record in enumerate(table.records)
    ]  # fmt: skip


def _answer(found: Mapping[str, Any]) -> str:
    if found["verdicts"]:
        by_outcome: dict[str, list[str]] = {}
        for verdict in found["verdicts"]:
            by_outcome.setdefault(verdict["outcome"], []).append(verdict["name"])
        said = "; ".join(f"{outcome}: {', '.join(names)}" for outcome, names in by_outcome.items())
        return f"{said[0].upper()}{said[1:]}."
    if not found["data"]:
        return "No network has finished."
    open_rules = ["No verdict yet."] if found["rules"] is not None else []
    return " ".join([*open_rules, *(_strongest(part, found["outcome"]) for part in found["data"])])


def _strongest(part: Mapping[str, Any], outcome: str) -> str:
    predicted = outcome_word(outcome)
    if not part["correlations"]:
        return f"On {part['name']} {part['n']} networks are too few for a correlation."
    rows = [(row, row["within"] or row["raw"]) for row in part["correlations"]]
    shown = [(row, e) for row, e in rows if e and e["low"] is not None and (e["low"] > 0 or e["high"] < 0)]
    if not shown:
        return f"On {part['name']} no measure is shown to correlate with {predicted} over {part['n']} networks."
    row, e = max(shown, key=lambda pair: abs(pair[1]["value"]))
    return (
        f"On {part['name']} {row['label']} correlates most with {predicted} over {part['n']} networks: ρ = "
        f"{caveats.signed(e['value'])} [{caveats.signed(e['low'])}, {caveats.signed(e['high'])}]."
    )


def _details(found: Mapping[str, Any]) -> list[str]:
    details = [f"{v['name']}, {v['statement']} {v['outcome'].capitalize()}: {v['reason']}" for v in found["verdicts"]]
    if found["verdicts"]:
        details += [_strongest(part, found["outcome"]) for part in found["data"]]
    for slope in found["slopes"]:
        value, low, high = (caveats.signed(100 * slope[name]) for name in ("value", "low", "high"))
        change = f"{value} [{low}, {high}]"
        details.append(
            f"On {slope['data']} the accuracy of large minus small batches, at matched learning rates, changes by "
            f"{change} points whenever the number of rows is multiplied by e = 2.72 ({slope['n']} seeds)."
        )
    for part in found["data"]:
        if part["selection"]:
            best = min(part["selection"], key=lambda row: row["top_10"])
            details.append(
                f"On {part['name']} the tenth chosen by {best['label']} is {100 * best['top_10']:.2f} points below the best "
                f"tenth, less than by any other measure; one network chosen by it is {100 * best['top_1']:.2f} below the "
                f"best one, a random one {100 * best['random']:.2f}."
            )
    return details
