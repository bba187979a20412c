"""The page of a study: self-contained, like every report; it shows partial results and says so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup
from plotly.offline import get_plotlyjs

from flatminima.report import study_plots as plots
from flatminima.report.numbers import integer
from flatminima.report.page import Key, _drawings, _environment
from flatminima.report.panels import symbol
from flatminima.report.reproduction import check_schema
from flatminima.report.study_tables import study_tables
from flatminima.study.value_names import outcome_word

_QUESTION = "Which measures predict {}, and what is left of that when confounders are held fixed?"


def render_study(results: Mapping[str, Any]) -> str:
    """Render the figures of a study as one HTML page.

    Args:
        results: what :func:`flatminima.study.analysis.analyse` returns.

    Returns:
        The page, to be written as UTF-8; it asks for nothing over the network.

    Raises:
        ValueError: the dictionary has another schema than 1.

    Example:
        >>> render_study({"schema": 2})
        Traceback (most recent call last):
        ValueError: results have schema 2, but this version reads schema 1: make them anew
    """
    check_schema(results)
    counts = results["counts"]
    factor, levels = plots.levels(results)
    kinds = list(plots.KINDS)
    rules = results["rules"]
    written = (
        ("none", "") if rules is None else (rules["digest"][:12], f"written {rules['written'] or 'at an unknown time'}")
    )
    context = {
        "results": results,
        "question": _QUESTION.format(outcome_word(results["outcome"])),
        "predicted": outcome_word(results["outcome"]),
        "command": results["command"],
        "partial": counts["not run"] > 0,
        "facts": [
            ("Networks", f"{integer(counts['finished'])} of {integer(counts['networks'])}", "finished"),
            ("Left out", integer(counts["missed"] + counts["failed"]), f"{counts['missed']} missed, {counts['failed']} failed"),
            ("Data", ", ".join(part["name"] for part in results["data"]) or "–", f"predicted: {results['outcome']}"),
            ("Resamples", integer(results["settings"]["draws"]), "BCa intervals, 95 %"),
            ("Rules", *written),
        ],
        "tables": study_tables(results),
        "plots": {"forest": _drawings(plots.forest(results)), "scatter": _drawings(plots.scatter(results))},
        "kinds": [
            Key(plots.KINDS[kind], kinds.index(kind), symbol(kinds.index(kind))) for kind in plots.kinds_shown(results)
        ],
        "levels": [Key(f"{factor} {level}", index, symbol(index)) for index, level in enumerate(levels)] if factor else [],
        "plotlyjs": Markup(get_plotlyjs()),
    }  # fmt: skip
    return _environment().get_template("study.html").render(context)
