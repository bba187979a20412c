"""Weakness, reproduced: does the pair proxy predict test accuracy, and does it predict more than cheap measures do?

After M. T. Bennett, "Are Flat Minima an Illusion?" (arXiv:2605.05209). The source's protocol gives the correlations of its
abstract; the head-to-head studies ask what it does not: the same stop loss for all, several training subsets, invariant
sharpness, margins and norms as rivals, and rules of decision that are written down before training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

import flatminima
from flatminima.data import DataError
from flatminima.measures import MEASURES
from flatminima.names import unknown
from flatminima.protocols.claims import PAPER, Claim, finite, holds, signed
from flatminima.protocols.study_files import Found, Part, run_parts, shipped
from flatminima.protocols.weakness_words import study_cautions, summary
from flatminima.study.bootstrap import Estimate
from flatminima.study.correlation import spearman
from flatminima.study.database import StudyError
from flatminima.study.preregister import (
    Preregistration,
    differs,
    weakness_rules,
)
from flatminima.study.run_table import RunTable, shared_seeds
from flatminima.study.study_measures import STUDY_MEASURES
from flatminima.study.subsets import load_subset
from flatminima.study.verdicts import decide

DATA = ("auto", "mnist", "digits")
OUTCOME = "test.accuracy"
HEAD_TO_HEAD = "head-to-head"

#: Of the abstract: Spearman's rho with test accuracy over 100 networks, and its p-value.
PUBLISHED: Mapping[str, Mapping[str, tuple[float | None, float | None]]] = {
    "mnist": {"pair_proxy": (0.374, 0.00012), "source_trace": (-0.226, None), "parameter_norm": (None, 0.848)},
    "fashion-mnist": {"pair_proxy": (0.384, 8.15e-5)},
}
_NAMES = {"pair_proxy": "the pair proxy", "source_trace": "the Hessian trace", "parameter_norm": "the weight norm"}
_ALPHA = 0.05
_LEFT_OUT = ("fixed.", "repeat.", "error.")  # of the columns; the database has them
_LEAST = 10  # networks of a correlation


def weakness_parts(data: str = "mnist", *, full: bool = False) -> list[Part]:
    """The studies of the reproduction, in the order in which they are run.

    Args:
        data: ``mnist`` (with Fashion-MNIST), or ``digits``: a small study that needs no files and proves nothing.
        full: with model selection and the head-to-head studies.
    """
    if data == "digits":
        return [Part(shipped("pair-proxy-digits"))]
    parts = [Part(shipped("pair-proxy-mnist")), Part(shipped("pair-proxy-fashion-mnist"))]
    if full:
        rules = weakness_rules(HEAD_TO_HEAD, written=datetime.now(timezone.utc).isoformat(timespec="seconds"))
        names = [f"{HEAD_TO_HEAD}-{name}" for name in ("mnist", "fashion-mnist", "digits")]
        parts += [Part(shipped("model-selection")), *(Part(shipped(name), rules) for name in names)]
    return parts


def reproduce_weakness(
    folder: Path,
    *,
    data: str = "auto",
    full: bool = False,
    workers: int | None = None,
    ray: str | None = None,
    run: bool = True,
    command: str = "flatminima reproduce weakness",
    progress: Callable[[str, float], None] = lambda part, fraction: None,
) -> dict[str, Any]:
    """Train and measure the networks of the source's experiments, and compare with its abstract.

    Args:
        folder: of the databases; what is there is not made again.
        data: ``mnist``, ``digits`` (embedded; a smoke run), or ``auto``: MNIST where its files are, digits otherwise. Reading
            needs no files; there ``auto`` is MNIST unless digits alone are in the folder.
        full: also model selection (300 networks) and the head-to-head studies (426 networks on each of three data sets).
        workers, ray: where to run; see :func:`~flatminima.study.run_study.run_study`.
        run: if not, only what is there is read.
        command: to be recorded.
        progress: called with the study at work and the fraction of all networks that are done.

    Returns:
        The JSON-ready results (documented in ``docs/reproductions/weakness.md``).

    Raises:
        ValueError: an unknown data set; DataError: it is not there; StudyError: as of ``run_study``.

    200 networks take about 7 CPU minutes, the full reproduction about 2 hours.
    """
    if data not in DATA:
        raise ValueError(unknown("data set", data, DATA))
    name = _there(data) if run else _made(data, folder)
    found = run_parts(weakness_parts(name, full=full), folder, workers=workers, ray=ray, run=run, progress=progress)
    proxies = [study for key, study in found.items() if key.startswith("pair-proxy")]
    claims = [claim for study in proxies for claim in _claims(study.table)]
    ahead = [study for key, study in found.items() if key.startswith(HEAD_TO_HEAD)]
    verdicts, rules = _verdicts(ahead)
    studies = [_study(study) for study in found.values()]
    results = {
        "schema": 1,
        "experiment": "weakness",
        "flatminima": flatminima.__version__,
        "command": command,
        "settings": {"data": name, "full": full},
        "groups": [
            {"name": "abstract", "title": "What the abstract says", "claims": [claim.to_dict() for claim in claims]}
        ],
        "rules": None if rules is None else rules.to_dict(),
        "verdicts": verdicts,
        "studies": studies,
        "labels": labels(studies),
    }  # fmt: skip
    said = summary(claims, studies, verdicts)
    if rules is not None:
        said["cautions"] += differs(rules, weakness_rules(HEAD_TO_HEAD))
    plain: dict[str, Any] = finite(results | said)
    return plain


def correlations(table: RunTable, outcome: str = OUTCOME) -> list[dict[str, Any]]:
    """Spearman's correlation of every measure with an outcome over the finished networks, and again on random orbits.

    Returns:
        For each measure ``{"name", "raw", "orbit"}``, estimates with 95 % BCa intervals, ranked within training subsets; a
        seed that was trained on several is drawn with all its networks. ``None`` where a measure has fewer than ten numbers or
        only one.
    """
    finished = table.finished
    if not len(finished):
        return []
    y = finished.column(outcome)
    found = []
    for name in finished.labels("measure."):
        entry: dict[str, Any] = {"name": name}
        for kind, prefix in (("raw", "measure."), ("orbit", "orbit.")):
            entry[kind] = None
            if prefix + name in finished.names:
                x = finished.column(prefix + name)
                there = np.isfinite(x) & np.isfinite(y)
                if there.sum() >= _LEAST and np.ptp(x[there]) > 0:
                    kept = finished.rows(np.flatnonzero(there))
                    within = kept.subsets if len(set(kept.subsets)) > 1 else None
                    entry[kind] = spearman(x[there], y[there], cells=within, clusters=shared_seeds(kept)).to_dict()
        found.append(entry)
    return found


def labels(studies: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Measure -> its name for people."""
    names = {entry["name"] for study in studies for entry in study.get("correlations", [])}
    known = {name: measure.label for name, measure in MEASURES.items()} | {
        name: measure.label for name, measure in STUDY_MEASURES.items()
    }
    return {name: known.get(name, name.replace("_", " ")) for name in sorted(names)}


