"""What each measure says about the outcome on one data set: correlations of every kind, comparisons, and selection."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flatminima.measures import MEASURES
from flatminima.study.bootstrap import Array, Estimate, Replicates
from flatminima.study.correlation import across_clusters, kendall, permutation_p
from flatminima.study.dependent import difference_of_sizes, meng_z
from flatminima.study.joint_ranks import JointRanks, Query, no_estimate
from flatminima.study.rank_table import RankTable, correlation_of
from flatminima.study.run_table import RunTable, resampling_units
from flatminima.study.study_measures import STUDY_MEASURES

Row = dict[str, Any]
#: Held fixed first, and then also.
CONFOUNDERS = ("train.loss", "parameter_norm")
MARGIN = "margin_quantile"
#: Kinds of correlation in a row, in the order of the forest plot.
KINDS = ("raw", "within", "partial", "partial_margin", "orbit", "corrected")
LEAST = 10  # networks that make a correlation worth an interval
_MOSTLY = 0.9  # of the networks have a measure that enters the joint table

#: Sign of the correlation with accuracy that the idea behind a measure says; sharpness measures know it themselves.
_EXPECTED = {
    "pair_proxy": 1, "free_patterns": 1, "unseen_patterns": 1, "unseen_free_patterns": 1, "probe_patterns": 1,
    "minimum_margin": 1, "margin_quantile": 1, "median_margin": 1, "normalised_margin": 1, "participation_ratio": 1,
    "parameter_norm": -1, "parameter_l1_norm": -1, "spectral_product": -1, "path_norm": -1, "path_norm_l1": -1,
    "compressed_size": -1, "source_trace": -1,
}  # fmt: skip


def expected_sign(name: str) -> int:
    """1 or -1: sign of the correlation with accuracy that is claimed for a measure; 0 where nothing is.

    Example:
        >>> expected_sign("trace"), expected_sign("pair_proxy"), expected_sign("positive_eigenvalues")
        (-1, 1, 0)
    """
    measure = MEASURES.get(name)
    if measure is not None and measure.flatter_when is not None:
        return {"lower": -1, "higher": 1}[measure.flatter_when]
    return _EXPECTED.get(name, 0)


def measure_label(label: str, name: str) -> str:
    """What a measure is called in tables; a study's own label is added where it is not the name."""
    known = MEASURES.get(name) or STUDY_MEASURES.get(name)
    shown = known.label if known is not None else name
    return shown if label == name else f"{shown} ({label})"


