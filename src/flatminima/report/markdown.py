"""Tables as GitHub-flavoured Markdown, for issues, papers and the documents of this project."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flatminima.report.methods_table import FLATNESS_LEGEND, LEGEND, flatness_table, methods_table
from flatminima.report.tables import Cell, Table


def markdown(table: Table) -> str:
    """One table; details stand in brackets behind the text, verdicts are bold.

    Example:
        >>> from flatminima.report.tables import Column
        >>> print(markdown(Table("t", "T", (Column("a"), Column("b", "s")), ((Cell("x|y"), Cell("1", "± 2", (), "less")),))))
        | a | b (s) |
        | ---: | ---: |
        | x\\|y | 1 (± 2) **less** |
    """
    heads = [_escaped(c.text) + (f" ({_escaped(c.detail)})" if c.detail else "") for c in table.columns]
    lines = [heads, ["---:" if c.numeric else "---" for c in table.columns]]
    lines += [[_cell(cell) for cell in row] for row in table.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def compare_markdown(results: Mapping[str, Any]) -> str:
    """The answer of a comparison, its command, and a row per method for accuracy and for flatness."""
    parts = [str(results.get("answer") or ""), f"    $ {results.get('command')}"]
    parts += [f"- {_escaped(sentence)}" for sentence in results.get("cautions") or []]
    text = "\n\n".join(parts[:2]) + ("\n\n" + "\n".join(parts[2:]) if parts[2:] else "")
    for table, legend in ((methods_table(results), LEGEND), (flatness_table(results), FLATNESS_LEGEND)):
        if table:
            text += f"\n\n{markdown(table)}\n\n{legend}"
    return text + "\n"


def _cell(cell: Cell) -> str:
    text = _escaped(cell.text) + (f" ({_escaped(cell.detail)})" if cell.detail else "")
    return f"{text} **{cell.verdict}**" if cell.verdict else text


def _escaped(text: object) -> str:
    """No line ends and no column ends where it should not, and no tag begins."""
    return " ".join(str(text).split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
