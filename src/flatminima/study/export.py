"""The runs of studies as one table for other programs: CSV or Parquet."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from flatminima.study.database import StudyDatabase, StudyError
from flatminima.study.store import write_bytes

FORMATS = (".csv", ".parquet")


def run_table(databases: Sequence[StudyDatabase]) -> pa.Table:
    """One row for every planned run, those without a record included.

    Columns: ``run``, ``study``, ``status`` (``waiting`` without a record), ``reason``, ``seconds``, ``version`` (number of the
    version of code and data), ``cell.FACTOR``, the fields of the specification by their paths, the values by their names, and
    ``missing`` (JSON: name -> why there is no number). What a run does not have is null.
    """
    rows = [row for database in databases for row in _rows(database)]
    counted = Counter(row["run"] for row in rows)
    if twice := [run for run, count in counted.items() if count > 1]:
        raise StudyError(f"{len(twice)} networks are given twice, first {twice[0][:12]}: expected each study once")
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: _column([row.get(name) for row in rows]) for name in names})


def write_table(table: pa.Table, path: Path) -> None:
    """Write the table, whole or not at all; the suffix says how.

    Raises:
        StudyError: another suffix, or a file that cannot be written.
    """
    check_suffix(path)
    content = io.BytesIO()
    if path.suffix == ".csv":
        pa.csv.write_csv(table, content)
    else:
        pa.parquet.write_table(table, content)
    write_file(path, content.getvalue())


def check_suffix(path: Path) -> None:
    """Refuse what no table is written as.

    Raises:
        StudyError: the suffix is none of ``FORMATS``.
    """
    if path.suffix not in FORMATS:
        raise StudyError(f"cannot export to {path}: expected a name that ends in {' or '.join(FORMATS)}")


def write_artefacts(database: StudyDatabase, folder: Path) -> int:
    """Write every artefact as ``FOLDER/RUN.NAME``; their number.

    Raises:
        StudyError: the folder cannot be written.
    """
    count = 0
    for run, name in database.artefact_names():
        write_file(folder / f"{run}.{name}", database.artefact(run, name) or b"")
        count += 1
    return count


def write_file(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all, and the folders above it.

    Raises:
        StudyError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content)
    except OSError as error:
        raise StudyError(f"cannot write {path}: {error.strerror or error}") from error


def _rows(database: StudyDatabase) -> Iterator[dict[str, Any]]:
    records = {record.id: record for record in database.records()}
    versions = database.run_versions()
    for spec in database.specs():
        plain = spec.to_dict()
        record = records.get(spec.id)
        row: dict[str, Any] = {
            "run": spec.id, "study": plain.pop("study"), "status": "waiting" if record is None else record.status,
            "reason": None if record is None else record.reason, "seconds": None if record is None else record.seconds,
            "version": versions.get(spec.id),
        }  # fmt: skip
        plain["measures"] = ", ".join(measure["label"] for measure in plain["measures"])
        row |= dict(flattened(plain))
        if record is not None:
            row |= {name: float(value) for name, value in record.values.items()}
            row["missing"] = json.dumps(record.missing, sort_keys=True) if record.missing else None
        yield row


def flattened(plain: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Paths and leaves of nested dictionaries.

    Example:
        >>> dict(flattened({"stop": {"rule": "loss"}, "seed": 3}))
        {'stop.rule': 'loss', 'seed': 3}
    """
    for name, value in plain.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _column(values: Sequence[Any]) -> pa.Array:
    """Numbers stay numbers; lists, and levels of several types, become text."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float} and kinds:
        return pa.array(values, pa.int64() if kinds == {int} else pa.float64())
    if kinds == {bool}:
        return pa.array(values, pa.bool_())
    texts = [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]
    return pa.array(texts, pa.string())
