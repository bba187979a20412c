"""The tables of a comparison, formatted once: the page and the terminal render these same cells.

A cell keeps the exact numbers next to the text that shows them, so that a test (or a reader with the page's source)
can compare them with ``results.json``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flatminima.report import labels
from flatminima.report.numbers import (
    MISSING,
    as_finite,
    as_float,
    change_factor,
    difference,
    factor,
    integer,
    plain,
    with_error,
)

Results = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """One cell: ``text``, a quieter second line ``detail``, and the exact numbers the two show, in reading order.

    ``verdict`` is a word (better, worse, flatter, sharper) and ``tone`` says how to colour it: "good", "bad" or "".
    """

    text: str
    detail: str = ""
    values: tuple[float | None, ...] = ()
    verdict: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Column:
    """A column's heading, with a quieter second line, and whether it holds numbers (set flush right)."""

    text: str
    detail: str = ""
    numeric: bool = True


@dataclass(frozen=True)
class Table:
    """A titled table; the first cell of a row is its heading."""

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def __bool__(self) -> bool:
        return bool(self.rows)


@dataclass(frozen=True)
class Quantity:
    """How a quantity is shown (times ``scale``) and which direction has which word."""

    label: str
    detail: str = ""
    scale: float = 1.0
    lower: tuple[str, str] = ("", "")
    higher: tuple[str, str] = ("", "")


_BETTER, _WORSE = ("better", "good"), ("worse", "bad")
PERFORMANCE = {
    "test_accuracy": Quantity("Test accuracy", "%, differences in percentage points", 100.0, _WORSE, _BETTER),
    "test_loss": Quantity("Test loss", "", 1.0, _BETTER, _WORSE),
    "train_loss": Quantity("Training loss"),
    "generalisation_gap": Quantity("Generalisation gap", "test loss − training loss"),
}


def measure_quantity(results: Results, name: str) -> Quantity:
    """How one measure is shown; the audit's verdict stands under its name, where a reader cannot miss it."""
    entry = (results.get("measures") or {}).get(name, {})
    verdict = ((results.get("audit") or {}).get("verdict") or {}).get(name)
    notes = [str(note) for note in (entry.get("unit"), f"audit: {verdict}" if verdict else None) if note]
    flatter, sharper = ("flatter", "good"), ("sharper", "bad")
    words = {"lower": (flatter, sharper), "higher": (sharper, flatter)}
    lower, higher = words.get(str(entry.get("flatter_when")), (("", ""), ("", "")))
    return Quantity(labels.measure(results, name), ", ".join(notes), 1.0, lower, higher)


def _scaled(value: object, scale: float) -> float | None:
    number = as_float(value)
    return None if number is None else number * scale


def _summary_cell(quantity: Quantity, stat: Mapping[str, Any], versus: Mapping[str, Any], n: object) -> Cell:
    mean, low, high = (_scaled(stat.get(key), quantity.scale) for key in ("mean", "low", "high"))
    if mean is None:
        return Cell(MISSING)
    own = _scaled(stat.get("error"), quantity.scale)
    # Over one seed there is no interval: the only error left is the measurement's own, and the dagger says so.
    alone = low is None or high is None
    half = own if low is None or high is None else (high - low) / 2.0
    text = with_error(mean, half) + (" †" if alone and half else "")
    shown: tuple[float | None, ...] = (mean, half) if half else (mean,)
    notes = [f"n = {stat['n']}"] if stat.get("n") is not None and stat["n"] != n else []
    delta, below, above = (_scaled(versus.get(key), quantity.scale) for key in ("difference", "low", "high"))
    if delta is None:
        return Cell(text, ", ".join(notes), shown)
    verdict, tone = "", ""
    shown += (delta,)
    if below is not None and above is not None:
        verdict, tone = quantity.higher if below > 0 else quantity.lower if above < 0 else ("", "")
        shown += (below, above)
    return Cell(text, ", ".join([f"Δ {difference(delta, below, above)}", *notes]), shown, verdict, tone)


def _method_columns(results: Results) -> tuple[Column, ...]:
    columns = []
    for summary in results.get("methods") or []:
        failed = f",\u00a0{summary['failed']}\u00a0failed" if summary.get("failed") else ""
        columns.append(Column(labels.method(summary["method"]), f"n\u00a0=\u00a0{summary.get('n', 0)}{failed}"))
    return tuple(columns)


def _any_finished(results: Results) -> bool:
    return any(summary.get("n") for summary in results.get("methods") or [])


def performance_table(results: Results) -> Table:
    """Held-out accuracy and losses: one row per quantity, one column per method."""
    rows = []
    for key, quantity in PERFORMANCE.items():
        cells = [Cell(quantity.label, quantity.detail)]
        for summary in results.get("methods") or []:
            versus = (summary.get("versus_first") or {}).get(key) or {}
            cells.append(_summary_cell(quantity, summary.get(key) or {}, versus, summary.get("n")))
        rows.append(tuple(cells))
    columns = (Column("", numeric=False), *_method_columns(results))
    return Table("performance", "Held-out performance", columns, tuple(rows) if _any_finished(results) else ())


