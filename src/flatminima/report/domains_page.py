"""The page of the SWAD reproduction: self-contained, like every report; it shows partial results and says so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup
from plotly.offline import get_plotlyjs

from flatminima.report import domains_plots as plots
from flatminima.report import domains_tables as tables
from flatminima.report.numbers import integer
from flatminima.report.page import Key, _drawings, _environment
from flatminima.report.panels import symbol

_QUESTION = "Does averaging weights over the valley of the validation loss predict better on a domain never seen?"


def render_swad(results: Mapping[str, Any]) -> str:
    """Render the results of ``flatminima reproduce swad`` as one HTML page.

    Args:
        results: what :func:`flatminima.protocols.reproduce_swad` returns.

    Returns:
        The page, to be written as UTF-8; it asks for nothing over the network.

    Raises:
        ValueError: the dictionary has another schema than 1.

    Example:
        >>> render_swad({"schema": 2})
        Traceback (most recent call last):
        ValueError: results have schema 2, but this version reads schema 1: make them anew
    """
    if results.get("schema") != 1:
        raise ValueError(
            f"results have schema {results.get('schema')!r}, but this version reads schema 1: make them anew"
        )
    finished, plan, settings, data = (results[name] for name in ("finished", "plan", "settings", "data"))
    flat = {row["method"] for row in results["flatness"]["rows"]}
    context = {
        "results": results,
        "question": _QUESTION,
        "command": results["command"],
        "partial": finished["partial"],
        "facts": [
            ("Data", data["name"], f"{len(data['counts'])} domains, {len(data['classes'])} classes"),
            ("Network", str(settings["model"]), str(results["protocol"])),
            ("Runs", f"{finished['runs']} of {finished['planned']}", "finished"),
            ("Targets × seeds", f"{len(plan['targets'])} × {len(plan['seeds'])}", ", ".join(plan["algorithms"])),
            ("Steps", integer(results["steps"]), f"evaluated every {settings['every']}"),
        ],
        "tables": {
            name: getattr(tables, f"{name}_table")(results)
            for name in (
                "accuracy", "published", "comparison", "pooled", "claims", "valley", "valley_runs", "flatness", "order", "data",
                "protocol", "settings", "failures",
            )
        },
        "plots": {
            name: _drawings(getattr(plots, name)(results)) for name in ("forest", "curves", "accuracies", "flatness", "planes")
        },
        "methods": [
            Key(tables.label(results, name), index, symbol(index)) for index, name in enumerate(plots.SHOWN) if name in flat
        ],
        "points": [
            Key(tables.label(results, f"erm/{name}"), index, symbol(index)) for name, index in plots.POINTS.items()
        ],
        "plotlyjs": Markup(get_plotlyjs()),
    }  # fmt: skip
    return _environment().get_template("domains.html").render(context)