def network_columns(table: RunTable) -> dict[str, Any]:
    """The networks column by column: what each is, how its training ended, and its numbers, but those of repetitions.

    ``values`` has a list for each name, in the order of ``seed``; ``None`` where a network has no number.
    """
    kept = [name for name in table.names if not name.startswith(_LEFT_OUT)]
    return {
        "cell": [record.spec["cell"] for record in table.records],
        "seed": table.spec("seed"),
        "subset": table.spec("data", "subset_seed"),
        "status": [record.status for record in table.records],
        "reason": [record.reason for record in table.records],
        "values": {name: [_short(record.values.get(name)) for record in table.records] for name in kept},
    }


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def _there(data: str) -> str:
    name = "mnist" if data == "auto" else data
    try:
        for grid in (shipped("pair-proxy-mnist"), shipped("pair-proxy-fashion-mnist")):
            if name == "mnist":
                load_subset(grid.cells[0].data)
    except DataError:
        if data != "auto":
            raise
        return "digits"
    return name


def _made(data: str, folder: Path) -> str:
    """The data set of the databases in a folder: whoever only reads them needs no pictures."""
    if data != "auto":
        return data
    made = {path.stem for path in folder.glob("*.sqlite")}
    there = [
        name for name in ("mnist", "digits") if made & {part.grid.name for part in weakness_parts(name, full=True)}
    ]
    return there[0] if there else "mnist"


