r"""Linear programs over the version space: HiGHS's dual simplex, warm-started, with rows added when they are violated.

The program has no objective. Its rows are :math:`(w_a - w_b) \cdot x \ge 1`, scaled to unit length, for pairs of a
winner and a loser at a point; weights are free and the last class is fixed at zero, so a solution exists with margin 1
if one exists at all. Training rows enter forty at a time, the most violated first; the rows of a probe are added,
solved from the basis at hand, and deleted again.
"""

from __future__ import annotations

from dataclasses import dataclass

import highspy
import numpy as np

from flatminima.measures.weakness.features import FloatArray, IntArray

_AT_ONCE = 40
_VIOLATED = 1e-7
_NOISE = 1e-11  # multipliers below this share of the largest are rounding
_KEPT = 6  # rows kept between programs, in multiples of the number of variables


@dataclass(frozen=True, eq=False)
class Ray:
    """Multipliers of an infeasible program: points (-1 is the probe), winners, losers, multipliers."""

    points: IntArray
    winners: IntArray
    losers: IntArray
    multipliers: FloatArray


class _Silent(highspy.Highs):  # type: ignore[misc]  # its annotations are not used, see pyproject.toml
    """HiGHS without the banner that version 1.16 prints while it is constructed."""

    def enableCallbacks(self) -> None:  # HiGHS's name
        self.silent()
        super().enableCallbacks()


class DualSimplex:
    """The linear program of one training set.

    Args:
        points: search coordinates of the training points, ``(n, D)``.
        labels: their classes.
        classes: K.
    """

    def __init__(self, points: FloatArray, labels: IntArray, classes: int) -> None:
        self.x, self.y, self.classes = points, labels, classes
        self.dim = points.shape[1]
        self.variables = (classes - 1) * self.dim
        self.length = np.linalg.norm(points, axis=1)
        self.programs = 0
        self.iterations = 0
        self._present = np.zeros((len(points), classes), dtype=bool)
        self._present[np.arange(len(points)), labels] = True  # no row: a class does not compete with itself
        self._rows = np.empty((0, 3), dtype=np.int64)  # point, winner, loser, in the order of the model
        self._probe_length = 1.0
        self._model = _Silent()
        for option, value in (
            ("output_flag", False), ("threads", 1), ("presolve", "off"), ("solver", "simplex"), ("simplex_strategy", 1),
        ):  # fmt: skip  # strategy 1: dual, serial
            self._model.setOptionValue(option, value)
        bound = np.full(self.variables, highspy.kHighsInf)
        self._model.addVars(self.variables, -bound, bound)

    def feasible(self, probe: FloatArray | None = None, target: int = -1) -> FloatArray | Ray | str:
        """Weights with every training label (and ``target`` at ``probe``), or multipliers that exclude them.

        Returns:
            Weights ``(K, D)``; or a :class:`Ray`; or a sentence that says why there is neither.
        """
        if probe is not None:
            rivals = np.delete(np.arange(self.classes), target)
            same = np.ones_like(rivals)
            self._probe_length = float(np.linalg.norm(probe))
            self._add(np.tile(probe / self._probe_length, (len(rivals), 1)), -same, target * same, rivals)
        self.programs += 1
        try:
            return self._solve()
        finally:
            self._clear()

    def _solve(self) -> FloatArray | Ray | str:
        model, status = self._model, highspy.HighsModelStatus
        while True:
            model.run()
            self.iterations += max(model.getInfo().simplex_iteration_count, 0)
            found = model.getModelStatus()
            if found == status.kInfeasible:
                return self._ray()
            if found not in (status.kOptimal, status.kModelEmpty):
                model.clearSolver()  # a basis that led into trouble is not handed on
                return f"HiGHS ended with {model.modelStatusToString(found)!r}"
            free = np.asarray(model.getSolution().col_value, dtype=np.float64).reshape(self.classes - 1, self.dim)
            weights = np.concatenate([free, np.zeros((1, self.dim))])
            scores = self.x @ weights.T
            slack = (scores[np.arange(len(scores)), self.y][:, None] - scores) / self.length[:, None] - 1.0
            slack[self._present] = 0.0
            flat = slack.ravel()
            worst = np.argpartition(flat, min(_AT_ONCE, flat.size - 1))[:_AT_ONCE]
            worst = np.sort(worst[flat[worst] < -_VIOLATED])
            if not len(worst):
                return weights
            where, losers = np.unravel_index(worst, slack.shape)
            self._present[where, losers] = True
            self._add(self.x[where] / self.length[where, None], where, self.y[where], losers)

    def _add(self, units: FloatArray, where: IntArray, winners: IntArray, losers: IntArray) -> None:
        """Rows with the unit vector in the winner's block and its opposite in the loser's; the last class has no block."""
        blocks = np.stack([winners, losers], axis=1)
        free = blocks < self.classes - 1
        columns = blocks[:, :, None] * self.dim + np.arange(self.dim)
        values = np.stack([units, -units], axis=1)
        starts = np.concatenate([[0], np.cumsum(free.sum(1) * self.dim)])
        count, bound = len(units), np.full(len(units), highspy.kHighsInf)
        self._model.addRows(
            count, np.ones(count), bound, int(starts[-1]), starts[:-1].astype(np.int32),
            columns[free].ravel().astype(np.int32), values[free].ravel(),
        )  # fmt: skip
        self._rows = np.concatenate([self._rows, np.stack([where, winners, losers], axis=1)])

    def _clear(self) -> None:
        """Delete the rows of the probe, and idle training rows when there are many."""
        gone = self._rows[:, 0] < 0
        if len(self._rows) > _KEPT * self.variables:
            basic = highspy.HighsBasisStatus.kBasic
            idle = ~gone & np.array([status == basic for status in self._model.getBasis().row_status])
            self._present[self._rows[idle, 0], self._rows[idle, 2]] = False
            gone |= idle
        if gone.any():
            self._model.deleteRows(int(gone.sum()), np.flatnonzero(gone).astype(np.int32))
            self._rows = self._rows[~gone]

    def _ray(self) -> Ray | str:
        _, exists, values = self._model.getDualRay()
        if not exists:
            self._model.clearSolver()
            return "HiGHS found the program infeasible without giving multipliers"
        multipliers = np.asarray(values, dtype=np.float64)
        multipliers = multipliers if multipliers.sum() >= 0 else -multipliers
        kept = np.flatnonzero(multipliers > _NOISE * multipliers.max(initial=0.0))
        if not len(kept):
            return "HiGHS found the program infeasible with multipliers that are all zero"
        points, winners, losers = self._rows[kept].T
        norms = np.where(points < 0, self._probe_length, self.length[points])
        return Ray(points, winners, losers, multipliers[kept] / norms)
