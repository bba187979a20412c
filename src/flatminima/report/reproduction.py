"""What the pages and the terminal tables of all reproductions share: the frame, and claims as rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup
from plotly.offline import get_plotlyjs

from flatminima.report.numbers import MISSING, plain
from flatminima.report.page import _drawings, _environment
from flatminima.report.panels import Panel
from flatminima.report.tables import Cell, Column, Table


def check_schema(results: Mapping[str, Any]) -> None:
    """Refuse results of another schema than 1.

    Raises:
        ValueError: they are.
    """
    if results.get("schema") != 1:
        raise ValueError(
            f"results have schema {results.get('schema')!r}, but this version reads schema 1: make them anew"
        )


def render_reproduction(
    template: str,
    results: Mapping[str, Any],
    *,
    question: str,
    source: str,
    contents: Sequence[tuple[str, str]],
    facts: Sequence[tuple[str, str, str]],
    plots: Mapping[str, Sequence[Panel]],
    **context: Any,
) -> str:
    """Render one reproduction as a self-contained HTML page.

    Args:
        template: extends ``reproduction.html``.
        results: with ``schema``, ``flatminima``, ``command``, ``answer``, ``details``, ``cautions`` and ``groups``.
        question: the page's title.
        source: what was reproduced.
        contents: anchors and titles of the sections.
        facts: name, value and detail of the figures under the answer; the count of statements is put before them.
        plots: panels by name.
        context: what else the template uses.

    Returns:
        The page, to be written as UTF-8; it asks for nothing over the network.
    """
    claims = [claim for group in results["groups"] for claim in group["claims"]]
    count = f"{sum(claim['reproduced'] for claim in claims)} of {len(claims)}"
    return (
        _environment()
        .get_template(template)
        .render(
            results=results,
            command=results["command"],
            question=question,
            source=source,
            contents=contents,
            facts=[("Statements", count, "reproduced"), *facts],
            groups={
                group["name"]: group | {"claims": [*map(claim_lines, group["claims"])]} for group in results["groups"]
            },
            plots={name: _drawings(panels) for name, panels in plots.items()},
            plotlyjs=Markup(get_plotlyjs()),
            **context,
        )
    )


def claim_lines(claim: Mapping[str, Any]) -> dict[str, Any]:
    """A claim with its parameters in words, and a line (quantity, expected, measured) for each quantity."""
    parameters = "; ".join(f"{name} {joined(value)}" for name, value in claim["parameters"].items())
    lines = [(name, _value(expected), _value(claim["measured"][name])) for name, expected in claim["expected"].items()]
    return {**claim, "parameters": parameters, "lines": lines}


def joined(value: object) -> str:
    """A parameter as text; a long list of equal numbers is counted."""
    if isinstance(value, list):
        if len(value) > 4 and len(set(map(str, value[1:-1]))) == 1:
            return f"{value[0]}, {value[1]} × {len(value) - 2}, {value[-1]}"
        return ", ".join(joined(v) for v in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return plain(value, 7) if isinstance(value, float) else MISSING if value is None else str(value)


def verdict(reproduced: bool) -> Cell:
    """The cell of a verdict."""
    return Cell("reproduced" if reproduced else "not reproduced", tone="good" if reproduced else "bad")


def claims_table(group: Mapping[str, Any]) -> Table:
    """A group of claims for the terminal, one row each with its first quantity; a verdict names every one that failed.

    Example:
        >>> claim = {"statement": "s", "parameters": {}, "expected": {"a": 7}, "measured": {"a": 7}, "reproduced": True,
        ...          "verdict": "reproduced"}
        >>> [cell.text for cell in claims_table({"name": "g", "title": "t", "claims": [claim]}).rows[0]]
        ['s', '7', '7', 'reproduced']
    """
    columns = (
        Column("Statement", "parameters", False), Column("Measured", "quantity"), Column("Proved or recorded"),
        Column("Verdict", "", False),
    )  # fmt: skip
    rows, before = [], None
    for claim in map(claim_lines, group["claims"]):
        name, expected, measured = claim["lines"][0]
        more = len(claim["lines"]) - 1
        statement = "as above" if claim["statement"] == before else claim["statement"]
        rows.append(
            (
                Cell(statement, claim["parameters"]),
                Cell(measured, name),
                Cell(expected, f"and {more} more" if more else ""),
                verdict(True) if claim["reproduced"] else Cell(claim["verdict"], tone="bad"),
            )
        )
        before = claim["statement"]
    return Table(group["name"], group["title"], columns, tuple(rows))
