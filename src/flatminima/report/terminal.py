"""The same tables for the terminal, as rich renderables; nothing here prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import rich.box
from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from flatminima.report import audit_tables as audited
from flatminima.report import labels, measure_tables, reproduction, tables
from flatminima.report.methods_table import FLATNESS_LEGEND, LEGEND, MANY, flatness_table, methods_table, without
from flatminima.report.tables import Cell, Table

_COLUMNS = 6  # kinds of symmetry that fit beside the measures
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
        output.add_column(head, justify="right" if column.numeric else "left", overflow="fold")
    for row in table.rows:
        output.add_row(*map(_lines, row))
    return output


def unrolled(table: Table) -> RichTable:
    """Render a table of methods with the methods below each quantity, which fits into eighty columns."""
    output = _new(table.title)
    output.add_column("")
    for head in ("Mean ± error", "Difference, 95% interval"):
        output.add_column(head, no_wrap=True)
    for heading, *cells in table.rows:
        output.add_row(_lines(heading), "", "")
        for index, (column, cell) in enumerate(zip(table.columns[1:], cells, strict=True)):
            change = Text(cell.detail.removeprefix("Δ "))
            if cell.verdict:
                change.append(f" {cell.verdict}", style=_STYLES[cell.tone])
            output.add_row(Text(f"  {column.text}"), Text(cell.text), change, end_section=index == len(cells) - 1)
    counts = "; ".join(f"{column.text}: {column.detail}" for column in table.columns[1:])
    output.caption = Text(f"Differences are to {table.columns[1].text}. {counts}\n", style="dim")
    output.caption_justify = "left"
    return output


def compare_table(results: Mapping[str, Any]) -> RenderableType:
    """The page's answer, performance, flatness, audit and failed runs, for ``console.print``; of many methods a row each."""
    parts: list[RenderableType] = [Text(str(results.get("answer") or ""), style="bold")]
    for key in ("details", "cautions"):
        parts += [Text(f"• {sentence}") for sentence in results.get(key) or []]
    parts.append(Text(""))
    if len(labels.methods(results)) > MANY:
        performance = without(methods_table(results), "n", "p")  # what fits; the page has all
        for table, legend in ((performance, LEGEND), (flatness_table(results), FLATNESS_LEGEND)):
            if table:
                parts += [rendered(table), Text(f"{legend}\n", style="dim")]
    else:
        parts += [unrolled(t) for t in (tables.performance_table(results), tables.measure_table(results)) if t]
    for table in (tables.audit_table(results), tables.failed_table(results)):
        if table:
            parts.append(rendered(table))
    return Group(*parts)


def measure_table(rows: Sequence[Mapping[str, Any]]) -> RichTable:
    """Measurements of one model: mappings with label (or name), value, error, error_kind, converged, cost and note."""
    return rendered(tables.measurement_rows_table(rows))


def measurement_tables(results: Mapping[str, Any]) -> RenderableType:
    """What ``flatminima measure`` found: the conclusions where more than measures were asked for, and the tables."""
    measures = measure_tables.measures_table(results)
    if not results["settings"]["curvature"]:
        return rendered(measures)
    parts: list[RenderableType] = [Text(str(results["answer"]), style="bold")]
    parts += [Text(f"• {sentence}") for key in ("details", "cautions") for sentence in results[key]]
    parts += [Text(f"note: {note}", style="dim") for note in results["notes"]]
    parts.append(Text(""))
    for table in (measure_tables.numbers_table(results), measure_tables.layers_table(results), measures):
        if table:
            parts.append(rendered(table))
    return Group(*parts)


def audit_tables(results: Mapping[str, Any]) -> RenderableType:
    """What ``flatminima audit`` found: the conclusions and the tables; of two minima the differences come first."""
    parts: list[RenderableType] = [Text(str(results["answer"]), style="bold")]
    parts += [Text(f"• {sentence}") for key in ("details", "cautions") for sentence in results[key]]
    parts += [Text(f"note: {note}", style="dim") for note in results["notes"]]
    parts.append(Text(""))
    audit = results["audits"][0]
    if results["comparison"] is not None:
        parts.append(rendered(audited.differences_table(results["comparison"], short=True)))
    else:
        parts.append(rendered(audited.verdict_table(audit, short=True)))
    kinds = range(0, len(audit["symmetries"]), _COLUMNS)
    matrices = [audited.matrix_table(audit, short=True, columns=slice(k, k + _COLUMNS)) for k in kinds]
    parts += [rendered(table) for table in (*matrices, audited.symmetries_table(audit, short=True)) if table]
    parts += [Text(f"refused at {site}: {reason}", style="dim") for site, reason in audited.refused(audit)]
    return Group(*parts)


def reproduction_tables(results: Mapping[str, Any], *more: Table) -> RenderableType:
    """The conclusions of a reproduction, every claim as a row, and what other tables there are."""
    parts: list[RenderableType] = [Text(str(results["answer"]), style="bold")]
    parts += [Text(f"• {sentence}") for sentence in results["details"]]
    parts.append(Text(""))
    parts += [rendered(reproduction.claims_table(group)) for group in results["groups"]]
    parts += map(rendered, more)
    return Group(*parts)
