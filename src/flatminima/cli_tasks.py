"""What the commands share that run an experiment of named tasks: progress, Ctrl-C, the three files, what is printed."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from flatminima.study.store import write_json, write_text

Report = Callable[[str, float], None]


def command_line() -> str:
    """The command as it was given, but for ``--render``, which changes no result."""
    return shlex.join(["flatminima", *(word for word in sys.argv[1:] if word != "--render")])


def words(text: str) -> list[str]:
    """What stands between commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def with_progress(
    experiment: Callable[[Report], dict[str, Any]], directory: Path, total: int, noun: str, err: Console
) -> dict[str, Any]:
    """Call ``experiment(progress)`` under a bar of ``total`` tasks; Ctrl-C ends the process with a line of help, status 130."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(),
    )  # fmt: skip
    done: dict[str, float] = {}
    bar = Progress(*columns, console=err)
    task = bar.add_task(f"{total} {noun}", total=total)

    def progress(name: str, fraction: float) -> None:
        bar.start()  # not before the first report: a refusal is one line
        done[name] = max(fraction, done.get(name, 0.0))
        finished, running = sum(f >= 1 for f in done.values()), [n for n, f in done.items() if 0 < f < 1]
        bar.update(
            task, completed=sum(done.values()), description=f"{finished}/{total} {noun}  {' '.join(running[:3])}"
        )

    try:
        return experiment(progress)
    except KeyboardInterrupt:
        err.print(
            f"Stopped. What is finished is kept in {directory}; the same command goes on from there, and --render shows it.",
            highlight=False, markup=False,
        )  # fmt: skip
        sys.exit(130)
    finally:
        if bar.live.is_started:
            bar.stop()


def publish(
    results: Mapping[str, Any],
    directory: Path,
    *,
    page: str,
    markdown: str,
    tables: Iterable[RenderableType],
    console: Console,
) -> None:
    """Write ``results.json``, ``report.html`` and ``table.md``; print the answer, the tables, the cautions and the files."""
    # One line: hundreds of tasks would be megabytes of indentation.
    write_json(directory / "results.json", dict(results), indent=None)
    write_text(directory / "report.html", page)
    write_text(directory / "table.md", markdown)
    console.print(results["answer"], highlight=False, markup=False)
    for table in tables:
        console.print(table)
    for caution in results["cautions"]:
        console.print(f"careful: {caution}", highlight=False, markup=False)
    for name in ("results.json", "report.html", "table.md"):
        console.print(str((directory / name).resolve()), highlight=False, markup=False, soft_wrap=True)
