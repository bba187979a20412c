"""A study of :mod:`study_networks`, the process that runs it, and what its file holds in the end."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import sys
import time
from pathlib import Path

from flatminima.study.database import StudyDatabase
from flatminima.study.grid import Grid
from flatminima.study.run_study import run_study
from flatminima.study.versions import current_version
from study_networks import record_of, run_batch

TEXT = """\
schema = 1
name = "tiny"
description = "Numbers from seeds."

[data]
name = "digits"
rows = 100

[model]
name = "mlp"
hidden = [8]

[seeds]
count = 12

[factors]
lr = [0.1, 0.5]

[[measures]]
name = "trace"
"""
GRID = Grid.parse(TEXT)


def contents(path: Path) -> dict[str, list[tuple[object, ...]]]:
    """All that a study holds, without the times and the claims."""
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        found = {
            table: connection.execute(f"SELECT {columns} FROM {table} ORDER BY {columns}").fetchall()
            for table, columns in (
                ("meta", "key, value"), ("versions", "number, content"), ("measurements", "run, name, value, missing"),
                ("runs", "id, position, spec, status, reason, seconds, version, owner"), ("artefacts", "run, name, content"),
            )
        }  # fmt: skip
    connection.close()
    return found


def begin(path: Path, grid: Grid = GRID) -> StudyDatabase:
    database = StudyDatabase(path, create=True)
    about = {"study": grid.name, "description": grid.description, "digest": grid.digest, "grid": grid.text}
    database.begin(grid.runs(), about, current_version("study_networks", ["digits"]))
    return database


def kill_writers(folder: Path) -> int:
    """Four times five processes write on one file and are killed at random moments; how many had not ended by then.

    What a killed one said it had saved must be there, and whatever is there must be whole.
    """
    generator, killed = random.Random(1), 0
    specs = {spec.id: spec for spec in GRID.runs()}
    for number in range(20):
        path, log = folder / f"s{number // 5}.sqlite", folder / f"log{number // 5}"
        if number % 5 == 0:
            begin(path).close()
        child = os.fork()
        if not child:
            save_all(path, log)
            os._exit(0)
        time.sleep(generator.uniform(0.0, 0.05))
        os.kill(child, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        with StudyDatabase(path) as database:
            assert database.check() == []
            records = {record.id: record for record in database.records(artefacts=True)}
        said = log.read_text().split("\n")[:-1] if log.exists() else []
        assert set(said) <= records.keys()
        assert all(record == record_of(specs[run]) for run, record in records.items())
        if number % 5 == 4:
            save_all(path, log)
    return killed


def save_all(path: Path, log: Path) -> None:
    """Record what is not recorded yet, and say so run by run."""
    with StudyDatabase(path) as database, log.open("a") as said:
        for spec in database.waiting():
            database.save(record_of(spec))
            said.write(f"{spec.id}\n")
            said.flush()


if __name__ == "__main__":  # the processes that tests kill
    if sys.argv[1] == "run":
        run_study(GRID, Path(sys.argv[2]), workers=int(sys.argv[3]), batch=4, run_batch=run_batch)
    else:
        print(kill_writers(Path(sys.argv[2])))
