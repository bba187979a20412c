r"""Linear programs over the version space: HiGHS's dual simplex, warm-started, with rows added when they are violated.

The program has no objective. Its rows are :math:`(w_a - w_b) \cdot x \ge 1`, scaled to unit length, for pairs of a winner and a loser
at a point; weights are free and the last class is fixed at zero, so a solution exists with margin 1 if one exists at all. Training rows
enter forty at a time, the most violated first; the rows of a probe are added, solved from the basis at hand, and deleted again.
"""

from __future__ import annotations

from dataclasses import dataclass

import highspy
import numpy as np

from flatminima.measures.weakness.features import FloatArray, IntArray

_AT_ONCE = 40
_VIOLATED = 1e-7
_KEPT = 6  # rows kept between programs, in multiples of the number of variables


@dataclass(frozen=True, eq=False)
class Ray:
    """Multipliers of an infeasible program: points (-1 is the probe), winners, losers, multipliers."""

    points: IntArray
    winners: IntArray
    losers: IntArray
    multipliers: FloatArray


class _Silent(highspy.Highs):
    """HiGHS without the banner that version 1.16 prints while it is constructed."""

    def enableCallbacks(self) -> None:  # noqa: N802  # HiGHS's name
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
        self._rows: list[tuple[int, int, int]] = []  # point, winner, loser, in the order of the model
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
            rivals = np.array([k for k in range(self.classes) if k != target])
            self._probe_length = float(np.linalg.norm(probe))
            self._add(probe[None], [(-1, target, int(k)) for k in rivals])
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
            self._add(self.x[where], list(zip(where.tolist(), self.y[where].tolist(), losers.tolist(), strict=True)))

    def _add(self, points: FloatArray, rows: list[tuple[int, int, int]]) -> None:
        starts, indices, values = [], [], []
        for i, (_, winner, loser) in enumerate(rows):
            x = points[i] if len(points) == len(rows) else points[0]
            unit = x / np.linalg.norm(x)
            starts.append(sum(map(len, indices)))
            for sign, k in ((1.0, winner), (-1.0, loser)):
                if k < self.classes - 1:
                    indices.append(np.arange(k * self.dim, (k + 1) * self.dim))
                    values.append(sign * unit)
        flat, numbers = np.concatenate(indices).astype(np.int32), np.concatenate(values)
        lower, upper = np.ones(len(rows)), np.full(len(rows), highspy.kHighsInf)
        self._model.addRows(len(rows), lower, upper, len(flat), np.array(starts, dtype=np.int32), flat, numbers)
        self._rows += rows

    def _clear(self) -> None:
        """Delete the rows of the probe, and idle training rows when there are many."""
        gone = [i for i, (point, _, _) in enumerate(self._rows) if point < 0]
        if len(self._rows) > _KEPT * self.variables:
            basic = highspy.HighsBasisStatus.kBasic
            status = self._model.getBasis().row_status
            idle = [i for i, s in enumerate(status) if s == basic and self._rows[i][0] >= 0]
            for i in idle:
                point, _, loser = self._rows[i]
                self._present[point, loser] = False
            gone = sorted([*gone, *idle])
        if gone:
            self._model.deleteRows(len(gone), np.array(gone, dtype=np.int32))
            left = set(gone)
            self._rows = [row for i, row in enumerate(self._rows) if i not in left]

    def _ray(self) -> Ray | str:
        _, exists, values = self._model.getDualRay()
        if not exists:
            self._model.clearSolver()
            return "HiGHS found the program infeasible without giving multipliers"
        multipliers = np.asarray(values, dtype=np.float64)
        multipliers = multipliers if multipliers.sum() >= 0 else -multipliers
        largest = float(multipliers.max(initial=0.0))
        kept = np.flatnonzero(multipliers > 1e-11 * largest)
        if not len(kept):
            return "HiGHS found the program infeasible with multipliers that are all zero"
        rows = np.array([self._rows[i] for i in kept], dtype=np.int64)
        norms = np.where(rows[:, 0] < 0, self._probe_length, self.length[rows[:, 0]])
        return Ray(rows[:, 0], rows[:, 1], rows[:, 2], multipliers[kept] / norms)
