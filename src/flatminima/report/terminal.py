"""The same tables for the terminal, as rich renderables; nothing here prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import rich.box
from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from flatminima.report import tables
from flatminima.report.tables import Cell, Table

_STYLES = {"good": "green", "bad": "red", "": ""}


def _new(title: str) -> RichTable:
    return RichTable(title=Text(title, style="bold"), title_justify="left", box=rich.box.SIMPLE_HEAD, pad_edge=False)


def _lines(cell: Cell) -> Text:
    # Text, never markup: a name with square brackets in it is a name.
    text = Text(cell.text, style=_STYLES[cell.tone] if not cell.verdict else "")
    if cell.detail:
        text.append(f"\n{cell.detail}", style="dim")
    if cell.verdict:
        text.append(f" {cell.verdict}", style=_STYLES[cell.tone])
    return text


def rendered(table: Table) -> RichTable:
    """Render a table cell by cell."""
    output = _new(table.title)
    for column in table.columns:
        head = Text(column.text)
        if column.detail:
            head.append(f"\n{column.detail}", style="dim")
        output.add_column(head, justify="right" if column.numeric else "left")
    for row in table.rows:
        output.add_row(*map(_lines, row))
    return output


def unrolled(table: Table) -> RichTable:
    """Render a table of methods with one line per row and method, which fits into eighty columns."""
    output = _new(table.title)
    for head in ("", "Method", "Mean ± error", "Difference to the first, 95% interval"):
        output.add_column(head)
    for heading, *cells in table.rows:
        for index, (column, cell) in enumerate(zip(table.columns[1:], cells, strict=True)):
            name = _lines(heading) if index == 0 else Text("")
            change = Text(cell.detail.removeprefix("Δ "))
            if cell.verdict:
                change.append(f" {cell.verdict}", style=_STYLES[cell.tone])
            method = Text(column.text).append(f" {column.detail}", style="dim")
            output.add_row(name, method, Text(cell.text), change, end_section=index == len(cells) - 1)
    return output


def compare_table(results: Mapping[str, Any]) -> RenderableType:
    """The page's answer, performance, flatness, audit and failed runs, for ``console.print``."""
    parts: list[RenderableType] = [Text(str(results.get("answer") or ""), style="bold")]
    parts += [Text(f"• {sentence}") for sentence in results.get("details") or []]
    parts.append(Text(""))
    for table in (tables.performance_table(results), tables.measure_table(results)):
        if table:
            parts.append(unrolled(table))
    for table in (tables.audit_table(results), tables.failed_table(results)):
        if table:
            parts.append(rendered(table))
    return Group(*parts)


def measure_table(rows: Sequence[Mapping[str, Any]]) -> RichTable:
    """Measurements of one model: mappings with label (or name), value, error, error_kind, converged, cost and note."""
    return rendered(tables.measurement_rows_table(rows))


def audit_table(rows: Sequence[Mapping[str, Any]], symmetries: Sequence[str]) -> RichTable:
    """An audit of one model: mappings with label (or measure), max_ratio per symmetry, invariant_under and verdict."""
    return rendered(tables.audit_rows_table(rows, symmetries))