def _claims(table: RunTable) -> list[Claim]:
    """What the abstract says about one data set, beside what was found on every network, as in the source.

    Networks that were still not right on all training rows at the cap are among them.
    """
    finished = table.where(lambda record: record.status != "failed")
    if len(finished) < _LEAST:
        return []
    data = finished.data_sets[0]
    y, claims = finished.column(OUTCOME), []
    for name, (rho, p) in PUBLISHED.get(data, {}).items():
        if finished.full_name(name) is None:
            continue
        x = finished.column(name)
        there = np.isfinite(x) & np.isfinite(y)  # a network that missed its criterion can lack a measure
        if there.sum() < _LEAST:
            continue
        found = spearman(x[there], y[there])
        says = "does not predict" if rho is None else "predicts"
        claim = Claim(f"{_NAMES[name]} {says} test accuracy on {data}", {"networks": int(there.sum())}, PAPER)
        claim.expected["Spearman's ρ"] = "no correlation" if rho is None else rho
        claim.measured["Spearman's ρ"] = found.value
        claim.expected["95 % interval"] = "holds 0" if rho is None else f"holds {signed(rho, '.3f')}, and not 0"
        claim.measured["95 % interval"] = _span(found)
        claim.expected["p"] = "not given" if p is None else p
        claim.measured["p"] = found.p
        claim.failures += _failures(found, rho)
        claims.append(claim)
    return claims


def _failures(found: Estimate, rho: float | None) -> list[str]:
    inside = f"interval is {_span(found)}"
    if rho is None:
        return [] if found.p > _ALPHA else [f"there is a correlation: {inside}"]
    failures = [] if holds(found.low, found.high, rho) else [f"{inside}, without the published {signed(rho, '.3f')}"]
    return failures + ([] if found.low > 0 or found.high < 0 else [f"{inside}: no correlation is shown"])


def _span(found: Estimate) -> str:
    return f"{signed(found.low, '.3f')} to {signed(found.high, '.3f')}"


def _verdicts(studies: Sequence[Found]) -> tuple[list[dict[str, Any]], Preregistration | None]:
    """The rules decided on all head-to-head studies together, once every network has been tried."""
    there = [study for study in studies if len(study.table)]
    rules = next((study.rules for study in there if study.rules is not None), None)
    for study in there:
        if study.rules != rules:
            raise StudyError(
                f"{study.path} has other rules of decision than {there[0].path}: expected the same for studies that are judged "
                "together; flatminima study report reads them one by one"
            )
    if rules is None or any(study.counts["not run"] for study in studies):
        return [], rules
    table = RunTable(tuple(record for study in studies for record in study.table.records))
    return decide(table, rules), rules


def _study(found: Found) -> dict[str, Any]:
    return {
        "name": found.grid.name,
        "description": found.grid.description,
        "grid": found.grid.text,
        "digest": found.grid.digest,
        "versions": list(found.versions),
        "counts": found.counts,
        "cpu_seconds": math.fsum(record.seconds for record in found.table.records),
        "correlations": (measured := correlations(found.table)),
        "cautions": study_cautions(found.table, measured, OUTCOME),
        "networks": network_columns(found.table),
    }
