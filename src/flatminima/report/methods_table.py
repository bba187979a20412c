"""A comparison with one row per method: what each spent, how it predicts, how flat it is. For Markdown and for many methods."""

from __future__ import annotations

from typing import Any

from flatminima.report import labels
from flatminima.report.numbers import MISSING, as_finite, difference, integer, plain, with_error
from flatminima.report.tables import PERFORMANCE, Cell, Column, Quantity, Results, Table, measure_quantity

MANY = 6
"""With more methods than these, tables that have a column per method are turned round."""


LEGEND = (
    "Gradients are evaluations of all rows of a step. Means are over seeds ± half their 95% interval; the difference is paired "
    "by seed, with its 95% interval. A word stands where that interval, or that of the loss, excludes zero. p is that of the "
    "paired t-test, Holm's p is corrected for the number of methods compared; there is none where all differences are the same."
)
FLATNESS_LEGEND = (
    "Mean over seeds ± half its 95% interval; in brackets the root mean square of the measurements' own errors, where it is "
    "above a ten-thousandth of the mean. A word stands where the paired 95% interval of the difference to the first method "
    "excludes zero, each by itself."
)


def methods_table(results: Results) -> Table:
    """What each method spent, its test accuracy, the paired difference to the first and its p-values; see :data:`LEGEND`."""
    rows = []
    for summary in results.get("methods") or []:
        if not summary.get("n"):
            continue
        versus = summary.get("versus_first") or {}
        quantity, pair = PERFORMANCE["test_accuracy"], versus.get("test_accuracy") or {}
        delta, below, above = (_scaled(pair.get(key), quantity.scale) for key in ("difference", "low", "high"))
        change = MISSING if delta is None else difference(delta, below, above)
        cells = [Cell(labels.method(summary["method"])), Cell(integer(summary["n"]), values=(float(summary["n"]),))]
        cells += [_spent(summary.get(key)) for key in ("gradient_evaluations", "steps")]
        cells += [Cell(_mean(summary.get("test_accuracy"), quantity)), Cell(change, "", (), *_words(quantity, pair))]
        cells += [_p(pair.get(key)) for key in ("p", "p_holm")]
        loss, pair = PERFORMANCE["test_loss"], versus.get("test_loss") or {}
        cells.append(Cell(_mean(summary.get("test_loss"), loss), "", (), *_words(loss, pair)))
        rows.append(tuple(cells))
    first = next(iter(labels.methods(results)), "")
    columns = (
        Column("Method", numeric=False),
        Column("n"),
        Column("Gradients"),
        Column("Steps"),
        Column("Test accuracy", "%"),
        Column(f"Minus {labels.method(first)}", "points"),
        Column("p"),
        Column("Holm's p"),
        Column("Test loss"),
    )
    return Table("methods", "Method by method", columns, tuple(rows))


def flatness_table(results: Results) -> Table:
    """Every measure that says something about flatness, as :data:`FLATNESS_LEGEND` says."""
    names = [n for n in labels.measures(results) if results["measures"][n].get("flatter_when")]
    rows = []
    for summary in results.get("methods") or []:
        if not summary.get("n"):
            continue
        cells = [Cell(labels.method(summary["method"]))]
        for name in names:
            stat = (summary.get("measures") or {}).get(name) or {}
            pair = ((summary.get("versus_first") or {}).get("measures") or {}).get(name) or {}
            mean, own = (as_finite(stat.get(key)) for key in ("mean", "error"))
            noted = own is not None and mean is not None and own > 1e-4 * abs(mean)
            quantity = measure_quantity(results, name)
            cells.append(Cell(_mean(stat, quantity), plain(own, 2) if noted else "", (), *_words(quantity, pair)))
        rows.append(tuple(cells))
    heads = tuple(Column(labels.capitalised(labels.measure(results, name))) for name in names)
    return Table("flatness", "Flatness, method by method", (Column("Method", numeric=False), *heads), tuple(rows))


def turned(table: Table) -> Table:
    """A table with a column per method as one with a row per method."""
    columns = (Column("Method", numeric=False), *(Column(row[0].text, row[0].detail) for row in table.rows))
    rows = (
        (Cell(column.text, column.detail), *(row[index] for row in table.rows))
        for index, column in enumerate(table.columns[1:], start=1)
    )
    return Table(table.name, table.title, columns, tuple(rows) if table.rows else ())


def without(table: Table, *headings: str) -> Table:
    """The table without the columns of these headings."""
    kept = [index for index, column in enumerate(table.columns) if column.text not in headings]
    return Table(
        table.name,
        table.title,
        tuple(table.columns[index] for index in kept),
        tuple(tuple(row[index] for index in kept) for row in table.rows),
    )


def _scaled(value: object, scale: float) -> float | None:
    number = as_finite(value)
    return None if number is None else scale * number


def _mean(stat: Any, quantity: Quantity) -> str:
    """The mean and half of its interval."""
    mean, low, high = (_scaled((stat or {}).get(key), quantity.scale) for key in ("mean", "low", "high"))
    return with_error(mean, None if low is None or high is None else (high - low) / 2)


def _words(quantity: Quantity, pair: Any) -> tuple[str, str]:
    """The verdict, and how to colour it, where the interval of the difference excludes zero."""
    below, above = (as_finite(pair.get(key)) for key in ("low", "high"))
    if below is None or above is None:
        return "", ""
    return quantity.higher if below > 0 else quantity.lower if above < 0 else ("", "")


def _spent(spent: Any) -> Cell:
    """The mean over seeds, and from where to where it went if it was not the same."""
    least, mean, most = (as_finite((spent or {}).get(key)) for key in ("least", "mean", "most"))
    if least is None or mean is None or most is None:
        return Cell(MISSING)
    span = f"{integer(least)} to {integer(most)}" if least < most else ""
    return Cell(integer(mean), span, (mean,))


def _p(value: object) -> Cell:
    number = as_finite(value)
    return (
        Cell(MISSING) if number is None else Cell("< 0.0001" if number < 1e-4 else plain(number, 2), values=(number,))
    )
