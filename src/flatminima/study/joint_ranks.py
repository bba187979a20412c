"""Many rank correlations of one set of networks, resampled together: one bootstrap for a whole report."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flatminima.study.bootstrap import DRAWS, Array, Estimate, Replicates, Resampling, replicates
from flatminima.study.correlation import corrected, spearman_brown
from flatminima.study.rank_table import RankTable, correlation_of, partial_of
from flatminima.study.statistics import LEVEL


@dataclass(frozen=True)
class Ranked:
    """Covariances of ranks ``(b, k, k)`` with the names of their columns."""

    covariances: Array
    places: Mapping[str, int]

    def rho(self, first: str, second: str, given: Sequence[str] = ()) -> Array:
        """Rank correlation of two columns, ``(b,)``; partial where others are given."""
        i, j = self.places[first], self.places[second]
        if not given:
            return correlation_of(self.covariances, i, j)
        return partial_of(self.covariances, i, j, [self.places[name] for name in given])

    def corrected(self, measure: str, outcome: str, halves: Sequence[str], repeats: Sequence[str]) -> Array:
        """Correlation corrected for the error of the outcome (its two halves) and of the measure (its repetitions)."""
        own = np.ones(1) if len(repeats) < 2 else self.repeatability(repeats)
        return corrected(self.rho(measure, outcome), own, spearman_brown(self.rho(*halves)))

    def repeatability(self, repeats: Sequence[str]) -> Array:
        """Mean correlation over all pairs of repetitions."""
        pairs = [self.rho(a, b) for i, a in enumerate(repeats) for b in repeats[:i]]
        return np.asarray(np.mean(pairs, axis=0))


Query: TypeAlias = "Callable[[Ranked, Ranked], Array]"
"""From covariances over all networks, and within cells, to a statistic ``(b,)``."""


@dataclass
class JointRanks:
    """Queries about the ranks of some columns, answered from the same resamples.

    Args:
        columns: name -> ``(n,)`` finite numbers.
        cells: label of each network's cell.
        units: label of each network's unit, that is drawn as a whole; networks drawn one by one are drawn within their cells.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> x = rng.standard_normal(60)
        >>> joint = JointRanks({"x": x, "y": x + rng.standard_normal(60)}, [0] * 60, list(range(60)))
        >>> joint.ask("raw", lambda pooled, within: pooled.rho("x", "y"))
        >>> joint.answer(draws=500)["raw"].estimates()[0].low > 0.4
        True
    """

    columns: Mapping[str, ArrayLike]
    cells: Sequence[Hashable]
    units: Sequence[Hashable]
    _queries: dict[str, Query] = field(default_factory=dict)

    def ask(self, key: str, query: Query) -> None:
        """Enter a query under a key."""
        self._queries[key] = query

    @property
    def several_cells(self) -> bool:
        """Whether there is more than one cell; otherwise what is within cells is what is pooled."""
        return len(set(self.cells)) > 1

    def answer(self, *, draws: int = DRAWS, seed: int = 0) -> dict[str, Replicates]:
        """Every query by its key.

        Raises:
            ValueError: fewer than 3 networks or fewer than two units.
        """
        if not self._queries:
            return {}
        names = list(self.columns)
        places = {name: place for place, name in enumerate(names)}
        arrays = [self.columns[name] for name in names]
        pooled_table = RankTable(arrays)
        within_table = RankTable(arrays, self.cells) if self.several_cells else None
        queries = list(self._queries.values())

        def statistic(counts: Array) -> Array:
            pooled = Ranked(pooled_table.covariances(counts), places)
            within = pooled if within_table is None else Ranked(within_table.covariances(counts), places)
            return np.stack([np.broadcast_to(query(pooled, within), (len(counts),)) for query in queries], axis=1)

        alone = len(set(self.units)) == pooled_table.n
        resampling = Resampling(
            pooled_table.n,
            clusters=None if alone else self.units,
            strata=self.cells if alone and self.several_cells else None,
        )
        found = replicates(statistic, resampling, draws=draws, seed=seed)
        return {key: found.column(i) for i, key in enumerate(self._queries)}


def estimate(found: Mapping[str, Replicates], key: str, level: float = LEVEL) -> Estimate:
    """The one statistic under a key."""
    return found[key].estimates(level=level)[0]


def complete(columns: Mapping[str, NDArray[np.float64]]) -> NDArray[np.intp]:
    """Rows in which every column has a number."""
    return np.flatnonzero(np.isfinite(np.stack(list(columns.values()))).all(0))


def no_estimate(n: int, note: str) -> Estimate:
    """In place of a statistic that cannot be computed."""
    nothing = math.nan
    return Estimate(nothing, nothing, nothing, nothing, nothing, n, 0, note)
