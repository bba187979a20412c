"""What goes wrong in the user's own code, or with their inputs, is one line that names the place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import Outcome
from flatminima import Objective, audit
from flatminima.objective import ObjectiveError
from flatminima.study.target import load_target

Run = Callable[..., Outcome]
pytestmark = pytest.mark.usefixtures("one_thread")
TARGET = """import torch
from torch import nn
from torch.nn import functional as F

def made():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)), torch.randn(8, 5), torch.arange(8) % 3
def narrow(): m, x, y = made(); return m, F.cross_entropy, (x[:, :3], y)
def later(): m, x, y = made(); return m, F.cross_entropy, [(x, y), (x[:, :3], y)]
def narrow_squares(): m, x, y = made(); return m, F.mse_loss, (x[:, :3], torch.zeros(8, 3))
def probes(): m, x, y = made(); return m, F.cross_entropy, (x, y), torch.randn(6, 4)
def raises(): raise KeyError("boom")
def refuses(): raise ValueError("not like this")
def inside():
    class M(nn.Module):
        def __init__(s): super().__init__(); s.l = nn.Linear(5, 3)
        def forward(s, x): raise RuntimeError("in forward")
    m, x, y = made(); return M(), F.cross_entropy, (x, y)
def loss():
    m, x, y = made(); return m, (lambda out, y: out["logits"].mean()), (x, y)
def whole():
    class M(nn.Module):
        def __init__(s): super().__init__(); s.l = nn.Linear(5, 3)
        def forward(s, x):
            assert len(x) == 8
            return s.l(x)
    m, x, y = made(); return M(), F.mse_loss, (x, torch.zeros(8, 3)), None
"""


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "user_target.py"
    path.write_text(TARGET)
    return path


def line_of(text: str) -> int:
    return next(i for i, line in enumerate(TARGET.splitlines(), 1) if text in line)


@pytest.mark.parametrize("command", ["measure", "audit", "symmetries"])
@pytest.mark.parametrize(
    ("function", "parts"),
    [
        ("narrow", ("the model fails on the inputs of batch 0, of shape (8, 3): RuntimeError: mat1 and mat2",)),
        ("narrow_squares", ("the inputs of batch 0, of shape (8, 3): RuntimeError: mat1 and mat2",)),
        ("later", ("the inputs of batch 1, of shape (8, 3)",)),
        ("probes", ("the model fails on the probes, of shape (6, 4): RuntimeError: mat1 and mat2",)),
        ("raises", ("user_target.py:raises failed at ", f"user_target.py:{line_of('boom')}: KeyError: 'boom'")),
        ("refuses", (f"user_target.py:{line_of('not like')}: ValueError: not like this",)),
        (
            "inside",
            ("batch 0, of shape (8, 5), at ", f"user_target.py:{line_of('in forward')}: RuntimeError: in forward"),
        ),
    ],
)
def test_one_line_names_the_place(run: Run, target: Path, command: str, function: str, parts: tuple[str, ...]) -> None:
    done = run(command, f"{target}:{function}")
    assert done.status == 2
    assert len(done.err.strip().splitlines()) == 1
    for part in parts:
        assert part in done.err


@pytest.mark.parametrize("command", ["measure", "audit"])
def test_a_loss_that_raises_is_named_by_its_line(run: Run, target: Path, command: str) -> None:
    done = run(command, f"{target}:loss")
    assert done.status == 2
    assert f"user_target.py:{line_of('logits')}: IndexError: " in done.err
    assert "Traceback" not in done.err


def test_a_syntax_error_is_named_by_its_line(run: Run, tmp_path: Path) -> None:
    (tmp_path / "broken_target.py").write_text("x = 1\ndef build(:\n")
    done = run("measure", f"{tmp_path}/broken_target.py:build")
    assert done.status == 2
    assert "broken_target.py:2: SyntaxError: " in done.err


def test_a_model_that_wants_its_rows_together_is_taken(target: Path) -> None:
    assert load_target(f"{target}:whole").probes is None


def test_our_own_faults_keep_their_traceback(run: Run, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: object, **options: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("flatminima.cli.Objective", failing)
    # A frame of this test is a user's to the command line; what is raised in our own code, below all of theirs, is not.
    monkeypatch.setattr("flatminima.cli.user_line", lambda error, called_by_us: None)
    with pytest.raises(ZeroDivisionError):
        run("measure", f"{target}:whole")


@pytest.mark.parametrize("loss", [F.cross_entropy, nn.CrossEntropyLoss(), lambda out, y: F.cross_entropy(out, y)])
def test_an_impossible_label_is_named_in_python_too(loss: Callable[..., torch.Tensor]) -> None:
    net, x, y = nn.Linear(5, 3), torch.randn(8, 5), torch.arange(8) % 3
    with pytest.raises(
        ObjectiveError, match=r"label out of range: batch 0: got 5, expected 0\.\.2 \(the model's outputs\)"
    ):
        audit(net, loss, (x, y + 5))
    with pytest.raises(ObjectiveError, match=r"label out of range: batch 1: got 3, expected 0\.\.2"):
        Objective(net, loss, [(x, y), (x, y + 1)])


def test_another_index_error_of_the_loss_is_the_users_own() -> None:
    with pytest.raises(IndexError, match="Dimension out of range"):
        Objective(nn.Linear(5, 3), lambda out, y: out.mean(7).sum(), (torch.randn(8, 5), torch.arange(8) % 3))