@dataclass(frozen=True)
class Association:
    """The finished networks of one data set, and what is asked about them.

    Args:
        table: of one data set.
        outcome: name of the value that is predicted.
        draws: of the bootstrap and of the permutations.
        seed: of both.
        level: of the intervals.
    """

    table: RunTable
    outcome: str
    draws: int
    seed: int
    level: float

    @cached_property
    def names(self) -> dict[str, str]:
        """Label -> name in the registry, of the measures of these networks."""
        specified = {m["label"]: m["name"] for spec in self.table.spec("measures") for m in spec}
        return {label: specified.get(label, label) for label in self.table.labels("measure.")}

    @cached_property
    def labels(self) -> list[str]:
        """Of measures that differ between networks and exist for enough of them."""
        return [label for label in self.names if _varied(self.table.column(f"measure.{label}"))]

    @cached_property
    def halves(self) -> list[str]:
        """The outcome on the two halves of the test set, if it was taken there."""
        found = [f"{self.outcome}.{half}" for half in "ab"]
        return found if all(self._usable(name) for name in found) else []

    @cached_property
    def confounders(self) -> list[str]:
        """Those that the networks have and differ in."""
        return [name for name in CONFOUNDERS if self._usable(name)]

    @cached_property
    def has_margin(self) -> bool:
        """Whether the margin can be held fixed too."""
        return self._usable(MARGIN)

    def repeats(self, label: str) -> list[str]:
        """Names of a measure's repetitions, itself included."""
        found = [name for name in self.table.names if name.startswith(f"repeat.{label}.")]
        return [f"measure.{label}", *found] if found else []

    def reliability(self, label: str) -> float | None:
        """Mean rank correlation within cells of all pairs of repetitions of a measure; ``None`` without repetitions."""
        columns = [self.table.column(name) for name in self.repeats(label)]
        if not columns:
            return None
        there = np.flatnonzero(np.isfinite(np.stack(columns)).all(0))
        if len(there) < LEAST:
            return None
        cells = self.table.rows(there).cells
        ranks = RankTable([column[there] for column in columns], cells if len(set(cells)) > 1 else None)
        once = ranks.covariances(np.ones((1, ranks.n)))
        pairs = [float(correlation_of(once, i, j)[0]) for i in range(len(columns)) for j in range(i)]
        return float(np.mean(pairs))

    def _usable(self, name: str) -> bool:
        return self.table.full_name(name) is not None and _varied(self.table.column(name), _MOSTLY)

    def _columns(self, labels: Sequence[str]) -> dict[str, NDArray[np.float64]]:
        names = [self.outcome, *self.halves, *self.confounders, *([MARGIN] if self.has_margin else [])]
        for label in labels:
            names.append(f"measure.{label}")
            names += [name for name in (f"orbit.{label}", *self.repeats(label)[1:]) if self._usable(name)]
        return {name: self.table.column(name) for name in dict.fromkeys(names)}

    def joint(self, labels: Sequence[str]) -> tuple[JointRanks, RunTable]:
        """The ranks of these measures and everything beside them, on the networks that have it all."""
        columns = self._columns(labels)
        rows = np.flatnonzero(np.isfinite(np.stack(list(columns.values()))).all(0))
        kept = self.table.rows(rows)
        return JointRanks({n: c[rows] for n, c in columns.items()}, kept.cells, resampling_units(kept)[0]), kept

    def groups(self) -> list[list[str]]:
        """Measures to be resampled together: those that nearly all networks have, and each other one by itself."""
        common = [label for label in self.labels if self._usable(f"measure.{label}")]
        return [group for group in (common, *[[x] for x in self.labels if x not in common]) if group]

    def given(self, label: str, margin: bool) -> list[str]:
        """What is held fixed for a measure: never itself."""
        names = [*self.confounders, *([MARGIN] if margin and self.has_margin else [])]
        return [name for name in names if name != self.names[label]]


def _varied(column: NDArray[np.float64], share: float = 0.0) -> bool:
    known = column[np.isfinite(column)]
    return len(known) >= max(LEAST, share * len(column)) and bool(np.ptp(known) > 0)


def correlations(association: Association) -> tuple[list[Row], list[Row]]:
    """A row of correlations for each measure, and a comparison of the first weakness measure with each other one.

    Returns:
        Rows ``{"measure", "label", "n", "units", KINDS..., "kendall", "permutation_p", "reliability", ...}``, each kind an
        :class:`~flatminima.study.bootstrap.Estimate` as a dictionary or ``None`` where it says nothing new or cannot be asked;
        and comparisons ``{"first", "second", "difference", "meng_p", "p"}``.
    """
    rows: list[Row] = []
    comparisons: list[Row] = []
    for group in association.groups():
        joint, kept = association.joint(group)
        if len(kept) < LEAST or len(set(joint.units)) < 3:
            rows += [_empty(association, label, len(kept)) for label in group]
            continue
        for label in group:
            _ask(association, joint, label)
        found = joint.answer(draws=association.draws, seed=association.seed)
        made = [_row(association, joint, kept, label, found) for label in group]
        rows += made
        if len(group) > 1:
            comparisons += _comparisons(association, joint, group, found)
    order = {label: place for place, label in enumerate(association.labels)}
    return sorted(rows, key=lambda row: order[row["measure"]]), comparisons


