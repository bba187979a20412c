"""The report against the results it shows: parsed from the page, drawn in a browser, and printed in the terminal."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from playwright.sync_api import Browser, Page
from rich.console import Console

from flatminima.report import labels, panels, plots, run_plots, tables, terminal
from flatminima.report.compare_markdown import compare_markdown
from flatminima.report.markdown import markdown
from flatminima.report.methods_table import MANY, flatness_table, methods_table, turned, without
from flatminima.report.numbers import difference, factor, integer, plain, with_error
from flatminima.report.page import render
from report_fixture import HOSTILE, LAYER, MEASURES, UNIT, make_results

SUPERSCRIPTS = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
NUMBER = re.compile(r"[+\-]?\d+(?:\.\d+)?(?: × 10\^-?\d+)?")


def parsed(text: str) -> list[tuple[float, float]]:
    """Read the numbers in a formatted text back, each with half a unit of its last digit: the format's inverse."""
    text = text.replace("−", "-").replace("\u202f", "")
    text = re.sub(r"10([⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+)", lambda m: "10^" + m.group(1).translate(SUPERSCRIPTS), text)
    shared = re.match(r"^(?:\((.*)\)|(.*\])) × 10\^(-?\d+)", text)
    scale = 10.0 ** int(shared.group(3)) if shared else 1.0
    body = (shared.group(1) or shared.group(2)) if shared else text
    numbers = []
    for match in NUMBER.findall(body):
        digits, _, power = match.partition(" × 10^")
        unit = scale * 10.0 ** int(power or 0)
        decimals = len(digits.partition(".")[2])
        zeros = 0 if decimals else len(digits) - len(digits.rstrip("0"))
        numbers.append((float(digits) * unit, 0.5001 * unit * 10.0 ** (zeros - decimals)))
    return numbers


def assert_shows(text: str, values: list[float | None]) -> None:
    found, expected = parsed(text), [value for value in values if value is not None]
    assert len(found) == len(expected), (text, values)
    for (shown, slack), value in zip(found, expected, strict=True):
        assert abs(shown - value) <= slack + 1e-12 * abs(value), (text, values)


# --- numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (12.3456, 0.789, "12.35 ± 0.79"),
        (12.3456, 12.0, "12 ± 12"),
        (561.4, 123.4, "560 ± 120"),
        (-2.5e-5, 1.04e-6, "(−2.50 ± 0.10) × 10⁻⁵"),
        (0.0, 0.5, "0.00 ± 0.50"),
        (9.996, 0.0996, "9.996 ± 0.100"),
        (43.80591, 4.4e-6, "43.8059 (± 4 × 10⁻⁶)"),
        (3.0, 0.0, "3.000"),
        (3.0, None, "3.000"),
        (3.0, float("nan"), "3.000"),
        (None, 0.1, "–"),
        (float("nan"), 0.1, "–"),
        (float("inf"), None, "∞"),
    ],
)
def test_value_and_error_share_their_last_digit(value: float | None, error: float | None, text: str) -> None:
    assert with_error(value, error) == text


def test_differences_counts_and_factors() -> None:
    assert difference(0.0123, -0.004, 0.0286) == "+0.012 [−0.004, 0.029]"
    assert difference(-3e7, -4e7, -2e7) == "−3.0 [−4.0, −2.0] × 10⁷"
    assert difference(None, 0.0, 1.0) == "–"
    assert difference(2.0, None, None) == "+2.000"
    assert integer(1234567) == "1\u202f234\u202f567"
    assert (factor(411.2), factor(1.0), factor(1.00004), factor(None)) == ("×411", "×1.0000", "×1.0000", "–")
    assert plain(True) == plain("7") == "–"  # neither is a number in JSON


finite = st.floats(min_value=-1e12, max_value=1e12).filter(lambda x: x == 0 or abs(x) > 1e-12)


@given(finite, st.floats(min_value=1e-12, max_value=1e12))
def test_a_formatted_number_reads_back_within_its_last_digit(value: float, error: float) -> None:
    assert_shows(plain(value), [value])
    text = with_error(value, error)
    if "(±" not in text:
        assert_shows(text, [value, error])


