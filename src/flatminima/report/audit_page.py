"""The page of an audit: self-contained, like every report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from plotly.offline import get_plotlyjs

from flatminima.report import audit_plots as plots
from flatminima.report import audit_tables as tables
from flatminima.report.measure_tables import settings_table
from flatminima.report.numbers import MISSING, integer, plain
from flatminima.report.page import Drawing, Key, _drawings, _environment
from flatminima.report.panels import COLOURS, symbol
from flatminima.report.tables import Table


@dataclass(frozen=True)
class Section:
    """What the page shows of one audited minimum."""

    name: str
    number: str
    answer: str
    tables: dict[str, Table]
    plots: dict[str, list[Drawing]]
    keys: list[Key]
    law_keys: list[Key]
    legend: list[tuple[str, str]]
    rejected: list[tuple[str, str]]


def render_audit(results: Mapping[str, Any]) -> str:
    """Render what ``flatminima audit`` found as one self-contained HTML page.

    Args:
        results: the dictionary in ``audit.json``.

    Returns:
        The page, to be written as UTF-8; it asks for nothing over the network, and text from the user is escaped.

    Raises:
        ValueError: the dictionary has another schema than 1.

    Example:
        >>> render_audit({"schema": 2})
        Traceback (most recent call last):
        ValueError: results have schema 2, but this version reads schema 1: make them anew
    """
    if results.get("schema") != 1:
        raise ValueError(
            f"results have schema {results.get('schema')!r}, but this version reads schema 1: make them anew"
        )
    comparison = results["comparison"]
    context = {
        "results": results,
        "question": _question(results),
        "command": str(results.get("command") or "flatminima audit"),
        "facts": _facts(results),
        "comparison": comparison,
        "differences": None if comparison is None else tables.differences_table(comparison),
        "difference_plots": [] if comparison is None else _drawings(plots.differences(comparison)),
        "sections": [_section(audit, str(i + 1)) for i, audit in enumerate(results["audits"])],
        "settings": settings_table(results),
        "plotlyjs": Markup(get_plotlyjs()),
    }
    return _environment().get_template("audit.html").render(context)


def _section(audit: Mapping[str, Any], number: str) -> Section:
    return Section(
        name=str(audit["name"]),
        number=number,
        answer=str(audit["answer"]),
        tables={
            "verdicts": tables.verdict_table(audit, f"verdicts-{number}"),
            "matrix": tables.matrix_table(audit, f"matrix-{number}"),
            "symmetries": tables.symmetries_table(audit, f"symmetries-{number}"),
            "laws": tables.law_table(audit, f"laws-{number}"),
        },
        plots={
            "orbits": _drawings(plots.orbits(audit)),
            "heatmap": _drawings(plots.heatmap(audit)),
            "laws": _drawings(plots.laws(audit)),
        },
        keys=_keys(plots.orbit_keys(audit)),
        law_keys=_keys(plots.law_keys(audit)),
        legend=tables.legend(audit),
        rejected=list(tables.refused(audit)),
    )


def _keys(names: list[str]) -> list[Key]:
    return [Key(name, (i + 1) % COLOURS, symbol(i + 1)) for i, name in enumerate(names)]


def _question(results: Mapping[str, Any]) -> str:
    if results["comparison"] is not None:
        return "Is one of these two minima flatter, or only written in other coordinates?"
    return f"Which numbers of {results['model']['name']} survive a change of coordinates?"


def _facts(results: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    model, audits = results["model"], results["audits"]
    kinds = {s["kind"] for audit in audits for s in audit["symmetries"]}
    members = sum(s["members"] for audit in audits for s in audit["symmetries"])
    losses = " / ".join(plain(audit["loss"], 3) for audit in audits)
    slopes = " / ".join(plain(audit["gradient_norm"], 2) for audit in audits)
    return [
        (
            "Parameters",
            integer(model["parameters"]),
            f"{model['dtype']} on {model['device']}, audited in double precision",
        ),
        (
            "Rows",
            integer((results.get("data") or {}).get("rows")),
            f"seed {(results.get('settings') or {}).get('seed', MISSING)}",
        ),
        ("Loss", losses, f"length of the gradient {slopes}"),
        ("Symmetries", integer(len(kinds)), f"kinds; {integer(members)} members, each proved"),
        ("Cost", integer(results.get("cost")), "gradient evaluations"),
    ]
