"""``flatminima audit``: one checkpoint, two checkpoints, its files and its refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_model
from torch import nn

from conftest import Comparison, Outcome
from flatminima.report.audit_page import render_audit

Run = Callable[..., Outcome]
FEW = ("--measures", "lambda_max,trace,w_hessian_w,orbit_minimal_trace", "--members", 2)
TARGET = """
import torch
from torch import nn
from torch.nn import functional as F


def build(act=nn.ReLU):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 4), act(), nn.Linear(4, 2))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, generator=generator)
    return model, F.cross_entropy, (x, (x[:, 0] > 0).long())


def smooth():
    return build(nn.GELU)


class OwnLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, _, _ = build()

    def forward(self, x, labels):
        logits = self.body(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def own_loss():
    _, _, (x, y) = build()
    return OwnLoss(), None, [{"x": x[:30], "labels": y[:30]}, {"x": x[30:], "labels": y[30:]}]
"""


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "net.py"
    path.write_text(TARGET)
    return path


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    save_model(network(3), str(tmp_path / "w.safetensors"))
    return tmp_path / "w.safetensors"


def read(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert isinstance(found, dict)
    return found


def refused(outcome: Outcome, *texts: str) -> None:
    assert outcome.status == 2, outcome
    assert outcome.out == ""
    assert outcome.err.startswith("error: ")
    assert len(outcome.err.strip().splitlines()) == 1
    for text in texts:
        assert text in outcome.err


def test_one_checkpoint_is_audited(run: Run, target: Path, weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    outcome = run("audit", f"{target}:build", weights, *FEW, "--out", out, "--json", tmp_path / "found.json")
    assert outcome.status == 0, outcome.err
    content = read(out / "audit.json")
    assert content == read(tmp_path / "found.json")
    assert content["comparison"] is None
    (audit,) = content["audits"]
    assert audit["name"] == "w"
    verdicts = {name: m["verdict"] for name, m in audit["measures"].items()}
    assert verdicts == {"lambda_max": "changes", "trace": "changes", "w_hessian_w": "invariant",
                        "orbit_minimal_trace": "invariant"}  # fmt: skip
    for symmetry in audit["symmetries"]:
        assert symmetry["max_change"] < 1e-9
        assert symmetry["law"]
    said = " ".join(outcome.out.split())
    assert " ".join(content["answer"].split()) in said
    assert "orbit-minimal trace" in outcome.out
    assert (out / "audit.html").read_text() == render_audit(content)
    assert str((out / "audit.html").resolve()) in outcome.out


def test_the_same_is_said_however_a_checkpoint_is_given(run: Run, target: Path, weights: Path, tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    texts = []
    for arguments in ((weights,), ("--checkpoint", weights)):
        assert run("audit", f"{target}:build", *arguments, *FEW, "--json", path).status == 0
        texts.append(read(path)["answer"])
    assert texts[0] == texts[1]


def test_two_checkpoints_are_compared(run: Run, target: Path, weights: Path, tmp_path: Path) -> None:
    other, out = tmp_path / "other.safetensors", tmp_path / "out"
    save_model(network(4), str(other))
    outcome = run("audit", f"{target}:build", weights, other, *FEW, "--out", out)
    assert outcome.status == 0, outcome.err
    content = read(out / "audit.json")
    assert content["comparison"]["names"] == ["w", "other"]
    assert [audit["name"] for audit in content["audits"]] == ["w", "other"]
    assert content["answer"] == content["comparison"]["verdict"]
    assert " ".join(content["answer"].split()) in " ".join(outcome.out.split())
    assert content["comparison"]["flatter"] in ("w", "other", None)


def test_the_same_function_is_recognised_and_never_flatter(
    run: Run, target: Path, weights: Path, tmp_path: Path
) -> None:
    twin = network(3)
    with torch.no_grad():
        twin[0].weight *= 16
        twin[0].bias *= 16
        twin[2].weight /= 16
    folder = tmp_path / "twin"
    folder.mkdir()
    save_model(twin, str(folder / "w.safetensors"))
    path = tmp_path / "found.json"
    outcome = run("audit", f"{target}:build", weights, folder / "w.safetensors", *FEW, "--json", path)
    assert outcome.status == 0, outcome.err
    found = read(path)["comparison"]
    assert found["flatter"] is None
    assert found["function"]["relation"] == "same"
    assert "are the same function" in found["verdict"]
    assert found["names"] == [str(weights), str(folder / "w.safetensors")]  # one stem, so the paths tell them apart


def test_runs_of_a_comparison_need_no_function(run: Run, comparison: Comparison, tmp_path: Path) -> None:
    directory = tmp_path / "tiny"
    shutil.copytree(comparison.directory, directory)
    runs = sorted((directory / "runs").glob("*seed0.safetensors"))[:2]
    path = tmp_path / "found.json"
    outcome = run(
        "audit", *runs, "--measures", "w_hessian_w,parameter_norm", "--members", 1, "--kinds", "relu-unit-rescaling",
        "--rows", 40, "--json", path,
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    found = read(path)
    assert found["data"]["rows"] == 40
    assert found["comparison"]["names"] == [r.stem for r in runs]
    assert [d["basis"] for d in found["comparison"]["differences"]] == ["invariant", "coordinates"]


def test_a_model_that_computes_its_own_loss(run: Run, target: Path, tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    outcome = run("audit", f"{target}:own_loss", *FEW, "--json", path)
    assert outcome.status == 0, outcome.err
    (audit,) = read(path)["audits"]
    assert "relu-unit-rescaling" in {s["kind"] for s in audit["symmetries"]}
    assert audit["measures"]["w_hessian_w"]["verdict"] == "invariant"


def test_what_does_not_apply_is_named(run: Run, target: Path, tmp_path: Path) -> None:
    path = tmp_path / "audit.json"
    outcome = run("audit", f"{target}:smooth", "--measures", "path_norm,w_hessian_w", "--members", 1, "--json", path)
    assert outcome.status == 0, outcome.err
    (audit,) = read(path)["audits"]
    assert audit["measures"]["path_norm"]["verdict"] == "not applicable"
    assert "GELU" in audit["measures"]["path_norm"]["sentence"]
    assert any("GELU" in reason for _, reason in audit["rejected"])
    assert "GELU" in outcome.out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((), "nothing to audit: give FILE.py:FUNCTION"),
        (("{t}:build", "{w}", "{w}", "{w}"), "3 checkpoints: give FILE.py:FUNCTION and up to two"),
        (("{w}",), "holds weights, but of which model? Give FILE.py:FUNCTION"),
        (("{t}:build", "absent.safetensors"), "no checkpoint at absent.safetensors"),
        (("{t}:build", "--measures", "tracee"), "unknown measure 'tracee': expected one of trace"),
        (("{t}:build", "--kinds", "relu"), "unknown kind of symmetry 'relu': expected one of"),
        (("{t}:build", "--members", "0"), "--members must be at least 1, got 0"),
        (("{t}:build", "--checks", "0"), "--checks must be at least 1, got 0"),
        (("{t}:build", "--max-scale", "inf"), "--max-scale must be finite and above 1, got inf"),
        (("{t}:build", "--mode", "test"), "unknown --mode 'test': expected one of"),
        (("{t}:build", "--option", "draws"), "expected name=value, got 'draws'"),
    ],
)
def test_bad_requests_are_refused(run: Run, target: Path, weights: Path, arguments: tuple[str, ...], text: str) -> None:
    refused(run("audit", *(a.format(t=target, w=weights) for a in arguments)), text)


def test_nothing_is_run_when_the_files_cannot_be_written(run: Run, target: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    target.write_text("raise RuntimeError('reached')")
    refused(run("audit", f"{target}:build", "--out", tmp_path / "file"), "is a file; --out must name")
    refused(run("audit", f"{target}:build", "--json", tmp_path), "cannot be written")


def test_weights_of_another_network_are_refused(run: Run, target: Path, tmp_path: Path) -> None:
    save_model(nn.Linear(3, 2), str(tmp_path / "other.safetensors"))
    refused(run("audit", f"{target}:build", tmp_path / "other.safetensors"), "does not fit")
