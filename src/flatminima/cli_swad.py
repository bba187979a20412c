"""The body of ``flatminima reproduce swad``: settings from options, the progress on stderr, the table, and the files."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from flatminima.protocols.domains import cells, reproduce_swad
from flatminima.protocols.domains_algorithms import ALGORITHMS
from flatminima.protocols.domains_settings import PROTOCOLS, DomainSettings, preset
from flatminima.report.domains_markdown import swad_markdown
from flatminima.report.domains_page import render_swad
from flatminima.report.domains_tables import terminal_tables
from flatminima.study.settings import SettingsError
from flatminima.study.store import StoreError, write_json, write_text

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
    others = [_results(Path(path)) for path in _list(beside or "")]
    directory = out or Path("runs") / f"swad-{Path(chosen.data).name}"
    wanted = None if targets.strip() == "all" else _list(targets)
    tasks = cells(chosen, wanted, seeds=seeds, algorithms=_list(algorithms), draws=draws)
    columns = (
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(),
    )  # fmt: skip
    done: dict[str, float] = {}
    bar = Progress(*columns, console=err)
    task = bar.add_task(f"{len(tasks)} runs", total=len(tasks))

    def progress(name: str, fraction: float) -> None:
        bar.start()  # not before the first report: a refusal is one line
        done[name] = max(fraction, done.get(name, 0.0))
        finished, running = sum(f >= 1 for f in done.values()), [n for n, f in done.items() if 0 < f < 1]
        bar.update(
            task, completed=sum(done.values()), description=f"{finished}/{len(tasks)} runs  {' '.join(running[:3])}"
        )

    command = shlex.join(["flatminima", *(word for word in sys.argv[1:] if word != "--render")])
    try:
        results = reproduce_swad(
            tasks, directory, workers=workers, ray=ray, run=run, command=command, beside=others, progress=progress
        )
    except KeyboardInterrupt:
        err.print(
            f"Stopped. What is finished is kept in {directory}; the same command goes on from there, and --render shows it.",
            highlight=False, markup=False,
        )  # fmt: skip
        sys.exit(130)
    finally:
        if bar.live.is_started:
            bar.stop()
    write_json(directory / "results.json", results)
    write_text(directory / "report.html", render_swad(results))
    write_text(directory / "table.md", swad_markdown(results))
    console.print(results["answer"], highlight=False, markup=False)
    for table in terminal_tables(results):
        console.print(table)
    for caution in results["cautions"]:
        console.print(f"careful: {caution}", highlight=False, markup=False)
    for name in ("results.json", "report.html", "table.md"):
        console.print(str((directory / name).resolve()), highlight=False, markup=False, soft_wrap=True)


def _list(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _results(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"--beside {path} cannot be read: {error}") from error
    if not isinstance(content, dict) or content.get("experiment") != "swad" or content.get("schema") != 1:
        raise StoreError(f"--beside {path} holds no results of flatminima reproduce swad")
    return content
