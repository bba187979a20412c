"""What is wrong with a study file: all mistakes at once, each with its line and field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from flatminima.names import unknown
from flatminima.study.toml_lines import Path, TomlLines

_MOST = 20  # mistakes that are printed


class GridError(ValueError):
    """The study file cannot be used; every mistake is a line ``FILE:LINE: FIELD: what is wrong``."""


class Problems:
    """Collects mistakes of one file.

    Args:
        source: what the file is called.
        toml: knows the lines.
    """

    def __init__(self, source: str, toml: TomlLines) -> None:
        self._source = source
        self._toml = toml
        self._found: dict[tuple[int, str], None] = {}

    def __bool__(self) -> bool:
        return bool(self._found)

    def add(self, path: Sequence[str | int], message: str, *, field: str = "") -> None:
        """A mistake at an entry of the file; ``field`` is what it is about where that is not the entry itself."""
        shown = dotted(path) or "file"
        about = f"{field} (set by {shown})" if field and field != shown else shown
        self._found[self._toml.line(path), f"{about}: {message}"] = None

    def add_validation(self, error: ValidationError, path: Path, known: Sequence[str]) -> None:
        """What pydantic found in the table at ``path``, whose fields are ``known``."""
        for mistake in error.errors(include_url=False):
            inside = tuple(part for part in mistake["loc"] if isinstance(part, int) or part in known)
            given = (*path, *(inside or mistake["loc"][:1]))
            self.add(given, said(mistake, known))

    def stop(self) -> None:
        """Raise what was found.

        Raises:
            GridError: something was.
        """
        if self._found:
            lines = [f"{self._source}:{line}: {text}" for line, text in sorted(self._found)]
            if len(lines) > _MOST:
                lines = [*lines[:_MOST], f"and {len(lines) - _MOST} more"]
            raise GridError("\n".join(lines))


def dotted(path: Sequence[str | int]) -> str:
    """A path as it is written.

    Example:
        >>> dotted(("measures", 0, "name"))
        'measures[0].name'
    """
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def said(mistake: Mapping[str, Any], known: Sequence[str]) -> str:
    """A mistake that pydantic found in a table of fields ``known``, in this project's words."""
    kind, given = mistake["type"], mistake["input"]
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return unknown("field", mistake["loc"][0], known)
    if kind == "missing":
        return "not given: expected a value"
    if kind == "too_short":
        return f"got {given!r}, expected at least {mistake['ctx']['min_length']} entry"
    message: str = mistake["msg"].removeprefix("Input should be ")
    return f"got {given!r}, expected {message}"
