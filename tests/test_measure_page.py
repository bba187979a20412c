"""The page of one minimum against the numbers it shows: parsed, and drawn in a browser."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from playwright.sync_api import Browser, Page
from rich.console import Console
from torch import nn
from torch.nn import functional as F

from flatminima.objective import Objective
from flatminima.report import measure_plots as plots
from flatminima.report import measure_tables as tables
from flatminima.report.measure_page import render_measure
from flatminima.report.terminal import measurement_tables
from flatminima.study.measure_settings import MeasureSettings
from flatminima.study.measuring import measure_minimum

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)> %{x} $&amp; [bold]"
COMMAND = "flatminima measure my.py:build --top 6 --density --trace --layers"


def measured(**options: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 3))
    x, y = torch.randn(30, 5), torch.arange(30) % 3
    asked = {
        "top": 6,
        "smallest": 2,
        "trace": True,
        "density": True,
        "layers": True,
        "runs": 3,
        "steps": 15,
        "max_products": 6,
    }
    settings = MeasureSettings(**(asked | options))  # type: ignore[arg-type]
    return measure_minimum(Objective(model, F.cross_entropy, (x, y)), settings, command=COMMAND)


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """Everything asked for. Not to be changed: copy it first."""
    return measured()


def hostile(results: dict[str, Any]) -> dict[str, Any]:
    found = copy.deepcopy(results)
    found["model"]["name"] = found["command"] = found["answer"] = HOSTILE
    found["notes"], found["cautions"] = [HOSTILE], [HOSTILE]
    for row in found["layers"]:
        row["name"] = row["module"] = HOSTILE
    return found


class Reader(HTMLParser):
    """Cells of the tables by id, with the exact values they hold, and the text of the captions."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: dict[str, list[list[list[float | None]]]] = {}
        self.captions = self.words = ""
        self._rows: list[list[list[float | None]]] = []
        self._skip = self._caption = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag == "figure" and str(found.get("id")).startswith("table-"):
            self._rows = self.tables.setdefault(str(found["id"]), [])
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append(json.loads(found.get("data-values") or "[]"))
        self._skip = tag in ("script", "style")
        self._caption = self._caption or tag == "figcaption"

    def handle_endtag(self, tag: str) -> None:
        self._skip = False
        self._caption = self._caption and tag != "figcaption"

    def handle_data(self, text: str) -> None:
        if not self._skip:
            self.words += text
            self.captions += text if self._caption else ""


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    return reader


# --- the page as HTML ----------------------------------------------------------------------------------------------


def test_tables_hold_the_numbers_of_the_file(results: dict[str, Any]) -> None:
    found = read(render_measure(results)).tables
    rows = found["table-numbers"][1:]
    for pair, row in zip(results["eigenvalues"], rows, strict=False):
        assert row[1] == [pair["value"], pair["error"]]
    values = [row[1] for row in rows[len(results["eigenvalues"]) :]]
    shape = results["shape"]
    for key in ("trace", "layers_trace"):
        assert [results[key]["value"], results[key]["error"]] in values
    for key in ("negative_mass", "resolved_negative_mass"):
        assert [100.0 * v for v in shape[key]] in values
    assert shape["negative_ratio"] in values
    assert shape["condition_numbers"][-1] in values
    assert [results["loss"], results["loss_error"]] in values
    assert [results["gradient"]["norm"], results["gradient"]["error"]] in values
    for layer, row in zip(results["layers"], found["table-layers"][1:], strict=True):
        assert row[1] == [layer["parameters"]]
        for cell, key in zip(row[2:4], ("top", "trace"), strict=True):
            assert cell == [layer[key]["value"], layer[key]["error"]]
        assert row[4] == pytest.approx([100 * layer["share"]["value"], 100 * layer["share"]["error"]])
    parts = list(results["cost"]["parts"].values())
    for part, row in zip([*parts, results["cost"]], found["table-cost"][1:], strict=True):
        assert row[1:] == [[part["products"]], [part["gradient_equivalents"]]]
    for measure, row in zip(results["measures"].values(), found["table-measurements"][1:], strict=True):
        assert row[1][0] == measure["value"]


def test_no_number_stands_without_its_error(results: dict[str, Any]) -> None:
    for table in (tables.numbers_table(results), tables.layers_table(results)):
        for row in table.rows:
            for column, cell in zip(table.columns, row, strict=True):
                if cell.values and column.text not in ("Parameters", "Cost"):
                    assert len(cell.values) > 1 or "rounding" in row[2].text, (row[0].text, cell)
                    assert "±" in cell.text or "[" in cell.text, cell


