"""Large against small batches at the same learning rate, number of rows and seed; and whether the difference depends on n."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from scipy import stats

from flatminima.study.equivalence import tost_paired
from flatminima.study.run_table import RunTable
from flatminima.study.statistics import interval

Key = tuple[str, int]  # data set, rows


def matched_differences(table: RunTable, outcome: str) -> dict[Key, dict[float, dict[Hashable, float]]]:
    """Outcome with the largest minus that with the smallest batch, by (data set, rows), learning rate and seeds.

    Only pairs of finished networks that share everything but the batch size: rows, subset, learning rate and seeds. Cells in
    which one of the two did not finish have none.

    Example:
        >>> from flatminima.study.run_spec import Record
        >>> def record(batch, accuracy):
        ...     spec = {"data": {"name": "digits", "rows": 250, "subset_seed": 42}, "seed": 0, "order_seed": 0}
        ...     spec["optimiser"] = {"lr": 0.1, "batch_size": batch}
        ...     return Record("a" * 64, spec, "finished", values={"test.accuracy": accuracy})
        >>> matched_differences(RunTable((record(64, 0.5), record(250, 0.75))), "test.accuracy")
        {('digits', 250): {0.1: {(42, 0, 0): 0.25}}}
    """
    values: dict[Key, dict[float, dict[Hashable, dict[int, float]]]] = {}
    planned: dict[Key, set[int]] = {}
    for record in table.records:
        data, optimiser = record.spec["data"], record.spec["optimiser"]
        planned.setdefault((data["name"], data["rows"]), set()).add(optimiser["batch_size"])
        if record.status != "finished" or outcome not in record.values:
            continue
        seeds = (data["subset_seed"], record.spec["seed"], record.spec["order_seed"])
        by_rate = values.setdefault((data["name"], data["rows"]), {}).setdefault(optimiser["lr"], {})
        by_rate.setdefault(seeds, {})[optimiser["batch_size"]] = record.values[outcome]
    found: dict[Key, dict[float, dict[Hashable, float]]] = {}
    for key, rates in values.items():
        # Of what was planned: where no network of the largest batch finished, the next one is not the large batch.
        small, large = min(planned[key]), max(planned[key])
        for rate, pairs in rates.items():
            differences = {
                seeds: batch[large] - batch[small]
                for seeds, batch in pairs.items()
                if small != large and small in batch and large in batch
            }
            if differences:
                found.setdefault(key, {})[rate] = differences
    return found


def batch_parts(
    table: RunTable, outcome: str, margins: Sequence[Sequence[float]], level: float
) -> tuple[list[dict[str, Any]], list[str]]:
    """One part of a verdict for each (data set, rows): the paired difference, averaged over learning rates, and its TOST.

    Args:
        table: all networks; those that did not finish say what was to be compared.
        outcome: name of the value.
        margins: (from so many rows on, margin), ascending.
        level: of the intervals; those that refute are widened to ``1 - (1 - level) / parts``.

    Returns:
        Parts, and why nothing can be said on a number of rows that has none.
    """
    pairs = matched_differences(table, outcome)
    planned = _planned_rates(table)
    parts, reasons = [], []
    for (data, rows), wanted in sorted(planned.items()):
        rates = pairs.get((data, rows), {})
        by_seed: dict[Hashable, list[float]] = {}
        for differences in rates.values():
            for seeds, difference in differences.items():
                by_seed.setdefault(seeds, []).append(difference)
        # A seed that lacks a learning rate would be a mean of other things.
        whole = [float(np.mean(d)) for d in by_seed.values() if len(d) == len(rates)]
        if len(whole) < 2:
            reasons.append(
                f"At n = {rows:,} on {data} fewer than two seeds have finished with a small and a large batch at every rate."
            )
            continue
        lost = [f"{rate:g}" for rate in sorted(wanted - set(rates))]
        without = f"; nothing finished to compare at {', '.join(lost)}" if lost else ""
        cell = f"n = {rows:,} on {data}"
        margin = next(m for start, m in reversed([(float(a), float(b)) for a, b in margins]) if rows >= start)
        ordinary, found = interval(whole), tost_paired(whole, margin)
        mean, n = float(np.mean(whole)), len(whole)
        spread = 1 - (1 - level) / len(planned)
        wide = float(stats.t.ppf((1 + spread) / 2, n - 1)) * found.se
        outside = mean - wide > margin or mean + wide < -margin
        inner = float(stats.t.ppf(level, n - 1)) * found.se
        outcome_of = "supported" if found.p <= 1 - level else "refuted" if outside else "undecided"
        p_zero = float(2 * stats.t.sf(abs(mean) / found.se, n - 1)) if found.se > 0 else math.nan
        parts.append(
            {
                "data": data, "rows": rows, "rates": sorted(rates), "what": cell, "value": mean,
                "low": ordinary["low"], "high": ordinary["high"], "se": found.se, "n": n, "units": n, "p": found.p,
                "p_zero": p_zero if math.isfinite(p_zero) else None, "inner_low": mean - inner, "inner_high": mean + inner,
                "margin": margin, "outcome": outcome_of,
                "note": f"learning rate {', '.join(f'{rate:g}' for rate in sorted(rates))}{without}",
                "lost": f"{cell}, learning rate {', '.join(lost)}" if lost else "",
            }
        )  # fmt: skip
    if not planned:
        reasons.append("There is no small and large batch at the same learning rate and number of rows.")
    return parts, reasons


def _planned_rates(table: RunTable) -> dict[Key, set[float]]:
    """Learning rates at which the smallest and the largest batch were both to be trained, finished or not."""
    batches: dict[Key, dict[float, set[int]]] = {}
    for record in table.records:
        data, optimiser = record.spec["data"], record.spec["optimiser"]
        by_rate = batches.setdefault((data["name"], data["rows"]), {})
        by_rate.setdefault(optimiser["lr"], set()).add(optimiser["batch_size"])
    found: dict[Key, set[float]] = {}
    for key, by_rate in batches.items():
        sizes = set().union(*by_rate.values())
        both = {rate for rate, own in by_rate.items() if {min(sizes), max(sizes)} <= own}
        if len(sizes) > 1 and both:
            found[key] = both
    return found


def slope_on_rows(table: RunTable, outcome: str) -> list[dict[str, Any]]:
    """Change of the matched difference for every factor e of rows: least squares for each seed, then t over seeds.

    Returns:
        One entry for each data set with at least two numbers of rows: mean, interval, p and the numbers of rows.
    """
    pairs = matched_differences(table, outcome)
    found = []
    for data in dict.fromkeys(name for name, _ in pairs):
        sizes = sorted(rows for name, rows in pairs if name == data)
        # Learning rates that every size has: others would make the size's effect one of the rate.
        shared = set.intersection(*(set(pairs[data, rows]) for rows in sizes))
        by_seed: dict[Hashable, dict[int, list[float]]] = {}
        for rows in sizes:
            for rate in shared:
                for seeds, difference in pairs[data, rows][rate].items():
                    by_seed.setdefault(seeds, {}).setdefault(rows, []).append(difference)
        whole = [d for d in by_seed.values() if len(d) == len(sizes) and all(len(v) == len(shared) for v in d.values())]
        if len(sizes) < 2 or len(whole) < 2:
            continue
        x = np.log(sizes)
        slopes = [float(np.polyfit(x, [np.mean(d[rows]) for rows in sizes], 1)[0]) for d in whole]
        answer = interval(slopes)
        se = float(stats.sem(slopes))
        p = float(2 * stats.t.sf(abs(float(np.mean(slopes))) / se, len(slopes) - 1)) if se > 0 else None
        found.append(
            {
                "data": data, "rows": sizes, "rates": sorted(shared), "value": answer["mean"], "low": answer["low"],
                "high": answer["high"], "p": p, "n": answer["n"],
            }
        )  # fmt: skip
    return found
