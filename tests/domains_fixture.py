"""A tiny data set of several domains that needs no file, and settings that train on it in a second."""

from __future__ import annotations

from types import MappingProxyType

import numpy as np
import pytest

from flatminima.data import MultiDomain
from flatminima.data.formats import in_memory
from flatminima.protocols import domains_views
from flatminima.protocols.domains_settings import DomainSettings, preset

NAMES = ("left", "middle", "right")


def tiny_domains(rows: int = 60, classes: int = 3, flip: str | None = None) -> MultiDomain:
    """Bars of one of three orientations at a brightness that depends on the domain; ``flip``: whose labels are wrong."""
    domains = {}
    for index, name in enumerate(NAMES):
        rng = np.random.default_rng(index)
        labels = np.arange(rows) % classes
        pixels = rng.integers(0, 60, (rows, 1, 28, 28))
        for row, label in enumerate(labels):
            at = int(rng.integers(6, 20))
            if label == 0:
                pixels[row, 0, at : at + 3] += 90 + 40 * index
            elif label == 1:
                pixels[row, 0, :, at : at + 3] += 90 + 40 * index
            else:
                pixels[row, 0, at : at + 6, at : at + 6] += 90 + 40 * index
        wrong = (labels + 1) % classes if name == flip else labels
        domains[name] = in_memory(pixels.astype(np.uint8), wrong)
    return MultiDomain("tiny", ("rows", "columns", "block"), MappingProxyType(domains), (1, 28, 28), False, "Made up.")


def tiny_settings(**changes: object) -> DomainSettings:
    """Forty steps on pooled pictures."""
    small = {"steps": 40, "every": 4, "batch": 6, "pairs": 2, "plane": 3, "flatness_rows": 20, "lr": 3e-3}
    return preset("rotated-mnist", **{**small, **changes})


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> MultiDomain:
    """What the protocol reads in place of MNIST."""
    data = tiny_domains()
    monkeypatch.setattr(domains_views, "_loaded", lambda *_: data)
    return data