@given(finite, st.floats(min_value=1e-9, max_value=1e9))
def test_a_formatted_interval_reads_back_within_its_last_digit(value: float, half: float) -> None:
    if half > 1e-6 * abs(value):
        assert_shows(difference(value, value - half, value + half), [value, value - half, value + half])


# --- the page as HTML ----------------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """Reads what the tests need: tables by id with text and exact values per cell, captions, and elements' names."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: dict[str, list[list[dict[str, Any]]]] = {}
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.figures: list[dict[str, Any]] = []
        self._table: list[list[dict[str, Any]]] | None = None
        self._cell: dict[str, Any] | None = None
        self._small = self._code = self._figure = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.elements.append((tag, found))
        self._figure = self._figure or tag == "figure"
        if tag == "figure":
            self.figures.append({"id": found["id"], "code": ""})
            self._table = self.tables.setdefault(str(found["id"]), []) if "table" in str(found["class"]) else None
        elif tag == "tr" and self._table is not None:
            self._table.append([])
        elif tag in ("td", "th") and self._table is not None:
            values = json.loads(found.get("data-values") or "[]")
            self._cell = {"text": "", "small": "", "values": values, "heading": tag == "th"}
            self._table[-1].append(self._cell)
        self._small = self._small or tag == "small"
        self._code = self._code or tag == "code"

    def handle_endtag(self, tag: str) -> None:
        self._small = self._small and tag != "small"
        self._code = self._code and tag != "code"
        self._figure = self._figure and tag != "figure"
        if tag in ("td", "th"):
            self._cell = None

    def handle_data(self, data: str) -> None:
        if self._cell is not None:
            self._cell["small" if self._small else "text"] += data
        elif self._code and self._figure:
            self.figures[-1]["code"] += data


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    return reader


def test_table_of_methods_equals_results() -> None:
    results = make_results(failed=(("sam", 3),))
    found = read(render(results)).tables
    for table, names in (("table-performance", list(tables.PERFORMANCE)), ("table-measures", list(MEASURES))):
        head, *rows = found[table]
        counts = ["n = 5", "n = 4, 1 failed", "n = 5", "n = 5"]
        assert [cell["text"] for cell in head[1:]] == ["SGD", "SAM", "SWAD", "SAM+SWAD"]
        assert [cell["small"].replace("\u00a0", " ") for cell in head[1:]] == counts
        assert len(rows) == len(names)
        for name, row in zip(names, rows, strict=True):
            scale = 100.0 if name == "test_accuracy" else 1.0
            for summary, cell in zip(results["methods"], row[1:], strict=True):
                measured = table == "table-measures"
                stat = summary["measures"][name] if measured else summary[name]
                half = (stat["high"] - stat["low"]) / 2
                versus = summary["versus_first"] or {"measures": {}}
                pair = (versus["measures"] if measured else versus).get(name)
                expected = [stat["mean"], half] if half else [stat["mean"]]
                expected += [pair["difference"], pair["low"], pair["high"]] if pair else []
                assert cell["values"] == pytest.approx([scale * value for value in expected], rel=1e-12)
                count = 2 if half else 1
                assert_shows(cell["text"], cell["values"][:count])
                assert_shows(
                    cell["small"].partition(" ")[2].rstrip("abcdefghijklmnopqrstuvwxyz "), cell["values"][count:]
                )


