"""Is an effect too small to matter? Two one-sided tests (TOST): a difference that is not significant is not yet none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from flatminima.study.statistics import interval


@dataclass(frozen=True)
class Equivalence:
    """Two one-sided tests.

    Attributes:
        difference: estimated effect.
        margin: effects up to this size do not matter.
        p_lower: against the effect being ``-margin`` or less.
        p_upper: against the effect being ``margin`` or more.
        se: standard error of the effect.
        df: degrees of freedom; infinite for the normal distribution.
    """

    difference: float
    margin: float
    p_lower: float
    p_upper: float
    se: float
    df: float

    @property
    def p(self) -> float:
        """The larger of the two: the effect is shown to be smaller than the margin where it is at most the level."""
        return max(self.p_lower, self.p_upper)


def tost(difference: float, se: float, margin: float, df: float = math.inf) -> Equivalence:
    r"""Equivalence of an estimate with a standard error.

    .. math:: p = \max\{1 - F_{df}((d + m) / s),\; 1 - F_{df}((m - d) / s)\}

    At level 5 % the same as asking whether the 90 % interval lies inside :math:`\pm m`.

    Args:
        difference: estimate d.
        se: its standard error s; 0 where it has none.
        margin: m.
        df: degrees of freedom of Student's distribution.

    Raises:
        ValueError: a margin that is not above 0, or a standard error below 0.

    Source: Schuirmann, "A comparison of the two one-sided tests procedure and the power approach", 1987.

    Example:
        >>> round(tost(0.02, 0.03, 0.1).p, 4)
        0.0038
    """
    if not margin > 0:
        raise ValueError(f"margin is {margin}: expected more than 0")
    if not se >= 0:
        raise ValueError(f"se is {se}: expected a standard error, 0 or more")
    if se == 0:
        lower, upper = float(difference <= -margin), float(difference >= margin)
    else:
        lower, upper = (float(stats.t.sf(edge / se, df)) for edge in (difference + margin, margin - difference))
    return Equivalence(difference, margin, lower, upper, se, df)


def tost_welch(a: Sequence[float], b: Sequence[float], margin: float) -> Equivalence:
    r"""Are the means of two groups equal up to a margin, whatever their variances?

    :math:`d = \bar b - \bar a`, with Welch's standard error and degrees of freedom.

    Args:
        a, b: at least two values each.
        margin: in the same unit.

    Raises:
        ValueError: fewer than two values, or a margin that is not above 0.

    Example:
        >>> a, b = [0.951, 0.949, 0.950, 0.952, 0.948], [0.9505, 0.9515, 0.9495, 0.9520, 0.9500]
        >>> round(tost_welch(a, b, 0.003).p, 4)
        0.0151
    """
    if min(len(a), len(b)) < 2:
        raise ValueError(f"Welch's test needs at least 2 values in each group, got {len(a)} and {len(b)}")
    squares = [float(np.var(values, ddof=1)) / len(values) for values in (a, b)]
    total = sum(squares)
    df = math.inf
    if total > 0:
        df = total**2 / sum(s**2 / (len(v) - 1) for s, v in zip(squares, (a, b), strict=True))
    return tost(float(np.mean(b) - np.mean(a)), math.sqrt(total), margin, df)


def tost_paired(differences: Sequence[float], margin: float) -> Equivalence:
    """Is the mean of paired differences 0 up to a margin?

    Raises:
        ValueError: fewer than two differences, or a margin that is not above 0.

    Example:
        >>> round(tost_paired([0.1, -0.05, 0.02, 0.0], 0.2).p, 4)
        0.005
    """
    found = interval(differences)
    mean, sd, n = found["mean"], found["sd"], found["n"]
    if mean is None or sd is None or n is None:
        raise ValueError(f"a paired test needs at least 2 differences, got {len(differences)}")
    return tost(mean, sd / math.sqrt(n), margin, n - 1)


def tost_correlation(rho: float, n: int, margin: float) -> Equivalence:
    r"""Is a rank correlation 0 up to a margin? On Fisher's scale, :math:`\operatorname{artanh}`.

    The standard error is that of Fieller, Hartley and Pearson, :math:`\sqrt{1.06 / (n - 3)}`; the result's ``difference``,
    ``margin`` and ``se`` are on Fisher's scale.

    Raises:
        ValueError: fewer than 4 observations, or a correlation or margin outside (-1, 1).

    Source: Fieller, Hartley and Pearson, "Tests for rank correlation coefficients", Biometrika 44, 1957.

    Example:
        >>> tost_correlation(0.0, 850, 0.1).p < 0.01 < 0.05 < tost_correlation(0.0, 100, 0.1).p
        True
    """
    if n < 4:
        raise ValueError(f"n is {n}: expected at least 4 observations")
    if not (abs(rho) < 1 and 0 < margin < 1):
        raise ValueError(f"rho is {rho} and margin {margin}: expected sizes below 1, and a margin above 0")
    return tost(math.atanh(rho), math.sqrt(1.06 / (n - 3)), math.atanh(margin))
