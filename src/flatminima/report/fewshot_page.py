"""The page of the F2M reproduction: self-contained, like every report; it shows partial results and says so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup
from plotly.offline import get_plotlyjs

from flatminima.report import fewshot_plots as plots
from flatminima.report import fewshot_tables as tables
from flatminima.report.numbers import integer
from flatminima.report.page import Key, _drawings, _environment
from flatminima.report.panels import symbol
from flatminima.report.reproduction import check_schema

_QUESTION = "Does training in a flat region keep old classes when new ones come with a few images each?"


def _ways(ways: Sequence[int]) -> str:
    """New classes of a session; a split made elsewhere may have more in one than in another."""
    return f"{min(ways)}" if min(ways) == max(ways) else f"{min(ways)} to {max(ways)}"


def render_f2m(results: Mapping[str, Any]) -> str:
    """Render the results of ``flatminima reproduce f2m`` as one HTML page.

    Args:
        results: what :func:`flatminima.protocols.fewshot.reproduce_f2m` returns.

    Returns:
        The page, to be written as UTF-8; it asks for nothing over the network.

    Raises:
        ValueError: the dictionary has another schema than 1.

    Example:
        >>> render_f2m({"schema": 2})
        Traceback (most recent call last):
        ValueError: results have schema 2, but this version reads schema 1: make them anew
    """
    check_schema(results)
    finished, plan, settings, data = (results[name] for name in ("finished", "plan", "settings", "data"))
    parameters = results["bases"][0]["parameters"] if results["bases"] else None
    context = {
        "results": results,
        "question": _QUESTION,
        "command": results["command"],
        "partial": finished["partial"],
        "facts": [
            ("Data", data["name"], f"{plan['base']} base classes, then"
             f" {plan['sessions'] - 1} × {_ways(plan['way'])}-way {plan['shot']}-shot"),
            ("Network", str(settings["model"]), f"{integer(parameters)} parameters, {settings['protocol']}"),
            ("Tasks", f"{finished['runs']} of {finished['planned']}", "finished"),
            ("Base seeds × draws", f"{plan['seeds']} × {plan['draws']}", "draws of shots within a seed"),
            ("Box", f"b = {settings['bound']:g}", "of RMS(w)" if settings["relative"] else "half width"),
        ],
        "tables": {
            name: getattr(tables, f"{name}_table")(results)
            for name in (
                "session", "published", "summary", "comparison", "ablation", "claims", "flatness", "flatness_differences",
                "trace", "movement", "defects", "settings", "failures",
            )
        },
        "plots": {name: _drawings(getattr(plots, name)(results)) for name in plots.PLOTS},
        "methods": [Key(tables.label(results, name), i, symbol(i)) for i, name in enumerate(plots.shown(results))],
        "parts": [Key("train images", 0, symbol(0)), Key("test images", 1, symbol(1))],
        "plotlyjs": Markup(get_plotlyjs()),
    }  # fmt: skip
    return _environment().get_template("fewshot.html").render(context)
