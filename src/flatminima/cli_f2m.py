"""The body of ``flatminima reproduce f2m``: settings from options, the progress on stderr, the tables, and the files."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from flatminima.protocols.fewshot import plan, reproduce_f2m
from flatminima.protocols.fewshot_methods import DEFAULT_METHODS, METHODS
from flatminima.protocols.fewshot_settings import PROTOCOLS, FewShotSettings, preset
from flatminima.report.fewshot_markdown import f2m_markdown
from flatminima.report.fewshot_page import render_f2m
from flatminima.report.fewshot_tables import terminal_tables
from flatminima.study.settings import SettingsError
from flatminima.study.store import write_json, write_text

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
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    done: dict[str, float] = {}
    bar = Progress(*columns, console=err)
    task = bar.add_task(f"{total} tasks", total=total)

    def progress(name: str, fraction: float) -> None:
        bar.start()  # not before the first report: a refusal is one line
        done[name] = max(fraction, done.get(name, 0.0))
        finished, running = sum(f >= 1 for f in done.values()), [n for n, f in done.items() if 0 < f < 1]
        bar.update(task, completed=sum(done.values()), description=f"{finished}/{total} tasks  {' '.join(running[:2])}")

    command = shlex.join(["flatminima", *(word for word in sys.argv[1:] if word != "--render")])
    try:
        results = reproduce_f2m(made, directory, workers=workers, ray=ray, run=run, command=command, progress=progress)
    except KeyboardInterrupt:
        err.print(
            f"Stopped. What is finished is kept in {directory}; the same command goes on from there, and --render shows it.",
            highlight=False, markup=False,
        )  # fmt: skip
        sys.exit(130)
    finally:
        if bar.live.is_started:
            bar.stop()
    write_json(directory / "results.json", results, indent=None)  # hundreds of streams: megabytes of indentation
    write_text(directory / "report.html", render_f2m(results))
    write_text(directory / "table.md", f2m_markdown(results))
    console.print(results["answer"], highlight=False, markup=False)
    for table in terminal_tables(results):
        console.print(table)
    for caution in results["cautions"]:
        console.print(f"careful: {caution}", highlight=False, markup=False)
    for name in ("results.json", "report.html", "table.md"):
        console.print(str((directory / name).resolve()), highlight=False, markup=False, soft_wrap=True)


def words(text: str) -> list[str]:
    """What stands between commas."""
    return [word.strip() for word in text.split(",") if word.strip()]
