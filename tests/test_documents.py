"""What the documents show runs: every block of Python, in the order of its document, and every link leads somewhere.

A block that begins with ```` ```python torchrun ```` is a script of its own, which two processes run. The others of a document
share one namespace, as a reader would paste them one after the other; what README takes for granted is set up here.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import flatminima

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")] + sorted(
    (ROOT / "docs").rglob("*.md")
)
BLOCK = re.compile(r"^```python([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!`)\[[^\]]*\]\(([^)\s]+)\)")


def blocks(document: Path, kind: str) -> list[tuple[int, str]]:
    """Line of the first statement, and text, of the blocks of a kind."""
    text = document.read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, match.start(2)) + 1, match[2])
        for match in BLOCK.finditer(text)
        if match[1].strip() == kind
    ]


def name(document: Path) -> str:
    return str(document.relative_to(ROOT))


class OwnLoss(nn.Module):
    """As a Hugging Face model: it computes its loss, with -100 for what does not count."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 3)

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": F.cross_entropy(self.body(inputs), labels)}


def surroundings(document: Path) -> dict[str, Any]:
    """What the first block may use."""
    space: dict[str, Any] = {"__name__": "__main__"}
    if name(document) not in ("README.md", "docs/audit.md", "docs/symmetries.md", "docs/weakness.md"):
        return space
    torch.manual_seed(0)
    y = torch.arange(60) % 10
    x = 3 * torch.eye(10)[y] + 0.3 * torch.randn(60, 10)
    y_unseen = torch.arange(8)
    x_unseen = x[y_unseen]  # each is a training row of its own class, so that no other class is possible there
    model, other = (nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 10)) for _ in range(2))
    return space | {
        "model": model,
        "other": other,
        "loss_fn": F.cross_entropy,
        "loader": [(x[:40], y[:40]), (x[40:], y[40:])],
        "epochs": 3,
        "validation_loss": lambda network: F.cross_entropy(network(x), y).item(),
        "x": x,
        "y": y,
        "x_train": x,
        "y_train": y,
        "x_unseen": x_unseen,
        "y_unseen": y_unseen,
        "v": torch.ones(sum(p.numel() for p in model.parameters())),
        "before": [1.0, 2.0, 3.0, 4.0, 5.0],
        "after": [2.0, 1.0, 3.0, 5.0, 4.0],
        "outcome": [5.0, 4.0, 3.0, 2.0, 1.0],
        "hugging_face_model": OwnLoss(),
        "batches_with_labels": [
            {"inputs": x[:40, :4], "labels": y[:40] % 3},
            {"inputs": x[40:, :4], "labels": y[40:] % 3},
        ],
    }


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if blocks(d, "")], ids=name)
@pytest.mark.usefixtures("one_thread")
def test_the_blocks_of_a_document_run(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("plotly.graph_objects.Figure.show", lambda *_, **__: None)
    space = surroundings(document)
    for line, text in blocks(document, ""):
        # Padding, so that a traceback and a failed assertion name the line of the document.
        exec(compile("\n" * (line - 1) + text, str(document), "exec"), space)


@pytest.mark.parametrize(
    ("document", "line"), [(d, line) for d in DOCUMENTS for line, _ in blocks(d, "torchrun")], ids=lambda x: str(x)
)
def test_the_scripts_of_a_document_run_on_two_processes(document: Path, line: int, tmp_path: Path) -> None:
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    (text,) = (text for at, text in blocks(document, "torchrun") if at == line)
    if "fully_shard" in text and not hasattr(torch.distributed.fsdp, "fully_shard"):
        pytest.skip("this torch has no fully_shard")
    (tmp_path / "train.py").write_text(text, encoding="utf-8")
    path = os.pathsep.join([str(Path(flatminima.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_links_lead_to_files(document: Path) -> None:
    for target in LINK.findall(document.read_text(encoding="utf-8")):
        if "://" not in target and not target.startswith("#"):
            assert (document.parent / target.split("#")[0]).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_other_kinds_of_blocks_are_not_mistaken_for_python(document: Path) -> None:
    kinds = {match[1].strip() for match in BLOCK.finditer(document.read_text(encoding="utf-8"))}
    assert kinds <= {"", "torchrun"}
