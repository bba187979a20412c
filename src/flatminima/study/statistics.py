"""Means over seeds and paired differences, with Student intervals; n is always part of the answer. p-values for families."""

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


def paired_p(values: dict[int, float], reference: dict[int, float]) -> float | None:
    r"""Two-sided p-value of the paired t-test over the seeds both have; ``None`` for fewer than two of them.

    .. math:: t = \bar d \sqrt n / s_d, \qquad p = 2\,(1 - F_{n-1}(|t|))

    Differences that are all zero have p = 1. Others that are all the same, as accuracies on few rows can be, have no spread to
    compare with and no p-value: ``None``.

    Example:
        >>> round(paired_p({0: 3.0, 1: 5.0, 2: 4.0}, {0: 1.0, 1: 2.0, 2: 3.0}), 4)
        0.0742
    """
    seeds = sorted(values.keys() & reference.keys())
    found = interval([values[s] - reference[s] for s in seeds])
    mean, sd, n = found["mean"], found["sd"], found["n"]
    if mean is None or sd is None or n is None:
        return None
    # Equal differences of unequal fractions differ in their last bit.
    if sd <= 1e-12 * max(max(abs(values[s]), abs(reference[s])) for s in seeds):
        return 1.0 if mean == 0 else None
    return float(2 * stats.t.sf(abs(mean) * math.sqrt(n) / sd, n - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    r"""p-values corrected for their number: rejecting those up to :math:`\alpha` errs with at most that probability.

    .. math:: \tilde p_{(i)} = \max_{j \le i} \min\bigl(1, (m - j + 1)\, p_{(j)}\bigr)

    for :math:`p_{(1)} \le \dots \le p_{(m)}`, whatever the dependence between them. Holm, "A simple sequentially rejective
    multiple test procedure" (1979).

    Example:
        >>> holm([0.04, 0.01, 0.03])
        [0.06, 0.03, 0.06]
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    r"""p-values corrected for exploration: of those up to :math:`\alpha`, on average at most that share is false.

    .. math:: \tilde p_{(i)} = \min_{j \ge i} \min\bigl(1, m\, p_{(j)} / j\bigr)

    for independent or positively dependent p-values. Benjamini and Hochberg, "Controlling the false discovery rate" (1995).

    Example:
        >>> [round(p, 4) for p in benjamini_hochberg([0.01, 0.04, 0.03, 0.5])]
        [0.04, 0.0533, 0.0533, 0.5]
    """
    return [] if not p_values else [float(p) for p in stats.false_discovery_control(p_values)]