def test_full_tables_equal_results() -> None:
    results = make_results(failed=(("sam", 3),))
    found = read(render(results)).tables
    rows = iter(found["table-summary"][1:])
    for name in [*tables.PERFORMANCE, *MEASURES]:
        for summary in results["methods"]:
            measured = name in MEASURES
            stat = (summary["measures"] if measured else summary)[name]
            versus = summary["versus_first"] or {}
            pair = ((versus.get("measures") or {}) if measured else versus).get(name) or {}
            expected = [stat.get("n", summary["n"]), *(stat.get(k) for k in ("mean", "sd", "error", "low", "high"))]
            expected += [pair.get(k) for k in ("difference", "low", "high")]
            for cell, value in zip(next(rows)[2:], expected, strict=True):
                assert cell["values"] == ([] if value is None else [value])
                assert_shows(cell["text"], cell["values"])
    assert next(rows, None) is None

    measured = [(n, run) for n in MEASURES for run in results["runs"] if n in run["measures"]]
    for (name, run), row in zip(measured, found["table-measurements"][1:], strict=True):
        measurement = run["measures"][name]
        assert row[3]["values"][0] == measurement["value"]
        assert row[1]["text"] == labels.method(run["method"])
        assert row[2]["text"] == str(run["seed"])
        assert row[4]["text"] == measurement["error_kind"]
        assert row[5]["text"] == ("yes" if measurement["converged"] else "no")
    for run, row in zip(results["runs"], found["table-runs"][1:], strict=True):
        accuracy = [] if run["test_accuracy"] is None else [100.0 * run["test_accuracy"]]
        assert parsed(row[10]["text"]) == [] or row[10]["text"] == f"{accuracy[0]:.2f}"
        assert row[7]["values"] == ([] if run["test_loss"] is None else [run["test_loss"]])
    for name, row in zip(MEASURES, found["table-audit"][1:], strict=True):
        ratio = results["audit"]["max_ratio"][name]
        assert [cell["values"] for cell in row[1:3]] == [[ratio[LAYER]], [ratio[UNIT]]]
        assert row[3]["text"] == results["audit"]["verdict"][name]


MANY_METHODS = (
    "sgd",
    "sam",
    "asam",
    "friendly-sam",
    "ae-sam",
    "sa-gd",
    "bsam",
    "swa",
    "tail",
    "swad-released",
    "asam+ema",
)


def test_a_row_per_method_equals_results() -> None:
    results = make_results(methods=MANY_METHODS, failed=(("ae-sam", 0),))
    rows = read(render(results)).tables["table-methods"][1:]
    for summary, row in zip(results["methods"], rows, strict=True):
        name, n, gradients, steps, accuracy, versus, p, corrected, loss = row
        assert name["text"] == labels.method(summary["method"])
        assert n["values"] == [summary["n"]]
        assert gradients["values"] == [summary["gradient_evaluations"]["mean"]]
        least, most = summary["steps"]["least"], summary["steps"]["most"]
        assert steps["small"] == (f"{integer(least)} to {integer(most)}" if least < most else "")
        stat = summary["test_accuracy"]
        assert_shows(accuracy["text"], [100 * stat["mean"], 50 * (stat["high"] - stat["low"])])
        assert_shows(
            loss["text"],
            [summary["test_loss"]["mean"], (summary["test_loss"]["high"] - summary["test_loss"]["low"]) / 2],
        )
        other = (summary["versus_first"] or {}).get("test_loss") or {"low": -1.0, "high": 1.0}
        assert loss["small"].strip() == ("better" if other["high"] < 0 else "worse" if other["low"] > 0 else "")
        pair = (summary["versus_first"] or {}).get("test_accuracy")
        if pair is None:
            assert {versus["text"], p["text"], corrected["text"]} == {"–"}
        else:
            assert_shows(versus["text"], [100 * pair[key] for key in ("difference", "low", "high")])
            better = "better" if pair["low"] > 0 else "worse" if pair["high"] < 0 else ""
            assert versus["small"].strip() == better
            assert (p["values"], corrected["values"]) == ([pair["p"]], [pair["p_holm"]])
    assert [row[0]["text"] for row in rows] == [
        "SGD", "SAM", "ASAM", "Friendly-SAM", "AE-SAM", "SA-GD", "bSAM", "SWA", "Tail average", "SWAD (released)", "ASAM+EMA",
    ]  # fmt: skip


def test_flatness_by_method_shows_means_errors_and_verdicts() -> None:
    results = make_results(methods=MANY_METHODS)
    table = flatness_table(results)
    names = [name for name in MEASURES if name != "parameter_norm"]
    for summary, (_, *cells) in zip(results["methods"], table.rows, strict=True):
        for name, cell in zip(names, cells, strict=True):
            stat = summary["measures"][name]
            assert_shows(cell.text, [stat["mean"], (stat["high"] - stat["low"]) / 2])
            if stat["error"] > 1e-4 * stat["mean"]:
                assert_shows(cell.detail, [stat["error"]])
            else:
                assert cell.detail == ""
            pair = ((summary["versus_first"] or {}).get("measures") or {}).get(name)
            assert cell.verdict == (
                "" if pair is None or pair["high"] >= 0 >= pair["low"] else "flatter" if pair["high"] < 0 else "sharper"
            )


