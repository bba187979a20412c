from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from flatminima.study.target import TargetError, first_rows, load_target

GOOD = """
import torch
from torch import nn
import flatminima_test_helper

def build():
    return nn.Linear(3, 2), nn.functional.cross_entropy, (flatminima_test_helper.x, torch.tensor([0, 1]))

def wrong():
    return nn.Linear(3, 2), 5, 4

class OwnLoss(nn.Linear):
    def forward(self, input, labels):
        return {"loss": nn.functional.cross_entropy(super().forward(input), labels)}

def own_loss():
    return OwnLoss(3, 2), None, {"input": torch.ones(4, 3), "labels": torch.tensor([0, 1, 0, 1])}

def single():
    return nn.Linear(3, 2)

number = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    (tmp_path / "flatminima_test_helper.py").write_text("import torch\nx = torch.ones(2, 3)\n")
    (tmp_path / "my_target.py").write_text(GOOD)
    return tmp_path


def test_the_function_is_called_with_its_folder_importable(folder: Path) -> None:
    target = load_target(f"{folder / 'my_target.py'}:build")
    ((x, y),) = target.data
    assert target.loss_fn(target.model(x), y).isfinite()
    assert torch.equal(x, torch.ones(2, 3))


def test_a_path_relative_to_the_working_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert isinstance(load_target("my_target.py:build").model, torch.nn.Linear)


def test_two_files_of_the_same_name_are_two_files(folder: Path) -> None:
    (folder / "other").mkdir()
    (folder / "other" / "my_target.py").write_text(GOOD.replace("nn.Linear(3, 2)", "nn.Linear(3, 7)"))
    first = load_target(f"{folder / 'my_target.py'}:build").model
    second = load_target(f"{folder / 'other' / 'my_target.py'}:build").model
    assert (first.out_features, second.out_features) == (2, 7)


@pytest.mark.parametrize("reference", ["my_target.py", "", ":", ":build", "my_target.py:"])
def test_another_form_is_refused(reference: str) -> None:
    with pytest.raises(TargetError, match=r"expected path/to/file\.py:function, got "):
        load_target(reference)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("absent.py:build", r"no file .*absent\.py; expected path/to/file\.py:function"),
        ("my_target.py:biuld", r"has no function 'biuld'; it has build, "),
        ("my_target.py:number", r"has no function 'number'"),
        (
            "my_target.py:wrong",
            r"wrong returned \(Linear, int, int\); expected a module, a loss function and data",
        ),
        ("my_target.py:single", r"single returned \(Linear\); expected a module"),
        ("notes.txt:build", r"notes\.txt cannot be imported as Python"),
    ],
)
def test_what_leads_nowhere_is_named(folder: Path, reference: str, message: str) -> None:
    (folder / "notes.txt").write_text("nothing")
    with pytest.raises(TargetError, match=message):
        load_target(f"{folder}/{reference}")


def test_a_file_that_fails_leaves_no_half_module_behind(folder: Path) -> None:
    path = folder / "fails_once.py"
    path.write_text("import torch\nraise RuntimeError('not today')\n")
    with pytest.raises(TargetError, match=r"fails_once\.py:2: RuntimeError: not today"):
        load_target(f"{path}:build")
    assert "fails_once" not in sys.modules
    path.write_text(GOOD)
    assert load_target(f"{path}:build").model.out_features == 2


@pytest.mark.parametrize("loss", ["nn.functional.cross_entropy", "nn.CrossEntropyLoss(ignore_index=9)"])
def test_the_row_of_an_impossible_label_or_a_nan_is_given(folder: Path, loss: str) -> None:
    path = folder / "batched.py"
    path.write_text(f"""
import torch
from torch import nn

def build(label=4, value=0.0):
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).train()
    x, y = torch.zeros(6, 3), torch.zeros(6, dtype=torch.int64)
    y[2], x[5, 1] = label, value
    return model, {loss}, ((x[:4], y[:4]) if part else (x[4:], y[4:]) for part in (True, False))

