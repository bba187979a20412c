"""The Python blocks of the documents on judging run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import flatminima as fm
from audit_fixture import fitted, mlp, rows

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[1]
DOCUMENTS = ("docs/symmetries.md", "docs/weakness.md", "docs/audit.md", "README.md#Weakness")


def blocks(document: str) -> list[str]:
    path, _, section = document.partition("#")
    text = (ROOT / path).read_text(encoding="utf-8")
    if section:
        text = text.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def given() -> dict[str, Any]:
    """What the documents assume that a reader has."""
    x, y = rows(30)
    x_unseen, y_unseen = rows(20, seed=2)
    model, other = fitted(mlp(), x, y), fitted(mlp(seed=1), x, y)
    return {
        "fm": fm, "torch": torch, "model": model, "other": other, "loss_fn": F.cross_entropy, "x": x, "y": y, "x_train": x,
        "y_train": y, "x_unseen": x_unseen, "y_unseen": y_unseen, "before": [1.0, 2.0, 3.0, 4.0, 5.0],
        "after": [2.0, 1.0, 3.0, 5.0, 4.0], "outcome": [5.0, 4.0, 3.0, 2.0, 1.0],
        "v": torch.ones(sum(p.numel() for p in model.parameters())),
    }  # fmt: skip


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_blocks_of_a_document_run(document: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = blocks(document)
    assert found
    names = given()
    if "classes=10" in "".join(found):
        found = [block.replace("classes=10", "classes=3").replace("why(3, 7)", "why(3, 2)") for block in found]
    for block in found:
        exec(compile(block, document, "exec"), names)