def test_many_methods_are_rows_on_the_page_and_in_the_terminal() -> None:
    results = make_results(methods=MANY_METHODS)
    assert len(MANY_METHODS) > MANY
    page = read(render(results))
    assert "Which of 10 methods find flatter minima than SGD, and which predict better?" in render(results)
    for name, table in (
        ("performance", tables.performance_table(results)),
        ("measures", tables.measure_table(results)),
    ):
        head, *rows = page.tables[f"table-{name}"]
        assert [row[0]["text"] for row in rows] == [labels.method(m) for m in MANY_METHODS]
        assert [cell["text"] for cell in head[1:]] == [row[0].text for row in table.rows]
        for row, column in zip(rows, zip(*(r[1:] for r in table.rows), strict=True), strict=True):
            assert [cell["text"] for cell in row[1:]] == [cell.text for cell in column]
    text = printed(terminal.compare_table(results), 200)
    for table in (without(methods_table(results), "n", "p"), flatness_table(results)):
        for row in table.rows:
            for cell in row:
                assert cell.text in text
    few = printed(terminal.compare_table(make_results()), 200)
    assert "Method by method" in text
    assert "Method by method" not in few
    assert not turned(tables.measure_table({"schema": 1, "runs": [], "methods": []}))


def test_no_two_of_thirty_methods_look_alike() -> None:
    assert len({(panels.colour(i), panels.symbol(i)) for i in range(30)}) == 30


def test_markdown_holds_the_tables_and_breaks_none() -> None:
    results = make_results(methods=MANY_METHODS)
    text = compare_markdown(results)
    assert text.startswith(results["answer"])
    assert f"    $ {results['command']}" in text
    for table in (methods_table(results), flatness_table(results)):
        lines = markdown(table).splitlines()
        assert len(lines) == len(table.rows) + 2
        assert {line.count("|") for line in lines} == {len(table.columns) + 1}
        assert all(line in text for line in lines)
    hostile = compare_markdown(hostile_results())
    assert "<script" not in hostile.split("\n\n", 2)[2]
    assert compare_markdown({"schema": 1, "runs": [], "methods": []})
    for case in MISSING_PARTS.values():
        assert "None |" not in compare_markdown(case)


def test_words_stand_only_where_the_interval_excludes_zero() -> None:
    results = make_results()
    table = tables.measure_table(results)
    first = table.rows[0][1:]
    assert [cell.verdict for cell in first] == ["", "flatter", "flatter", "flatter"]
    pair = results["methods"][1]["versus_first"]["measures"]["lambda_max"]
    pair["high"] = 0.1
    assert tables.measure_table(results).rows[0][2].verdict == ""
    pair.update(difference=3.0, low=1.0, high=5.0)
    assert tables.measure_table(results).rows[0][2].verdict == "sharper"
    assert {cell.verdict for cell in table.rows[-1]} == {""}  # the parameter norm has no flatter direction


def test_every_table_and_plot_names_the_command() -> None:
    results = make_results(failed=(("sgd", 0),))
    figures = read(render(results)).figures
    assert len(figures) == 10 + 7
    assert {figure["code"] for figure in figures} == {results["command"]}


def test_failed_runs_are_listed_with_step_and_reason() -> None:
    rows = read(render(make_results(failed=(("sam", 3), ("swad", 0))))).tables["table-failed"][1:]
    reason = "the training loss is not finite (nan) in batch 4"
    assert [[cell["text"] for cell in row] for row in rows] == [
        ["SAM", "3", "260", reason],
        ["SWAD", "0", "260", reason],
    ]


def test_the_page_names_no_address_outside_itself() -> None:
    reader = read(render(make_results()))
    for tag, attributes in reader.elements:
        for name in ("src", "href", "srcset", "action", "data"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)
    assert "link" not in {tag for tag, _ in reader.elements}


