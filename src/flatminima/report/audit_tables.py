"""The tables of an audit: the page and the terminal render these same cells. Each takes one entry of ``audits``.

``short`` leaves out what a terminal has no room for.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from flatminima.audit import MEANING
from flatminima.report import labels
from flatminima.report.measure_list import SHORT
from flatminima.report.numbers import MISSING, as_float, change_factor, factor, integer, plain, with_error
from flatminima.report.tables import Cell, Column, Table

Results = Mapping[str, Any]

#: A word for each verdict, and how it is coloured.
WORDS = {
    "invariant": ("invariant", "good"),
    "nearly": ("nearly invariant", "good"),
    "survived": ("no theorem", ""),
    "undecided": ("undecided", ""),
    "found to change": ("coordinates", "bad"),
    "changes": ("coordinates", "bad"),
    "broken": ("BROKEN", "bad"),
    "not tested": ("not tested", ""),
    "not applicable": ("not defined", ""),
}
_UNTESTED = ("not tested", "not applicable")
_MARKS = {"undecided": "?", "broken": "!!", "survived": "·", "nearly": "~"}
_KEEPS = {"outputs": "every output", "probabilities": "every probability", "predictions": "every predicted class"}


def verdict_table(audit: Results, name: str = "verdicts", short: bool = False) -> Table:
    """One row per measure: value, range and factors over the orbit, and the verdict with what to use instead."""
    rows: list[tuple[Cell, ...]] = []
    for measure, m in audit["measures"].items():
        word, tone = WORDS[m["verdict"]]
        tested = m["verdict"] not in _UNTESTED
        value, error, low, high = (as_float(m[key]) for key in ("value", "error", "low", "high"))
        shown = MISSING if value is None else with_error(value, error)
        ratio = factor(change_factor(m, "max_ratio")) if tested else MISSING
        if short:
            rows.append((Cell(str(m["label"])), Cell(shown), Cell(ratio), Cell(word, tone=tone), Cell(_instead(m))))
            continue
        rows.append(
            (
                Cell(str(m["label"]), str(measure)),
                Cell(shown, "" if value is None else _kind(m), (value, error)),
                Cell(f"{plain(low, 3)} … {plain(high, 3)}" if tested else MISSING, values=(low, high)),
                Cell(ratio, values=(as_float(m["max_ratio"]),)),
                Cell(factor(m["spread"]), values=(as_float(m["spread"]),)),
                Cell(word, str(m["sentence"]), tone=tone),
            )
        )
    columns = [
        Column("Measure", numeric=False),
        Column("Value", "" if short else "± its error"),
        Column("Over the orbit", "least … most"),
        Column("Factor", "" if short else "largest"),
        Column("Spread", "geometric"),
        Column("Verdict", numeric=False),
        Column("Use instead", numeric=False),
    ]
    columns = [columns[i] for i in ((0, 1, 3, 5, 6) if short else range(6))]
    return Table(name, "Which numbers survive a change of coordinates?", tuple(columns), tuple(rows))


def matrix_table(audit: Results, name: str = "matrix", short: bool = False, columns: slice = slice(None)) -> Table:
    """Measure by symmetry (some of the columns, where there are many): the largest factor, and what it means."""
    kinds = [s["kind"] for s in audit["symmetries"]][columns]
    rows = []
    for measure, row in audit["changes"].items():
        if not row:
            continue
        cells = [Cell(str(audit["measures"][measure]["label"]))]
        for kind in kinds:
            c = row[kind]
            tone = "bad" if c["significant"] else "good" if c["status"] in ("invariant", "nearly") else ""
            text, meaning = factor(change_factor(c, "max_ratio")), str(c["status"])
            if short:
                text, meaning = "✓" if meaning == "invariant" else _MARKS.get(meaning, "") + text, ""
            cells.append(Cell(text, meaning, (as_float(c["max_ratio"]),), tone=tone))
        rows.append(tuple(cells))
    heads = [Column(SHORT.get(kind, kind) if short else labels.symmetry(kind)) for kind in kinds]
    title = "Largest factor under each symmetry"
    return Table(name, title, (Column("Measure", numeric=False), *heads), tuple(rows))


def symmetries_table(audit: Results, name: str = "symmetries", short: bool = False, shown: int = 3) -> Table:
    """One row per kind of symmetry: where it acts, what it keeps, and how well that is proved."""
    rows = []
    for s in audit["symmetries"]:
        sites = list(map(str, s["sites"]))
        first = [textwrap.shorten(sites[0], 60)] if short else sites[:shown]
        more = f" and {len(sites) - len(first)} more" if len(sites) > len(first) else ""
        code = f" ({SHORT[s['kind']]})" if s["kind"] in SHORT else ""
        row = [
            Cell(labels.symmetry(s["kind"]) + code, "" if short else str(s["law"])),
            Cell("; ".join(first) + more),
            Cell(_KEEPS[s["preserves"]], "" if s["exact"] else "up to the epsilon of a normalisation"),
            Cell(integer(s["members"]), values=(s["members"],)),
            Cell(plain(s["max_change"], 2), values=(s["max_change"],)),
        ]
        rows.append(tuple(row if short else [*row, Cell(str(s["hessian_law"]))]))
    columns = [
        Column("Symmetry", numeric=False),
        Column("Sites", numeric=False),
        Column("Keeps", numeric=False),
        Column("Members"),
        Column("Outputs change", "at most, relative"),
    ]
    if not short:
        columns.append(Column("Hence", numeric=False))
    return Table(name, "The symmetries", tuple(columns), tuple(rows))


def law_table(audit: Results, name: str = "laws") -> Table:
    """The trace of the member that changes it most: predicted, measured, and which parameters carry it."""
    rows = []
    for law in audit["laws"]:
        trace, own = as_float(law["trace"]), law["most"]
        predicted, measured = as_float(law["predicted"][own]), as_float(law["measured"][own])
        wrong = "" if law["agrees"] else "NOT the predicted one"
        growing = as_float(law["growing"])
        rows.append(
            (
                Cell(labels.symmetry(law["symmetry"])),
                Cell(_over(predicted, trace), "exact" if law["exact"] else "sampled", (predicted,)),
                Cell(_over(measured, trace), wrong, (measured,), tone="bad" if wrong else ""),
                Cell(MISSING if growing is None else f"{plain(100 * growing, 3)} %", values=(growing,)),
                Cell("; ".join(map(_part, law["parts"][:3])) or "not told apart from its error"),
            )
        )
    columns = (
        Column("Symmetry", numeric=False),
        Column("Trace, predicted"),
        Column("Trace, measured"),
        Column("Share that grows"),
        Column("Carried by", "share of the trace, its factor", numeric=False),
    )
    return Table(name, "Why the trace changes", columns, tuple(rows))


def differences_table(comparison: Results, short: bool = False) -> Table:
    """Two minima, measure by measure: difference with combined error, what it stands on, and which one is flatter by it."""
    a, b = map(str, comparison["names"])
    rows = []
    for d in comparison["differences"]:
        first, second, gap, error = (as_float(d[key]) for key in ("first", "second", "difference", "error"))
        tone = "good" if d["trusted"] else "bad" if d["basis"] in ("coordinates", "broken") else ""
        rows.append(
            (
                Cell(str(d["label"]), "" if short else str(d["measure"])),
                Cell(plain(first), values=(first,)),
                Cell(plain(second), values=(second,)),
                Cell(with_error(gap, error), "" if d["resolved"] else "within its error", (gap, error)),
                Cell(str(d["basis"]), tone=tone),
                Cell(MISSING if d["flatter"] is None else str(d["flatter"]), "" if short else str(d["sentence"])),
            )
        )
    columns = (
        Column("Measure", numeric=False),
        Column(a),
        Column(b),
        Column("Difference", "" if short else f"{b} − {a}, ± combined error"),
        Column("Stands on", numeric=False),
        Column("Flatter by it", numeric=False),
    )
    return Table("differences", "Difference by difference", columns, tuple(rows))


def legend(audit: Results) -> list[tuple[str, str]]:
    """The statuses that occur, with their meaning."""
    seen = {c["status"] for row in audit["changes"].values() for c in row.values()}
    return [(status, meaning) for status, meaning in MEANING.items() if status in seen]


def refused(audit: Results) -> Sequence[tuple[str, str]]:
    """``(site, reason)`` of what was looked at and refused."""
    return [(str(site), str(reason)) for site, reason in audit["rejected"]]


def _instead(m: Results) -> str:
    repair = m["repair"]
    return "" if repair is None else f"{repair['label']}{', which survives more' if repair['moves_under'] else ''}"


def _kind(m: Results) -> str:
    return str(m["error_kind"]) if m["converged"] else f"{m['error_kind']}; not converged"


def _over(value: float | None, trace: float | None) -> str:
    return MISSING if value is None or not trace else factor(value / trace)


def _part(part: Results) -> str:
    scaled = "" if part["scale"] is None else f" (weights {factor(part['scale'])})"
    return f"{part['name']}: {plain(100 * part['share'], 3)} % {factor(part['factor'])}{scaled}"