def _empty(association: Association, label: str, n: int) -> Row:
    note = f"only {n} networks have everything that is asked about"
    row: Row = {
        "measure": label, "label": measure_label(label, association.names[label]), "n": n, "units": 0,
        "permutation_p": None, "reliability": None, "kendall": None, "subsets": None, "given": [],
    }  # fmt: skip
    return row | dict.fromkeys(KINDS) | {"raw": no_estimate(n, note).to_dict()}


def _ask(association: Association, joint: JointRanks, label: str) -> None:
    name, outcome = f"measure.{label}", association.outcome
    joint.ask(f"raw/{label}", _rho(name, outcome))
    if joint.several_cells:
        joint.ask(f"within/{label}", _rho(name, outcome, within=True))
    for kind, margin in (("partial", False), ("partial_margin", True)):
        given = association.given(label, margin)
        if given and (not margin or association.has_margin):
            joint.ask(f"{kind}/{label}", _rho(name, outcome, given, within=True))
    if f"orbit.{label}" in joint.columns:
        joint.ask(f"orbit/{label}", _rho(f"orbit.{label}", outcome, within=True))
    if association.halves:
        repeats = [r for r in association.repeats(label) if r in joint.columns]
        joint.ask(f"corrected/{label}", _corrected(name, outcome, association.halves, repeats))


def _rho(first: str, second: str, given: Sequence[str] = (), within: bool = False) -> Query:
    return lambda pooled, inside: (inside if within else pooled).rho(first, second, given)


def _corrected(name: str, outcome: str, halves: Sequence[str], repeats: Sequence[str]) -> Query:
    return lambda pooled, inside: inside.corrected(name, outcome, halves, repeats)


def _row(
    association: Association, joint: JointRanks, kept: RunTable, label: str, found: Mapping[str, Replicates]
) -> Row:
    level, name = association.level, f"measure.{label}"
    x, y = (np.asarray(joint.columns[n]) for n in (name, association.outcome))
    kinds: dict[str, Estimate | None] = {
        kind: found[f"{kind}/{label}"].estimates(level=level)[0] if f"{kind}/{label}" in found else None
        for kind in KINDS
    }
    shared = len(set(joint.units)) < len(x)
    try:
        p = permutation_p(
            x, y, cells=joint.cells if joint.several_cells else None, blocks=joint.units if shared else None,
            draws=association.draws, seed=association.seed,
        )  # fmt: skip
    except ValueError:  # a seed without one of the cells: there is no permutation of seeds
        p = math.nan
    tau = kendall(
        x, y, clusters=joint.units if shared else None,
        strata=joint.cells if joint.several_cells and not shared else None, draws=min(association.draws, 2000),
        seed=association.seed, level=level,
    )  # fmt: skip
    return {
        "measure": label,
        "label": measure_label(label, association.names[label]),
        "expected": expected_sign(association.names[label]),
        "n": len(x),
        "units": len(set(joint.units)),
        **{kind: None if e is None else e.to_dict() for kind, e in kinds.items()},
        "given": association.given(label, False),
        "kendall": tau.to_dict(),
        "permutation_p": p if math.isfinite(p) else None,
        "reliability": association.reliability(label),
        "subsets": _over_subsets(kept, x, y, level),
    }


def _over_subsets(kept: RunTable, x: Array, y: Array, level: float) -> Row | None:
    """The interval for other training subsets, where there are several."""
    subsets = kept.subsets
    values, sizes = [], []
    for subset in dict.fromkeys(subsets):
        rows = np.flatnonzero([s == subset for s in subsets])
        if len(rows) >= 4:
            once = RankTable([x[rows], y[rows]]).covariances(np.ones((1, len(rows))))
            values.append(float(correlation_of(once, 0, 1)[0]))
            sizes.append(len(rows))
    # With other factors a subset's correlation would also be one between cells.
    if len(values) < 2 or len(set(kept.cells)) > len(set(subsets)):
        return None
    return across_clusters(values, sizes, level=level).to_dict()