def hostile_results() -> dict[str, Any]:
    """Every text that a user or an exception can put into the results, replaced by markup."""
    results = make_results(methods=("sgd", HOSTILE), seeds=2, failed=((HOSTILE, 1),), name=HOSTILE)
    results["answer"] = results["data"]["note"] = results["network"]["name"] = HOSTILE
    results["cautions"] = [HOSTILE]
    results["details"] = [HOSTILE, "</script><script>alert(2)</script>", "{{ 7 * 7 }}"]
    results["settings"][HOSTILE] = HOSTILE
    results["audit"]["rejected"] = [[HOSTILE, HOSTILE]]
    results["audit"]["verdict"]["trace"] = HOSTILE
    results["audit"]["symmetries"].append(HOSTILE)
    for entry in results["measures"].values():
        entry["label"] = entry["unit"] = entry["meaning"] = f"{HOSTILE} %{{x}} <a href='https://example.org'>a</a> $x$"
    for run in results["runs"]:
        if run["failure"]:
            run["failure"]["reason"] = HOSTILE
        for measurement in run["measures"].values():
            measurement["note"] = measurement["error_kind"] = HOSTILE
    return results


def test_text_from_the_user_is_escaped() -> None:
    clean, hostile = read(render(make_results(methods=("sgd", "sam"), seeds=2))), read(render(hostile_results()))
    scripts = [sum(tag == "script" for tag, _ in page.elements) for page in (clean, hostile)]
    assert scripts[0] == scripts[1]
    assert not any(tag == "img" for tag, _ in hostile.elements)
    assert not any(name.startswith("on") for _, attributes in hostile.elements for name in attributes)
    assert "{{ 7 * 7 }}" in render(hostile_results())


def test_figures_hold_nothing_that_could_end_their_script_element() -> None:
    figures = re.findall(r'<script type="application/json">(.*?)</script>', render(hostile_results()))
    assert len(figures) > 10
    for figure in figures:
        assert "<" not in figure
        assert json.loads(figure)["data"]


def test_another_schema_is_refused() -> None:
    with pytest.raises(ValueError, match="schema 2, but this version reads schema 1"):
        render({"schema": 2})


def stripped(value: Any, keep: frozenset[str], instead: float | None = None) -> Any:
    """The same structure with every number, but those under the names to keep, replaced."""
    if isinstance(value, dict):
        return {key: entry if key in keep else stripped(entry, keep, instead) for key, entry in value.items()}
    if isinstance(value, list):
        return [stripped(entry, keep, instead) for entry in value]
    return instead if isinstance(value, (int, float)) and not isinstance(value, bool) else value


MISSING_PARTS: dict[str, dict[str, Any]] = {
    "one seed": make_results(seeds=1),
    "two seeds": make_results(seeds=2),
    "one method": make_results(methods=("sgd",)),
    "no density, landscape or audit": make_results(density=False, landscape=False, audit=False),
    "all failed": make_results(methods=("sgd", "sam"), seeds=1, failed=(("sgd", 0), ("sam", 0)), audit=False),
    "first method failed": make_results(methods=("sgd", "sam"), seeds=2, failed=(("sgd", 0), ("sgd", 1))),
    "null numbers": stripped(make_results(seeds=2), frozenset({"schema", "seed"})),
    "nan numbers": stripped(
        make_results(seeds=2), frozenset({"schema", "seed", "seeds", "n", "failed", "step"}), float("nan")
    ),
    "no parts": {"schema": 1, "runs": [], "methods": []},
    "null parts": dict.fromkeys(make_results()) | {"schema": 1},
}


@pytest.mark.parametrize("case", MISSING_PARTS)
def test_missing_parts_are_left_out(case: str) -> None:
    page = render(MISSING_PARTS[case])
    assert "None" not in re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r">\s*nan\b", page)


def test_one_seed_gives_no_interval_and_says_so() -> None:
    results = make_results(seeds=1)
    page = render(results)
    assert "No method has two finished seeds" in page
    row = tables.measure_table(results).rows[1]
    assert row[1].text.endswith("†")
    assert row[1].values[1] == pytest.approx(results["methods"][0]["measures"]["trace"]["error"])
    assert row[2].verdict == ""


def test_rendering_changes_nothing_and_is_deterministic() -> None:
    results = make_results(seeds=2)
    before = copy.deepcopy(results)
    assert render(results) == render(results)
    assert results == before


# --- the plots -----------------------------------------------------------------------------------------------------


