"""One SQLite file for one study: its runs, what was measured on them, their artefacts, and what they were made with.

A finished run is one transaction, so at every moment, ``kill -9`` and a full disk included, it is there whole or not at all.
The journal is SQLite's rollback journal and not a write-ahead log: at rest the study is one file that can be copied, it works
on a network file system, and a study writes a few times a second at most, which is no work for either. ``synchronous = EXTRA``
makes what was committed outlive a power cut.

Several processes may work on one file. Each claims the runs it is about to make, and renews its claim while it lives; claims
spare double work and nothing depends on them: the first record of a run is kept, and a second one changes nothing.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flatminima.study.claims import Claims
from flatminima.study.run_spec import Record, RunSpec

SCHEMA = 1
_APPLICATION = 0x464D5354  # "FMST" in the header of the file
_PATIENCE = 60.0  # seconds to wait for another process that writes
_TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE versions (number INTEGER PRIMARY KEY, at REAL NOT NULL, content TEXT NOT NULL);
CREATE TABLE runs (
    id TEXT PRIMARY KEY, position INTEGER NOT NULL UNIQUE, spec TEXT NOT NULL,
    status TEXT CHECK (status IN ('finished', 'missed', 'failed')), reason TEXT, seconds REAL, at REAL,
    version INTEGER REFERENCES versions (number), owner TEXT, lease REAL
);
CREATE TABLE measurements (
    run TEXT NOT NULL REFERENCES runs (id), name TEXT NOT NULL, value REAL, missing TEXT,
    PRIMARY KEY (run, name), CHECK ((value IS NULL) <> (missing IS NULL))
) WITHOUT ROWID;
CREATE TABLE artefacts (
    run TEXT NOT NULL REFERENCES runs (id), name TEXT NOT NULL, content BLOB NOT NULL, PRIMARY KEY (run, name)
);
"""


class StudyError(ValueError):
    """The study cannot be used or went no further; the message says why, what is kept and what to do."""


