"""One directory for one experiment: what is finished is never lost and never done again.

``settings.json`` says whose directory it is. Every file appears whole or not at all. A task leaves its files, then the record
that vouches for them; a run of a comparison leaves weights (``.safetensors``), then a training record, then a full record, so
a run that was killed is redone from the last whole one.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from torch import nn

from flatminima.study.checkpoint import load_weights, save_weights

_MARKER = "settings.json"


class StoreError(ValueError):
    """The output directory cannot be used; the message says why and what to do."""


class ResultStore:
    """Records of named tasks, and their files, under one directory.

    Args:
        directory: created if absent. An existing one must be empty, or hold the same experiment.
        settings: plain dictionary that defines the experiment.
        kind: what the experiment is called in errors.

    Raises:
        StoreError: the directory cannot be written, holds something else, or holds an experiment with other settings (the
            differing ones are given with both values). Nothing is changed then.
    """

    def __init__(self, directory: Path, settings: dict[str, Any], *, kind: str = "experiment") -> None:
        self.directory = directory
        self.runs = directory / "runs"
        self._kind = kind
        self._claim(json.loads(json.dumps(settings)))

    def file(self, name: str, suffix: str) -> Path:
        """Where the file ``suffix`` of a task lies; any text can be a name."""
        return self.runs / f"{quote(name, safe='+@,= ')}{suffix}"

    def result(self, name: str) -> dict[str, Any] | None:
        """Record of a finished task, or ``None``; a file that somebody emptied is no record."""
        return read_json(self.file(name, ".json")) or None

    def save(self, name: str, record: dict[str, Any], files: Mapping[str, bytes] | None = None) -> None:
        """Files first, then the record that vouches for them; its presence means that the task is done."""
        for suffix, content in (files or {}).items():
            write_bytes(self.file(name, suffix), content)
        write_json(self.file(name, ".json"), record)

    def _claim(self, settings: dict[str, Any]) -> None:
        directory, marker = self.directory, self.directory / _MARKER
        try:
            if directory.exists() and not directory.is_dir():
                raise StoreError(f"{directory} is a file; --out must name a directory")
            if marker.exists():
                self._compare(read_json(marker), settings)
            elif directory.exists() and any(not _is_partial_marker(path) for path in directory.iterdir()):
                raise StoreError(
                    f"{directory} is not empty and holds no {self._kind} (no {_MARKER}); choose a new or an empty directory"
                )
            directory.mkdir(parents=True, exist_ok=True)
            if not marker.exists():
                write_json(marker, settings)  # before anything else, so that what a killed process leaves is resumed
            self.runs.mkdir(exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.runs):
                pass
        except OSError as error:
            raise StoreError(f"cannot use {directory} for results: {error.strerror or error}") from error

    def _compare(self, found: dict[str, Any] | None, wanted: dict[str, Any]) -> None:
        if not isinstance(found, dict):
            raise StoreError(f"{self.directory / _MARKER} is not readable JSON; choose another directory")
        names = sorted(found.keys() | wanted.keys())
        different = [
            f"{name}: {json.dumps(found.get(name))} there, {json.dumps(wanted.get(name))} now"
            for name in names
            if found.get(name) != wanted.get(name)
        ]
        if different:
            article = "an" if self._kind[0] in "aeiou" else "a"
            raise StoreError(
                f"{self.directory} holds {article} {self._kind} with other settings ({'; '.join(different)}); "
                "give the same settings to resume it, or another --out"
            )


class RunStore(ResultStore):
    """Files of a comparison under one directory; arguments and errors as of :class:`ResultStore`."""

    def __init__(self, directory: Path, settings: dict[str, Any]) -> None:
        super().__init__(directory, settings, kind="comparison")

    def trained(self, run: str) -> dict[str, Any] | None:
        """Training record of a run whose weights are on disk, or ``None``."""
        return self._record(self.runs / f"{run}.train.json", "method", "seed", "failure", "seconds")

    def finished(self, run: str) -> dict[str, Any] | None:
        """Full record of a run, or ``None``."""
        return self._record(self.runs / f"{run}.json", "method", "seed", "failure", "seconds", "status")

    def _record(self, path: Path, *keys: str) -> dict[str, Any] | None:
        # A file somebody else left or emptied is no record: the run is then done again.
        record = read_json(path)
        return record if record is not None and all(key in record for key in keys) else None

    def save_trained(self, run: str, model: nn.Module, record: dict[str, Any]) -> None:
        """Weights first, the record that vouches for them second."""
        save_weights(model, self.runs / f"{run}.safetensors")
        write_json(self.runs / f"{run}.train.json", record)

    def load_trained(self, run: str, model: nn.Module) -> None:
        """Put the stored weights of a run into ``model``."""
        load_weights(model, self.runs / f"{run}.safetensors")

    def save_finished(self, run: str, record: dict[str, Any]) -> None:
        """Full record; its presence means that nothing of this run remains to be done."""
        write_json(self.runs / f"{run}.json", record)

    @classmethod
    def settings_of(cls, weights: Path) -> dict[str, Any] | None:
        """The settings of the comparison that this file of weights is a run of, or ``None``."""
        return read_json(weights.resolve().parent.parent / _MARKER) if weights.resolve().parent.name == "runs" else None


def _is_partial_marker(path: Path) -> bool:
    """What :func:`write_bytes` leaves when it is killed."""
    return path.name.startswith(f".{_MARKER}.")


def read_json(path: Path) -> dict[str, Any] | None:
    """What :func:`write_json` left, or ``None``."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        return None  # cannot come from write_json; whatever it is, the run is not finished
    return content if isinstance(content, dict) else None


def write_json(path: Path, content: dict[str, Any], *, indent: int | None = 1) -> None:
    """Write a JSON file that is whole or absent at every moment; NaN and infinity are refused by ``json``."""
    separators = (",", ":") if indent is None else None
    write_text(path, json.dumps(content, indent=indent, separators=separators, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file that is whole or absent at every moment."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file that is whole or absent at every moment."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).chmod(0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