def ignored(): return build(9 if "9" in "{loss}" else -100)
def nan(): return build(0, float("nan"))
def float_targets(): return nn.Linear(3, 2), {loss}, (torch.zeros(4, 3), torch.full((4, 2), 0.5))
def other_loss(): return nn.Linear(3, 1), lambda out, y: (out[:, 0] - y).square().mean(), (torch.zeros(4, 3), torch.arange(4))
""")
    with pytest.raises(TargetError, match=r"label out of range: batch 0, row 2: got 4, expected 0\.\.1"):
        load_target(f"{path}:build")
    with pytest.raises(TargetError, match="NaN in the inputs: batch 1, row 1"):
        load_target(f"{path}:nan")
    target = load_target(f"{path}:ignored")
    assert len(target.data) == 2  # a generator is drawn once and kept
    assert all(module.training for module in target.model.modules())
    assert torch.equal(target.model[1].running_var, torch.ones(2))
    for name in ("float_targets", "other_loss"):
        load_target(f"{path}:{name}")


def test_a_model_may_compute_its_own_loss_from_dictionaries(folder: Path) -> None:
    target = load_target(f"{folder / 'my_target.py'}:own_loss")
    assert target.loss_fn is None
    ((batch, labels),) = target.data
    assert sorted(batch) == ["input", "labels"]
    assert torch.equal(labels, torch.tensor([0, 1, 0, 1]))
    assert len(first_rows(target.data, 3)[0][0]["input"]) == 3


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("classifier", r"label out of range: batch 0, row 1: got 5, expected 0\.\.2"),
        ("language", r"label out of range: batch 1, row 0: got 9, expected 0\.\.6"),
        ("nan", "NaN in the inputs: batch 0, row 2"),
    ],
)
def test_labels_of_models_that_compute_their_loss_are_checked(folder: Path, function: str, message: str) -> None:
    (folder / "hub.py").write_text("""
import torch
from types import SimpleNamespace
from torch import nn

class TinyForSequenceClassification(nn.Linear):
    config = SimpleNamespace(num_labels=3, problem_type=None)

    def forward(self, x, labels):
        return {"loss": nn.functional.cross_entropy(super().forward(x), labels)}

class TinyLMHeadModel(nn.Linear):
    config = SimpleNamespace(vocab_size=7)

x = torch.zeros(4, 3)

def classifier(): return TinyForSequenceClassification(3, 3), None, {"x": x, "labels": torch.tensor([0, 5, 1, -100])}
def fits(): return TinyForSequenceClassification(3, 3), None, {"x": x, "labels": torch.tensor([0, 2, 1, -100])}
def language():
    good = torch.tensor([[1, 2], [-100, 6]])
    return TinyLMHeadModel(3, 7), None, [{"x": x[:2], "labels": good}, {"x": x[:2], "labels": torch.tensor([[1, 9], [0, 0]])}]
def nan():
    x = torch.tensor([[0.0], [1.0], [float("nan")]])
    return TinyLMHeadModel(3, 7), None, {"x": x, "labels": torch.zeros(3, 1).long()}
""")
    with pytest.raises(TargetError, match=message):
        load_target(f"{folder / 'hub.py'}:{function}")
    assert load_target(f"{folder / 'hub.py'}:fits").loss_fn is None


def test_the_first_rows_are_cut_across_batches() -> None:
    x, y = torch.arange(12.0).view(6, 2), torch.arange(6)
    whole = [(x[:4], y[:4]), (x[4:], y[4:])]
    for rows in (1, 4, 5, 6):
        found = first_rows(whole, rows)
        assert torch.equal(torch.cat([a for a, _ in found]), x[:rows])
        assert torch.equal(torch.cat([b for _, b in found]), y[:rows])
        assert len(found) == (1 if rows <= 4 else 2)
    with pytest.raises(TargetError, match="--rows 7: the data have 6 rows"):
        first_rows(whole, 7)
    with pytest.raises(TargetError, match="--rows must be at least 1, got 0"):
        first_rows(whole, 0)
