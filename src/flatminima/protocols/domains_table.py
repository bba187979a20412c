"""The numbers of the protocol from the records of its runs: accuracies, paired differences, flatness, the valleys."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flatminima.study.resampling import sign_flip, two_way_bootstrap
from flatminima.study.statistics import holm, interval

Record = Mapping[str, Any]

#: Methods in the order of the tables, with their labels: algorithm/reader.
METHODS: Mapping[str, str] = {
    "erm/selected": "ERM, selected on the sources",
    "erm/last": "ERM, last iterate",
    "erm/lowest": "ERM, lowest source loss",
    "erm/swa": "SWA, last 20 %",
    "erm/tail": "dense tail, last 20 %",
    "erm/ema": "EMA",
    "erm/swad": "SWAD",
    "erm/swad-released": "SWAD, released code's rule",
    "erm/swad-2f": "SWAD, every 2nd evaluation",
    "erm/swad-4f": "SWAD, every 4th evaluation",
    "sam/selected": "SAM, selected on the sources",
    "sam/tail": "SAM, dense tail",
    "sam/swad": "SAM + SWAD",
    "coral/selected": "CORAL, selected on the sources",
    "coral/tail": "CORAL, dense tail",
    "coral/swad": "CORAL + SWAD",
    "mixup/selected": "Mixup, selected on the sources",
    "mixup/tail": "Mixup, dense tail",
    "mixup/swad": "Mixup + SWAD",
    "erm/oracle": "ERM, oracle (sees the target)",
}

#: Which method is compared with which, decided before any run; the first two are what SWAD has to show.
COMPARISONS: Sequence[tuple[str, str]] = (
    ("erm/swad", "erm/selected"),
    ("erm/swad", "erm/tail"),
    ("erm/tail", "erm/selected"),
    ("erm/swa", "erm/selected"),
    ("erm/ema", "erm/selected"),
    ("erm/last", "erm/selected"),
    ("erm/swad-released", "erm/swad"),
    ("sam/selected", "erm/selected"),
    ("sam/swad", "erm/swad"),
    ("coral/selected", "erm/selected"),
    ("coral/swad", "coral/tail"),
    ("mixup/selected", "erm/selected"),
    ("mixup/swad", "mixup/tail"),
)
#: Last validation loss over that at the valley's start: below, the loss still fell when the start was declared.
FALLING = 0.95
#: Whose local flatness is compared; the paper's order, flattest first.
FLATNESS_ORDER = ("erm/swad", "erm/swa", "sam/selected", "erm/selected")
FLATNESS_PAIRS = (*pairwise(FLATNESS_ORDER), ("erm/swad", "erm/selected"), ("erm/swad", "erm/tail"))
FLATNESS_METHODS = ("erm/selected", "erm/last", "erm/swa", "erm/tail", "erm/swad", "sam/selected", "sam/swad")


class Results:
    """The finished runs, by method, target and seed.

    With several hyper-parameter draws, every method takes for each target and seed the draw that is best on the held-out rows
    of the sources; the oracle, the one that is best for it.

    Args:
        records: what :func:`~flatminima.protocols.domains_cell.run_cell` returned.
        targets, seeds: of the plan.
    """

    def __init__(self, records: Iterable[Record], targets: Sequence[str], seeds: Sequence[int]) -> None:
        self.targets, self.seeds = list(targets), list(seeds)
        self.records = [
            record for record in records if record["target"] in self.targets and record["seed"] in self.seeds
        ]
        self.finished = [record for record in self.records if record["failure"] is None]
        self._best: dict[tuple[str, str, int], Record] = {}
        for record in self.finished:
            for reader in record["methods"]:
                key = (f"{record['algorithm']}/{reader}", record["target"], record["seed"])
                if key not in self._best or _selection(record, reader) > _selection(self._best[key], reader):
                    self._best[key] = record

    def methods(self) -> list[str]:
        """Those of :data:`METHODS` with at least one run."""
        return [name for name in METHODS if any(key[0] == name for key in self._best)]

    def run(self, method: str, target: str, seed: int) -> Record | None:
        """The record a method's weights come from."""
        return self._best.get((method, target, seed))

    def weights(self, method: str, target: str, seed: int) -> Mapping[str, Any] | None:
        """What is known about a method's weights."""
        record = self.run(method, target, seed)
        return None if record is None else record["methods"][method.split("/")[1]]

    def table(self, method: str, quantity: str = "target_accuracy", scale: float = 100.0) -> NDArray[np.float64]:
        """``(targets, seeds)``; NaN where there is no run."""
        cells = np.full((len(self.targets), len(self.seeds)), math.nan)
        for i, target in enumerate(self.targets):
            for j, seed in enumerate(self.seeds):
                found = self.weights(method, target, seed)
                if found is not None and found[quantity] is not None:
                    cells[i, j] = scale * found[quantity]
        return cells