def test_scatter_holds_every_run_at_its_place() -> None:
    results = make_results(failed=(("sam", 3),))
    for name, panel in zip(MEASURES, plots.accuracy_against_measures(results), strict=True):
        drawn = [(x, y) for trace in panel.figure.data for x, y in zip(trace.x, trace.y, strict=True)]
        runs = [run for run in results["runs"] if run["status"] == "finished"]
        assert drawn == [(run["measures"][name]["value"], 100.0 * run["test_accuracy"]) for run in runs]


def test_parabola_has_the_measured_curvature() -> None:
    results = make_results()
    for panel, run in zip(run_plots.loss_slices(results), results["runs"][::5], strict=True):
        cut = run["landscape"]
        by_name = {trace.name: trace for trace in panel.figure.data}
        for title, key in (("random direction", "random"), ("top eigenvector", "top")):
            assert list(by_name[title].y) == cut[key]
            x, y = by_name[f"{title}, parabola"].x, by_name[f"{title}, parabola"].y
            second = (y[21] - 2 * y[20] + y[19]) / (x[21] - x[20]) ** 2
            assert second == pytest.approx(cut[f"{key}_curvature"], rel=1e-9)
            assert y[20] == cut[key][20]


def test_headline_prefers_a_measure_that_survives_the_audit() -> None:
    results = make_results()
    assert [panel.title for panel in plots.headline(results)] == [
        "Better? Test accuracy",
        "Flatter? Elementwise-adaptive sharpness",
    ]
    results["audit"]["verdict"] = {}
    assert plots.headline(results)[1].title == "Flatter? Top Hessian eigenvalue"


def test_swad_windows_are_shaded() -> None:
    results = make_results()
    found = run_plots.training_curves(results)
    for panel, method in zip(found, ("sgd", "sam", "swad", "sam+swad"), strict=True):
        windows = [run["swad"] for run in results["runs"] if run["method"] == method and run["swad"]]
        assert [(s.x0, s.x1) for s in panel.figure.layout.shapes] == [(w["start_step"], w["end_step"]) for w in windows]


def test_heat_map_shows_the_logarithm_of_the_change_factor() -> None:
    results = make_results()
    del results["audit"]["max_ratio"]["trace"][LAYER]
    (panel,) = plots.audit_heatmap(results)
    heat = panel.figure.data[0]
    assert heat.z[0][1] == pytest.approx(2.6138418, abs=1e-6)  # log10(411)
    assert heat.z[1][0] is None
    assert heat.text[1][0] == "–"
    assert heat.text[0][1] == "×411"


def test_log_axes_are_labelled_with_at_least_two_ticks() -> None:
    for low, high in ((-6.2, 3.3), (-1.0, 0.1), (1.31, 1.45), (-12.0, -11.2), (0.0, 30.0)):
        options = panels.log_axis(low, high)
        assert 2 <= len(options["tickvals"]) <= 9
        assert len(set(options["ticktext"])) == len(options["ticktext"])
        assert all(10**low <= tick <= 10**high for tick in options["tickvals"])


# --- the terminal --------------------------------------------------------------------------------------------------


def printed(renderable: Any, width: int = 100) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def test_terminal_shows_the_numbers_of_the_page() -> None:
    results = make_results(failed=(("sam", 3),))
    text = printed(terminal.compare_table(results), 160)
    for table in (tables.performance_table(results), tables.measure_table(results), tables.audit_table(results)):
        for row in table.rows:
            assert all(cell.text in text for cell in row)
    assert results["answer"] in text
    assert "the training loss is not finite (nan) in batch 4" in text


def test_terminal_takes_brackets_in_names_literally() -> None:
    rows = [
        {"label": "trace [bold]x[/nothing]", "value": 2.0, "error": 0.1, "error_kind": "standard error", "cost": 4.0}
    ]
    assert "trace [bold]x[/nothing]" in printed(terminal.measure_table(rows))
    assert "2.00 ± 0.10" in printed(terminal.measure_table(rows))
    text = printed(terminal.rendered(tables.audit_table(make_results())))
    assert all(part in text for part in ("ReLU layer rescaling", "invariant by theorem", "changes"))
    printed(terminal.compare_table(hostile_results()))
    for case in MISSING_PARTS.values():
        printed(terminal.compare_table(case), 80)


# --- the page in a browser -----------------------------------------------------------------------------------------