def measure_table(results: Results) -> Table:
    """Flatness: one row per measure, one column per method."""
    rows = []
    for name in labels.measures(results):
        quantity = measure_quantity(results, name)
        cells = [Cell(quantity.label, quantity.detail)]
        for summary in results.get("methods") or []:
            stat = (summary.get("measures") or {}).get(name) or {}
            versus = ((summary.get("versus_first") or {}).get("measures") or {}).get(name) or {}
            cells.append(_summary_cell(quantity, stat, versus, summary.get("n")))
        rows.append(tuple(cells))
    columns = (Column("Measure", numeric=False), *_method_columns(results))
    return Table("measures", "Flatness", columns, tuple(rows) if _any_finished(results) else ())


def interval_count(results: Results) -> int:
    """How many paired 95% intervals the measure table shows: one in twenty excludes zero by chance."""
    count = 0
    for summary in results.get("methods") or []:
        for versus in ((summary.get("versus_first") or {}).get("measures") or {}).values():
            count += as_finite((versus or {}).get("low")) is not None
    return count


def _number_cell(value: object, text: str | None = None) -> Cell:
    number = as_float(value)
    return Cell(MISSING) if number is None else Cell(plain(number) if text is None else text, values=(number,))


def summary_table(results: Results) -> Table:
    """Every mean with its spread over seeds, its measurement error and its paired difference, one number per cell."""
    heads = ("Mean", "SD over seeds", "Measurement error", "95% low", "95% high", "Difference", "95% low", "95% high")
    rows = []
    quantities = [(q.label, key, False) for key, q in PERFORMANCE.items()]
    quantities += [(labels.measure(results, name), name, True) for name in labels.measures(results)]
    for label, key, measured in quantities:
        for summary in results.get("methods") or []:
            source = (summary.get("measures") if measured else summary) or {}
            versus = summary.get("versus_first") or {}
            stat, pair = source.get(key) or {}, ((versus.get("measures") if measured else versus) or {}).get(key) or {}
            n = stat.get("n", summary.get("n"))
            cells = [Cell(label), Cell(labels.method(summary["method"])), _number_cell(n, integer(n))]
            cells += [_number_cell(stat.get(column)) for column in ("mean", "sd", "error", "low", "high")]
            cells += [_number_cell(pair.get(column)) for column in ("difference", "low", "high")]
            rows.append(tuple(cells))
    columns = (Column("Quantity", numeric=False), Column("Method", numeric=False), Column("n"), *map(Column, heads))
    return Table("summary", "Every mean in full", columns, tuple(rows))


def run_table(results: Results) -> Table:
    """One row per run: what was spent and what came out."""
    rows = []
    for run in results.get("runs") or []:
        swad = run.get("swad") or {}
        window = MISSING
        start, end = as_finite(swad.get("start_step")), as_finite(swad.get("end_step"))
        if start is not None and end is not None:
            window = f"steps {start:.0f} to {end:.0f}"
        elif run.get("average"):
            window = f"{integer(run['average'].get('n'))} iterates"
        cells = [Cell(labels.method(run.get("method"))), Cell(str(run.get("seed", MISSING)))]
        cells += [Cell(str(run.get("status", MISSING)), tone="bad" if run.get("status") == "failed" else "")]
        cells += [_number_cell(run.get(key), integer(run.get(key))) for key in ("steps", "gradient_evaluations")]
        for key in ("train_loss", "validation_loss", "test_loss"):
            cells.append(_number_cell(run.get(key)))
        for key in ("train_accuracy", "validation_accuracy", "test_accuracy"):
            percent = _scaled(run.get(key), 100.0)
            cells.append(_number_cell(percent, None if percent is None else f"{percent:.2f}"))
        notes = list(swad.get("notes") or [])
        notes += [f"{key} {value:g}" for key, value in (run.get("average") or {}).items() if key != "n"]
        if swad and swad.get("converged") is False:
            notes.insert(0, "never converged")
        cells.append(Cell(window, "; ".join(str(note) for note in notes)))
        rows.append(tuple(cells))
    columns = (
        Column("Method", numeric=False),
        Column("Seed"),
        Column("Status", numeric=False),
        Column("Steps"),
        Column("Gradient evaluations"),
        Column("Training loss"),
        Column("Validation loss"),
        Column("Test loss"),
        Column("Training accuracy", "%"),
        Column("Validation accuracy", "%"),
        Column("Test accuracy", "%"),
        Column("Averaged", numeric=False),
    )
    return Table("runs", "Every run", columns, tuple(rows))


