"""The levels of a study's factors, and what goes with some combinations of them: each sets fields."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from flatminima.names import unknown
from flatminima.study.grid_errors import Problems
from flatminima.study.grid_fields import locate_field
from flatminima.study.run_spec import Option
from flatminima.study.toml_lines import Path

Assignments: TypeAlias = dict[tuple[str, str], tuple[Any, Path]]
"""Table and field: what it is set to, and where the file says so."""


@dataclass
class Condition:
    """An entry ``[[when]]``.

    Attributes:
        where: factor -> the levels that it is about.
        assignments: what it sets; ``None``: it skips the cell.
        path: where it stands.
        met: some cell was one of these.
    """

    where: dict[str, list[Any]]
    assignments: Assignments | None
    path: Path
    met: bool = False


def read_levels(content: Mapping[str, Any], problems: Problems) -> dict[str, dict[Option, Assignments]]:
    """Factor -> level -> what it sets."""
    found: dict[str, dict[Option, Assignments]] = {}
    models = _models(content)
    for factor, given in content.get("factors", {}).items():
        path: Path = ("factors", factor)
        found[factor] = {}
        if isinstance(given, list):
            place = locate_field(factor, models, path, problems)
            for index, value in enumerate(given):
                level = tuple(value) if isinstance(value, list) else value
                if isinstance(level, dict) or (isinstance(level, tuple) and not is_option(level)):
                    problems.add((*path, index), f"got {value!r}, expected a number, a text, or a list of these")
                elif level in found[factor]:
                    problems.add((*path, index), f"level {value!r} is given twice: expected each once")
                elif place is not None:
                    found[factor][level] = {place: (value, (*path, index))}
        elif isinstance(given, dict):
            for label, settings in given.items():
                if not isinstance(settings, dict):
                    problems.add((*path, label), f"got {settings!r}, expected a table of fields, as in {{ lr = 0.1 }}")
                    continue
                found[factor][label] = _assignments(settings, models, (*path, label), problems)
        else:
            problems.add(path, f"got {given!r}, expected a list of levels, or a table of named ones")
            continue
        if not given:
            problems.add(path, "has no level: expected at least one")
    return found


def _models(content: Mapping[str, Any]) -> list[str]:
    """Names of all networks that the file mentions."""
    names = [content.get("model", {}).get("name")]
    for given in content.get("factors", {}).values():
        tables = given.values() if isinstance(given, dict) else ()
        names += [table.get(key) for table in tables if isinstance(table, dict) for key in ("model", "model.name")]
    for factor in ("model", "model.name"):
        listed = content.get("factors", {}).get(factor, [])
        names += listed if isinstance(listed, list) else []
    return [name for name in dict.fromkeys(n for n in names if isinstance(n, str))]


def is_option(value: object) -> bool:
    """Whether a model can be given this: a number, a text, or a list of these."""
    return all(map(_scalar, value)) if isinstance(value, (list, tuple)) else _scalar(value)


def _scalar(value: object) -> bool:
    return isinstance(value, (str, int, float, bool))


def _assignments(settings: Mapping[str, Any], models: list[str], path: Path, problems: Problems) -> Assignments:
    found: Assignments = {}
    for key, value in _flat(settings):
        place = locate_field(key, models, (*path, key), problems)
        if place is not None:
            found[place] = value, (*path, *key.split("."))
    return found


def _flat(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """``{ data.rows = 5 }`` is a table in a table."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from ((f"{key}.{inner}", found) for inner, found in value.items())
        else:
            yield key, value


def read_conditions(content: Mapping[str, Any], levels: Mapping[str, list[Any]], problems: Problems) -> list[Condition]:
    """The entries ``[[when]]``, in their order."""
    given = content.get("when", [])
    if not isinstance(given, list) or not all(isinstance(entry, dict) for entry in given):
        problems.add(("when",), "expected tables [[when]] with where, and set or skip")
        return []
    found = []
    for index, entry in enumerate(given):
        path: Path = ("when", index)
        for key in entry:
            if key not in ("where", "set", "skip"):
                problems.add((*path, key), unknown("field", key, ("where", "set", "skip")))
        where, settings, skip = entry.get("where"), entry.get("set"), entry.get("skip")
        if not isinstance(where, dict) or not where:
            problems.add((*path, "where"), f"got {where!r}, expected factors and levels, as in {{ batch = 'large' }}")
            continue
        if (settings is None) == (skip is None) or skip not in (None, True):
            problems.add(path, "expected either set = { ... } or skip = true")
            continue
        if settings is not None and not isinstance(settings, dict):
            problems.add((*path, "set"), f"got {settings!r}, expected a table of fields")
            continue
        wanted = {}
        for factor, value in where.items():
            if factor not in levels:
                problems.add((*path, "where", factor), unknown("factor", factor, levels))
                continue
            listed = isinstance(value, list) and not any(tuple(value) == level for level in levels[factor])
            wanted[factor] = [tuple(v) if isinstance(v, list) else v for v in (value if listed else [value])]
            for level in wanted[factor]:
                if level not in levels[factor]:
                    known = ", ".join(map(repr, levels[factor]))
                    problems.add((*path, "where", factor), f"{level!r} is no level of it: expected one of {known}")
        assignments = None
        if settings is not None:
            assignments = _assignments(settings, _models(content), (*path, "set"), problems)
        found.append(Condition(wanted, assignments, path))
    return found
