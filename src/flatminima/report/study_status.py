"""The terminal's view of how far a study is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

_MOST = 8  # reasons that are listed


def status_tables(found: Mapping[str, Any]) -> RenderableType:
    """What :func:`flatminima.study.status.study_status` found, for ``console.print``."""
    counts = found["counts"]
    total = sum(counts.values())
    said = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    parts: list[RenderableType] = [Text(f"{found['study']}: {total} networks: {said}", style="bold")]
    if found["description"]:
        parts.append(Text(found["description"]))
    parts.append(_cells(found["cells"]))
    for entry in found["reasons"][:_MOST]:
        parts.append(Text(f"{entry['count']} {entry['status']}: {entry['reason']}"))
    if len(found["reasons"]) > _MOST:
        parts.append(Text(f"and {len(found['reasons']) - _MOST} more reasons (--json lists them)"))
    parts.append(Text(f"computing time {_time(found['seconds'])}"))
    for owner, claimed in found["processes"].items():
        host, process, _ = owner.rsplit(":", 2)
        parts.append(Text(f"process {process} on {host} works on {claimed} of them"))
    for number, version in enumerate(found["versions"], start=1):
        if version["changes"]:
            parts.append(
                Text(f"version {number} made {version['runs']} runs: {'; '.join(version['changes'])}", style="yellow")
            )
    for step in found["extended"]:
        parts.append(Text(f"extended by {step['added']} networks when {step['recorded']} had a record", style="yellow"))
    parts.append(Text("rules of decision " + (f"{found['rules'][:12]}" if found["rules"] else "none")))
    return Group(*parts)


def _cells(cells: list[Mapping[str, Any]]) -> Table:
    factors = list(dict.fromkeys(factor for cell in cells for factor in cell["factors"]))
    table = Table()
    for factor in factors:
        table.add_column(Text(factor))
    for status in ("finished", "missed", "failed", "waiting"):
        table.add_column(status, justify="right")
    for cell in cells:
        levels = [Text(str(cell["factors"].get(factor, ""))) for factor in factors]
        table.add_row(*levels, *(str(cell[status]) for status in ("finished", "missed", "failed", "waiting")))
    return table


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
