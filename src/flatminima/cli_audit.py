"""The body of ``flatminima audit``: what the arguments name, the progress on stderr, and the files."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from flatminima.report.audit_page import render_audit
from flatminima.study.audit_settings import AuditSettings
from flatminima.study.auditing import Minimum, audit_minima
from flatminima.study.checkpoint import CheckpointError, load_weights
from flatminima.study.compare import target_of_run
from flatminima.study.settings import SettingsError
from flatminima.study.store import write_json, write_text
from flatminima.study.target import Target, first_rows, load_target

_WEIGHTS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_USAGE = "give FILE.py:FUNCTION and up to two checkpoints, or one or two checkpoints of a comparison (DIR/runs/*.safetensors)"


def named(arguments: Sequence[str], checkpoints: Sequence[Path]) -> tuple[str | None, list[Path]]:
    """``FILE.py:FUNCTION``, if it is there, and the checkpoints.

    Raises:
        SettingsError: nothing, or more than two checkpoints.

    Example:
        >>> named(["my.py:build", "a.safetensors", "b.pt"], [])
        ('my.py:build', [PosixPath('a.safetensors'), PosixPath('b.pt')])
        >>> named(["a.safetensors", "b.safetensors"], [])[0] is None
        True
    """
    rest = list(arguments)
    reference = rest.pop(0) if rest and Path(rest[0]).suffix not in _WEIGHTS else None
    found = [*map(Path, rest), *checkpoints]
    if reference is None and not found:
        raise SettingsError(f"nothing to audit: {_USAGE}")
    if len(found) > 2:
        raise SettingsError(f"{len(found)} checkpoints: {_USAGE}")
    return reference, found


def minima(reference: str | None, paths: Sequence[Path], device: torch.device) -> tuple[list[Minimum], Target]:
    """The networks with their weights, and the loss and the data of them.

    Raises:
        SettingsError: checkpoints without a model.
        TargetError, CheckpointError: what they name cannot be used.
    """
    absent = [path for path in paths if not path.is_file()]
    if absent:
        raise CheckpointError(f"no checkpoint at {absent[0]}")
    target = load_target(reference, device) if reference is not None else _target_of(paths[0], device)
    if not paths:
        return [Minimum(reference or "", target.model)], target
    names = [path.stem for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    if len(set(names)) < len(names):
        names = [f"{name} ({place})" for name, place in zip(names, ("first", "second"), strict=True)]
    found = []
    for name, path in zip(names, paths, strict=True):
        model = copy.deepcopy(target.model)
        load_weights(model, path)
        found.append(Minimum(name, model))
    return found, target


def _target_of(path: Path, device: torch.device) -> Target:
    target = target_of_run(path, device)
    if target is None:
        raise SettingsError(f"{path} holds weights, but of which model? {_USAGE[0].upper()}{_USAGE[1:]}")
    return target


def rows(target: Target, count: int | None) -> Any:
    """The data, or their first rows."""
    return target.data if count is None else first_rows(target.data, count)


def run(
    found: Sequence[Minimum], target: Target, data: Any, settings: AuditSettings, command: str, console: Console
) -> Any:
    """:func:`audit_minima`, with a bar on the console."""
    with _bar(console) as progress:
        try:
            return audit_minima(
                found, target.loss_fn, data, settings, probes=target.probes, command=command, progress=progress
            )
        except KeyboardInterrupt:
            console.print("Stopped; nothing was written.", highlight=False)
            sys.exit(130)


def save(found: dict[str, Any], out: Path | None, json_path: Path | None, console: Console) -> None:
    """Write ``audit.json`` and the page into ``out``, and the JSON to ``json_path``; say where."""
    written = []
    if out is not None:
        write_json(out / "audit.json", found)
        write_text(out / "audit.html", render_audit(found))
        written += [out / "audit.json", out / "audit.html"]
    if json_path is not None:
        write_json(json_path, found)
        written.append(json_path)
    for path in written:
        console.print(str(path.resolve()), highlight=False, markup=False, soft_wrap=True)


@contextmanager
def _bar(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A bar where somebody is watching: members measured, of how many."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(),
    )  # fmt: skip
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task("measuring the network", total=None)
    with bar:
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)