class StudyDatabase:
    """An open study; a context manager that closes it.

    Args:
        path: of the file.
        create: make the file if it is absent or empty.

    Raises:
        StudyError: absent, no study, of a newer schema, damaged, or not to be read.

    Example:
        >>> import tempfile
        >>> from flatminima.study.run_spec import DataSpec, ModelSpec
        >>> run = RunSpec("tiny", (), DataSpec("digits", 100), ModelSpec("mlp"))
        >>> study = StudyDatabase(Path(tempfile.mkdtemp()) / "tiny.sqlite", create=True)
        >>> study.begin([run], {"study": "tiny"}, {"torch": "2"})
        >>> study.save(Record(run.id, run.to_dict(), "finished", values={"test.accuracy": 0.9}))
        True
        >>> study.counts(), study.records()[0].values
        ({'waiting': 0, 'finished': 1, 'missed': 0, 'failed': 0}, {'test.accuracy': 0.9})
    """

    def __init__(self, path: Path, *, create: bool = False) -> None:
        self.path = path
        self._version: str | None = None  # that this process makes runs with
        if not create and not path.is_file():
            raise StudyError(
                f"{path} is not there: expected the file of a study; flatminima study run GRID.toml makes one"
            )
        with self._told():
            # Writable wherever it can be: what a killed process left is rolled back by the first who looks.
            uri = f"{path.absolute().as_uri()}?mode={'rwc' if create else 'rw'}"
            self._connection = sqlite3.connect(uri, uri=True, timeout=_PATIENCE, isolation_level=None)
        try:
            with self._told():
                self._connection.execute("PRAGMA foreign_keys = ON")
                self._connection.execute("PRAGMA synchronous = EXTRA")
                self._check(create)
        except BaseException:
            self._connection.close()
            raise
        self.claims = Claims(self._connection, self._rows, self._transaction)

    def __enter__(self) -> StudyDatabase:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    # What the study is

    @property
    def begun(self) -> bool:
        """The file holds a study, and is not a new one."""
        return bool(self._one("SELECT count(*) FROM sqlite_master WHERE name = 'runs'"))

    def begin(self, runs: Sequence[RunSpec], meta: Mapping[str, Any], version: Mapping[str, Any]) -> None:
        """Fill a new file, in one transaction. A process that begins the same study a moment later changes nothing.

        Args:
            runs: in their order.
            meta: key -> anything for JSON, such as the study file.
            version: of code and data.
        """
        with self._transaction():
            if self.begun:
                return
            for statement in _TABLES.split(";"):
                self._connection.execute(statement)
            self._connection.execute(f"PRAGMA application_id = {_APPLICATION}")
            self._connection.execute(f"PRAGMA user_version = {SCHEMA}")
            self._connection.executemany(
                "INSERT INTO meta VALUES (?, ?)", ((k, json.dumps(v)) for k, v in meta.items())
            )
            self._add_version(version)
            self._add_runs(runs)

    def extend(self, runs: Sequence[RunSpec], meta: Mapping[str, Any]) -> int:
        """Add the runs that are not there yet and replace entries of the meta data; the number of runs added."""
        with self._transaction():
            known = {row[0] for row in self._rows("SELECT id FROM runs")}
            new = [run for run in runs if run.id not in known]
            self._add_runs(new)
            for key, value in meta.items():
                self._connection.execute("REPLACE INTO meta VALUES (?, ?)", (key, json.dumps(value)))
            return len(new)

    def meta(self, key: str) -> Any:
        """An entry of the meta data, or ``None``."""
        found = self._one("SELECT value FROM meta WHERE key = ?", key)
        return None if found is None else json.loads(found)

    def set_meta(self, key: str, value: Any) -> None:
        """Add an entry, such as the rules of decision, before there is any result; nothing is ever changed.

        Raises:
            StudyError: there is another entry of this name, or none and there are results already.
        """
        with self._transaction():
            there = self.meta(key)
            if there is None and self._one("SELECT count(*) FROM runs WHERE status IS NOT NULL"):
                raise StudyError(f"{self.path} has results already: {key!r} had to be given before the first of them")
            self._connection.execute("INSERT OR IGNORE INTO meta VALUES (?, ?)", (key, json.dumps(value)))
            if _timeless(self.meta(key)) != _timeless(json.loads(json.dumps(value))):
                raise StudyError(
                    f"{self.path} holds other {key!r} already: expected the same; they were written before"
                )

    def versions(self) -> list[dict[str, Any]]:
        """Versions of code and data that runs were made with, in the order of their use."""
        return [json.loads(row[0]) for row in self._rows("SELECT content FROM versions ORDER BY number")]

    def add_version(self, version: Mapping[str, Any]) -> None:
        """From now on this process makes runs with another version. Last ones that no run was made with are replaced."""
        with self._transaction():
            self._connection.execute("DELETE FROM versions WHERE number > (SELECT coalesce(max(version), 0) FROM runs)")
            self._add_version(version)

    def use_version(self, version: Mapping[str, Any]) -> None:
        """From now on this process makes runs with a version that is there already."""
        self._version = json.dumps(version, sort_keys=True)

    # Runs

    def specs(self) -> list[RunSpec]:
        """All runs, in their order."""
        return self._specs("SELECT spec FROM runs ORDER BY position")

    def waiting(self) -> list[RunSpec]:
        """Runs without a record, in their order."""
        return self._specs("SELECT spec FROM runs WHERE status IS NULL ORDER BY position")

    def counts(self) -> dict[str, int]:
        """Number of runs by status."""
        found = dict(self._rows("SELECT coalesce(status, 'waiting'), count(*) FROM runs GROUP BY status"))
        return {status: int(found.get(status, 0)) for status in ("waiting", "finished", "missed", "failed")}

    def save(self, record: Record) -> bool:
        """Keep the record of a run, in one transaction; whether it was the first of this run.

        Raises:
            StudyError: the study has no such run, or the disk is full; nothing of the record is kept then.
        """
        with self._transaction():
            found = self._rows("SELECT status FROM runs WHERE id = ?", record.id)
            if not found:
                raise StudyError(f"run {record.id[:12]} is none of this study")
            if found[0][0] is not None:
                return False
            self._connection.execute(
                "UPDATE runs SET status = ?, reason = ?, seconds = ?, at = ?, owner = NULL, lease = NULL, "
                "version = ? WHERE id = ?",
                (record.status, record.reason, record.seconds, time.time(), self._version_number(), record.id),
            )
            rows: list[tuple[str, str, float | None, str | None]] = [
                (record.id, name, float(value), None) for name, value in record.values.items()
            ]
            rows += [(record.id, name, None, why) for name, why in record.missing.items()]
            self._connection.executemany("INSERT INTO measurements VALUES (?, ?, ?, ?)", rows)
            contents = ((record.id, name, content) for name, content in record.artefacts.items())
            self._connection.executemany("INSERT INTO artefacts VALUES (?, ?, ?)", contents)
            return True

    def records(self, *, artefacts: bool = False) -> list[Record]:
        """Records of the runs that have one, in the order of the study; with the artefacts only where asked for."""
        with self._told():
            self._connection.execute("BEGIN")  # one moment of a study that may be running
            try:
                return [self._record(row, artefacts) for row in self._rows(_RECORDS)]
            finally:
                self._connection.execute("COMMIT")

    def artefact(self, run: str, name: str) -> bytes | None:
        """One artefact of a run, or ``None``."""
        content = self._one("SELECT content FROM artefacts WHERE run = ? AND name = ?", run, name)
        return None if content is None else bytes(content)

    def artefact_names(self) -> list[tuple[str, str]]:
        """Run and name of every artefact, in the order of the study."""
        query = "SELECT run, name FROM artefacts JOIN runs ON runs.id = run ORDER BY position, name"
        return [(run, name) for run, name in self._rows(query)]

    def run_versions(self) -> dict[str, int]:
        """Run -> number of the version it was made with."""
        return dict(self._rows("SELECT id, version FROM runs WHERE status IS NOT NULL"))

    def timing(self) -> tuple[float, float | None]:
        """Computing seconds of all records, and the time of the last one."""
        seconds, last = self._rows("SELECT total(seconds), max(at) FROM runs")[0]
        return float(seconds), last

    def check(self) -> list[str]:
        """What SQLite finds damaged; an intact file gives an empty list."""
        found = [str(row[0]) for row in self._rows("PRAGMA integrity_check")]
        return [] if found == ["ok"] else found

    # Inside

    def _check(self, create: bool) -> None:
        application, schema = self._one("PRAGMA application_id"), self._one("PRAGMA user_version")
        objects = self._one("SELECT count(*) FROM sqlite_master")
        if not objects and create:
            return
        if application != _APPLICATION:
            raise StudyError(f"{self.path} is not the file of a study; choose another file")
        if schema != SCHEMA:
            raise StudyError(
                f"{self.path} is a study of schema {schema}, and this is flatminima for schema {SCHEMA}: "
                "use the version of flatminima that wrote it"
            )

    def _record(self, row: Sequence[Any], artefacts: bool) -> Record:
        run, spec, status, reason, seconds = row
        numbers = self._rows("SELECT name, value, missing FROM measurements WHERE run = ? ORDER BY name", run)
        contents = (
            self._rows("SELECT name, content FROM artefacts WHERE run = ? ORDER BY name", run) if artefacts else []
        )
        return Record(
            run, json.loads(spec), status, reason or "",
            values={name: value for name, value, missing in numbers if missing is None},
            missing={name: missing for name, _, missing in numbers if missing is not None},
            artefacts={name: bytes(content) for name, content in contents}, seconds=seconds or 0.0,
        )  # fmt: skip

    def _specs(self, query: str) -> list[RunSpec]:
        try:
            return [RunSpec.from_dict(json.loads(row[0])) for row in self._rows(query)]
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise StudyError(f"{self.path}: {_advice(f'malformed specification of a run ({error!r})')}") from error

    def _add_version(self, version: Mapping[str, Any]) -> None:
        self.use_version(version)
        self._connection.execute("INSERT INTO versions (at, content) VALUES (?, ?)", (time.time(), self._version))

    def _version_number(self) -> int:
        """Of the version of this process, and not of the last: another process may have begun with another one."""
        if self._version is None:
            return int(self._one("SELECT max(number) FROM versions"))
        query = "SELECT max(number) FROM versions WHERE content = ?"
        if (found := self._one(query, self._version)) is None:
            self._connection.execute("INSERT INTO versions (at, content) VALUES (?, ?)", (time.time(), self._version))
            found = self._one(query, self._version)
        return int(found)

    def _add_runs(self, runs: Iterable[RunSpec]) -> None:
        first = (self._one("SELECT max(position) FROM runs") or 0) + 1
        rows = ((run.id, position, json.dumps(run.to_dict())) for position, run in enumerate(runs, first))
        self._connection.executemany("INSERT INTO runs (id, position, spec) VALUES (?, ?, ?)", rows)

    def _rows(self, query: str, *values: Any) -> list[Any]:
        with self._told():
            return self._connection.execute(query, values).fetchall()

    def _one(self, query: str, *values: Any) -> Any:
        rows = self._rows(query, *values)
        return rows[0][0] if rows else None

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """All of what is done within, or nothing."""
        with self._told():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:  # a full disk has rolled back by itself
                    self._connection.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """SQLite's errors, with what to do about them."""
        try:
            yield
        except sqlite3.Error as error:
            raise StudyError(f"{self.path}: {_advice(str(error))}") from error


def _timeless(value: Any) -> Any:
    """An entry without the time at which it says that it was written."""
    return {key: inner for key, inner in value.items() if key != "written"} if isinstance(value, dict) else value


_RECORDS = "SELECT id, spec, status, reason, seconds FROM runs WHERE status IS NOT NULL ORDER BY position"


def _advice(message: str) -> str:
    if "full" in message:
        return f"{message}; every finished run is kept: free some space, and the same command goes on from there"
    if "disk I/O" in message:
        return (
            f"{message} (the disk is full, a size limit is reached, or it fails); every finished run is kept: "
            "mend that, and the same command goes on from there"
        )
    if "locked" in message:
        return f"{message}: another process has been writing for {_PATIENCE:.0f} s; wait for it, or end it"
    if "not a database" in message:
        return f"{message}: expected the file of a study; choose another file"
    if "malformed" in message or "Could not decode" in message:
        return f"{message}: the file is damaged; restore a copy of it"
    return f"{message}: expected a file that can be read and written, in a folder where files can be made"
