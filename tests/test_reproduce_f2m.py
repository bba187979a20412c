"""``flatminima reproduce f2m`` as a person meets it: runs, resumes, refuses, and the page it leaves."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import Browser

from conftest import Outcome
from fewshot_fixture import tiny_data, tiny_settings
from flatminima.data import DataError
from flatminima.protocols import fewshot, fewshot_views
from flatminima.protocols.fewshot_settings import FewShotSettings, preset
from flatminima.protocols.fewshot_split import FewShotSplit
from flatminima.report.fewshot_markdown import f2m_markdown
from flatminima.report.fewshot_page import render_f2m
from flatminima.report.fewshot_tables import comparison_table, session_table, terminal_tables
from flatminima.study.settings import SettingsError
from flatminima.study.store import StoreError, write_json

Run = Callable[..., Outcome]
HOSTILE = "<script>alert(1)</script>"
METHODS = ("baseline", "baseline-raw", "ft", "f2m", "f2m-no-noise", "f2m-no-clamp", "crt")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two seeds and two draws, one task missing: everything the page can show, and partial. Not to be changed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patched:
        data = tiny_data()
        patched.setattr(fewshot_views, "loaded", lambda *_: data)
        made = fewshot.plan(tiny_settings(), METHODS, seeds=2, draws=2)
        directory = tmp_path_factory.mktemp("f2m") / "out"
        _in_this_process(made, directory)
        (directory / "runs" / "flat+clamp-seed1-draw1.json").unlink()
        torch.set_num_threads(threads)
        return fewshot.reproduce_f2m(made, directory, run=False, command="flatminima reproduce f2m --seeds 2")


def _in_this_process(made: fewshot.Plan, directory: Path) -> None:
    """What the workers would do; they would not see a patched data set."""
    store = fewshot.open_store(made.settings, directory)
    for name, cell in made.base_cells().items():
        found = fewshot.run_base(cell)
        store.save(name, found.record, found.files)
    for name, second in fewshot.second_cells(made, store).items():
        store.save(name, fewshot._run_second(second, lambda fraction: None).record)


def pictures(folder: Path, classes: int = 5, train: int = 8, test: int = 4) -> Path:
    """``train/<class>/<file>`` and ``test/<class>/<file>``, 16 pixels a side."""
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("test", test)):
        for c in range(classes):
            (folder / part / f"class{c}").mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 100, (16, 16, 3)).astype(np.uint8)
                pixels[3 * c : 3 * c + 3] += 120
                Image.fromarray(pixels).save(folder / part / f"class{c}" / f"{i}.png")
    return folder


SMALL = [
    "--size", 16, "--base-classes", 3, "--way", 1, "--shot", 2, "--iterations", 3, "--model", "resnet20", "--width", 4,
    "--probe-rows", 12, "--layers", 2, "--held-out", 0.2,
]  # fmt: skip


def test_the_command_trains_resumes_and_shows_what_is_there(run: Run, tmp_path: Path) -> None:
    data, out = pictures(tmp_path / "mine"), tmp_path / "out"
    small = ["--data", data, *SMALL, "--methods", "baseline,f2m,f2m-no-noise", "--out", out]
    first = run("reproduce", "f2m", *small, "--seeds", 1, "--draws", 1)
    assert first.status == 0, first.err
    found = json.loads((out / "results.json").read_text())
    assert found["plan"]["methods"] == ["baseline", "f2m", "f2m-no-noise"]
    assert found["answer"] in " ".join(first.out.split())
    assert "one base seed says nothing about others" in found["answer"]
    assert (out / "report.html").read_text().startswith("<!doctype html>")
    split = FewShotSplit.from_dict(json.loads((out / "splits" / "seed0.json").read_text()))
    assert split.files[0][0][0].startswith(f"class{split.sessions[0][0]}/")
    record = out / "runs" / "flat+clamp-seed0-draw0.json"
    before = record.stat().st_mtime_ns
    more = run("reproduce", "f2m", *small, "--seeds", 2, "--draws", 2, "--render")
    assert more.status == 0, more.err
    partial = json.loads((out / "results.json").read_text())
    assert partial["finished"]["partial"]
    assert "--render" not in partial["command"]
    assert "tasks are finished. Everything below is over those alone." in (out / "report.html").read_text()
    again = run("reproduce", "f2m", *small, "--seeds", 1, "--draws", 1)
    assert (again.status, record.stat().st_mtime_ns) == (0, before)
    assert json.loads((out / "results.json").read_text()) == found
    changed = run("reproduce", "f2m", *small, "--seeds", 1, "--draws", 1, "--bound", 0.1)
    assert changed.status == 2
    assert "experiment with other settings (bound: 0.005 there, 0.1 now)" in changed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "cifar"], "unknown data set 'cifar': expected one of cifar100"),
        (["--protocol", "papers"], "unknown protocol 'papers': expected one of paper"),
        (["--methods", "f2n"], "unknown method 'f2n': expected one of f2m"),
        (["--workers", "0"], "--workers must be at least 1, got 0"),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--bound", "0"], "--bound must be finite and > 0, got 0.0"),
        (["--shot", "500"], "has 145 train images: expected at least 500, the shots"),
        (["--base-classes", "10"], "10 base classes and 1 sessions of 1 need 11 classes: digits has 10"),
        (["--layers", "30"], "--layers 30: the model has 7 convolutions larger than one pixel"),
        (["--layer-names", "conv9*"], "--layer-names 'conv9*' matches no parameter"),
        (["--model", "mlp"], "convolutions larger than one pixel"),
        (["--methods", "f2m-swad", "--held-out", "0"], "f2m-swad needs base images held out"),
        (["--split", "absent.json"], "the split absent.json cannot be read"),
        (["--validate", "--split", "absent.json"], "--validate makes its own splits; leave out --split"),
        (["--split", "absent.json", "--shot", "1", "--order", "sorted"], "--split decides --shot, --order: leave them out"),
        (["--data", "mini-imagenet"], "mini-imagenet was not found"),
    ],
)  # fmt: skip
def test_mistakes_are_said_in_one_line_before_any_work(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.delenv("FLATMINIMA_DATA", raising=False)
    chosen = arguments if "--data" in arguments else ["--data", "digits", *arguments]
    outcome = run("reproduce", "f2m", *chosen, "--out", tmp_path / "out")
    assert outcome.status == 2
    assert re.search(re.escape(message).replace("145", r"\d+"), outcome.err), outcome.err
    assert outcome.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "methods", "message"),
    [
        (
            {"layer_names": ("*",), "relative": True},
            ["f2m"],
            "the box of the base flat: Parameter number 2 of shape .* is zero",
        ),
        (
            {"layer_names": ("*",)},
            ["f2m-relative"],
            "is zero or not finite, so a bound relative to its size means nothing",
        ),
        ({"joint_iterations": 0}, ["joint"], "joint needs --joint-iterations of at least 1, got 0"),
        ({"joint_iterations": 0, "joint": "scratch"}, ["crt"], "crt with --joint scratch needs --joint-iterations"),
    ],
)
def test_settings_that_methods_cannot_use_are_refused_before_any_work(
    changes: dict[str, Any], methods: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tiny_data()
    monkeypatch.setattr(fewshot_views, "loaded", lambda *_: data)
    with pytest.raises(SettingsError, match=message):
        fewshot.plan(tiny_settings(**changes), methods, seeds=1, draws=1)
    fewshot.plan(tiny_settings(**changes), ["baseline"], seeds=1, draws=1)


def test_nothing_to_show_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data = tiny_data()
    monkeypatch.setattr(fewshot_views, "loaded", lambda *_: data)
    made = fewshot.plan(tiny_settings(), ["baseline"], seeds=1, draws=1)
    with pytest.raises(SettingsError, match="holds no finished stream of sessions yet; run it without --render"):
        fewshot.reproduce_f2m(made, tmp_path / "out", run=False)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(StoreError, match="is not empty and holds no experiment"):
        fewshot.reproduce_f2m(made, tmp_path / "other")


@pytest.mark.usefixtures("one_thread")
def test_a_base_that_diverged_has_no_sessions_and_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data = tiny_data()
    monkeypatch.setattr(fewshot_views, "loaded", lambda *_: data)
    made = fewshot.plan(tiny_settings(lr=1e12, probe_rows=0), ["baseline", "f2m-frozen"], seeds=1, draws=1)
    good = fewshot.plan(tiny_settings(probe_rows=0), ["baseline", "f2m-frozen"], seeds=1, draws=1)
    _in_this_process(good, tmp_path / "good")
    store = fewshot.open_store(good.settings, tmp_path / "good")
    store.save("flat-seed0", fewshot.run_base(made.base_cells()["flat-seed0"]).record)
    (tmp_path / "good" / "runs" / "flat+frozen-seed0-draw0.json").unlink()
    found = fewshot.reproduce_f2m(good, tmp_path / "good", run=False)
    assert found["finished"]["missing"] == []
    assert "1 tasks failed and are in no mean; the first is flat: the training loss became" in " ".join(
        found["cautions"]
    )
    assert "the training loss became" in f2m_markdown(found)


@pytest.mark.parametrize("part", ["train", "test"])
def test_broken_pictures_are_named_before_any_work(part: str, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "mine")
    broken = folder / part / "class1" / "0.png"
    broken.write_bytes(broken.read_bytes()[:-60])
    made = fewshot.plan(small_settings(folder), ["baseline"], seeds=1, draws=1)
    with pytest.raises(DataError, match=r"class1/0.png is not a readable image"):
        fewshot.reproduce_f2m(made, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("one_thread")
def test_an_experiment_whose_bases_all_diverged_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data = tiny_data()
    monkeypatch.setattr(fewshot_views, "loaded", lambda *_: data)
    made = fewshot.plan(tiny_settings(lr=1e12, probe_rows=0), ["baseline"], seeds=1, draws=1)
    _in_this_process(made, tmp_path / "out")
    with pytest.raises(
        SettingsError, match=r"every base training diverged \(plain: the training loss became .*: lower --lr"
    ):
        fewshot.reproduce_f2m(made, tmp_path / "out")


@pytest.mark.usefixtures("one_thread")
def test_weights_are_needed_only_for_what_is_left_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data, out = tiny_data(), tmp_path / "out"
    monkeypatch.setattr(fewshot_views, "loaded", lambda *_: data)
    made = fewshot.plan(tiny_settings(probe_rows=0), ["baseline", "f2m-frozen"], seeds=1, draws=1)
    _in_this_process(made, out)
    weights = out / "runs" / "plain-seed0.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    assert fewshot.reproduce_f2m(made, out)["finished"]["missing"] == []
    (out / "runs" / "plain+frozen-seed0-draw0.json").unlink()
    for broken in (None, content[:-1], (out / "runs" / "flat-seed0.safetensors").read_bytes()):
        if broken is not None:
            weights.write_bytes(broken)
        with pytest.raises(
            StoreError, match=r"plain-seed0.safetensors is (missing|not what its record says); remove .*json"
        ):
            fewshot.reproduce_f2m(made, out)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("where", [{"workers": 2}, pytest.param({"ray": "local"}, marks=pytest.mark.slow)])
def test_where_it_runs_changes_nothing(where: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    settings = small_settings(pictures(tmp_path / "mine"))
    made = fewshot.plan(settings, ["baseline", "f2m"], seeds=1, draws=2)
    _in_this_process(made, tmp_path / "here")
    found = [
        fewshot.reproduce_f2m(made, tmp_path / "here", run=False),
        fewshot.reproduce_f2m(made, tmp_path / "there", **where),
    ]
    for content in found:
        for one in (*content["streams"], *content["bases"]):
            one["seconds"] = None
    assert found[0] == found[1]


@pytest.mark.usefixtures("one_thread")
def test_a_split_that_was_written_can_be_used_again(tmp_path: Path) -> None:
    settings = small_settings(pictures(tmp_path / "mine"))
    data, split = fewshot_views.data_and_split(settings, 0, 1)
    split.save(tmp_path / "split.json")
    found = []
    for given in (None, str(tmp_path / "split.json")):
        made = fewshot.plan(replace(settings, split=given), ["baseline", "f2m"], seeds=1, draws=1)
        _in_this_process(made, tmp_path / f"with {given is not None}")
        found.append(fewshot.reproduce_f2m(made, tmp_path / f"with {given is not None}", run=False)["streams"])
    assert [s["correct"] for s in found[0]] == [s["correct"] for s in found[1]]
    with pytest.raises(SettingsError, match=r"--draws 2: the split .*split.json has 1"):
        fewshot.plan(replace(settings, split=str(tmp_path / "split.json")), ["baseline"], seeds=1, draws=2)
    assert data.train.names is not None


def test_a_directory_whose_pictures_have_changed_is_refused(tmp_path: Path) -> None:
    settings = small_settings(pictures(tmp_path / "mine"))
    out = tmp_path / "out"
    fewshot.open_store(settings, out)

    def splits(draws: int) -> dict[Path, dict[str, Any]]:
        return fewshot._checked_splits(fewshot.plan(settings, ["baseline"], seeds=1, draws=draws), out)

    (path, two), *_ = splits(2).items()
    write_json(path, two)
    assert splits(1) == {path: two}  # the records of the other draw are still there
    assert len(splits(3)[path]["shots"]) == 3
    for c in range(5):
        (tmp_path / "mine" / "train" / f"class{c}" / "7.png").unlink()
    fewshot_views.loaded.cache_clear()
    made = fewshot.plan(settings, ["baseline"], seeds=1, draws=1)
    for run in (True, False):
        with pytest.raises(StoreError, match=r"seed0.json has other train, .*shots, files than the data give now"):
            fewshot.reproduce_f2m(made, out, run=run)
    assert json.loads(path.read_text()) == two


def small_settings(data: Path) -> FewShotSettings:
    return preset(
        str(data), size=16, base=3, way=1, shot=2, iterations=3, model_options={"width": 4, "blocks": 1}, layers=2,
        probe_rows=0, crop=14,
    )  # fmt: skip


# --- tables and page -------------------------------------------------------------------------------------------------


def test_the_summary_has_every_part(results: dict[str, Any]) -> None:
    assert results["finished"]["missing"] == ["flat+clamp-seed1-draw1"]
    assert [row["name"] for row in results["methods"]] == [
        "baseline", "baseline-raw", "ft", "crt", "f2m", "f2m-no-noise", "f2m-no-clamp",
    ]  # fmt: skip
    assert results["methods"][4]["numbers"]["last"]["cells"] == 3
    assert {row["base"] for row in results["flatness"]["rows"]} == {"plain", "flat"}
    assert {row["name"] for row in results["movement"]} == {"ft", "crt", "f2m", "f2m-no-noise", "f2m-no-clamp"}
    assert len(results["streams"]) == 2 * 2 * 6 - 1  # baseline and baseline-raw share theirs
    assert json.loads(json.dumps(results, allow_nan=False)) == results


def test_tables_keep_the_exact_numbers(results: dict[str, Any]) -> None:
    for row, source in zip(session_table(results).rows, results["methods"], strict=True):
        assert row[0].text == source["label"]
        for cell, stat in zip(row[1:-2], source["sessions"]["accuracy"], strict=True):
            assert cell.values[0] == stat["mean"]
    for row, source in zip(comparison_table(results).rows, results["comparisons"], strict=True):
        average = source["quantities"]["average"]
        assert row[1].values == (average["mean"], average["low"], average["high"])
    assert len(terminal_tables(results)) == 3
    text = f2m_markdown(results)
    for table in (session_table(results), comparison_table(results)):
        assert all(cell.text in text for row in table.rows for cell in row)
    assert results["answer"] in text
    published = copy.deepcopy(results)
    published["published"] = {"paper": {"f2m": {"label": "F2M", "accuracy": [64.7, 50.0, 44.6], "check": "recalled"}}}
    rows = session_table(published).rows
    place = next(i for i, row in enumerate(rows) if row[0].text == "F2M") + 1
    assert [cell.text for cell in rows[place]] == ["F2M", "64.70", "50.00", "44.60", "20.10", "53.10"]
    assert rows[place][0].detail == "published: recalled"


def test_the_page_says_that_it_is_partial_and_escapes_text(results: dict[str, Any]) -> None:
    page = render_f2m(results)
    assert "Partial: 31 of 32 tasks are finished." in page
    hostile = copy.deepcopy(results)
    hostile["answer"] = HOSTILE
    hostile["methods"][0]["label"] = HOSTILE
    hostile["claims"][0]["statement"] = "<b>bold</b>"
    page = render_f2m(hostile)
    assert "<script>alert" not in page
    assert "<b>bold" not in page
    own = page[: page.index("<footer>")]
    assert not re.search(r"(?:src|href)=\"(?!#)", own)
    assert "default-src 'none'" in own
    whole = copy.deepcopy(results)
    whole["finished"] |= {"partial": False}
    assert 'class="partial"' not in render_f2m(whole)


def test_the_page_in_a_browser(results: dict[str, Any], browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text(render_f2m(results))
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith("file:") else errors.append(request.url))
    page.goto((tmp_path / "report.html").as_uri())
    page.wait_for_function("document.querySelectorAll('.plot .main-svg').length >= 9")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.wait_for_timeout(500)  # plots follow the window
    inner = page.evaluate("[...document.querySelectorAll('.js-plotly-plot')].map(plot => plot._fullLayout._size.w)")
    assert min(inner) > 150, inner  # the names of methods leave room for what is drawn
    page.close()
    assert errors == []