def failed_table(results: Results) -> Table:
    """The runs that failed, with the step and the reason."""
    rows = []
    for run in results.get("runs") or []:
        if run.get("status") == "failed":
            failure = run.get("failure") or {}
            reason = str(failure.get("reason") or "no reason recorded")
            step = _number_cell(failure.get("step"), integer(failure.get("step")))
            rows.append((Cell(labels.method(run.get("method"))), Cell(str(run.get("seed"))), step, Cell(reason)))
    columns = (Column("Method", numeric=False), Column("Seed"), Column("Step"), Column("Reason", numeric=False))
    return Table("failed", "Failed runs", columns, tuple(rows))


def _measurement_cells(measurement: Mapping[str, Any]) -> list[Cell]:
    value, error = as_float(measurement.get("value")), as_float(measurement.get("error"))
    shown = (value,) if value is not None and not error else (value, error)
    converged, cost = measurement.get("converged"), as_finite(measurement.get("cost"))
    kind = str(measurement.get("error_kind") or MISSING)
    if kind == "not applicable":
        reached = Cell(MISSING)
    else:
        reached = Cell("no" if converged is False else "yes", tone="bad" if converged is False else "")
    return [
        Cell(with_error(value, error), values=shown if value is not None else ()),
        Cell(kind),
        reached,
        _number_cell(cost, None if cost is None else f"{cost:g}"),
        Cell(str(measurement.get("note") or "")),
    ]


_MEASUREMENT_COLUMNS = (
    Column("Value"),
    Column("Kind of error", numeric=False),
    Column("Converged", numeric=False),
    Column("Cost", "gradient evaluations"),
    Column("Note", numeric=False),
)


def measurement_table(results: Results) -> Table:
    """One row per measure and run, with the measurement's own error and its cost."""
    rows = []
    for name in labels.measures(results):
        for run in results.get("runs") or []:
            measurement = (run.get("measures") or {}).get(name)
            if measurement:
                head = [Cell(labels.measure(results, name)), Cell(labels.method(run.get("method")))]
                rows.append((*head, Cell(str(run.get("seed"))), *_measurement_cells(measurement)))
    columns = (Column("Measure", numeric=False), Column("Method", numeric=False), Column("Seed"), *_MEASUREMENT_COLUMNS)
    return Table("measurements", "Every measurement", columns, tuple(rows))


def measurement_rows_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Measurements of one model: each row a mapping with label (or name), value, error, error_kind, converged, cost."""
    cells = [(Cell(str(row.get("label") or row.get("name"))), *_measurement_cells(row)) for row in rows]
    return Table(
        "measurements", "Measurements", (Column("Measure", numeric=False), *_MEASUREMENT_COLUMNS), tuple(cells)
    )


def audit_table(results: Results) -> Table:
    """The audit of a comparison: one row per audited measure, one column per symmetry, and the verdict."""
    audit, entries = results.get("audit") or {}, results.get("measures") or {}
    kinds = [str(kind) for kind in audit.get("symmetries") or []]
    rows = []
    for name in audit.get("measures") or []:
        ratios = (audit.get("max_ratio") or {}).get(name) or {}
        proven = entries.get(name, {}).get("invariant_under") or ()
        cells = [Cell(labels.measure(results, name))]
        for kind in kinds:
            note = "invariant by theorem" if kind in proven else ""
            ratio = change_factor(ratios, kind)
            cells.append(Cell(factor(ratio), note, () if ratio is None or math.isinf(ratio) else (ratio,)))
        verdict = str((audit.get("verdict") or {}).get(name) or MISSING)
        cells.append(Cell(verdict, tone={"survives": "good", "changes": "bad"}.get(verdict, "")))
        rows.append(tuple(cells))
    heads = tuple(Column(labels.symmetry(kind), "largest change factor") for kind in kinds)
    columns = (Column("Measure", numeric=False), *heads, Column("Verdict", numeric=False))
    return Table("audit", "Audit", columns, tuple(rows))


def glossary_table(results: Results) -> Table:
    """What each measure is, in words."""
    rows = []
    for name, entry in (results.get("measures") or {}).items():
        proven = ", ".join(labels.symmetry(kind) for kind in entry.get("invariant_under") or ())
        cells = (
            Cell(labels.measure(results, name), name),
            Cell(str(entry.get("meaning") or "")),
            Cell(proven or "none"),
        )
        rows.append(cells)
    heads = ("Measure", "What it is", "Invariant by theorem under")
    return Table("glossary", "The measures", tuple(Column(h, numeric=False) for h in heads), tuple(rows))


def settings_table(results: Results) -> Table:
    """The settings of the command, as they were used."""
    rows = []
    for key, value in (results.get("settings") or {}).items():
        parts = value if isinstance(value, (list, tuple)) else [value]
        shown = [MISSING if part is None or part != part else str(part) for part in parts]  # NaN is no setting
        rows.append((Cell(str(key)), Cell(", ".join(shown))))
    columns = (Column("Setting", numeric=False), Column("Value", numeric=False))
    return Table("settings", "Settings", columns, tuple(rows))
