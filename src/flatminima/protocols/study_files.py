"""The studies that are shipped as files, run or read as a reproduction needs them."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flatminima.names import unknown
from flatminima.study.database import StudyDatabase
from flatminima.study.grid import Grid
from flatminima.study.preregister import Preregistration
from flatminima.study.run_spec import PREDICTIONS
from flatminima.study.run_study import Progress, run_study
from flatminima.study.run_table import RunTable

Array = NDArray[np.uint8]
_FOLDER = resources.files("flatminima.protocols") / "studies"

#: Studies of the package; ``flatminima study new --from NAME`` and the reproductions read them.
SHIPPED = tuple(sorted(entry.name.removesuffix(".toml") for entry in _FOLDER.iterdir() if entry.name.endswith(".toml")))


def shipped(name: str, *, rows: Collection[int] | None = None, count: int | None = None) -> Grid:
    """A shipped study, or a part of it: the same networks, only fewer.

    Args:
        name: one of :data:`SHIPPED`.
        rows: only cells with so many training rows.
        count: the first so many seeds of every cell; all by default.

    Raises:
        ValueError: an unknown name, or a part without any network.

    Example:
        >>> len(shipped("pair-proxy-mnist").runs()), len(shipped("pair-proxy-mnist", count=3).runs())
        (100, 3)
    """
    if name not in SHIPPED:
        raise ValueError(unknown("shipped study", name, SHIPPED))
    whole = Grid.parse((_FOLDER / f"{name}.toml").read_text(encoding="utf-8"), f"{name}.toml")
    cells = [cell for cell in whole.cells if rows is None or cell.data.rows in rows]
    if not cells or (count is not None and count < 1):
        raise ValueError(f"nothing is left of study {name} with rows {rows} and count {count}")
    few = [replace(c, seeds=replace(c.seeds, count=min(count or c.seeds.count, c.seeds.count))) for c in cells]
    return replace(whole, cells=tuple(few))


@dataclass(frozen=True)
class Part:
    """A study that a reproduction needs.

    Attributes:
        grid: what it consists of.
        rules: written into its database before anything is trained.
    """

    grid: Grid
    rules: Preregistration | None = None


@dataclass(frozen=True)
class Found:
    """A study as far as it has been run.

    Attributes:
        grid: what it consists of.
        table: the records there are.
        rules: that were written before training, or ``None``.
        versions: of code and data that made them.
        path: of the database.
    """

    grid: Grid
    table: RunTable
    rules: Preregistration | None
    versions: tuple[Mapping[str, Any], ...]
    path: Path

    def predictions(self, table: RunTable) -> Array:
        """Classes predicted on the evaluation rows by the networks of a part of the table, ``(networks, rows)``."""
        with StudyDatabase(self.path) as database:
            kept = [database.artefact(record.id, PREDICTIONS) or b"" for record in table.records]
        return np.stack([np.frombuffer(content, dtype=np.uint8) for content in kept])

    @property
    def counts(self) -> dict[str, int]:
        """Networks of the study: how many finished, missed their criterion, failed, or were not run."""
        made = [record.status for record in self.table.records]
        counts = {status: made.count(status) for status in ("finished", "missed", "failed")}
        return {"networks": len(self.grid.runs()), **counts, "not run": len(self.grid.runs()) - len(made)}


def run_parts(
    parts: Iterable[Part],
    folder: Path,
    *,
    workers: int | None = None,
    ray: str | None = None,
    run: bool = True,
    progress: Callable[[str, float], None] = lambda name, fraction: None,
) -> dict[str, Found]:
    """Make what is missing of some studies, each in ``FOLDER/NAME.sqlite``, and read them all.

    Args:
        parts: in the order in which they are run.
        folder: of the databases; the same call goes on where an earlier one was stopped.
        workers, ray: as of :func:`~flatminima.study.run_study.run_study`.
        run: whether to make anything; if not, what is there is read, whatever version made it.
        progress: called with the name of a study and the fraction of all networks that have a record.

    Raises:
        StudyError, DataError: as of :func:`~flatminima.study.run_study.run_study`.
    """
    wanted = list(parts)
    total = sum(len(part.grid.runs()) for part in wanted)
    before, found = 0, {}
    for part in wanted:
        path = folder / f"{part.grid.name}.sqlite"
        if run:
            meta = {} if part.rules is None else {"rules": part.rules.to_dict()}

            def told(now: Progress, name: str = part.grid.name, before: int = before) -> None:
                progress(name, (before + now.recorded + now.underway) / total)

            run_study(part.grid, path, workers=workers, ray=ray, meta=meta, progress=told)
        before += len(part.grid.runs())
        found[part.grid.name] = read_study(part.grid, path)
    return found


def read_study(grid: Grid, path: Path) -> Found:
    """The records of a study that are in a database, in the order of the grid; none where there is no file."""
    if not path.is_file():
        return Found(grid, RunTable(()), None, (), path)
    with StudyDatabase(path) as database:
        records = {record.id: record for record in database.records()}
        written = database.meta("rules")
        versions = tuple(database.versions())
    rules = None if written is None else Preregistration.from_json(json.dumps(written))
    return Found(grid, RunTable(tuple(records[r.id] for r in grid.runs() if r.id in records)), rules, versions, path)
