"""A study as a TOML file: factors x seeds, and what is trained, how, until when, and measured.

    schema = 1
    name = "batch-and-rate"

    [data]
    name = "digits"
    rows = 250

    [model]
    name = "mlp"
    hidden = [64, 16]

    [optimiser]
    lr = 0.1

    [stop]
    rule = "loss"
    threshold = 0.01

    [seeds]
    first = 0
    count = 10
    subsets = [42, 43, 44]        # training subsets, crossed with the seeds

    [factors]
    lr = [0.05, 0.15, 0.5]        # a field of one section, or section.field

    [factors.batch]               # or levels by name, each of which sets some fields
    small = { batch_size = 32 }
    large = { batch_size = "min(rows, 4096)" }

    [[when]]                      # what goes with some combinations of levels
    where = { batch = "large", lr = 0.05 }
    set = { max_epochs = 2000 }   # or: skip = true

    [[measures]]
    name = "trace"
    orbit = true

The fields of ``data``, ``optimiser``, ``stop`` and ``measures`` are those of :mod:`flatminima.study.run_spec`; other fields of
``model`` are options of the network. Every cell of the grid is checked before anything is trained.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path as FilePath
from typing import Any

from flatminima.study.grid_cells import Cell, expand
from flatminima.study.grid_errors import GridError, Problems
from flatminima.study.run_spec import MeasureSpec, RunSpec
from flatminima.study.toml_lines import TOMLDecodeError, TomlLines

__all__ = ["SCHEMA", "Grid", "GridError"]

SCHEMA = 1


@dataclass(frozen=True)
class Grid:
    """A checked study.

    Attributes:
        name: of the study.
        description: in words.
        factors: factor -> its levels, in the order of the file.
        cells: the combinations that are not skipped.
        measures: taken of every network.
        text: the file.

    Example:
        >>> grid = Grid.parse('''schema = 1
        ... name = "tiny"
        ... [data]
        ... name = "digits"
        ... rows = 100
        ... [model]
        ... name = "mlp"
        ... hidden = [8]
        ... [seeds]
        ... count = 3
        ... [factors]
        ... lr = [0.1, 0.2]
        ... ''')
        >>> [(run.factors["lr"], run.seed) for run in grid.runs()]
        [(0.1, 0), (0.1, 1), (0.1, 2), (0.2, 0), (0.2, 1), (0.2, 2)]
        >>> Grid.parse(grid.text.replace("hidden = [8]", "hiden = [8]"), "tiny.toml")
        Traceback (most recent call last):
        flatminima.study.grid_errors.GridError: tiny.toml:8: model.hiden: unknown option of mlp 'hiden': ...
    """

    name: str
    description: str
    factors: dict[str, tuple[Any, ...]]
    cells: tuple[Cell, ...]
    measures: tuple[MeasureSpec, ...]
    text: str

    @classmethod
    def read(cls, path: FilePath) -> Grid:
        """The study of a file.

        Raises:
            GridError: it cannot be read or is not a valid study; every mistake is a line ``FILE:LINE: FIELD: what is wrong``.
        """
        try:
            text = path.read_text(encoding="utf-8-sig")  # some editors begin with a mark of the byte order
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise GridError(f"cannot read the study {path}: {reason}") from error
        return cls.parse(text, str(path))

    @classmethod
    def parse(cls, text: str, source: str = "study") -> Grid:
        """The study of a text; ``source`` is what errors call it.

        Raises:
            GridError: as of :meth:`read`.
        """
        try:
            toml = TomlLines(text)
        except TOMLDecodeError as error:
            raise GridError(f"{source}: not TOML: {error}") from error
        problems = Problems(source, toml)
        study = expand(toml.content, SCHEMA, problems)
        problems.stop()
        return cls(study.name, study.description, study.factors, study.cells, study.measures, text)

    def runs(self) -> list[RunSpec]:
        """Every network: cell by cell, in each the subsets, in each the seeds."""
        return list(self._runs)

    @cached_property
    def _runs(self) -> tuple[RunSpec, ...]:  # which remember their ids: a large study would otherwise hash for minutes
        return tuple(
            RunSpec(self.name, cell.levels, data, cell.model, cell.optimiser, cell.stop, seed, order, self.measures)
            for cell in self.cells
            for data in cell.subsets()
            for seed, order in cell.seeds.pairs()
        )

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what decides the results: the networks and their measures, not comments or layout."""
        ids = "\n".join(run.id for run in self.runs())
        return hashlib.sha256(ids.encode()).hexdigest()
