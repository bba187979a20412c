"""Means over seeds and paired differences, with Student intervals; n is always part of the answer."""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy import stats

LEVEL = 0.95


def interval(values: Sequence[float]) -> dict[str, float | int | None]:
    r"""Mean, sample standard deviation and 95 % interval of the mean.

    .. math:: \bar x \pm t_{n-1, 0.975}\, s / \sqrt n

    Returns:
        ``{"mean", "sd", "low", "high", "n"}``; ``sd``, ``low`` and ``high`` are ``None`` for fewer than two values, and
        all numbers are ``None`` for none.

    Example:
        >>> [round(v, 3) for v in interval([1.0, 2.0, 3.0]).values()]
        [2.0, 1.0, -0.484, 4.484, 3]
    """
    n = len(values)
    if n == 0:
        return {"mean": None, "sd": None, "low": None, "high": None, "n": 0}
    mean = math.fsum(values) / n
    if n == 1:
        return {"mean": mean, "sd": None, "low": None, "high": None, "n": 1}
    sd = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * sd / math.sqrt(n)
    return {"mean": mean, "sd": sd, "low": mean - half, "high": mean + half, "n": n}


def paired(values: dict[int, float], reference: dict[int, float]) -> dict[str, float | int | None]:
    """Mean difference ``values - reference`` over the seeds both have, with its 95 % interval.

    Example:
        >>> paired({0: 3.0, 1: 4.0}, {0: 1.0, 1: 2.0, 2: 9.0})
        {'difference': 2.0, 'low': 2.0, 'high': 2.0, 'n': 2}
    """
    seeds = sorted(values.keys() & reference.keys())
    found = interval([values[s] - reference[s] for s in seeds])
    return {"difference": found["mean"], "low": found["low"], "high": found["high"], "n": found["n"]}
