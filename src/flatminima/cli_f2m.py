"""The body of ``flatminima reproduce f2m``: settings from options, the progress on stderr, the tables, and the files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from flatminima.cli_tasks import command_line, publish, with_progress, words
from flatminima.protocols.fewshot import plan, reproduce_f2m
from flatminima.protocols.fewshot_methods import DEFAULT_METHODS, METHODS
from flatminima.protocols.fewshot_settings import PROTOCOLS, FewShotSettings, preset
from flatminima.report.fewshot_markdown import f2m_markdown
from flatminima.report.fewshot_page import render_f2m
from flatminima.report.fewshot_tables import terminal_tables
from flatminima.study.settings import SettingsError

__all__ = ["DEFAULT_METHODS", "METHODS", "PROTOCOLS", "run", "settings"]


def settings(data: str, protocol: str, *, width: int | None = None, **changes: Any) -> FewShotSettings:
    """The protocol's settings with what was asked for; see :func:`~flatminima.protocols.fewshot_settings.preset`."""
    if isinstance(patterns := changes.get("layer_names"), str):
        changes["layer_names"] = tuple(words(patterns))
    chosen = preset(data, protocol, **changes)
    return chosen if width is None else replace(chosen, model_options={**chosen.model_options, "width": width})


def run(
    chosen: FewShotSettings,
    *,
    methods: str,
    seeds: int,
    draws: int,
    workers: int | None,
    ray: str | None,
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
    made = plan(chosen, words(methods), seeds=seeds, draws=draws)
    directory = out or Path("runs") / f"f2m-{Path(chosen.data).name}"
    total = len(made.base_cells()) + len(made.second_stage())
    results = with_progress(
        lambda progress: reproduce_f2m(
            made, directory, workers=workers, ray=ray, run=run, command=command_line(), progress=progress
        ),
        directory, total, "tasks", err,
    )  # fmt: skip
    publish(
        results, directory, page=render_f2m(results), markdown=f2m_markdown(results), tables=terminal_tables(results),
        console=console,
    )  # fmt: skip