def _comparisons(
    association: Association, joint: JointRanks, group: Sequence[str], found: Mapping[str, Replicates]
) -> list[Row]:
    """The reference measure, weakness where it was taken, against every other: paired bootstrap and Meng's z.

    Meng's z is one of independent networks. Where a seed was trained several times it is given the number of seeds, which is
    cautious: with the number of networks it erred twice as often as it says (three subsets, half of the variance the seed's).
    """
    first = next((x for x in group if association.names[x] == "pair_proxy"), group[0])
    kind = "within" if joint.several_cells else "raw"
    table = RankTable(
        [joint.columns[association.outcome], *[joint.columns[f"measure.{x}"] for x in group]],
        joint.cells if joint.several_cells else None,
    )
    once = table.covariances(np.ones((1, table.n)))
    at = {label: place + 1 for place, label in enumerate(group)}

    def rho(i: int, j: int) -> float:
        return float(correlation_of(once, i, j)[0])

    compared = []
    for second in group:
        if second == first:
            continue
        difference = difference_of_sizes(found[f"{kind}/{first}"], found[f"{kind}/{second}"])
        made = difference.estimates(level=association.level)[0]
        r12, r13, r23 = rho(0, at[first]), rho(0, at[second]), rho(at[first], at[second])
        known = all(math.isfinite(r) for r in (r12, r13, r23))
        independent = len(set(joint.units))
        meng = meng_z(r12, r13, r23, independent, absolute=True).p if known and independent > 3 else math.nan
        compared.append(
            {
                "first": first, "second": second, "first_label": measure_label(first, association.names[first]),
                "second_label": measure_label(second, association.names[second]), "r_first": r12, "r_second": r13,
                "between": r23, "difference": made.to_dict(), "meng_p": meng if math.isfinite(meng) else None,
            }
        )  # fmt: skip
    return compared


def selection(association: Association) -> list[Row]:
    """What one loses by choosing networks by a measure: direction from half a, accuracy from half b.

    Returns:
        For each measure ``{"measure", "label", "top_1", "top_10", "random", "n"}``: accuracy of the best network minus that of
        the chosen one; the mean of the best tenth minus that of the chosen tenth; and the first for a network drawn at
        random. Networks between which the measure does not choose are drawn at random: their mean counts. Empty where the
        test set was not split.
    """
    if not association.halves:
        return []
    found = []
    for label in association.labels:
        x = association.table.column(f"measure.{label}")
        a, b = (association.table.column(half) for half in association.halves)
        there = np.isfinite(x) & np.isfinite(a) & np.isfinite(b)
        x, a, b = x[there], a[there], b[there]
        if len(x) < LEAST:
            continue
        once = RankTable([x, a]).covariances(np.ones((1, len(x))))
        rho = float(correlation_of(once, 0, 1)[0])
        value = x if rho > 0 else -x
        tenth = max(1, len(x) // 10)
        best = np.sort(b)[::-1]
        found.append(
            {
                "measure": label, "label": measure_label(label, association.names[label]), "n": len(x),
                "direction": "highest" if rho > 0 else "lowest", "top_1": float(best[0] - _chosen(value, b, 1)),
                "top_10": float(best[:tenth].mean() - _chosen(value, b, tenth)), "random": float(best[0] - b.mean()),
            }
        )  # fmt: skip
    return found


def _chosen(value: NDArray[np.float64], outcome: NDArray[np.float64], count: int) -> float:
    """Expected mean outcome of the networks with the largest values; ties at the edge are drawn at random."""
    edge = np.sort(value)[-count]
    above, tied = value > edge, value == edge
    left = count - int(above.sum())
    return float((outcome[above].sum() + left * outcome[tied].mean()) / count)
