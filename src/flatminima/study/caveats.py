"""What a careful reader should know about a study, computed from its records: confounders, noise, and what is missing."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from flatminima.study.along_axes import evaluation_rows
from flatminima.study.association import LEAST, Association, measure_label
from flatminima.study.dependent import meng_z
from flatminima.study.rank_table import RankTable, correlation_of
from flatminima.study.run_table import RunTable
from flatminima.study.value_names import word

FEW_UNITS = 20
_COLLINEAR = 0.9
_RELIABLE = 0.7
_CONFOUNDED = 0.7
_ASKED_ABOUT = ("pair_proxy", "trace")
_COVARIATES = (
    "train.epochs", "train.loss", "parameter_norm", "live_units", "participation_ratio", "normalised_margin", "margin_quantile",
)  # fmt: skip


def of_design(table: RunTable) -> list[str]:
    """Sentences about all records: what was left out, and what varies together with what."""
    tests: Sequence[Callable[[RunTable], list[str]]] = (_unfinished, _rate, _drift, _replications, _mixed)
    return [sentence for test in tests for sentence in test(table)]


def of_data(
    association: Association, rows: Sequence[Mapping[str, Any]], compared: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Sentences about the networks of one data set; ``rows`` and ``compared`` are those of its correlations."""
    name = association.table.data_sets[0] if len(association.table) else ""
    found = [
        *_left_out(association, rows), *_units(association, rows), *_ceiling(association), *_reliability(association, rows),
        *_simpson(rows), *_moved(rows), *_collinear(association), *_confounded(association), *_multiplicity(rows),
        *_superiority(rows, compared),
    ]  # fmt: skip
    return [f"{name}: {sentence}" for sentence in found]


def _unfinished(table: RunTable) -> list[str]:
    found = []
    for status, words in (("missed", "did not reach their stop criterion within the cap"), ("failed", "failed")):
        left = table.with_status(status)
        if not len(left):
            continue
        cells = Counter(_cell(record.spec) for record in left.records)
        most = ", ".join(f"{cell} ({count})" for cell, count in cells.most_common(4) if cell)
        where = f": {most}{' and others' if len(cells) > 4 else ''}" if most else ""
        found.append(
            f"{len(left)} of {len(table)} networks {words}{where}. They are in no correlation, and not missing at random."
        )
    return found


def _cell(spec: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in spec["cell"].items())


def _rate(table: RunTable) -> list[str]:
    """Batch size and learning rate: whether every pair of batch sizes shares a rate at the same number of rows."""
    rates: dict[tuple[str, int], dict[int, set[float]]] = {}
    for record in table.finished.records:  # a matching cell that nobody finished matches nothing
        data, optimiser = record.spec["data"], record.spec["optimiser"]
        rates.setdefault((data["name"], data["rows"]), {}).setdefault(optimiser["batch_size"], set()).add(
            optimiser["lr"]
        )
    alone = [
        f"{rows:,} rows of {data}"
        for (data, rows), by_batch in rates.items()
        if any(not (a & b) for a, b in itertools.combinations(by_batch.values(), 2))
    ]
    if not alone:
        return []
    return [
        f"Batch sizes differ in learning rate too at {', '.join(alone)}: what looks like an effect of the batch can be one "
        "of the rate."
    ]


def _drift(table: RunTable) -> list[str]:
    """Protocols that change with the number of rows."""
    seen: dict[tuple[str, str], dict[int, set[str]]] = {}
    for record in table.records:
        spec, rows = record.spec, record.spec["data"]["rows"]
        stop, optimiser = spec["stop"], spec["optimiser"]
        parts = {
            "learning rates": optimiser["lr"], "schedule": (optimiser["schedule"], str(optimiser["drops"])),
            "stop rule": (stop["rule"], stop["threshold"]), "cap": (stop["max_epochs"], stop["max_steps"]),
            "how rows are drawn": spec["data"]["subset_rule"],
        }  # fmt: skip
        for name, value in parts.items():
            seen.setdefault((name, spec["data"]["name"]), {}).setdefault(rows, set()).add(str(value))
    differ = [key for key, by_rows in seen.items() if len({frozenset(v) for v in by_rows.values()}) > 1]
    changed = list(dict.fromkeys(name for name, _ in differ))
    if not changed:
        return []
    return [f"With the number of rows change also: {', '.join(changed)}. A trend over rows is a trend over these too."]


def _replications(table: RunTable) -> list[str]:
    seeds = {data: set(table.of_data(data).spec("seed")) for data in table.data_sets}
    same = [f"{a} and {b}" for a, b in itertools.combinations(seeds, 2) if seeds[a] & seeds[b]]
    if not same:
        return []
    return [
        f"{'; '.join(same)} share seeds, and with them initial hidden layers: they are not independent replications."
    ]