def test_sentences_cautions_and_notes_are_on_the_page(results: dict[str, Any]) -> None:
    found = copy.deepcopy(results)
    found["notes"].append("attention runs on PyTorch's math kernel, the one that has a second derivative")
    words = " ".join(read(render_measure(found)).words.split())
    for key in ("details", "cautions", "notes"):
        assert found[key]
        for sentence in found[key]:
            assert " ".join(sentence.split()) in words
    assert found["answer"] in words


def test_every_figure_names_the_command_and_the_field(results: dict[str, Any]) -> None:
    page = render_measure(results)
    captions = read(page).captions
    figures = len(re.findall(r"<figure", page))
    assert figures == 3 + 5
    assert captions.count(COMMAND) == captions.count("measure.json → ") == figures
    assert "results.json" not in captions


def test_rendering_changes_nothing_and_is_deterministic(results: dict[str, Any]) -> None:
    before = copy.deepcopy(results)
    assert render_measure(results) == render_measure(json.loads(json.dumps(results)))
    assert results == before


def test_another_schema_is_refused() -> None:
    with pytest.raises(ValueError, match="schema 3, but this version reads schema 1"):
        render_measure({"schema": 3})


def stripped(value: Any, keep: frozenset[str]) -> Any:
    """Every number gone, as JSON writes infinity and NaN."""
    if isinstance(value, dict):
        return {key: entry if key in keep else stripped(entry, keep) for key, entry in value.items()}
    if isinstance(value, list):
        return [stripped(entry, keep) for entry in value]
    return None if isinstance(value, float) else value


CASES: dict[str, dict[str, Any]] = {
    "measures": {"top": None, "smallest": None, "trace": False, "density": False, "layers": False},
    "top": {"smallest": None, "trace": False, "density": False, "layers": False, "measures": ()},
    "trace": {"top": None, "smallest": None, "density": False, "layers": False, "measures": ()},
    "layers of ggn": {"top": None, "smallest": None, "trace": False, "density": False, "matrix": "ggn", "measures": ()},
    "density": {"top": None, "smallest": None, "trace": False, "layers": False, "measures": ()},
    "one": {"top": 1, "smallest": 1, "density": False, "layers": False, "measures": ()},
}


@pytest.fixture(scope="module", params=[*CASES, "nulls", "nothing"])
def partial(request: pytest.FixtureRequest, results: dict[str, Any]) -> dict[str, Any]:
    if request.param == "nulls":
        return stripped(results, frozenset({"n"}))
    if request.param == "nothing":
        return {"schema": 1, "settings": {"curvature": True}}
    return measured(**CASES[request.param])


def test_parts_that_were_not_asked_for_are_left_out(partial: dict[str, Any]) -> None:
    page = re.sub(r"<script.*?</script>", "", render_measure(partial), flags=re.DOTALL)
    assert "None" not in page
    assert not re.search(r">\s*nan\b", page)
    assert ("#layers" in page) == bool(partial.get("layers"))
    assert ("#measures" in page) == bool(partial.get("measures"))


# --- the plots -----------------------------------------------------------------------------------------------------


def test_plots_hold_every_value_with_its_error(results: dict[str, Any]) -> None:
    for panel, end in zip(plots.eigenvalues(results), ("largest", "smallest"), strict=True):
        pairs = [pair for pair in results["eigenvalues"] if pair["end"] == end]
        marks = panel.figure.data[0]
        assert list(marks.y) == [pair["value"] for pair in pairs]
        assert list(marks.error_y.array) == [pair["error"] for pair in pairs]
        assert [symbol == "circle" for symbol in marks.marker.symbol] == [pair["converged"] for pair in pairs]
    assert {pair["converged"] for pair in results["eigenvalues"]} == {True, False}
    for panel, key in zip(plots.layers(results), ("top", "trace"), strict=True):
        bars = panel.figure.data[0]
        assert list(bars.x) == [row[key]["value"] for row in results["layers"]]
        assert list(bars.error_x.array) == [row[key]["error"] for row in results["layers"]]
    found = results["density"]
    everything = plots.density(results)[0].figure.data
    assert list(everything[2].x) == found["grid"]
    assert [max(y, everything[2].y[-1]) for y in found["high"]] == pytest.approx(list(everything[1].y), abs=1e-3)
    assert list(everything[3].x) == found["outliers"]
    assert list(everything[3].error_x.array) == found["outlier_errors"]


