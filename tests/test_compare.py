"""The main job as a whole: the same numbers whatever interrupts it, and nothing done twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from conftest import TINY, TINY_ARGUMENTS, Comparison, Outcome
from flatminima import data, models
from flatminima.measures import resolve
from flatminima.study import compare as compare_module
from flatminima.study.checkpoint import load_weights
from flatminima.study.compare import RunJob, compare, execute
from flatminima.study.methods import METHODS
from flatminima.study.settings import CompareSettings
from flatminima.study.statistics import holm, interval, paired, paired_p
from flatminima.study.store import RunStore, StoreError
from flatminima.study.summary import summarise

RUNS = [f"{method}-seed{seed}" for method in TINY.methods for seed in range(TINY.seeds)]
MAIN = "from flatminima.cli import main; main()"


def without_times(results: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in results.items() if key != "times"}


def finished(directory: Path) -> set[str]:
    return {run for run in RUNS if (directory / "runs" / f"{run}.json").exists()}


def stamps(directory: Path, runs: set[str]) -> dict[str, int]:
    """When the files of these runs were last written."""
    return {
        path.name: path.stat().st_mtime_ns
        for run in runs
        for suffix in ("json", "train.json", "safetensors")
        for path in [directory / "runs" / f"{run}.{suffix}"]
    }


@contextmanager
def command(directory: Path) -> Iterator[subprocess.Popen[str]]:
    """The real command in a process group of its own, one run at a time."""
    arguments = [sys.executable, "-c", MAIN, *TINY_ARGUMENTS, "--workers", "1", "--out", str(directory)]
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def wait_for(process: subprocess.Popen[str], directory: Path, runs: int) -> None:
    while len(finished(directory)) < runs:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def test_the_results_are_repeated_exactly_with_another_number_of_workers(
    comparison: Comparison, tmp_path: Path
) -> None:
    again = compare(TINY, tmp_path, workers=1)
    assert without_times(again) == without_times(comparison.results)
    assert json.loads((tmp_path / "results.json").read_text()) == again
    assert set(again["times"]) == set(RUNS)


def test_a_comparison_that_is_killed_and_stopped_ends_as_if_it_had_not_been(
    comparison: Comparison, tmp_path: Path
) -> None:
    with command(tmp_path) as process:
        wait_for(process, tmp_path, 2)
        process.kill()
        process.communicate()
    first = finished(tmp_path)
    assert 2 <= len(first) < len(RUNS)
    kept = stamps(tmp_path, first)
    assert not (tmp_path / "results.json").exists()

    with command(tmp_path) as process:
        wait_for(process, tmp_path, len(first) + 2)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"Stopped. What is finished is kept in {tmp_path}" in " ".join(err.split())
    assert "Traceback" not in out + err
    second = finished(tmp_path)
    assert first < second < set(RUNS)
    assert stamps(tmp_path, first) == kept
    kept = stamps(tmp_path, second)

    told: list[tuple[str, float]] = []
    resumed = compare(TINY, tmp_path, workers=2, progress=lambda run, fraction: told.append((run, fraction)))
    assert without_times(resumed) == without_times(comparison.results)
    assert stamps(tmp_path, second) == kept
    assert {run for run, fraction in told if fraction < 1} == set(RUNS) - second
    for run in RUNS:
        weights = (directory / "runs" / f"{run}.safetensors" for directory in (tmp_path, comparison.directory))
        assert len({path.read_bytes() for path in weights}) == 1


@pytest.mark.usefixtures("one_thread")
def test_a_run_that_is_trained_is_only_measured(
    comparison: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(comparison.directory, tmp_path / "copy")
    run = tmp_path / "copy" / "runs" / "sam+swad-seed1.json"
    expected = json.loads(run.read_text())
    run.unlink()

    def train(*_: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(compare_module, "train", train)
    execute(RunJob(TINY, tmp_path / "copy", "sam+swad", 1))
    found = json.loads(run.read_text())
    assert {**found, "seconds": 0} == {**expected, "seconds": 0}
    (tmp_path / "copy" / "runs" / "sam+swad-seed1.train.json").unlink()  # weights that no record vouches for
    with pytest.raises(AssertionError, match="trained again"):
        execute(RunJob(TINY, tmp_path / "copy", "sam+swad", 1))


@pytest.mark.usefixtures("one_thread")
def test_a_run_whose_weights_are_lost_is_trained_again(comparison: Comparison, tmp_path: Path) -> None:
    shutil.copytree(comparison.directory, tmp_path / "copy")
    runs = tmp_path / "copy" / "runs"
    expected = json.loads((runs / "sgd-seed1.json").read_text())
    (runs / "sgd-seed1.json").unlink()
    (runs / "sgd-seed1.safetensors").write_bytes((runs / "sgd-seed1.safetensors").read_bytes()[:100])
    execute(RunJob(TINY, tmp_path / "copy", "sgd", 1))
    assert {**json.loads((runs / "sgd-seed1.json").read_text()), "seconds": 0} == {**expected, "seconds": 0}


def test_a_finished_comparison_starts_no_process(
    comparison: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(comparison.directory, tmp_path / "copy")
    monkeypatch.setattr(subprocess, "Popen", None)
    monkeypatch.setattr(os, "posix_spawn", None, raising=False)
    monkeypatch.setattr(compare_module, "execute", None)
    assert compare(TINY, tmp_path / "copy", workers=2) == comparison.results


def test_changed_settings_are_refused_before_any_work(comparison: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in comparison.directory.rglob("*")}
    monkeypatch.setattr(compare_module, "run_jobs", None)
    with pytest.raises(StoreError, match=r"lr: 0\.05 there, 0\.1 now; rho: 0\.05 there, 0\.2 now"):
        compare(replace(TINY, rho=0.2, lr=0.1), comparison.directory)
    assert {path: path.stat().st_mtime_ns for path in comparison.directory.rglob("*")} == before


def test_a_failed_run_is_reported_and_the_others_go_on(tmp_path: Path, run: Callable[..., Outcome]) -> None:
    arguments = (*TINY_ARGUMENTS, "--methods", "sgd,sam", "--seeds", 1, "--rho", "1e6", "--out", tmp_path)
    ended = run(*arguments)
    assert ended.status == 0, ended.err
    results = json.loads((tmp_path / "results.json").read_text())
    methods = {m["method"]: (m["n"], m["failed"]) for m in results["methods"]}
    assert methods == {"sgd": (1, 0), "sam": (0, 1)}
    failed = [r for r in results["runs"] if r["status"] == "failed"]
    assert [(r["method"], r["seed"]) for r in failed] == [("sam", 0)]
    page = (tmp_path / "report.html").read_text()
    for r in failed:
        assert r["failure"]["step"] == r["steps"] - 1
        assert r["test_accuracy"] is None
        for text in (page, " ".join(ended.out.split())):
            assert r["failure"]["reason"] in text
    assert results["answer"].startswith("No comparison")
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    assert run(*arguments).status == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()} == kept  # a failure is a result


@pytest.mark.usefixtures("one_thread")
def test_a_run_that_cannot_be_measured_has_failed(comparison: Comparison, tmp_path: Path) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(comparison.directory, directory)
    store = RunStore(directory, TINY.to_dict())
    splits = data.load("digits", train_size=TINY.train_size)
    model = models.build("mlp", splits.input_shape, splits.classes)
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    store.save_trained("sgd-seed0", model, json.loads((directory / "runs" / "sgd-seed0.train.json").read_text()))
    execute(RunJob(TINY, directory, "sgd", 0))
    found = store.finished("sgd-seed0") or {}
    assert found["status"] == "failed"
    assert found["failure"]["step"] == 40
    assert found["failure"]["reason"].startswith("while measuring: ")


@pytest.mark.parametrize("method", TINY.methods)
def test_the_scores_are_those_of_the_stored_weights(comparison: Comparison, method: str) -> None:
    splits = data.load("digits", train_size=TINY.train_size)
    model = models.build("mlp", splits.input_shape, splits.classes)
    load_weights(model, comparison.directory / "runs" / f"{method}-seed1.safetensors")
    model.double().eval()
    (found,) = (r for r in comparison.results["runs"] if (r["method"], r["seed"]) == (method, 1))
    for name in ("train", "validation", "test"):
        split = getattr(splits, name)
        logits = model(split.x.double()).detach()
        assert found[f"{name}_loss"] == pytest.approx(float(F.cross_entropy(logits, split.y)), rel=1e-5)
        assert found[f"{name}_accuracy"] == pytest.approx(float((logits.argmax(1) == split.y).double().mean()))
    norm = torch.cat([p.detach().reshape(-1) for p in model.parameters()]).norm()
    assert found["measures"]["parameter_norm"]["value"] == pytest.approx(float(norm), rel=1e-6)


def test_the_statistics_are_those_of_the_runs(comparison: Comparison) -> None:
    results = comparison.results
    assert [(r["method"], r["seed"]) for r in results["runs"]] == [(m, s) for m in TINY.methods for s in (0, 1)]
    runs = {m: [r for r in results["runs"] if r["method"] == m] for m in TINY.methods}
    for entry in results["methods"]:
        mine, first = runs[entry["method"]], runs["sgd"]
        assert (entry["n"], entry["failed"]) == (2, 0)
        for key in ("steps", "gradient_evaluations"):
            spent = [r[key] for r in mine]
            assert entry[key] == {"least": min(spent), "mean": sum(spent) / 2, "most": max(spent)}
        assert entry["test_accuracy"] == interval([r["test_accuracy"] for r in mine])
        assert entry["generalisation_gap"] == interval([r["test_loss"] - r["train_loss"] for r in mine])
        for name in (m.name for m in resolve()):
            values = [r["measures"][name]["value"] for r in mine]
            shown = {key: value for key, value in entry["measures"][name].items() if key != "error"}
            assert shown == interval(values)
            errors = [r["measures"][name]["error"] for r in mine if r["measures"][name]["error"] is not None]
            rms = (sum(e * e for e in errors) / len(errors)) ** 0.5 if errors else None
            assert entry["measures"][name]["error"] == (None if rms is None else pytest.approx(rms))
            if entry["method"] != "sgd":
                reference = {r["seed"]: r["measures"][name]["value"] for r in first}
                by_seed = {r["seed"]: r["measures"][name]["value"] for r in mine}
                assert entry["versus_first"]["measures"][name] == paired(by_seed, reference)
        assert (entry["versus_first"] is None) == (entry["method"] == "sgd")


def test_the_primary_comparison_is_corrected_for_the_number_of_methods(comparison: Comparison) -> None:
    results = comparison.results
    first, *others = results["methods"]
    scores = {
        m["method"]: {r["seed"]: r["test_accuracy"] for r in results["runs"] if r["method"] == m["method"]}
        for m in results["methods"]
    }
    expected = [paired_p(scores[m["method"]], scores["sgd"]) for m in others]
    found = [m["versus_first"]["test_accuracy"] for m in others]
    assert [v["p"] for v in found] == expected
    corrected = holm([1.0 if p is None else p for p in expected])
    assert [v["p_holm"] for v in found] == [None if p is None else c for p, c in zip(expected, corrected, strict=True)]
    assert first["versus_first"] is None
    assert results["budget"] == {"kind": "gradients", "amount": 40}


def accuracies(**columns: list[float]) -> dict[str, Any]:
    """Results in which the methods have these test accuracies."""
    records = [
        {
            "method": method.replace("_", "+"), "seed": seed, "status": "finished", "failure": None, "steps": 40,
            "gradient_evaluations": 40, "swad": None, "train_accuracy": 1.0, "test_accuracy": value, "train_loss": 0.1,
            "test_loss": 0.2, "audit": None, "measures": {}, "seconds": {},
        }
        for method, values in columns.items()
        for seed, value in enumerate(values)
    ]  # fmt: skip
    settings = CompareSettings(methods=tuple(m.replace("_", "+") for m in columns), seeds=len(columns["sgd"]))
    return summarise(settings, data.load("digits", train_size=300), 1, records)


def test_the_answer_says_which_differences_are_left_by_holms_correction() -> None:
    results = accuracies(
        sgd=[0.90, 0.91, 0.92, 0.93, 0.94],
        sam=[0.9201, 0.9299, 0.94, 0.9501, 0.9599],  # two points in every seed
        ema=[0.91, 0.91, 0.93, 0.94, 0.95],  # p = 0.016 by itself, with two comparisons 0.032
        asam=[0.89, 0.93, 0.90, 0.95, 0.94],
    )
    assert "SAM and EMA predicted better than SGD on held-out data (of these differences Holm's" in results["answer"]
    assert "correction for 3 comparisons leaves all)" in results["answer"]
    assert any(line.endswith("n=5, Holm's p 0.032.") for line in results["details"])
    more = {f"sam_{average}": [0.89, 0.93, 0.90, 0.95, 0.94] for average in ("ema", "swa", "lawa", "tail")}
    results = accuracies(
        sgd=[0.90, 0.91, 0.92, 0.93, 0.94],
        sam=[0.9201, 0.9299, 0.94, 0.9501, 0.9599],
        ema=[0.91, 0.91, 0.93, 0.94, 0.95],
        **more,
    )
    assert "(of these differences Holm's correction for 6 comparisons leaves only SAM)" in results["answer"]


def test_of_many_methods_only_what_is_told_apart_gets_a_sentence() -> None:
    noise = {
        f"{o}_ema": [0.89, 0.93, 0.90, 0.95, 0.94] for o in ("sam", "asam", "gsam", "wsam", "msam", "bsam", "random")
    }
    results = accuracies(sgd=[0.90, 0.91, 0.92, 0.93, 0.94], sam=[0.9201, 0.9299, 0.94, 0.9501, 0.9599], **noise)
    assert [line.split(" minus")[0] for line in results["details"][:1]] == ["Test accuracy of SAM"]
    assert results["details"][-1] == "Of 7 of the 8 methods the test accuracy cannot be told from that of SGD."
    assert any("ASAM, whose radius is in units of the weights, at 0.5 and bSAM" in c for c in results["cautions"])


def test_equal_differences_are_left_by_nothing() -> None:
    results = accuracies(sgd=[0.9, 0.8, 0.7], sam=[0.95, 0.85, 0.75], ema=[0.9, 0.8, 0.7])
    versus = [m["versus_first"]["test_accuracy"] for m in results["methods"][1:]]
    assert [(v["p"], v["p_holm"]) for v in versus] == [(None, None), (1.0, 1.0)]
    assert "for 2 comparisons leaves none" in results["answer"]


def test_the_audit_is_that_of_the_first_seeds(comparison: Comparison) -> None:
    audit = comparison.results["audit"]
    assert audit["symmetries"] == ["relu-layer-rescaling", "relu-unit-rescaling", "unit-permutation"]
    assert all(change < 1e-9 for change in audit["proofs"].values())
    for run in comparison.results["runs"]:
        assert (run["audit"] is not None) == (run["seed"] == 0)
    for name, measure in ((m.name, m) for m in resolve()):
        for kind in audit["symmetries"]:
            cells = [r["audit"][name][kind] for r in comparison.results["runs"] if r["audit"]]
            ratios = [cell["max_ratio"] for cell in cells]
            assert audit["max_ratio"][name][kind] == (None if None in ratios else max(ratios))
            if kind in measure.invariant_under:  # and what is estimated agrees to its own error
                assert all(cell["max_ratio"] < 1.01 + cell["resolution"] for cell in cells)
                assert not any(cell["significant"] for cell in cells)
    assert audit["verdict"]["lambda_max"] == "changes"
    assert audit["verdict"]["w_hessian_w"] == "survives"


def test_the_landscape_is_the_loss_around_the_stored_weights(comparison: Comparison) -> None:
    (run,) = (r for r in comparison.results["runs"] if (r["method"], r["seed"]) == ("swad", 1))
    landscape = run["landscape"]
    splits = data.load("digits", train_size=TINY.train_size)
    model = models.build("mlp", splits.input_shape, splits.classes)
    load_weights(model, comparison.directory / "runs" / "swad-seed1.safetensors")
    model.double()
    x, y = splits.train.x[: TINY.measure_rows].double(), splits.train.y[: TINY.measure_rows]
    w = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    direction = torch.randn(len(w), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    direction /= direction.norm()

    def loss(alpha: float) -> float:
        torch.nn.utils.vector_to_parameters(w + alpha * direction, model.parameters())
        return float(F.cross_entropy(model(x), y).detach())

    assert landscape["random"] == pytest.approx([loss(alpha) for alpha in landscape["alpha"]], rel=1e-5)
    h = 1e-5
    assert landscape["random_slope"] == pytest.approx((loss(h) - loss(-h)) / (2 * h), rel=1e-4, abs=1e-6)
    curvature = (loss(h) - 2 * loss(0) + loss(-h)) / h**2
    assert landscape["random_curvature"] == pytest.approx(curvature, rel=1e-2, abs=1e-4)
    assert landscape["top_curvature"] == run["measures"]["lambda_max"]["value"] > abs(landscape["random_curvature"])
    middle = len(landscape["alpha"]) // 2
    assert landscape["top"][middle] == pytest.approx(loss(0), rel=1e-5)


def test_a_network_that_learned_nothing_proves_nothing(comparison: Comparison) -> None:
    records = [json.loads((comparison.directory / "runs" / f"{run}.json").read_text()) for run in RUNS]
    for record in records:
        record["train_accuracy"] = 0.1
        for cells in (record["audit"] or {}).values():
            for cell in cells.values():
                cell.update(max_ratio=1.0, significant=False)
    splits = data.load("digits", train_size=TINY.train_size)
    results = summarise(TINY, splits, 1, records)
    assert results["audit"]["verdict"]["lambda_max"] == "survives"
    assert "top Hessian eigenvalue" not in results["answer"]  # did not move, but not by theorem
    assert any("better than chance" in caution for caution in results["cautions"])
    assert not any("better than chance" in caution for caution in summarise(TINY, splits, 1, records[:0])["cautions"])


EVERY = CompareSettings(
    methods=("all", "asam+ema", "looksam+swad"), model="convnet-bn", seeds=1, steps=12, train_size=150, batch_size=32,
    measure_rows=16, audit_members=0,
)  # fmt: skip


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """Every method on a network with normalisation layers. Not to be changed: copy the directory first."""
    directory = tmp_path_factory.mktemp("everything") / "all"
    return Comparison(directory, compare(EVERY, directory, workers=2))


def test_every_method_is_trained_measured_and_has_spent_the_budget(everything: Comparison) -> None:
    results = everything.results
    assert [m["method"] for m in results["methods"]] == [*METHODS, "asam+ema", "looksam+swad"]
    for run in results["runs"]:
        assert run["status"] == "finished", run["failure"]
        assert run["gradient_evaluations"] == 12
        assert set(run["measures"]) == {m.name for m in resolve()}
    assert results["command"].startswith(
        "flatminima compare --data digits --model convnet-bn --methods all,asam+ema,looksam+swad"
    )


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("method", ["ae-sam", "friendly-sam", "sam-on", "bsam", "lawa", "looksam+swad"])
def test_an_interrupted_run_of_any_kind_ends_in_the_same_bits(
    everything: Comparison, tmp_path: Path, method: str
) -> None:
    shutil.copytree(everything.directory, tmp_path / "copy")
    runs, whole = tmp_path / "copy" / "runs", everything.directory / "runs"
    (runs / f"{method}-seed0.json").unlink()
    (runs / f"{method}-seed0.train.json").unlink()
    execute(RunJob(EVERY, tmp_path / "copy", method, 0))
    assert (runs / f"{method}-seed0.safetensors").read_bytes() == (whole / f"{method}-seed0.safetensors").read_bytes()
    found, expected = (json.loads((at / f"{method}-seed0.json").read_text()) for at in (runs, whole))
    assert {**found, "seconds": 0} == {**expected, "seconds": 0}


def test_runs_of_an_earlier_version_are_kept(comparison: Comparison, tmp_path: Path) -> None:
    shutil.copytree(comparison.directory, tmp_path / "copy")
    for path in (tmp_path / "copy" / "runs").glob("*.json"):
        record = json.loads(path.read_text())
        assert record.pop("average") is None  # that field came later
        path.write_text(json.dumps(record))
    settings = json.loads((tmp_path / "copy" / "settings.json").read_text())
    assert settings.pop("monitor_rows") is None  # and that setting
    (tmp_path / "copy" / "settings.json").write_text(json.dumps(settings))
    before = stamps(tmp_path / "copy", set(RUNS))
    assert compare(TINY, tmp_path / "copy", workers=1) == comparison.results
    assert stamps(tmp_path / "copy", set(RUNS)) == before