class Opened:
    """A page opened from its file, with everything it complained about and asked for."""

    def __init__(self, browser: Browser, path: Path, results: dict[str, Any], width: int = 1400, dark: bool = False):
        path.write_text(render(results), encoding="utf-8")
        scheme: Literal["dark", "light"] = "dark" if dark else "light"
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page: Page = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_function(
            "() => [...document.querySelectorAll('.plot')].every(plot => plot.querySelector('svg.main-svg'))"
        )
        assert self.requests == [path.as_uri()]


def assert_every_plot_is_drawn(opened: Opened, results: dict[str, Any]) -> None:
    made = [
        *plots.headline(results),
        *plots.relative_differences(results),
        *plots.accuracy_against_measures(results),
        *plots.audit_heatmap(results),
        *run_plots.training_curves(results),
        *run_plots.loss_slices(results),
        *run_plots.eigenvalue_densities(results),
    ]
    drawn = opened.page.evaluate(
        "() => [...document.querySelectorAll('.plot')].map(plot => [plot.data.length, "
        "plot.querySelectorAll('.scatterlayer .trace, .heatmaplayer .hm').length])"
    )
    expected = [len(panel.figure.data) for panel in made]
    assert drawn == [[count, count] for count in expected]


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1400, 390])
def test_browser_draws_every_plot_without_error_or_request(
    browser: Browser, tmp_path: Path, width: int, dark: bool
) -> None:
    results = make_results(failed=(("sam", 3),))
    opened = Opened(browser, tmp_path / "report.html", results, width, dark)
    assert_every_plot_is_drawn(opened, results)
    opened.page.evaluate("() => document.querySelectorAll('details').forEach(part => part.open = true)")
    assert opened.page.evaluate("() => document.scrollingElement.scrollWidth") <= width
    # Nothing that holds text or a plot may stick out of the page, except inside a table's own scrolling box.
    outside = opened.page.evaluate(
        "() => [...document.querySelectorAll('h1, h2, h3, p, li, figcaption, .plot, .scroll, dd')]"
        ".filter(e => !e.closest('table') && e.getBoundingClientRect().right > innerWidth + 0.5)"
        ".map(e => e.outerHTML.slice(0, 80))"
    )
    assert outside == []
    text = opened.page.evaluate("() => getComputedStyle(document.querySelector('.plot .xtick text')).fill")
    assert text == ("rgb(230, 232, 235)" if dark else "rgb(27, 31, 36)")
    assert opened.complaints == []
    opened.context.close()


def test_browser_redraws_when_the_colour_scheme_changes(browser: Browser, tmp_path: Path) -> None:
    opened = Opened(browser, tmp_path / "report.html", make_results(seeds=2))
    ink = "() => getComputedStyle(document.querySelector('.plot .xtick text')).fill"
    light = opened.page.evaluate(ink)
    opened.page.emulate_media(color_scheme="dark")
    opened.page.wait_for_function(f"before => ({ink})() !== before", arg=light)
    assert opened.complaints == []
    opened.context.close()


@pytest.mark.parametrize("case", MISSING_PARTS)
def test_browser_shows_incomplete_results(browser: Browser, tmp_path: Path, case: str) -> None:
    opened = Opened(browser, tmp_path / "report.html", MISSING_PARTS[case], 390)
    assert opened.page.evaluate("() => document.scrollingElement.scrollWidth") <= 390
    assert_every_plot_is_drawn(opened, MISSING_PARTS[case])
    assert opened.complaints == []
    opened.context.close()


def test_browser_runs_no_script_from_names(browser: Browser, tmp_path: Path) -> None:
    opened = Opened(browser, tmp_path / "report.html", hostile_results(), 390)
    assert "flatter minima" in opened.page.title()
    assert opened.page.evaluate("() => document.querySelectorAll('img, a:not([href^=\"#\"])').length") == 0
    assert opened.page.evaluate("() => document.scrollingElement.scrollWidth") <= 390
    assert opened.complaints == []
    opened.context.close()


def test_an_infinite_change_is_written_and_a_missing_one_is_not() -> None:
    results = make_results()
    name, kind = results["audit"]["measures"][0], results["audit"]["symmetries"][0]
    results["audit"]["max_ratio"][name][kind] = None
    assert "×∞" in render(results)
    del results["audit"]["max_ratio"][name][kind]
    assert "×∞" not in render(results)
