"""Tables as Markdown, for documents."""

from __future__ import annotations

from flatminima.report.tables import Cell, Table


def markdown_table(table: Table) -> str:
    """A table with its headings; a cell's detail follows in brackets, its verdict in bold."""
    heads = [
        escaped(column.text) + (f" ({escaped(column.detail)})" if column.detail else "") for column in table.columns
    ]
    lines = [heads, ["---:" if column.numeric else "---" for column in table.columns]]
    lines += [[_cell(cell) for cell in row] for row in table.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(cell: Cell) -> str:
    detail = escaped(cell.detail)
    text = escaped(cell.text) + (f" {detail}" if detail.startswith("±") else f" ({detail})" if detail else "")
    return f"{text} **{cell.verdict}**" if cell.verdict else text


def escaped(text: object) -> str:
    """Text on one line, without what Markdown would read as table or tag."""
    return " ".join(str(text).split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
