from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from playwright.sync_api import Browser, sync_playwright

from conftest import Outcome
from domains_fixture import NAMES, tiny_domains, tiny_settings
from flatminima.protocols import domains, domains_cell, domains_summary, domains_views
from flatminima.report.domains_markdown import swad_markdown
from flatminima.report.domains_page import render_swad
from flatminima.report.domains_tables import accuracy_table, comparison_table, terminal_tables
from flatminima.study.settings import SettingsError
from flatminima.study.store import StoreError
from test_domain_data import domains as folder_of_domains

Run = Callable[..., Outcome]
HOSTILE = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """ERM and SAM on three targets, one seed of two planned: everything the page can show, and partial. Not to be changed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patched:
        data = tiny_domains()
        for module in (domains, domains_cell, domains_summary):
            patched.setattr(module, "domain_data", lambda settings: data)
        settings = tiny_settings(steps=16, tolerance=0.05, lr=1e-2)
        plan = domains.cells(settings, seeds=2, algorithms=("erm", "sam"))
        store = domains.open_store(settings, tmp_path_factory.mktemp("swad") / "out")
        for name, cell in plan.items():
            if cell.seed == 0 or (cell.algorithm == "erm" and cell.target == "left"):
                store.save(name, domains_cell.run_cell(cell))
        torch.set_num_threads(threads)
        return domains.reproduce_swad(plan, store.directory, run=False, command="flatminima reproduce swad --seeds 2")


def test_the_command_trains_resumes_and_shows_what_is_there(run: Run, tmp_path: Path) -> None:
    data = folder_of_domains(tmp_path / "mine", {name: {"cat": 9, "dog": 8} for name in ("ink", "oil", "wash")})
    out = tmp_path / "out"
    small = ["--size", 16, "--steps", 4, "--every", 2, "--batch", 3, "--algorithms", "erm", "--out", out]
    first = run("reproduce", "swad", "--data", data, *small, "--seeds", 1, "--targets", "oil")
    assert first.status == 0, first.err
    found = json.loads((out / "results.json").read_text())
    assert found["plan"] == {"targets": ["oil"], "seeds": [0], "algorithms": ["erm"], "draws": 1}
    assert found["answer"] in " ".join(first.out.split())
    assert "one target says nothing about others" in found["answer"]
    assert (out / "report.html").read_text().startswith("<!doctype html>")
    record = out / "runs" / "erm-oil-seed0.json"
    before = record.stat().st_mtime_ns
    more = run("reproduce", "swad", "--data", data, *small, "--seeds", 2, "--render")
    assert more.status == 0, more.err
    partial = json.loads((out / "results.json").read_text())
    assert partial["finished"]["runs"] == 1
    assert partial["finished"]["planned"] == 6
    assert "--render" not in partial["command"]
    assert "Partial: 1 of 6 runs are finished" in (out / "report.html").read_text()
    again = run("reproduce", "swad", "--data", data, *small, "--seeds", 1, "--targets", "oil")
    assert json.loads((out / "results.json").read_text()) == found
    assert (again.status, record.stat().st_mtime_ns) == (0, before)
    changed = run("reproduce", "swad", "--data", data, *small, "--seeds", 1, "--lr", "0.1")
    assert changed.status == 2
    assert "experiment with other settings (lr: 0.001 there, 0.1 now)" in changed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "pac"], "unknown data set 'pac': expected one of pacs"),
        (["--protocol", "swad"], "unknown protocol 'swad': expected one of swad-2021"),
        (["--workers", "0"], "--workers must be at least 1, got 0"),
        (["--steps", "10"], "--every 25 is more than --steps 10"),
        (["--beside", "absent.json"], "--beside absent.json cannot be read"),
        (["--data", "pacs", "--protocol", "swad-2021"], "give --weights torchvision:IMAGENET1K_V1"),
    ],
)
def test_mistakes_are_said_in_one_line_before_any_work(
    run: Run, tmp_path: Path, arguments: list[str], message: str
) -> None:
    outcome = run("reproduce", "swad", *arguments, "--out", tmp_path / "out")
    assert outcome.status == 2
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_data_that_cannot_be_used_are_named_before_any_work(run: Run, tmp_path: Path) -> None:
    data = folder_of_domains(tmp_path / "mine", {"ink": {"cat": 9, "dog": 8}, "oil": {"cat": 9}})
    outcome = run("reproduce", "swad", "--data", data, "--out", tmp_path / "out")
    assert (outcome.status, "domain 'oil' has no class 'dog', which ink has" in outcome.err) == (2, True)
    shutil.rmtree(data)
    folder_of_domains(data, {"ink": {"cat": 9, "dog": 8}, "oil": {"cat": 9, "dog": 8}})
    (data / "oil" / "cat" / "3.png").write_bytes(b"")
    outcome = run("reproduce", "swad", "--data", data, "--out", tmp_path / "out")
    assert "oil/cat/3.png is not a readable image (0 bytes)" in outcome.err
    (data / "oil" / "cat" / "3.png").unlink()
    outcome = run("reproduce", "swad", "--data", data, "--targets", "oli", "--out", tmp_path / "out")
    assert "unknown target domain 'oli': expected one of oil, ink" in outcome.err
    assert not (tmp_path / "out").exists()


def test_nothing_to_show_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data = tiny_domains()
    monkeypatch.setattr(domains_views, "_loaded", lambda *_: data)
    plan = domains.cells(tiny_settings(), seeds=1)
    with pytest.raises(SettingsError, match="holds no finished run of this experiment yet; run it without --render"):
        domains.reproduce_swad(plan, tmp_path / "out", run=False)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(StoreError, match="is not empty and holds no experiment"):
        domains.reproduce_swad(plan, tmp_path / "other")


@pytest.mark.slow
def test_a_ray_cluster_gives_the_same_results_as_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    data = folder_of_domains(tmp_path / "mine", {name: {"cat": 9, "dog": 8} for name in ("ink", "oil", "wash")})
    from flatminima.protocols.domains_settings import preset

    settings = preset(str(data), size=16, steps=4, every=2, batch=3)
    plan = domains.cells(settings, seeds=1, algorithms=("erm", "sam"))
    found = [
        domains.reproduce_swad(plan, tmp_path / name, **where)  # type: ignore[arg-type]
        for name, where in (("ray", {"ray": "local"}), ("here", {"workers": 2}))
    ]
    for content in found:
        for one in content["runs"]:
            one["seconds"] = None
    assert found[0] == found[1]


# --- tables and page -------------------------------------------------------------------------------------------------


def test_the_summary_has_every_part(results: dict[str, Any]) -> None:
    assert results["finished"]["partial"]
    assert results["finished"]["missing"] == ["erm-middle-seed1", "erm-right-seed1", *(f"sam-{n}-seed1" for n in NAMES)]
    assert set(results["planes"]) == set(NAMES)
    assert {row["method"] for row in results["flatness"]["rows"]} >= {"erm/swad", "sam/selected"}
    assert [row["method"] for row in results["comparisons"]][:2] == ["erm/swad", "erm/swad"]
    assert json.loads(json.dumps(results, allow_nan=False)) == results


def test_tables_keep_the_exact_numbers(results: dict[str, Any]) -> None:
    for row, source in zip(accuracy_table(results).rows, results["methods"], strict=True):
        assert row[0].text == source["label"]
        for cell, target in zip(row[1:-1], NAMES, strict=True):
            assert cell.values == (source["targets"][target]["mean"], source["targets"][target]["se"])
        assert row[-1].values == (source["average"]["mean"], source["average"]["se"])
    for row, source in zip(comparison_table(results).rows, results["comparisons"], strict=True):
        assert row[1].values == (source["difference"], source["low"], source["high"])
        assert row[3].values == (source["p"],)
    assert len(terminal_tables(results)) == 3
    text = swad_markdown(results)
    for table in (accuracy_table(results), comparison_table(results)):
        assert all(cell.text in text for row in table.rows for cell in row)
    assert results["answer"] in text
    assert "7 of 12 runs are finished" in text
    published = copy.deepcopy(results)
    published["published"] = {
        "erm/swad": {"label": "SWAD", "average": 88.1, "se": 0.1, "targets": {"left": {"mean": 1, "se": 2}}}
    }
    cell = next(row for row in accuracy_table(published).rows if row[0].text == "SWAD")[-1]
    assert (cell.text, cell.detail) == ("88.1", "± 0.1, SWAD")


def test_the_page_says_that_it_is_partial_and_escapes_text(results: dict[str, Any]) -> None:
    page = render_swad(results)
    assert "Partial: 7 of 12 runs are finished." in page
    hostile = copy.deepcopy(results)
    hostile["data"]["counts"] = {HOSTILE: hostile["data"]["counts"]["left"]}
    hostile["data"]["held_out"] = {HOSTILE: 3}
    hostile["claims"][0]["statement"] = "<b>bold</b>"
    hostile["answer"] = HOSTILE
    page = render_swad(hostile)
    assert "<script>alert" not in page
    assert "<b>bold" not in page
    own = page[: page.index("<footer>")]
    assert not re.search(r"(?:src|href)=\"(?!#)", own)
    assert "default-src 'none'" in own
    whole = copy.deepcopy(results)
    whole["finished"] |= {"partial": False}
    assert 'class="partial"' not in render_swad(whole)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    path = next((found for name in names if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(names)} is on PATH")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield chromium
        chromium.close()


@pytest.mark.parametrize(("width", "scheme"), [(1400, "light"), (390, "dark")])
def test_the_page_draws_every_plot_and_does_not_overflow(
    browser: Browser, results: dict[str, Any], tmp_path: Path, width: int, scheme: Any
) -> None:
    path = tmp_path / "report.html"
    path.write_text(render_swad(results), encoding="utf-8")
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(path.as_uri())
    page.wait_for_function("document.querySelectorAll('.plot .main-svg').length > 0")
    plots = page.locator(".plot").count()
    assert plots == 1 + 3 + 3 + 4 + 6  # differences, curves, accuracies, flatness, planes
    assert page.locator(".plot:has(.main-svg)").count() == plots
    page.evaluate("() => document.querySelectorAll('details').forEach(part => part.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert complaints == []
    page.close()
