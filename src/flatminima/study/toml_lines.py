"""On which line of a TOML text each entry stands, so that an error can say so; the parser itself does not tell."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["Path", "TOMLDecodeError", "TomlLines"]

TOMLDecodeError = tomllib.TOMLDecodeError
Path: TypeAlias = "tuple[str | int, ...]"
_CLOSING = ("]", "}", '"""', "'''")  # in the last line of a statement of several


class TomlLines:
    """A parsed text that knows its lines.

    Args:
        text: of the file.

    Raises:
        TOMLDecodeError: not TOML; its message names line and column.

    Attributes:
        content: what the parser made of it.

    Example:
        >>> toml = TomlLines('name = "x"\\n\\n[stop]\\nrule = "loss"\\n\\n[[measures]]\\nname = "trace"\\n')
        >>> toml.line(("stop", "rule")), toml.line(("stop", "threshold")), toml.line(("measures", 0, "name"))
        (4, 3, 7)
    """

    def __init__(self, text: str) -> None:
        self.content: dict[str, Any] = tomllib.loads(text)
        self._lines: dict[Path, int] = {}
        table: Path = ()
        tables: dict[Path, int] = {}  # [[name]]: how many so far
        for number, parsed, kind in _statements(text.replace("\r\n", "\n").split("\n")):
            if kind == "value":
                for path in _paths(parsed):
                    self._lines.setdefault((*table, *path), number)
                continue
            names = _header(parsed)
            table = _resolved(names if kind == "table" else names[:-1], tables)
            if kind == "tables":
                array = (*table, names[-1])
                tables[array] = tables.get(array, 0) + 1
                self._lines.setdefault(array, number)
                table = (*array, tables[array] - 1)
            self._lines.setdefault(table, number)

    def line(self, path: Sequence[str | int]) -> int:
        """Line of the entry, or of what holds it; 1 for the file."""
        path = tuple(path)
        while path and path not in self._lines:
            path = path[:-1]
        return self._lines.get(path, 1)


def _statements(rows: list[str]) -> Iterator[tuple[int, dict[str, Any], str]]:
    """First line, content and kind of each statement: one ends where the text from its beginning is whole TOML."""
    start = 0
    while start < len(rows):
        end = start + 1
        while (parsed := _parsed("\n".join(rows[start:end]))) is None and end < len(rows):
            end += 1
            while end < len(rows) and not any(closing in rows[end - 1] for closing in _CLOSING):
                end += 1  # a list of thousands of lines is not read anew at each of them
        first = rows[start].lstrip()
        if parsed:
            yield (
                start + 1,
                parsed,
                "tables" if first.startswith("[[") else "table" if first.startswith("[") else "value",
            )
        start = end


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        return tomllib.loads(text)
    except TOMLDecodeError:
        return None


def _header(parsed: Any) -> list[str]:
    names = []
    while parsed:
        ((name, inner),) = parsed.items()
        names.append(name)
        parsed = inner[0] if isinstance(inner, list) else inner
    return names


def _resolved(names: Sequence[str], tables: dict[Path, int]) -> Path:
    path: Path = ()
    for name in names:
        path = (*path, name)
        if path in tables:
            path = (*path, tables[path] - 1)
    return path


def _paths(value: Any) -> Iterator[Path]:
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in entries:
        yield (name,)
        for path in _paths(inner):
            yield (name, *path)
