"""The records of a study as columns: one row for each network, NaN where it has no number."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flatminima.names import unknown
from flatminima.study.run_spec import Record

#: What a quantity may be called that a study measures or always logs: looked up in this order.
PREFIXES = ("", "measure.", "covariate.")


@dataclass(frozen=True)
class RunTable:
    """Records in columns.

    Example:
        >>> spec = {"cell": {"lr": 0.1}, "data": {"name": "digits", "subset_seed": 42}, "seed": 3, "order_seed": 3}
        >>> table = RunTable((Record("a" * 64, spec, "finished", values={"measure.trace": 2.0}),))
        >>> table.column("trace").tolist(), table.labels("measure."), table.settings()
        ([2.0], ['trace'], [{'lr': 0.1, 'subset': 42, 'seed': 3}])
    """

    records: tuple[Record, ...]

    def __len__(self) -> int:
        return len(self.records)

    def where(self, keep: Callable[[Record], bool]) -> RunTable:
        """The records that fulfil a condition, in their order."""
        return RunTable(tuple(record for record in self.records if keep(record)))

    def rows(self, indices: Iterable[int]) -> RunTable:
        """The records at these places."""
        return RunTable(tuple(self.records[int(i)] for i in indices))

    @property
    def finished(self) -> RunTable:
        """Those that met their stop criterion; only these are compared."""
        return self.with_status("finished")

    @cached_property
    def names(self) -> list[str]:
        """Full names of all values, in the order in which they first appear."""
        return list(dict.fromkeys(name for record in self.records for name in record.values))

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(self.names)

    def labels(self, prefix: str) -> list[str]:
        """What follows a prefix in the names that have it."""
        return [name.removeprefix(prefix) for name in self.names if name.startswith(prefix)]

    def full_name(self, name: str) -> str | None:
        """The name under which a quantity is recorded: as it is, as a measure or as a covariate; ``None`` if nowhere."""
        return next((prefix + name for prefix in PREFIXES if prefix + name in self._known), None)

    def column(self, name: str) -> NDArray[np.float64]:
        """Values of a quantity, NaN where a record has none.

        Raises:
            ValueError: no record has it.
        """
        full = self.full_name(name)
        if full is None:
            raise ValueError(unknown("value", name, self.names))
        return np.array([record.values.get(full, np.nan) for record in self.records])

    def spec(self, *path: str) -> list[Any]:
        """An entry of every specification, such as ``spec("data", "name")``."""
        found = []
        for record in self.records:
            value: Any = record.spec
            for key in path:
                value = value[key]
            found.append(value)
        return found

    @cached_property
    def data_sets(self) -> list[str]:
        """Names of the data sets, in the order in which they first appear."""
        return list(dict.fromkeys(self.spec("data", "name")))

    def of_data(self, name: str) -> RunTable:
        """The records of one data set."""
        return self.where(lambda record: record.spec["data"]["name"] == name)

    def of_rows(self, rows: int) -> RunTable:
        """The records of networks with so many training rows."""
        return self.where(lambda record: record.spec["data"]["rows"] == rows)

    def with_status(self, status: str) -> RunTable:
        """The records that ended so: finished, missed or failed."""
        return self.where(lambda record: record.status == status)

    @cached_property
    def subsets(self) -> list[Hashable]:
        """The training subset of each: records that share it share its luck."""
        return [(data["name"], data.get("rows"), data["subset_seed"]) for data in self.spec("data")]

    @cached_property
    def cells(self) -> list[Hashable]:
        """The cell of each: its study, factors and training subset, all that is the same for networks that differ in seed.

        Studies that are reported together differ in what is no factor of either: networks, stop criteria.
        """
        return [
            (record.spec.get("study"), tuple((n, hashable(v)) for n, v in record.spec["cell"].items()), subset)
            for record, subset in zip(self.records, self.subsets, strict=True)
        ]

    @cached_property
    def starts(self) -> list[Hashable]:
        """Data set and seeds of each: records that share them began with the same weights and the same order of rows."""
        return [(r.spec["data"]["name"], r.spec["seed"], r.spec["order_seed"]) for r in self.records]

    def settings(self) -> list[dict[str, Hashable]]:
        """Factors, training subset and seed of each, for statistics along single axes; the same names for all.

        The study, and the seed of the order where it is not that of the network, only where networks differ in them: they tell
        networks apart that are otherwise alike. A factor that a network's study does not vary is ``None``.
        """
        factors = dict.fromkeys(name for record in self.records for name in record.spec["cell"])
        studies = len({record.spec.get("study") for record in self.records}) > 1
        seeds = [(record.spec["seed"], record.spec["order_seed"]) for record in self.records]
        orders = len(set(seeds)) > len({seed for seed, _ in seeds})
        return [
            {name: hashable(record.spec["cell"].get(name)) for name in factors}
            | {"subset": record.spec["data"]["subset_seed"]}
            | ({"study": record.spec.get("study")} if studies else {})
            | {"seed": record.spec["seed"]}
            | ({"order": record.spec["order_seed"]} if orders else {})
            for record in self.records
        ]


def hashable(value: Any) -> Hashable:
    """Lists, which JSON makes of tuples, as tuples."""
    return tuple(value) if isinstance(value, list) else value


def resampling_units(table: RunTable) -> tuple[Sequence[Hashable], str]:
    """Which networks are drawn together when a data set's networks are resampled, and in words.

    Networks that began alike, in several cells or on several subsets, are one unit. Otherwise each is its own; cells and
    subsets are kept as they are, so that an interval is about other seeds, on these subsets.

    Example:
        >>> resampling_units(RunTable(()))
        ([], 'networks')
    """
    starts = table.starts
    if len(set(starts)) < len(starts):
        return starts, "seeds, each with all its networks"
    return list(range(len(table))), "networks"


def shared_seeds(table: RunTable) -> Sequence[Hashable] | None:
    """The clusters of a bootstrap over these networks: their seeds, where one was trained more than once.

    Example:
        >>> shared_seeds(RunTable(())) is None
        True
    """
    units, _ = resampling_units(table)
    return units if len(set(units)) < len(table) else None
