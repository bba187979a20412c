"""The results of the SWAD reproduction as Markdown, for documents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flatminima.report.domains_tables import (
    accuracy_table,
    claims_table,
    comparison_table,
    failures_table,
    flatness_table,
    pooled_table,
    valley_table,
)
from flatminima.report.tables import Cell, Table


def swad_markdown(results: Mapping[str, Any]) -> str:
    """Answer, cautions and the main tables, with the command that made them."""
    finished = results["finished"]
    parts = [
        f"    {results['command']}",
        f"{finished['runs']} of {finished['planned']} runs are finished.",
        results["answer"],
    ]
    parts.append("\n".join(f"- {_escaped(sentence)}" for sentence in [*results["details"], *results["cautions"]]))
    for table in (
        accuracy_table(results), comparison_table(results), pooled_table(results), claims_table(results), valley_table(results),
        flatness_table(results), failures_table(results),
    ):  # fmt: skip
        if table:
            parts.append(f"**{table.title}**\n\n{_markdown(table)}")
    return "\n\n".join(parts) + "\n"


def _markdown(table: Table) -> str:
    heads = [
        _escaped(column.text) + (f" ({_escaped(column.detail)})" if column.detail else "") for column in table.columns
    ]
    lines = [heads, ["---:" if column.numeric else "---" for column in table.columns]]
    lines += [[_cell(cell) for cell in row] for row in table.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(cell: Cell) -> str:
    detail = _escaped(cell.detail)
    text = _escaped(cell.text) + (f" {detail}" if detail.startswith("±") else f" ({detail})" if detail else "")
    return f"{text} **{cell.verdict}**" if cell.verdict else text


def _escaped(text: object) -> str:
    return " ".join(str(text).split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
