"""The fields of a study file's tables, and which of them a factor sets."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, TypeAdapter

from flatminima.models import MODELS, options_of
from flatminima.names import unknown
from flatminima.study.grid_errors import Problems
from flatminima.study.run_spec import DataSpec, OptimiserSpec, StopSpec
from flatminima.study.toml_lines import Path

MOST_RUNS = 1_000_000


@dataclass(frozen=True)
class Seeds:
    """Replicates of a cell.

    Attributes:
        first, count: seeds of the initial weights, ``first`` .. ``first + count - 1``.
        subsets: seeds of training subsets, crossed with these; ``None``: the one of ``data``.
        order: of the rows: ``"seed"``: the seed of the weights, so that cells are paired; or one number for all.
    """

    __pydantic_config__: ClassVar[Any] = {"strict": True, "extra": "forbid"}
    first: Annotated[int, Field(ge=0, lt=2**62)] = 0
    count: Annotated[int, Field(ge=1, le=MOST_RUNS)] = 10
    subsets: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**63)], ...], Field(min_length=1)] | None = None
    order: Literal["seed"] | Annotated[int, Field(ge=0, lt=2**63)] = "seed"

    def pairs(self) -> Iterator[tuple[int, int]]:
        """Seed and order seed of every network."""
        for seed in range(self.first, self.first + self.count):
            yield seed, seed if self.order == "seed" else int(self.order)


ADAPTERS: Mapping[str, TypeAdapter[Any]] = {
    "data": TypeAdapter(DataSpec), "optimiser": TypeAdapter(OptimiserSpec), "stop": TypeAdapter(StopSpec),
    "seeds": TypeAdapter(Seeds),
}  # fmt: skip
FIELDS = {
    name: tuple(f.name for f in dataclasses.fields(kind))
    for name, kind in (("data", DataSpec), ("optimiser", OptimiserSpec), ("stop", StopSpec), ("seeds", Seeds))
}

# Short names that would be ambiguous, or that no field has.
_SHORT = {
    "rows": ("data", "rows"),
    "data": ("data", "name"),
    "model": ("model", "name"),
    "optimiser": ("optimiser", "name"),
}


def locate_field(name: str, models: Sequence[str], path: Path, problems: Problems) -> tuple[str, str] | None:
    """Table and field of a name such as ``lr``, ``stop.rows`` or ``hidden``; a mistake is added for one that is none.

    Args:
        name: as written.
        models: the networks of the study; their options are fields too.
        path: where the name stands.
        problems: where mistakes go.
    """
    if name in _SHORT:
        return _SHORT[name]
    options = {model: options_of(model) for model in models if model in MODELS}
    table, dot, field = name.partition(".")
    if dot and table == "model":
        if field == "name" or any(field in found for found in options.values()):
            return table, field
        problems.add(path, _unused(field, options))
        return None
    if dot:
        if table not in FIELDS:
            problems.add(path, unknown("table", table, (*FIELDS, "model")))
        elif field not in FIELDS[table]:
            problems.add(path, unknown("field", field, FIELDS[table]))
        else:
            return table, field
        return None
    holders = [table for table, found in FIELDS.items() if name in found]
    if any(name in found for found in options.values()):
        holders.append("model")
    if len(holders) == 1:
        return holders[0], name
    if holders:
        problems.add(
            path, f"{name!r} is ambiguous: expected one of {', '.join(f'{table}.{name}' for table in holders)}"
        )
    else:
        problems.add(path, _unused(name, options))
        if not options:
            problems.add(path, unknown("field", name, sorted({f for found in FIELDS.values() for f in found})))
    return None


def _unused(name: str, options: Mapping[str, Sequence[str]]) -> str:
    taken = "; ".join(f"{model} takes {', '.join(found) or 'none'}" for model, found in options.items())
    return (
        f"{name!r} is a field of no table, and no model of this study uses it ({taken or 'it names no known model'}): "
        "expected a field of data, optimiser, stop or seeds, or an option of the model"
    )