def _selection(record: Record, reader: str) -> float:
    if reader == "oracle":
        return max(record["oracle_curve"], default=-math.inf)
    return float(record["methods"][reader]["validation_accuracy"])


def mean_and_error(values: Iterable[float]) -> dict[str, float | int | None]:
    """Mean, standard error (n - 1 in the variance) and n of the numbers among the values."""
    known = [value for value in values if math.isfinite(value)]
    found = interval(known)
    sd = found["sd"]
    return {"mean": found["mean"], "se": None if sd is None else sd / math.sqrt(len(known)), "n": len(known)}


def accuracy_row(results: Results, method: str) -> dict[str, Any]:
    """One method: per target over seeds; then the mean over targets within each seed, over seeds that have them all."""
    cells = results.table(method)
    complete = cells[:, np.isfinite(cells).all(0)]
    return {
        "name": method,
        "label": METHODS[method],
        "targets": {target: mean_and_error(row) for target, row in zip(results.targets, cells, strict=True)},
        "average": mean_and_error(complete.mean(0)),
    }


def compare(cells: NDArray[np.float64], targets: Sequence[str]) -> dict[str, Any]:
    """Paired differences ``(targets, seeds)``: effect with its interval, and tests over targets and over seeds."""
    rows = [row[np.isfinite(row)] for row in cells]
    per_target = {target: float(row.mean()) for target, row in zip(targets, rows, strict=True) if len(row)}
    if not per_target:
        return {"difference": None, "low": None, "high": None, "cells": 0, "per_target": {}}
    low, high = two_way_bootstrap(cells[[len(row) > 0 for row in rows]])
    over_targets = sign_flip(list(per_target.values()))
    complete = cells[:, np.isfinite(cells).all(0)].mean(0)
    over_seeds = interval(complete.tolist())
    seeds: dict[str, Any] = {name: over_seeds[name] for name in ("low", "high", "n")}
    if len(complete):
        flipped = sign_flip(complete.tolist())
        seeds |= {"p": flipped.p, "smallest_p": flipped.smallest}
    return {
        "difference": over_targets.statistic,
        "low": low,
        "high": high,
        "cells": int(np.isfinite(cells).sum()),
        "per_target": per_target,
        "wins": sum(value > 0 for value in per_target.values()),
        "targets": len(per_target),
        "worst_target": min(per_target, key=lambda target: per_target[target]),
        "p": over_targets.p,
        "smallest_p": over_targets.smallest,
        "seeds": seeds,
    }


def comparisons(results: Results) -> list[dict[str, Any]]:
    """All of :data:`COMPARISONS` that can be made, with Holm's correction for their number."""
    present = set(results.methods())
    found = []
    for method, baseline in COMPARISONS:
        if {method, baseline} <= present:
            cells = results.table(method) - results.table(baseline)
            row = {"method": method, "baseline": baseline, **compare(cells, results.targets)}
            if row["cells"]:
                found.append(row)
    for row, corrected in zip(found, holm([row["p"] for row in found]), strict=True):
        row["p_holm"] = corrected
    return found


def flatness_cells(results: Results, method: str, where: str, index: int) -> NDArray[np.float64]:
    """Rise of the loss at one radius, ``(targets, seeds)``."""
    algorithm, reader = method.split("/")
    cells = np.full((len(results.targets), len(results.seeds)), math.nan)
    for record in results.finished:
        probed = record["flatness"].get(reader)
        if record["algorithm"] == algorithm and record["draw"] == 0 and probed is not None:
            rise = probed[where]["rise"][index]
            if rise is not None:
                cells[results.targets.index(record["target"]), results.seeds.index(record["seed"])] = rise
    return cells


