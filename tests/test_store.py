from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flatminima.study import store as store_module
from flatminima.study.store import RunStore, StoreError, write_json, write_text

SETTINGS = {"data": "digits", "seeds": 3, "methods": ["sgd", "sam"]}


def tree(directory: Path) -> dict[str, bytes | None]:
    """Everything below a directory, with contents."""
    return {str(p.relative_to(directory)): p.read_bytes() if p.is_file() else None for p in directory.rglob("*")}


def test_records_and_weights_come_back(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "new" / "deep", SETTINGS)
    assert store.trained("a") is None
    assert store.finished("a") is None
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    trained = {"method": "sgd", "seed": 0, "failure": None, "seconds": {}}
    store.save_trained("a", model, trained)
    assert store.trained("a") == trained
    assert store.finished("a") is None
    store.load_trained("a", other)
    assert torch.equal(other.weight, model.weight)
    store.save_finished("a", trained | {"status": "finished"})
    again = RunStore(tmp_path / "new" / "deep", SETTINGS)
    assert again.finished("a") == trained | {"status": "finished"}


def test_a_file_without_the_fields_of_a_record_is_none(tmp_path: Path) -> None:
    store = RunStore(tmp_path, SETTINGS)
    write_json(store.runs / "a.json", {})
    write_json(store.runs / "a.train.json", {})
    assert store.finished("a") is None
    assert store.trained("a") is None


def test_weights_are_on_disk_before_the_record_that_vouches_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = RunStore(tmp_path, SETTINGS)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(store_module, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        store.save_trained("a", nn.Linear(3, 2), {"steps": 4})
    assert (store.runs / "a.safetensors").exists()
    assert store.trained("a") is None


@pytest.mark.parametrize("broken", ["replace", "fsync"])
def test_a_file_is_whole_or_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, broken, fail)
        with pytest.raises(OSError, match="No space left"):
            write_json(path, {"new": 2})
    assert tree(tmp_path) == {"a.json": b'{\n "old": 1\n}\n'}
    write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"new": 2}
    write_text(path, "é\n")
    assert path.read_text(encoding="utf-8") == "é\n"
    assert list(tree(tmp_path)) == ["a.json"]


def test_json_without_a_number_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert tree(tmp_path) == {}


def test_a_damaged_record_means_that_the_run_is_not_finished(tmp_path: Path) -> None:
    store = RunStore(tmp_path, SETTINGS)
    for content in (b"", b'{"loss": 0.', b"[1]", b"\xff\xfe"):
        (store.runs / "a.json").write_bytes(content)
        assert store.finished("a") is None


def test_a_foreign_directory_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    before = tree(tmp_path)
    with pytest.raises(StoreError, match=r"is not empty and holds no comparison \(no settings\.json\)"):
        RunStore(tmp_path, SETTINGS)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("content", [b"not json", b"[1, 2]", b"\xff"])
def test_a_foreign_settings_file_is_refused_and_untouched(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "settings.json").write_bytes(content)
    with pytest.raises(StoreError, match=r"settings\.json is not readable JSON; choose another directory"):
        RunStore(tmp_path, SETTINGS)
    assert tree(tmp_path) == {"settings.json": content}


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StoreError, match="file is a file; --out must name a directory"):
        RunStore(tmp_path / "file", SETTINGS)
    with pytest.raises(StoreError, match=r"cannot use .*file/below for results: Not a directory"):
        RunStore(tmp_path / "file" / "below", SETTINGS)
    assert tree(tmp_path) == {"file": b"mine"}


def test_an_unwritable_directory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoreError, match="for results: File name too long"):
        RunStore(tmp_path / ("n" * 300), SETTINGS)
    (tmp_path / "odd" / "settings.json").mkdir(parents=True)
    with pytest.raises(StoreError, match="for results: Is a directory"):
        RunStore(tmp_path / "odd", SETTINGS)

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    # By patching and not by chmod: the superuser may write everywhere.
    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    with pytest.raises(StoreError, match=r"cannot use .*new for results: Permission denied"):
        RunStore(tmp_path / "new", SETTINGS)


def test_changed_settings_are_refused_with_both_values(tmp_path: Path) -> None:
    RunStore(tmp_path, SETTINGS)
    before = tree(tmp_path)
    with pytest.raises(StoreError) as refused:
        RunStore(tmp_path, {**SETTINGS, "seeds": 5, "methods": ["sgd"], "extra": None, "rho": 0.1})
    message = str(refused.value)
    assert "seeds: 3 there, 5 now" in message
    assert 'methods: ["sgd", "sam"] there, ["sgd"] now' in message
    assert "rho: null there, 0.1 now" in message
    assert "data:" not in message
    assert "give the same settings to resume it, or another --out" in message
    assert tree(tmp_path) == before
    RunStore(tmp_path, {**SETTINGS, "methods": ("sgd", "sam")})  # a tuple is a list in JSON


def test_what_a_kill_leaves_at_the_very_start_is_resumed(tmp_path: Path) -> None:
    """The kill can come between any two steps of claiming the directory."""
    steps = ["mkdir", "replace", "runs", "probe"]
    for step in steps:
        directory = tmp_path / step
        directory.mkdir()
        if step != "mkdir":
            (directory / ".settings.json.abc123").write_text('{"data"')
        if step in ("runs", "probe"):
            write_json(directory / "settings.json", SETTINGS)
        if step == "probe":
            (directory / "runs").mkdir()
        RunStore(directory, SETTINGS)
        assert json.loads((directory / "settings.json").read_text()) == SETTINGS
        assert (directory / "runs").is_dir()


def test_the_settings_are_written_before_anything_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(store_module, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            RunStore(tmp_path / "a", SETTINGS)
    assert tree(tmp_path) == {"a": None}
    RunStore(tmp_path / "a", SETTINGS)
