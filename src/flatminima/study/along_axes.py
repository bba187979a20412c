"""Statistics along single hyper-parameters for every measure of a grid."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flatminima.study.association import Association, expected_sign, measure_label
from flatminima.study.granulated import conditional_information, granulated_kendall
from flatminima.study.run_table import RunTable
from flatminima.study.sign_error import sign_error

_MOST_ROWS = 200_000
_HELD = ("seed", "order", "study")  # that a network has, and that are no hyper-parameters


def along_axes(association: Association) -> list[dict[str, Any]]:
    """Granulated Kendall, conditional information and sign errors of each measure.

    Returns:
        For each measure ``{"measure", "label", "psi", "mean_psi", "information", "held", "sign_error"}``; empty where nothing
        but the seed varies.
    """
    settings = association.table.settings()
    axes = [a for a in (settings[0] if settings else {}) if len({s[a] for s in settings}) > 1 and a not in _HELD]
    if not axes:
        return []
    outcome = association.table.column(association.outcome)
    points = evaluation_rows(association.table, association.outcome)
    found = []
    for label in association.labels:
        name = association.names[label]
        measure = association.table.column(f"measure.{label}")
        kendall = granulated_kendall(settings, measure, outcome, held=_HELD)
        information = conditional_information(settings, measure, outcome, held=_HELD)
        least = min(information.by_set, key=information.by_set.__getitem__) if information.by_set else ()
        row: dict[str, Any] = {
            "measure": label, "label": measure_label(label, name), "psi": kendall.psi,
            "mean_psi": _known(kendall.mean), "information": _known(information.score),
            "held": list(least), "sign_error": None,
        }  # fmt: skip
        direction = expected_sign(name)
        if points is not None and direction:
            errors = sign_error(settings, measure, outcome, points, direction=direction, held=_HELD)
            worst = max((e for e in errors.environments if math.isfinite(e.error)), key=lambda e: e.error, default=None)
            row["sign_error"] = {
                "direction": direction, "mean": _known(errors.mean), "percentile_90": _known(errors.percentile_90),
                "worst": _known(errors.worst), "counted": errors.counted, "environments": len(errors.environments),
                "worst_at": "" if worst is None else f"{worst.axis} {worst.values[0]} to {worst.values[1]}",
                "points": points,
            }  # fmt: skip
        found.append(row)
    return found


def evaluation_rows(table: RunTable, outcome: str) -> int | None:
    """Rows behind each accuracy: the smallest number of which all of them are multiples of one over it.

    With some tens of networks it is the number itself; with fewer it can be a divisor of it, which makes errors look larger.

    Example:
        >>> from flatminima.study.run_spec import Record
        >>> records = [Record("a" * 64, {}, "finished", values={"test.accuracy": k / 1547}) for k in (1400, 1401, 1390)]
        >>> evaluation_rows(RunTable(tuple(records)), "test.accuracy")
        1547
    """
    # Equal fractions that were computed in two ways differ in their last bit.
    values: NDArray[np.float64] = np.unique(table.column(outcome).round(12))
    values = values[np.isfinite(values)]
    if len(values) < 2 or values[0] < 0 or values[-1] > 1:
        return None
    least = round(1 / float(np.diff(values).min()))
    for rows in range(least, min(20 * least, _MOST_ROWS) + 1):
        if np.abs(values * rows - np.round(values * rows)).max() < 1e-6 * max(1, rows / 1e4):
            return rows
    return None


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
