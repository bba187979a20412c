"""The body of ``flatminima reproduce swad``: settings from options, the progress on stderr, the table, and the files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from flatminima.cli_tasks import command_line, publish, with_progress, words
from flatminima.protocols.domains import cells, reproduce_swad
from flatminima.protocols.domains_algorithms import ALGORITHMS
from flatminima.protocols.domains_settings import PROTOCOLS, DomainSettings, preset
from flatminima.report.domains_markdown import swad_markdown
from flatminima.report.domains_page import render_swad
from flatminima.report.domains_tables import terminal_tables
from flatminima.study.settings import SettingsError
from flatminima.study.store import StoreError

__all__ = ["ALGORITHMS", "PROTOCOLS", "run", "settings"]


def settings(data: str, protocol: str, *, width: int | None = None, **changes: Any) -> DomainSettings:
    """The protocol's settings with what was asked for; see :func:`~flatminima.protocols.domains_settings.preset`."""
    chosen = preset(data, protocol, **changes)
    if width is None:
        return chosen
    return replace(chosen, model_options={**chosen.model_options, "width": width})


def run(
    chosen: DomainSettings,
    *,
    targets: str,
    seeds: int,
    algorithms: str,
    draws: int,
    workers: int | None,
    ray: str | None,
    beside: str | None,
    run: bool,
    out: Path | None,
    consoles: tuple[Console, Console],
) -> None:
    """Do the experiment, write ``results.json``, ``report.html`` and ``table.md``, print the answer and the tables.

    Raises:
        SettingsError, DataError, StoreError: before any work is spent.
    """
    console, err = consoles
    if workers is not None and workers < 1:
        raise SettingsError(f"--workers must be at least 1, got {workers}")
    others = [_results(Path(path)) for path in words(beside or "")]
    directory = out or Path("runs") / f"swad-{Path(chosen.data).name}"
    wanted = None if targets.strip() == "all" else words(targets)
    tasks = cells(chosen, wanted, seeds=seeds, algorithms=words(algorithms), draws=draws)
    results = with_progress(
        lambda progress: reproduce_swad(
            tasks, directory, workers=workers, ray=ray, run=run, command=command_line(), beside=others, progress=progress
        ),
        directory, len(tasks), "runs", err,
    )  # fmt: skip
    publish(
        results, directory, page=render_swad(results), markdown=swad_markdown(results), tables=terminal_tables(results),
        console=console,
    )  # fmt: skip


def _results(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"--beside {path} cannot be read: {error}") from error
    if not isinstance(content, dict) or content.get("experiment") != "swad" or content.get("schema") != 1:
        raise StoreError(f"--beside {path} holds no results of flatminima reproduce swad")
    return content
