"""The body of ``flatminima measure``: settings from options, the progress on stderr, and the files."""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.status import Status
from rich.table import Table

from flatminima.measures import MEASURES, MeasureOptions, resolve
from flatminima.measures.invariance import FUNCTION_PRESERVING
from flatminima.objective import Objective
from flatminima.report.measure_page import render_measure
from flatminima.study.measure_settings import MeasureSettings
from flatminima.study.measuring import measure_minimum
from flatminima.study.settings import SettingsError
from flatminima.study.stages import Stage
from flatminima.study.store import StoreError, write_json, write_text

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def settings(*, names: Sequence[str] | None, options: MeasureOptions, density: bool, **asked: Any) -> MeasureSettings:
    """The settings; options that were not given keep their defaults, and those without effect are refused.

    Raises:
        SettingsError: a value that cannot be used.
    """
    for name in ("runs", "steps"):
        if asked[name] is not None and not density:
            raise SettingsError(f"--{name} {asked[name]} is of the density; add --density")
    given = {name: value for name, value in asked.items() if value is not None}
    chosen = tuple(m.name for m in resolve(names))
    found = MeasureSettings(measures=chosen, options=options, density=density, **given)
    if not chosen and not found.curvature:
        raise SettingsError("--measures none leaves nothing; add --top, --smallest, --density, --trace or --layers")
    if found.trace_rtol != MeasureSettings.trace_rtol and not (found.trace or found.layers):
        raise SettingsError(f"--trace-rtol {found.trace_rtol:g} is of the traces; add --trace or --layers")
    return found


def refuse_inapplicable(objective: Objective, names: Sequence[str]) -> None:
    """Refuse a measure that was asked for by its name and does not apply; in a group it is passed over, with a note.

    Raises:
        SettingsError: with the reason.
    """
    for name in names:
        reason = MEASURES[name].applies(objective) if name in MEASURES else None
        if reason is not None:
            raise SettingsError(f"--measures {name} does not apply here: {reason}")


def listing() -> Table:
    """Every measure with its cost and the number of function-preserving kinds of map that it survives."""
    table = Table(box=None, header_style="bold")
    for heading in ("Measure", "What it is", "Cost", "Survives", "Changes", "Use instead"):
        table.add_column(heading, no_wrap=heading == "Measure")
    for m in MEASURES.values():
        counts = [len(kinds & FUNCTION_PRESERVING) for kinds in (m.invariant_under | m.almost_under, m.changes_under)]
        name = f"{m.name} *" if m.default else m.name
        table.add_row(name, m.meaning, m.cost_class, *map(str, counts), ", ".join(m.repair))
    kinds = len(FUNCTION_PRESERVING)
    table.caption = (
        f"* measured by default. Of {kinds} kinds of function-preserving maps; docs/measures.md has the table"
    )
    return table


def size(text: str) -> int:
    """Bytes from such as ``512M``; powers of 1024.

    Raises:
        SettingsError: not of that form, or nothing.

    Example:
        >>> size("2G"), size("1.5 MiB"), size("1000")
        (2147483648, 1572864, 1000)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    found = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if found < 1:
        raise SettingsError(f"--max-memory must be a number of bytes such as 512M or 2G, got {text!r}")
    return found


def check_out(directory: Path | None) -> None:
    """Make the directory, and be sure that files can be written there.

    Raises:
        StoreError: it is a file, or cannot be made or written.
    """
    if directory is None:
        return
    if directory.exists() and not directory.is_dir():
        raise StoreError(f"{directory} is a file; --out must name a directory")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise StoreError(f"cannot use {directory} for results: {error.strerror or error}") from error


def run(
    objective: Objective, asked: MeasureSettings, command: str, console: Console, probes: Any = None
) -> dict[str, Any]:
    """:func:`measure_minimum`, with a line on the console for what is at work, and one for each part that is done."""
    status: Status | None = Status("", console=console) if console.is_terminal else None

    def report(stage: Stage) -> None:
        # Layers are many: only the one at work is shown.
        if stage.done and stage.products and stage.group != "layers":
            console.print(str(stage), highlight=False, markup=False, soft_wrap=True)
        elif status is not None and not stage.done:
            status.update(str(stage).replace("[", r"\["))
            status.start()

    try:
        found = measure_minimum(objective, asked, probes=probes, command=command, progress=report)
    except KeyboardInterrupt:
        console.print("Stopped; nothing was written.", highlight=False)
        sys.exit(130)
    finally:
        if status is not None:
            status.stop()
    spent = found["cost"]["parts"].get("layers")
    if spent is not None:
        console.print(f"layers: {len(found['layers'])}, {spent['products']} products", highlight=False)
    return found


def save(found: dict[str, Any], out: Path | None, json_path: Path | None, console: Console) -> None:
    """Write ``measure.json`` and the page into ``out``, and the JSON to ``json_path``; say where."""
    written = []
    if out is not None:
        write_json(out / "measure.json", found)
        write_text(out / "report.html", render_measure(found))
        written += [out / "measure.json", out / "report.html"]
    if json_path is not None:
        write_json(json_path, found)
        written.append(json_path)
    for path in written:
        console.print(str(path.resolve()), highlight=False, markup=False, soft_wrap=True)
