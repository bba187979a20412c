"""A tiny data set for class-incremental learning that needs no file, and settings that train on it in a second."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from flatminima.data import ClassData
from flatminima.data.formats import in_memory
from flatminima.data.splits import LabelledImages
from flatminima.protocols import fewshot_views
from flatminima.protocols.fewshot_settings import FewShotSettings, preset


def pictures(rows: int, classes: int, seed: int, size: int = 12) -> LabelledImages:
    """Noise with one bright spot whose place is the class."""
    rng = np.random.default_rng(seed)
    labels = np.arange(rows) % classes
    pixels = rng.integers(0, 90, (rows, 1, size, size))
    for row, label in enumerate(labels):
        top, left = 1 + 4 * (int(label) // 3), 1 + 4 * (int(label) % 3)
        pixels[row, 0, top : top + 2, left : left + 2] += 120
    return in_memory(pixels.astype(np.uint8), labels)


def tiny_data(classes: int = 7, per_class: int = 16, size: int = 12) -> ClassData:
    """Seven classes, 16 train and 8 test images of each."""
    return ClassData(
        "tiny", tuple(f"place {c}" for c in range(classes)), pictures(classes * per_class, classes, 0, size),
        pictures(classes * per_class // 2, classes, 1, size), (1, size, size), False, "Made up.",
    )  # fmt: skip


def tiny_settings(**changes: Any) -> FewShotSettings:
    """Three base classes, two sessions of two classes with three shots."""
    small = {
        "base": 3, "way": 2, "shot": 3, "iterations": 12, "batch_images": 4, "model_options": {"blocks": 1, "width": 4},
        "layers": 2, "joint_iterations": 4, "exemplar_epochs": 3, "rebalance_epochs": 2, "fsll_epochs": 3, "every": 4,
        "probe_rows": 20, "probe_draws": 4, "probe_steps": 2, "held_out": 0.25, "session_lr": 0.05,
    }  # fmt: skip
    return preset("digits", **{**small, **changes})


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> ClassData:
    """What the protocol reads in place of a data set."""
    data = tiny_data()
    monkeypatch.setattr(fewshot_views, "loaded", lambda *_: data)
    return data
