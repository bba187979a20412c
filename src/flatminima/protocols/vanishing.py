"""The advantage of large batches and whether it vanishes with more data, reproduced, with the cells that the source lacks.

After M. T. Bennett, "Are Flat Minima an Illusion?" (arXiv:2605.05209). There the two regimes differ in batch size and, 10 to 50
times, in learning rate. Here each batch size is also trained at the other's learning rate, so that the difference can be split.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

import flatminima
from flatminima.protocols.claims import PAPER, Claim, finite, holds
from flatminima.protocols.study_files import Found, Part, run_parts, shipped
from flatminima.protocols.vanishing_words import GRID, PUBLISHED, cautions, critique, slope_words, summary
from flatminima.protocols.weakness import OUTCOME, labels, network_columns
from flatminima.study.batch_effect import slope_on_rows
from flatminima.study.correlation import spearman
from flatminima.study.preregister import differs, weakness_rules
from flatminima.study.run_spec import Record
from flatminima.study.run_table import RunTable, shared_seeds
from flatminima.study.subsets import load_subset
from flatminima.study.verdicts import decide

_QUICK_ROWS, _QUICK_SEEDS = (500, 2000), 3  # of the preset
_SOURCE = {"small": "small", "large": "large"}  # the learning rate that the source gives each batch size
_MARGIN = {"few": 0.3, "many": 0.1}  # percentage points that do not matter, below 6,000 rows and from there


def vanishing_parts(*, full: bool = False) -> list[Part]:
    """The studies of the reproduction: a preset of 24 networks, or both in full.

    The full study of the source's protocol goes up to 60,000 rows, which takes days; stop it where you like.
    """
    if not full:
        return [Part(shipped("vanishing", rows=_QUICK_ROWS, count=_QUICK_SEEDS))]
    rules = weakness_rules(GRID, batch=True, written=datetime.now(timezone.utc).isoformat(timespec="seconds"))
    return [Part(shipped(GRID), rules), Part(shipped("vanishing"))]


def reproduce_vanishing(
    folder: Path,
    *,
    full: bool = False,
    workers: int | None = None,
    ray: str | None = None,
    run: bool = True,
    command: str = "flatminima reproduce vanishing",
    progress: Callable[[str, float], None] = lambda part, fraction: None,
) -> dict[str, Any]:
    """Train with small and large batches at both learning rates for growing training sets, and compare with the abstract.

    Args:
        folder: of the databases; what is there is not made again.
        full: 25 seeds of every cell from 500 to 60,000 rows, and batch x learning rate x rows under one protocol.
        workers, ray: where to run; see :func:`~flatminima.study.run_study.run_study`.
        run: if not, only what is there is read.
        command: to be recorded.
        progress: called with the study at work and the fraction of all networks that are done.

    Returns:
        The JSON-ready results (documented in ``docs/reproductions/vanishing.md``).

    Raises:
        DataError: MNIST is not there; StudyError: as of ``run_study``.

    The preset takes about 9 CPU minutes.
    """
    parts = vanishing_parts(full=full)
    load_subset(parts[0].grid.cells[0].data)  # refused before anything is made
    found = run_parts(parts, folder, workers=workers, ray=ray, run=run, progress=progress)
    source = found["vanishing"]
    sizes = sorted({cell.data.rows for cell in source.grid.cells})
    differences = matched(source.table, sizes)
    claims = _claims(differences)
    rules, verdicts = None, []
    if GRID in found and not found[GRID].counts["not run"]:
        rules = found[GRID].rules
        verdicts = [] if rules is None else decide(found[GRID].table, rules)
    slopes = slope_on_rows(found[GRID].table, OUTCOME) if GRID in found else []
    traces, shared = trace_correlations(source.table), agreement(source)
    studies = [_study(study) for study in found.values()]
    results = {
        "schema": 1,
        "experiment": "vanishing",
        "flatminima": flatminima.__version__,
        "command": command,
        "settings": {"full": full, "rows": sizes},
        "groups": [
            {"name": "abstract", "title": "What the abstract says", "claims": [claim.to_dict() for claim in claims]}
        ],
        "cells": [cell for study in found.values() for cell in cells(study)],
        "differences": differences,
        "slopes": slopes,
        "correlations": traces,
        "agreement": shared,
        "rules": None if rules is None else rules.to_dict(),
        "verdicts": verdicts,
        "studies": studies,
        "labels": labels(studies),
    }
    said = summary(claims, differences, verdicts)
    said["details"] += [slope_words(slope) for slope in slopes]
    said["cautions"] = [*critique(differences, traces, shared), *cautions(differences, studies)]
    if rules is not None:
        said["cautions"] += differs(rules, weakness_rules(GRID, batch=True))
    plain: dict[str, Any] = finite(results | said)
    return plain


def matched(table: RunTable, sizes: Collection[int] = ()) -> list[dict[str, Any]]:
    """Large minus small batches in percentage points, by rows: the source's comparison, and at each learning rate.

    Intervals are Welch's, of two independent samples of seeds. The outcome is that of two one-sided tests at 5 % against a
    margin of 0.3 points below 6,000 rows and of 0.1 from there: equivalent, different, or undecided; missed, where networks of
    a cell did not meet their stop criterion and too few are left, or not run. ``sizes`` are numbers of rows that have an
    entry in any case.
    """
    finished, found = table.finished, []
    for rows in sorted({*sizes, *(record.spec["data"]["rows"] for record in table.records)}):
        part = finished.of_rows(rows)
        for kind, small_rate, large_rate in (
            ("as the source", _SOURCE["small"], _SOURCE["large"]),
            ("small batches' rate", "small", "small"),
            ("large batches' rate", "large", "large"),
        ):
            small, large = _accuracies(part, "small", small_rate), _accuracies(part, "large", large_rate)
            missed = [
                _missed(table, rows, batch, rate) for batch, rate in (("small", small_rate), ("large", large_rate))
            ]
            entry: dict[str, Any] = {"rows": rows, "kind": kind, "n_small": len(small), "n_large": len(large)}
            entry |= {"missed_small": missed[0], "missed_large": missed[1]}
            entry |= _welch(100 * large, 100 * small, _MARGIN["few" if rows < 6000 else "many"])
            found.append(entry if entry["low"] is not None or not any(missed) else entry | {"outcome": "missed"})
    return found


def cells(found: Found) -> list[dict[str, Any]]:
    """Every cell: how many networks finished, missed their criterion, or were not run, and the means of those that finished."""
    entries = []
    made = {record.id: record for record in found.table.records}
    by_cell: dict[Any, list[str]] = {}
    specs = {}
    for run in found.grid.runs():
        by_cell.setdefault(run.cell, []).append(run.id)
        specs[run.cell] = run
    for cell, ids in by_cell.items():
        records = [made[i] for i in ids if i in made]
        done = [record for record in records if record.status == "finished"]
        entry: dict[str, Any] = {
            "study": found.grid.name, "factors": dict(cell), "rows": specs[cell].data.rows,
            "batch_size": specs[cell].optimiser.batch_size, "lr": specs[cell].optimiser.lr, "networks": len(ids),
            "finished": len(done), "missed": sum(r.status == "missed" for r in records),
            "failed": sum(r.status == "failed" for r in records), "not run": len(ids) - len(records),
        }  # fmt: skip
        for name in (OUTCOME, "train.epochs", "train.loss", "measure.trace", "measure.parameter_norm", *_PATTERNS):
            values = [record.values[name] for record in done if name in record.values]
            entry[name] = _mean(np.array(values)) if values else None
        entries.append(entry)
    return entries


_PATTERNS = ("measure.unseen_patterns_1", "measure.unseen_patterns_2")


def trace_correlations(table: RunTable) -> list[dict[str, Any]]:
    """Trace and patterns against accuracy for the source's two regimes: pooled, within regimes, and how reliable a trace is.

    The trace of the source is a new random estimate on a new random subset at every call; ``reliability`` is the rank
    correlation of two calls on the same networks.
    """
    finished, found = table.finished, []
    for rows in sorted({record.spec["data"]["rows"] for record in table.records}):
        part = finished.of_rows(rows).where(_own_rate)
        if min(sum(cell["batch"] == batch for cell in part.spec("cell")) for batch in _SOURCE) < 3:
            continue
        y, regimes = part.column(OUTCOME), [cell["batch"] for cell in part.spec("cell")]
        seeds = shared_seeds(part)
        for name in ("measure.source_trace", "measure.trace", "measure.orbit_minimal_trace", *_PATTERNS):
            if name not in part.names:
                continue
            x = part.column(name)
            if not np.isfinite(x).all() or np.ptp(x) == 0:
                continue
            entry: dict[str, Any] = {
                "rows": rows, "name": name.removeprefix("measure."), "networks": len(part),
                "pooled": spearman(x, y, strata=None if seeds else regimes, clusters=seeds).to_dict(),
                "within": spearman(x, y, cells=regimes, clusters=seeds).to_dict(), "reliability": None,
            }  # fmt: skip
            repeats = [f"repeat.source_trace.{i}" for i in (1, 2)]
            if name == "measure.source_trace" and set(repeats) <= set(part.names):
                first, second = map(part.column, repeats)
                entry["reliability"] = spearman(first, second, cells=regimes, clusters=seeds).to_dict()
            found.append(entry)
    return found


def agreement(found: Found) -> list[dict[str, Any]]:
    """On test pictures that a network gets wrong, the mean share of the other networks that are right; by rows and regime.

    This is the source's measure of how errors are shared, on test pictures instead of all unseen ones. It conditions on a
    network's own errors and is a re-expression of their number.
    """
    entries = []
    for rows in sorted({record.spec["data"]["rows"] for record in found.table.records}):
        part = found.table.finished.of_rows(rows).where(_own_rate)
        if len(part) < 3:
            continue
        labels_ = load_subset(next(r for r in found.grid.runs() if r.data.rows == rows).data).test_labels.numpy()
        shares = others_right(found.predictions(part) == labels_)
        for batch in _SOURCE:
            own = np.array([cell["batch"] == batch for cell in part.spec("cell")])
            if own.any():
                entries.append({"rows": rows, "batch": batch, **_mean(shares[own])})
    return entries


def others_right(right: NDArray[np.bool_]) -> NDArray[np.float64]:
    """For each network the mean, over what it gets wrong, of the share of the others that are right, ``(networks,)``.

    Example:
        >>> others_right(np.array([[True, False, False], [True, True, False], [True, True, True]])).round(3).tolist()
        [0.75, 0.5, nan]
    """
    votes = right.sum(0)
    shares = votes / (len(right) - 1)  # of the others, where a network is wrong itself
    return np.array([shares[~own].mean() if not own.all() else math.nan for own in right])


def _own_rate(record: Record) -> bool:
    cell = record.spec["cell"]
    return bool(_SOURCE[cell["batch"]] == cell["rate"])


def _cell(table: RunTable, batch: str, rate: str) -> RunTable:
    return table.where(lambda record: (record.spec["cell"]["batch"], record.spec["cell"]["rate"]) == (batch, rate))


def _missed(table: RunTable, rows: int, batch: str, rate: str) -> int:
    return len(_cell(table.of_rows(rows).with_status("missed"), batch, rate))


def _accuracies(table: RunTable, batch: str, rate: str) -> NDArray[np.float64]:
    chosen = _cell(table, batch, rate)
    return chosen.column(OUTCOME) if len(chosen) else np.empty(0)


def _mean(values: NDArray[np.float64]) -> dict[str, Any]:
    values = values[np.isfinite(values)]
    n = len(values)
    if not n:
        return {"mean": None, "half": None, "n": 0}
    half = float(stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan
    return {"mean": float(values.mean()), "half": half, "n": n}


def _welch(a: NDArray[np.float64], b: NDArray[np.float64], margin: float) -> dict[str, Any]:
    empty = {"difference": None, "low": None, "high": None, "p": None, "margin": margin, "outcome": "not run"}
    if min(len(a), len(b)) < 2:
        return empty
    difference = float(a.mean() - b.mean())
    if a.std() == 0 and b.std() == 0:
        return empty | {"difference": difference, "outcome": "undecided"}
    found = stats.ttest_ind(a, b, equal_var=False)
    outer, inner = found.confidence_interval(0.95), found.confidence_interval(0.90)
    equivalent = -margin < inner.low and inner.high < margin
    outcome = "equivalent" if equivalent else "different" if outer.low > 0 or outer.high < 0 else "undecided"
    return {
        "difference": difference, "low": float(outer.low), "high": float(outer.high), "p": float(found.pvalue),
        "margin": margin, "outcome": outcome,
    }  # fmt: skip


def _claims(differences: Sequence[Mapping[str, Any]]) -> list[Claim]:
    claims = []
    for entry in differences:
        if entry["kind"] != "as the source" or entry["rows"] not in PUBLISHED or entry["low"] is None:
            continue
        value, n = PUBLISHED[entry["rows"]], entry["rows"]
        claim = Claim(
            f"accuracy with large minus accuracy with small batches, {n:,} rows",
            {"networks": entry["n_small"] + entry["n_large"], "learning rates": "the source's"}, PAPER,
        )  # fmt: skip
        claim.expected["percentage points"], claim.measured["percentage points"] = value, entry["difference"]
        claim.expected["95 % interval"] = f"holds {value:+g}"
        claim.measured["95 % interval"] = inside = f"{entry['low']:+.3f} to {entry['high']:+.3f}"
        if not holds(entry["low"], entry["high"], value):
            claim.failures.append(f"the interval is {inside}, without the published {value:+g}")
        claims.append(claim)
    return claims


def _study(found: Found) -> dict[str, Any]:
    return {
        "name": found.grid.name, "description": found.grid.description, "grid": found.grid.text,
        "digest": found.grid.digest, "versions": list(found.versions), "counts": found.counts,
        "cpu_seconds": math.fsum(record.seconds for record in found.table.records),
        "networks": network_columns(found.table),
    }  # fmt: skip
