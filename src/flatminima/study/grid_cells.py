"""From the tables of a study file to its cells: levels set fields, and what results is checked cell by cell."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from flatminima.names import unknown
from flatminima.study.grid_checks import check_cell, check_layers, check_measures
from flatminima.study.grid_errors import Problems, dotted, said
from flatminima.study.grid_fields import ADAPTERS, FIELDS, MOST_RUNS, Seeds
from flatminima.study.grid_levels import Assignments, Condition, is_option, read_conditions, read_levels
from flatminima.study.run_spec import (
    DataSpec,
    MeasureSpec,
    ModelSpec,
    OptimiserSpec,
    Option,
    StopSpec,
    frozen_options,
)
from flatminima.study.toml_lines import Path

_TABLES = ("data", "model", "optimiser", "stop", "seeds")
_TOP = ("schema", "name", "description", *_TABLES, "factors", "when", "measures")
_NAME = re.compile(r"[\w][\w .-]*")
_ROWS = re.compile(r"rows|min\(\s*rows\s*,\s*([1-9]\d*)\s*\)")


@dataclass(frozen=True)
class Cell:
    """One combination of levels, and the networks that it stands for.

    Attributes:
        levels: factor and level.
        data, model, optimiser, stop: what results.
        seeds: the replicates.
    """

    levels: tuple[tuple[str, Option], ...]
    data: DataSpec
    model: ModelSpec
    optimiser: OptimiserSpec
    stop: StopSpec
    seeds: Seeds

    def subsets(self) -> list[DataSpec]:
        """The data, once for every training subset."""
        if self.seeds.subsets is None:
            return [self.data]
        return [dataclasses.replace(self.data, subset_seed=seed) for seed in self.seeds.subsets]

    @property
    def count(self) -> int:
        """Networks."""
        return self.seeds.count * len(self.subsets())


@dataclass(frozen=True)
class Study:
    """What a file says, checked."""

    name: str
    description: str
    factors: dict[str, tuple[Any, ...]]
    cells: tuple[Cell, ...]
    measures: tuple[MeasureSpec, ...]


def expand(content: Mapping[str, Any], schema: int, problems: Problems) -> Study:
    """The cells of a parsed file; mistakes go to ``problems``, and the result is of use only where there are none."""
    for key in content:
        if key not in _TOP:
            problems.add((key,), unknown("table or field", key, _TOP))
    if content.get("schema") != schema or content["schema"] is True:
        problems.add(("schema",), f"got {content.get('schema')!r}, expected schema = {schema}, the form of this file")
    name, description = content.get("name"), content.get("description", "")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        problems.add(("name",), f"got {name!r}, expected a name of letters, digits, spaces, dots, - and _")
    if not isinstance(description, str):
        problems.add(("description",), f"got {description!r}, expected text")
    for table in ("data", "model"):
        if table not in content:
            problems.add((), f"[{table}] is not given: expected a table that says what every network is made with")
    for table in (*_TABLES, "factors"):
        if not isinstance(content.get(table, {}), dict):
            problems.add((table,), f"got {content[table]!r}, expected a table")
    measures = _measures(content.get("measures", []), problems)
    problems.stop()

    levels = read_levels(content, problems)
    conditions = read_conditions(content, {factor: list(found) for factor, found in levels.items()}, problems)
    problems.stop()
    if math.prod(len(found) for found in levels.values()) > MOST_RUNS:
        problems.add(("factors",), f"more than {MOST_RUNS:,} cells: expected fewer levels")
        problems.stop()

    cells = _cells(content, levels, conditions, problems)
    problems.stop()
    if not cells:
        problems.add(("when",), "every cell is skipped: expected at least one that is left")
    elif sum(cell.count for cell in cells) > MOST_RUNS:
        problems.add(("seeds",), f"more than {MOST_RUNS:,} networks: expected fewer")
    _refuse_same(cells, problems)
    check_layers(measures, ((cell.model, cell.data.name) for cell in cells), problems)
    factors = {factor: tuple(found) for factor, found in levels.items()}
    return Study(str(name), str(description), factors, tuple(cells), tuple(measures))


def _cells(
    content: Mapping[str, Any],
    levels: Mapping[str, Mapping[Option, Assignments]],
    conditions: list[Condition],
    problems: Problems,
) -> list[Cell]:
    base: Assignments = {
        (table, field): (value, (table, field)) for table in _TABLES for field, value in content.get(table, {}).items()
    }
    for table in ADAPTERS:  # also what every level overrides
        given = content.get(table, {})
        plain = _batch_size(given, MOST_RUNS) if table == "optimiser" else given
        _validated(table, plain, {}, problems, whole=False)
    cells = []
    for chosen in itertools.product(*(found.items() for found in levels.values())):
        cell = tuple(zip(levels, (level for level, _ in chosen), strict=True))
        values = dict(base)
        for _, assignments in chosen:
            values.update(assignments)
        skipped = False
        added: Assignments = {}
        for condition in conditions:
            if all(dict(cell)[factor] in wanted for factor, wanted in condition.where.items()):
                condition.met = True
                _refuse_contradiction(added, condition.assignments or {}, cell, problems)
                added.update(condition.assignments or {})
                skipped |= condition.assignments is None
        values.update(added)
        if not skipped and (made := _cell(cell, values, problems)) is not None:
            cells.append(made)
    for condition in conditions:
        if not condition.met:
            problems.add(condition.path, "matches no cell: expected levels that occur together")
    return cells


def _refuse_contradiction(
    given: Assignments, more: Assignments, cell: tuple[tuple[str, Option], ...], problems: Problems
) -> None:
    """Two conditions of one cell that set a field to different values: neither says that it goes before the other."""
    for place, (value, path) in more.items():
        other, where = given.get(place, (value, path))
        if other != value:
            problems.add(
                path,
                f"sets {dotted(place)} to {value!r}, and {dotted(where)} to {other!r}, where {_words(cell)}: "
                "expected conditions that agree",
            )


def _words(levels: tuple[tuple[str, Option], ...]) -> str:
    return ", ".join(f"{name} = {value!r}" for name, value in levels)


def _cell(levels: tuple[tuple[str, Option], ...], values: Assignments, problems: Problems) -> Cell | None:
    tables: dict[str, dict[str, Any]] = {table: {} for table in _TABLES}
    for (table, field), (value, _) in values.items():
        tables[table][field] = value
    # An entry that nobody wrote is blamed on its table.
    places = {place: path for place, (_, path) in values.items()}
    made: dict[str, Any] = {}
    tables["optimiser"] = _batch_size(tables["optimiser"], tables["data"].get("rows"))
    if "threshold" not in tables["stop"]:
        rule = tables["stop"].get("rule", StopSpec.rule)
        tables["stop"]["threshold"] = {"accuracy": 1.0, "never": None}.get(rule, StopSpec.threshold)
    for table in ADAPTERS:
        if (found := _validated(table, tables[table], places, problems)) is not None:
            made[table] = found
    name = tables["model"].pop("name", None)
    if not isinstance(name, str):
        problems.add(places.get(("model", "name"), ("model",)), f"got {name!r}, expected the name of a network")
        return None
    for option, value in tables["model"].items():
        if not is_option(value):
            about, place = ("model", option), places[("model", option)]
            problems.add(place, f"got {value!r}, expected a number, a text, or a list of these", field=dotted(about))
            return None
    subsets = made["seeds"].subsets or () if "seeds" in made else ()
    for index, subset in enumerate(subsets):
        if subset in subsets[:index]:
            place = (*places[("seeds", "subsets")], index)
            problems.add(place, f"{subset} is given twice: expected each once")
            return None
    made["model"] = ModelSpec(name, frozen_options(tables["model"]))
    if len(made) < len(_TABLES):
        return None
    cell = Cell(levels, **made)
    return cell if check_cell(cell.data, cell.model, cell.optimiser, cell.stop, places, problems) else None


def _batch_size(optimiser: dict[str, Any], rows: Any) -> dict[str, Any]:
    """``rows`` and ``min(rows, 4096)`` are numbers once the rows are known."""
    given = optimiser.get("batch_size")
    match = _ROWS.fullmatch(given) if isinstance(given, str) else None
    if match is None:
        return optimiser
    known = rows if isinstance(rows, int) and rows > 0 else 1  # other rows are a mistake of their own
    return {**optimiser, "batch_size": known if match[1] is None else min(known, int(match[1]))}


def _validated(
    table: str, given: dict[str, Any], places: Mapping[tuple[str, str], Path], problems: Problems, *, whole: bool = True
) -> Any:
    """The object of a table, or ``None``; what is missing is no mistake where the table is not ``whole``."""
    try:
        return ADAPTERS[table].validate_json(json.dumps(given, default=str))
    except ValidationError as error:
        for mistake in error.errors(include_url=False):
            if mistake["type"] == "missing" and not whole:
                continue
            field = str(mistake["loc"][0])
            place = places.get((table, field), (table, field))
            rest = tuple(part for part in mistake["loc"][1:] if isinstance(part, int))
            about = "" if place == (table, field) else dotted((table, field))
            problems.add((*place, *rest), said(mistake, FIELDS[table]), field=about)
    return None


def _measures(given: Any, problems: Problems) -> list[MeasureSpec]:
    if not isinstance(given, list) or not all(isinstance(entry, dict) for entry in given):
        problems.add(("measures",), "expected tables [[measures]], each with a name")
        return []
    adapter, fields = TypeAdapter(MeasureSpec), tuple(f.name for f in dataclasses.fields(MeasureSpec))
    found = []
    for index, entry in enumerate(given):
        path: Path = ("measures", index)
        options = entry.get("options", {})
        if not isinstance(options, dict):
            problems.add((*path, "options"), f"got {options!r}, expected a table of options")
            continue
        plain = {key: value for key, value in entry.items() if key != "options"}
        try:
            made = adapter.validate_json(json.dumps(plain, default=str))
        except ValidationError as error:
            problems.add_validation(error, path, fields)
            continue
        found.append(dataclasses.replace(made, options=frozen_options(options)))
        check_measures(found, path, problems)
    return found


def _refuse_same(cells: list[Cell], problems: Problems) -> None:
    """Two cells that share networks would count each of these twice."""
    seen: dict[Any, list[Cell]] = {}
    for cell in cells:
        optimiser = cell.optimiser
        if optimiser.schedule != "step":  # what nothing reads makes no other network
            optimiser = dataclasses.replace(optimiser, drop_factor=OptimiserSpec.drop_factor)
        others = seen.setdefault((dataclasses.replace(cell.data, subset_seed=0), cell.model, optimiser, cell.stop), [])
        other = next((other for other in others if _overlap(other, cell)), None)
        others.append(cell)
        if other is None:
            continue
        different = [name for (name, a), (_, b) in zip(cell.levels, other.levels, strict=True) if a != b]
        whole = other.seeds == cell.seeds and other.data.subset_seed == cell.data.subset_seed
        how = "has no effect: the cells" if whole else "some networks of the cells"
        problems.add(
            ("factors", different[0]), f"{how} {_words(other.levels)} and {_words(cell.levels)} are the same networks"
        )


def _overlap(a: Cell, b: Cell) -> bool:
    if not set(a.subsets()) & set(b.subsets()):
        return False
    both = range(max(a.seeds.first, b.seeds.first), min(a.seeds.first + a.seeds.count, b.seeds.first + b.seeds.count))
    orders = {a.seeds.order, b.seeds.order}
    return bool(both) and (len(orders) == 1 or any(order in both for order in orders if order != "seed"))