def flatness(results: Results, radii: Sequence[float]) -> dict[str, Any]:
    """Local flatness per method, place and radius, with norms and losses, and differences along the paper's order."""
    rows, order = [], []
    for where in ("source", "target"):
        for index, radius in enumerate(radii):
            cells = {name: flatness_cells(results, name, where, index) for name in FLATNESS_METHODS}
            cells = {name: c for name, c in cells.items() if np.isfinite(c).any()}
            for name, c in cells.items():
                low, high = two_way_bootstrap(c)
                row: dict[str, Any] = {
                    "method": name, "where": where, "radius": radius, **mean_and_error(np.nanmean(_rows(c), axis=1)),
                    "low": low, "high": high,
                }  # fmt: skip
                if (reference := cells.get("erm/selected")) is not None and name != "erm/selected":
                    paired = compare(c - reference, results.targets)
                    row["versus_erm"] = {key: paired[key] for key in ("difference", "low", "high")}
                rows.append(row)
            for flatter, sharper in FLATNESS_PAIRS:
                if {flatter, sharper} <= cells.keys():
                    pair = compare(cells[flatter] - cells[sharper], results.targets)
                    if pair["cells"]:
                        order.append({"flatter": flatter, "sharper": sharper, "where": where, "radius": radius, **pair})
    beside = [
        {
            "method": name,
            "norm": mean_and_error(results.table(name, "norm", 1.0).ravel()),
            "validation_loss": mean_and_error(results.table(name, "validation_loss", 1.0).ravel()),
            "target_loss": mean_and_error(results.table(name, "target_loss", 1.0).ravel()),
        }
        for name in FLATNESS_METHODS
        if name in results.methods()
    ]
    return {"radii": list(radii), "rows": rows, "order": order, "beside": beside}


def _rows(cells: NDArray[np.float64]) -> NDArray[np.float64]:
    return cells[np.isfinite(cells).any(1)]


_VALLEY = (
    "start_step", "end_step", "n", "converged", "threshold", "detected_at", "stopped_at", "final_ratio", "highest_ratio",
    "evaluations", "notes", "votes",
)  # fmt: skip


def valleys(results: Results) -> list[dict[str, Any]]:
    """What every SWAD found, per run."""
    return [
        {
            "method": f"{record['algorithm']}/{reader}", "target": record["target"], "seed": record["seed"],
            "draw": record["draw"], **{name: record["methods"][reader].get(name) for name in _VALLEY},
        }
        for record in results.finished
        for reader in record["methods"]
        if reader.startswith("swad")
    ]  # fmt: skip


def valley_summary(found: Sequence[Mapping[str, Any]], method: str, steps: int) -> dict[str, Any] | None:
    """How often the start and the end of the valley were found, and whether the loss still fell."""
    rows = [row for row in found if row["method"] == method]
    if not rows:
        return None
    converged = [row for row in rows if row["converged"]]
    falling = [row["final_ratio"] for row in converged if row["final_ratio"] is not None]
    highest = [row["highest_ratio"] for row in converged if row["highest_ratio"] is not None]
    return {
        "runs": len(rows),
        "converged": len(converged),
        "ended": sum(row["stopped_at"] is not None for row in rows),
        "start_share": float(np.median([row["start_step"] / (steps - 1) for row in converged])) if converged else None,
        "final_ratio": float(np.median(falling)) if falling else None,
        "smallest_final_ratio": min(falling) if falling else None,
        "still_falling": sum(value < FALLING for value in falling),
        "highest_ratio": max(highest) if highest else None,
        "iterates": float(np.median([row["n"] for row in rows])),
    }


def published(data: str) -> dict[str, Any]:
    """The paper's numbers for a data set, method -> label, targets and average; empty for the others."""
    text = resources.files("flatminima.protocols").joinpath("domains_published.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text).get(data, {})
    return found