def _mixed(table: RunTable) -> list[str]:
    found = []
    for data in table.data_sets:
        studies = list(dict.fromkeys(table.of_data(data).spec("study")))
        if len(studies) > 1:
            found.append(
                f"{', '.join(studies)} are pooled on {data}: raw correlations there can be those between studies; within cells "
                "each study is by itself."
            )
    return found


def _left_out(association: Association, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Measures without a row, and networks that are in none: neither goes unsaid."""
    table, found = association.table, []
    asked = {m["label"]: m["name"] for spec in table.spec("measures") for m in spec} | association.names
    alike, few = [], []
    for label, name in asked.items():
        if label in association.labels:
            continue
        column = table.column(f"measure.{label}") if f"measure.{label}" in table.names else np.full(len(table), np.nan)
        known = column[np.isfinite(column)]
        shown = measure_label(label, name)
        if len(known) < LEAST:
            few.append(f"{shown} ({len(known)})")
        else:
            alike.append(f"{shown} ({known[0]:.6g})")
    if alike and len(table) >= LEAST:
        found.append(f"the same for all networks, and so without a correlation: {_list(alike)}.")
    if few and len(table) >= LEAST:
        found.append(f"numbers of fewer than {LEAST} networks, and so without a correlation: {_list(few)}.")
    least = min((row["n"] for row in rows), default=len(table))
    if least < len(table):
        found.append(
            f"{len(table) - least} of {len(table)} finished networks lack a number and are left out where it is needed; they "
            "need not be missing at random."
        )
    return found


def _moved(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Correlations that random function-preserving moves take away: the two intervals have nothing in common."""
    lost = []
    for row in rows:
        own, orbit = row["within"] or row["raw"], row["orbit"]
        if own is None or orbit is None or None in (own["low"], own["high"], orbit["low"], orbit["high"]):
            continue
        if orbit["low"] <= 0 <= orbit["high"] and (own["low"] > orbit["high"] or own["high"] < orbit["low"]):
            lost.append(row["label"])
    if not lost:
        return []
    return [
        f"correlations that random moves, which change no prediction, take away: {_list(lost)}. They rest on the coordinates "
        "in which training leaves a network."
    ]


def _units(association: Association, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    found = []
    subsets = len(set(association.table.subsets))
    if subsets == 1:
        found.append("all networks share one training subset; no interval here speaks for another one.")
    elif 1 < subsets < FEW_UNITS:
        tabled = any(row.get("subsets") for row in rows)
        found.append(
            f"there are {subsets} training subsets; intervals are about other seeds on these."
            + (" The interval over subsets, by t, stands in the table." if tabled else "")
        )
    units = min((row["units"] for row in rows if row["units"]), default=FEW_UNITS)
    if units < FEW_UNITS:
        found.append(f"only {units} independent seeds are resampled; such intervals are too narrow.")
    return found


def _ceiling(association: Association) -> list[str]:
    y = association.table.column(association.outcome)
    y = y[np.isfinite(y)]
    points = evaluation_rows(association.table, association.outcome)
    if points is None or len(y) < 3:
        return []
    noise = math.sqrt(float(y.mean() * (1 - y.mean())) / points)
    cells = association.table.cells
    inside = (
        [y[[i for i, c in enumerate(cells) if c == cell]] for cell in dict.fromkeys(cells)]
        if len(cells) == len(y)
        else [y]
    )
    variances = [float(v.var(ddof=1)) for v in inside if len(v) > 2]
    spread = math.sqrt(float(np.mean(variances))) if variances else math.nan
    if not spread < 2 * noise:
        return []
    return [
        f"networks of one cell differ in accuracy by {100 * spread:.2f} points (standard deviation), and {points:,} test rows "
        f"alone can make {100 * noise:.2f}: much of what is to be predicted is noise of the test set."
    ]


def _reliability(association: Association, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    found = []
    weak = [
        f"{row['label']} ({row['reliability']:.2f})"
        for row in rows
        if row["reliability"] is not None and row["reliability"] < _RELIABLE
    ]
    if weak:
        found.append(
            f"measured again, {', '.join(weak)} hardly repeat: where they show no correlation, nothing is shown."
        )
    if association.halves:
        columns = [association.table.column(name) for name in association.halves]
        half = _rho(association, *columns)
        whole = 2 * half / (1 + half) if half > 0 else 0.0
        if math.isfinite(half) and whole < _RELIABLE:
            found.append(
                f"the reliability of accuracy within cells, from its two halves, is {whole:.2f}: no measure can correlate with "
                f"it by more than about {math.sqrt(whole):.2f}."
            )
    return found


def _simpson(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    turned, shrunk = [], []
    for row in rows:
        raw, within = row["raw"], row["within"]
        if raw is None or within is None or None in (raw["value"], within["value"], raw["low"], within["low"]):
            continue
        if raw["low"] * raw["high"] > 0:
            if raw["value"] * within["value"] < 0 and within["low"] * within["high"] > 0:
                turned.append(row["label"])
            # One being significant and the other not says nothing: the pooled value has to be excluded within cells.
            elif within["low"] <= 0 <= within["high"] and not within["low"] <= raw["value"] <= within["high"]:
                shrunk.append(row["label"])
    found = []
    if turned:
        found.append(f"within cells the correlation has the other sign for {_list(turned)} (Simpson's paradox).")
    if shrunk:
        found.append(
            f"correlations that pool cells and are not seen within any: {_list(shrunk)}. They say that cells differ."
        )
    return found


def _collinear(association: Association) -> list[str]:
    pairs = []
    labels = association.labels
    for a, b in itertools.combinations(labels, 2):
        rho = _rho(association, association.table.column(f"measure.{a}"), association.table.column(f"measure.{b}"))
        if abs(rho) >= _COLLINEAR:
            names = " and ".join(measure_label(label, association.names[label]) for label in (a, b))
            pairs.append((abs(rho), f"{names} ({signed(rho)})"))
    if not pairs:
        return []
    shown = [text for _, text in sorted(pairs, reverse=True)]
    return [f"{len(pairs)} pairs of measures are almost one variable: {_list(shown)}."]


def _confounded(association: Association) -> list[str]:
    """What the measures that the questions are about go with; measures of one idea are not each other's confounders."""
    found = []
    absent = [name for name in _COVARIATES if association.table.full_name(name) is None]
    for label in association.labels:
        if association.names[label] not in _ASKED_ABOUT:
            continue
        close = []
        for name in _COVARIATES:
            if name in absent:
                continue
            rho = _rho(association, association.table.column(f"measure.{label}"), association.table.column(name))
            if abs(rho) >= _CONFOUNDED:
                close.append(f"{word(name)} ({signed(rho)})")
        if close:
            shown = measure_label(label, association.names[label])
            found.append(f"{shown} goes with {_list(close)}: what one of them predicts, the other may.")
    if absent:
        found.append(f"not recorded, and so not held fixed: {', '.join(map(word, absent))}.")
    return found


def _multiplicity(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    tested = [row for row in rows if row.get("p_bh") is not None]
    alone = [row for row in tested if row["p"] <= 0.05]
    left = [row["label"] for row in alone if row["p_bh"] > 0.05]
    if not left:
        return []
    return [
        f"of {len(alone)} measures significant at 5 % by themselves, these are not after Benjamini and Hochberg: {_list(left)}."
    ]


def _superiority(rows: Sequence[Mapping[str, Any]], compared: Sequence[Mapping[str, Any]]) -> list[str]:
    """Whether the reference measure is told apart from others at all, and what so many networks could have told apart."""
    if not compared:
        return []
    open_ones = [
        c["second_label"]
        for c in compared
        if c["difference"]["low"] is not None and c["difference"]["low"] <= 0 <= c["difference"]["high"]
    ]
    n = max((row["n"] for row in rows), default=0)
    units = max((row["units"] for row in rows), default=0)
    if not open_ones:
        return []
    # Networks of one seed say less than as many independent ones and no less than one of them.
    few = f" (if those of one seed said nothing new, {power(units):.0%})" if units < n else ""
    return [
        f"{compared[0]['first_label']} is not shown to predict better or worse than {_list(open_ones)}. With {n} independent "
        f"networks, correlations of 0.40 and 0.25 would be told apart {power(n):.0%} of the time{few}."
    ]


def power(n: int, r12: float = 0.40, r13: float = 0.25, r23: float = 0.35) -> float:
    """Probability that Meng's z tells two correlations apart at 5 %, to first order.

    Example:
        >>> round(power(100), 2), round(power(425), 2)
        (0.29, 0.83)
    """
    z = meng_z(r12, r13, r23, max(n, 4)).z
    return float(stats.norm.sf(1.959964 - z) + stats.norm.sf(1.959964 + z))


def _rho(association: Association, x: Any, y: Any) -> float:
    """Rank correlation within cells."""
    there = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
    if len(there) < 3:
        return math.nan
    cells = association.table.cells
    inside = [cells[i] for i in there] if len(set(cells)) > 1 else None
    table = RankTable([x[there], y[there]], inside)
    return float(correlation_of(table.covariances(np.ones((1, len(there)))), 0, 1)[0])


def _list(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def signed(rho: float) -> str:
    """A correlation with its sign, a minus being a minus.

    Example:
        >>> signed(-0.314)
        '−0.31'
    """
    return f"{rho:+.2f}".replace("-", "−")
