"""The report: one HTML page with everything inside it, which needs no network and no other file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from flatminima.report import labels, plots, run_plots, tables
from flatminima.report.methods_table import LEGEND, MANY, methods_table, turned
from flatminima.report.numbers import MISSING, as_finite, integer, plain
from flatminima.report.panels import COLOURS, Panel, symbol


@dataclass(frozen=True)
class Drawing:
    """A panel ready for the template: its figure as JSON that is safe inside a script element."""

    title: str
    description: str
    height: int
    figure: Markup


@dataclass(frozen=True)
class Key:
    """One entry of the legend of methods."""

    label: str
    index: int
    symbol: str


def _drawing(panel: Panel) -> Drawing:
    # A "<" could end the script element. Plotly escapes it too, but promises that nowhere.
    encoded = str(panel.figure.to_json()).replace("<", "\\u003c")
    return Drawing(panel.title, panel.description, int(panel.figure.layout.height), Markup(encoded))


def _drawings(panels: Sequence[Panel]) -> list[Drawing]:
    return [_drawing(panel) for panel in panels]


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("flatminima.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["exact"] = lambda values: json.dumps(list(values))
    return environment


def _joined(names: Sequence[str], word: str) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {word} {names[-1]}"


def _question(results: Mapping[str, Any]) -> str:
    names = [labels.method(name) for name in labels.methods(results)]
    if len(names) < 2:
        return f"How flat are the minima that {names[0]} finds?" if names else "How flat are these minima?"
    if len(names) > MANY:
        return f"Which of {len(names) - 1} methods find flatter minima than {names[0]}, and which predict better?"
    others = _joined(names[1:], "and")
    verb, they = ("does", "it") if len(names) == 2 else ("do", "they")
    return f"{verb.capitalize()} {others} find flatter minima than {names[0]}, and {verb} {they} predict better?"


def _cautions(results: Mapping[str, Any]) -> list[str]:
    """What a careful reader should know, beyond what the study itself says."""
    runs = results.get("runs") or []
    cautions = [str(sentence) for sentence in results.get("cautions") or []]
    failed = sum(run.get("status") == "failed" for run in runs)
    if failed:
        cautions.append(
            f"{failed} of {len(runs)} runs failed and {'is' if failed == 1 else 'are'} in no mean; see “Failed runs”."
        )
    if failed < len(runs) and all((summary.get("n") or 0) < 2 for summary in results.get("methods") or []):
        cautions.append("No method has two finished seeds: nothing here says how much the results vary between seeds.")
    measurements = [value for run in runs for value in (run.get("measures") or {}).values() if value]
    loose = sum(value.get("converged") is False for value in measurements)
    if loose:
        cautions.append(
            f"{loose} of {len(measurements)} measurements did not converge; they are marked under “Every measurement”."
        )
    return cautions


def _facts(results: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    data, network, settings = (results.get(key) or {} for key in ("data", "network", "settings"))
    runs = results.get("runs") or []
    finished = sum(run.get("status") == "finished" for run in runs)
    rows = " / ".join(integer(data.get(key)) for key in ("train", "validation", "test"))
    budget = {"gradients": "equal gradient evaluations", "steps": "equal optimiser steps"}
    classes = data.get("classes")
    count = len(classes) if isinstance(classes, (list, tuple)) else classes
    facts = [
        ("Data", str(data.get("name", MISSING)), f"{integer(count)} classes"),
        ("Rows", rows, "training / validation / test"),
        ("Network", str(network.get("name", MISSING)), f"{integer(network.get('parameters'))} parameters"),
        ("Runs", f"{finished} of {len(runs)}", "finished"),
    ]
    if settings.get("budget") is not None:
        facts.append(("Budget", budget.get(str(settings["budget"]), str(settings["budget"])), "for every method"))
    return facts


def _proofs(results: Mapping[str, Any]) -> list[str]:
    largest: dict[str, float] = {}
    for run in results.get("runs") or []:
        for kind, change in (run.get("proofs") or {}).items():
            number = as_finite(change)
            if number is not None:
                largest[kind] = max(number, largest.get(kind, 0.0))
    return [f"{labels.symmetry(kind)}: {plain(change, 2)}" for kind, change in largest.items()]


def _rejected(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(str(site), str(reason)) for site, reason in (results.get("audit") or {}).get("rejected") or []]


def render(results: Mapping[str, Any]) -> str:
    """Render the results of a comparison as one self-contained HTML page.

    The page holds its style, its script and plotly.js (about 5 MB) and asks for nothing over the network. Text from
    the user is escaped. Parts that the results lack (no density, no audit, every run failed) are left out.

    Args:
        results: the dictionary in ``results.json``.

    Returns:
        The page, to be written as UTF-8.

    Raises:
        ValueError: the dictionary has another schema than 1.

    Example:
        >>> page = render({"schema": 1, "command": "flatminima compare", "answer": "No run finished.", "runs": []})
        >>> page.startswith("<!doctype html>"), "No run finished." in page
        (True, True)
    """
    if results.get("schema") != 1:
        raise ValueError(
            f"results have schema {results.get('schema')!r}, but this version reads schema 1: make them anew"
        )
    names = labels.methods(results)
    performance, measures = tables.performance_table(results), tables.measure_table(results)
    if len(names) > MANY:
        performance, measures = turned(performance), turned(measures)
    context = {
        "results": results,
        "question": _question(results),
        "answer": str(results.get("answer") or "No answer was recorded."),
        "cautions": _cautions(results),
        "facts": _facts(results),
        "command": str(results.get("command") or "flatminima compare"),
        "keys": [Key(labels.method(name), index % COLOURS, symbol(index)) for index, name in enumerate(names)],
        "methods_legend": LEGEND,
        "first": labels.method(names[0]) if names else "",
        "several": any((summary.get("n") or 0) > 1 for summary in results.get("methods") or []),
        "interval_count": tables.interval_count(results),
        "windows": any(run.get("swad") for run in results.get("runs") or []),
        "failures": any(run.get("status") == "failed" for run in results.get("runs") or []),
        "proofs": _proofs(results),
        "rejected": _rejected(results),
        "tables": {
            "methods": methods_table(results),
            "performance": performance,
            "measures": measures,
            "summary": tables.summary_table(results),
            "failed": tables.failed_table(results),
            "runs": tables.run_table(results),
            "measurements": tables.measurement_table(results),
            "audit": tables.audit_table(results),
            "glossary": tables.glossary_table(results),
            "settings": tables.settings_table(results),
        },
        "plots": {
            "headline": _drawings(plots.headline(results)),
            "differences": _drawings(plots.relative_differences(results)),
            "scatter": _drawings(plots.accuracy_against_measures(results)),
            "audit": _drawings(plots.audit_heatmap(results)),
            "curves": _drawings(run_plots.training_curves(results)),
            "slices": _drawings(run_plots.loss_slices(results)),
            "densities": _drawings(run_plots.eigenvalue_densities(results)),
        },
        "plotlyjs": Markup(get_plotlyjs()),
    }
    return _environment().get_template("page.html").render(context)
