"""What several test files share: one tiny comparison, and the command line in this process."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from playwright.sync_api import Browser, sync_playwright

from flatminima import cli
from flatminima.study.compare import compare
from flatminima.study.settings import CompareSettings

# One commit, one verdict: examples are the same in every run. `pytest --hypothesis-profile=explore` draws new ones.
settings.register_profile("repeatable", derandomize=True)
settings.register_profile("explore", derandomize=False)
settings.load_profile("repeatable")

TINY = CompareSettings(seeds=2, steps=40, train_size=300, measure_rows=64, audit_rows=32, audit_members=2)
TINY_ARGUMENTS = (
    "compare", "--seeds", "2", "--steps", "40", "--train-size", "300", "--measure-rows", "64", "--audit-rows", "32",
    "--audit-members", "2",
)  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """A finished comparison and where it lies."""

    directory: Path
    results: dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    status: int
    out: str
    err: str


@pytest.fixture(scope="session")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """All methods on digits, two seeds, in two processes. Not to be changed: copy the directory first."""
    directory = tmp_path_factory.mktemp("comparison") / "tiny"
    return Comparison(directory, compare(TINY, directory, workers=2))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """The command line without a new process: ``run("measure", "file.py:build")``."""

    def call(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["flatminima", *map(str, arguments)])
        status = 0
        try:
            cli.main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        return Outcome(status, *capsys.readouterr())

    return call


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums in the order of a worker process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium, to open pages in."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    path = next((found for name in names if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(names)} is on PATH")
    arguments = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=arguments)
        yield chromium
        chromium.close()