def test_many_eigenvalues_over_decades_have_a_log_axis(results: dict[str, Any]) -> None:
    found = copy.deepcopy(results)
    found["eigenvalues"] = [
        {"end": "largest", "rank": i + 1, "value": 10.0 ** (3 - i), "error": 10.0 ** (-i), "converged": True} for i in range(6)
    ]  # fmt: skip
    (panel,) = plots.eigenvalues(found)
    assert panel.figure.layout.yaxis.type == "log"
    found["eigenvalues"][-1]["error"] = 1.0  # reaches below zero
    assert plots.eigenvalues(found)[0].figure.layout.yaxis.type is None


# --- the terminal --------------------------------------------------------------------------------------------------


def printed(results: dict[str, Any], width: int) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(measurement_tables(results))
    return capture.get()


def test_terminal_shows_the_numbers_of_the_page(results: dict[str, Any]) -> None:
    text = printed(results, 500)
    for table in (tables.numbers_table(results), tables.layers_table(results), tables.measures_table(results)):
        for row in table.rows:
            assert all(cell.text in text for cell in row)
    assert results["answer"] in text
    assert all(f"note: {note}" in text for note in results["notes"])
    assert HOSTILE in printed(hostile(results), 300)
    printed(results, 80)


# --- the page in a browser -----------------------------------------------------------------------------------------


class Opened:
    """A page opened from its file, with everything it complained about and asked for."""

    def __init__(self, browser: Browser, path: Path, results: dict[str, Any], width: int = 1400, dark: bool = False):
        path.write_text(render_measure(results), encoding="utf-8")
        scheme: Literal["dark", "light"] = "dark" if dark else "light"
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page: Page = self.context.new_page()
        self.complaints: list[str] = []
        requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        self.page.on("request", lambda request: requests.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_function(
            "() => [...document.querySelectorAll('.plot')].every(plot => plot.querySelector('svg.main-svg'))"
        )
        assert requests == [path.as_uri()]

    def check(self, results: dict[str, Any], width: int) -> None:
        """Every trace of every plot is drawn, and nothing sticks out."""
        made = [*plots.eigenvalues(results), *plots.density(results), *plots.layers(results)]
        drawn = self.page.evaluate(
            "() => [...document.querySelectorAll('.plot')].map(plot => [plot.data.length, "
            "plot.querySelectorAll('.scatterlayer .trace, .barlayer .trace').length])"
        )
        assert drawn == [[len(panel.figure.data)] * 2 for panel in made]
        self.page.evaluate("() => document.querySelectorAll('details').forEach(part => part.open = true)")
        assert self.page.evaluate("() => document.scrollingElement.scrollWidth") <= width
        outside = self.page.evaluate(
            "() => [...document.querySelectorAll('h1, h2, h3, p, li, figcaption, .plot, .scroll, dd')]"
            ".filter(e => !e.closest('table') && e.getBoundingClientRect().right > innerWidth + 0.5)"
            ".map(e => e.outerHTML.slice(0, 80))"
        )
        assert outside == []
        assert self.complaints == []
        self.context.close()


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1400, 390])
def test_browser_draws_every_plot_without_error_or_request(
    browser: Browser, tmp_path: Path, results: dict[str, Any], width: int, dark: bool
) -> None:
    opened = Opened(browser, tmp_path / "report.html", results, width, dark)
    text = opened.page.evaluate("() => getComputedStyle(document.querySelector('.plot .xtick text')).fill")
    assert text == ("rgb(230, 232, 235)" if dark else "rgb(27, 31, 36)")
    opened.check(results, width)


def test_browser_shows_partial_results(browser: Browser, tmp_path: Path, partial: dict[str, Any]) -> None:
    Opened(browser, tmp_path / "report.html", partial, 390).check(partial, 390)


def test_browser_runs_no_script_from_names(browser: Browser, tmp_path: Path, results: dict[str, Any]) -> None:
    found = hostile(results)
    opened = Opened(browser, tmp_path / "report.html", found, 390)
    assert HOSTILE[:20] in opened.page.title()
    assert opened.page.evaluate("() => document.querySelectorAll('img, a:not([href^=\"#\"])').length") == 0
    opened.check(found, 390)


def test_browser_shows_a_deep_network(browser: Browser, tmp_path: Path, results: dict[str, Any]) -> None:
    found = copy.deepcopy(results)
    row = found["layers"][0]
    found["layers"] = [row | {"name": f"model.layers.{i}.self_attention.projection"} for i in range(90)]
    Opened(browser, tmp_path / "report.html", found, 390).check(found, 390)
