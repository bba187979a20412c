"""Tables as GitHub-flavoured Markdown, for issues, papers and the documents of this project."""

from __future__ import annotations

from flatminima.report.tables import Cell, Table


def markdown(table: Table) -> str:
    """One table; details stand in brackets behind the text, errors behind their ±, and verdicts are bold.

    Example:
        >>> from flatminima.report.tables import Column
        >>> row = (Cell("x|y", "z"), Cell("1", "± 2", (), "less"))
        >>> print(markdown(Table("t", "T", (Column("a", numeric=False), Column("b", "s")), (row,))))
        | a | b (s) |
        | --- | ---: |
        | x\\|y (z) | 1 ± 2 **less** |
    """
    heads = [escaped(c.text) + (f" ({escaped(c.detail)})" if c.detail else "") for c in table.columns]
    lines = [heads, ["---:" if column.numeric else "---" for column in table.columns]]
    lines += [[_cell(cell) for cell in row] for row in table.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escaped(text: object) -> str:
    """No line ends and no column ends where it should not, and no tag begins."""
    return " ".join(str(text).split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def _cell(cell: Cell) -> str:
    text, detail = escaped(cell.text), escaped(cell.detail)
    text += f" {detail}" if detail.startswith("±") else f" ({detail})" if detail else ""
    return f"{text} **{cell.verdict}**" if cell.verdict else text
