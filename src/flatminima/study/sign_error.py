"""How often does a measure point the wrong way, in the environment where it does worst?"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from flatminima.study.granulated import Settings, checked, lines_along


@dataclass(frozen=True)
class Environment:
    """Pairs of networks that differ in one hyper-parameter, by one pair of values.

    Attributes:
        axis: the hyper-parameter.
        values: the two values.
        error: weighted share of the pairs with the wrong sign; NaN where no pair's outcomes differ beyond noise.
        weight: sum of the weights, the effective number of pairs.
        pairs: number of pairs.
    """

    axis: str
    values: tuple[Hashable, Hashable]
    error: float
    weight: float
    pairs: int


@dataclass(frozen=True)
class SignError:
    """Sign errors over environments; NaN where none has a pair that counts.

    Attributes:
        mean, percentile_90, worst: over the environments that have an error.
        environments: all of them.
    """

    mean: float
    percentile_90: float
    worst: float
    environments: tuple[Environment, ...]

    @property
    def counted(self) -> int:
        """Environments that have an error."""
        return sum(math.isfinite(e.error) for e in self.environments)


def hoeffding_weight(difference: ArrayLike, points: int) -> NDArray[np.float64]:
    r"""How sure one can be of the sign of a difference of two accuracies.

    .. math:: \max\bigl(0,\; 1 - 2 e^{-2 m (|\Delta g| / 2)^2}\bigr)^2

    Args:
        difference: of two accuracies, each on m test points, in [0, 1].
        points: m.

    Raises:
        ValueError: no test point.

    Source: Dziugaite et al., "In search of robust measures of generalization", 2020 (2010.11924), section 4.

    Example:
        >>> hoeffding_weight([0.005, 0.02], 10_000).round(4).tolist()
        [0.0, 0.5319]
    """
    if points < 1:
        raise ValueError(f"points is {points}: expected the number of test points")
    half = np.abs(np.asarray(difference, dtype=np.float64)) / 2
    found: NDArray[np.float64] = np.maximum(0.0, 1 - 2 * np.exp(-2 * points * half**2)) ** 2
    return found


def sign_error(
    settings: Settings,
    measure: ArrayLike,
    outcome: ArrayLike,
    points: int,
    *,
    direction: int = 1,
    held: Sequence[str] = (),
) -> SignError:
    r"""The robust sign-error.

    .. math:: \frac{\sum w\, (1 - \operatorname{sgn} \Delta\mu\, \operatorname{sgn} \Delta g) / 2}{\sum w}

    in each environment, over the pairs of networks that share everything else. 0 is right always, 0.5 is a coin. A mean over
    environments hides the one where the measure fails; the worst does not.

    Args:
        settings, measure, outcome: as for :func:`~flatminima.study.granulated.granulated_kendall`; outcome: accuracies.
        points: test points behind each accuracy, for :func:`hoeffding_weight`.
        direction: 1 where the measure should rise with the outcome, -1 where it should fall.
        held: names, such as the seed, that are never the one that changes.

    Raises:
        ValueError: another direction, or as for these functions.

    Source: Dziugaite et al. (2010.11924), equations 3 to 5.

    Example:
        >>> settings = [{"lr": lr, "seed": s} for lr in (0.1, 0.5) for s in (0, 1)]
        >>> found = sign_error(settings, [1, 1, 2, 0], [0.5, 0.5, 0.9, 0.9], 1000, held=["seed"])
        >>> found.worst, found.environments[0].pairs
        (0.5, 2)
    """
    if direction not in (1, -1):
        raise ValueError(f"direction is {direction}: expected 1 or -1")
    axes, kept, mu, g = checked(settings, measure, outcome)
    pairs: dict[tuple[str, Hashable, Hashable], list[tuple[int, int]]] = {}
    for axis in axes:
        if axis in held:
            continue
        order = {value: position for position, value in enumerate(dict.fromkeys(s[axis] for s in kept))}
        for line in lines_along(kept, axis):
            rows = sorted(line, key=lambda row: order[kept[row][axis]])
            for position, first in enumerate(rows):
                for second in rows[position + 1 :]:
                    pairs.setdefault((axis, kept[first][axis], kept[second][axis]), []).append((first, second))
    environments = []
    for (axis, one, other), rows in pairs.items():
        first, second = np.array(rows).T
        change = g[second] - g[first]
        weights = hoeffding_weight(change, points)
        wrong = (1 - direction * np.sign(mu[second] - mu[first]) * np.sign(change)) / 2
        total = float(weights.sum())
        error = float(weights @ wrong) / total if total > 0 else math.nan
        environments.append(Environment(axis, (one, other), error, total, len(rows)))
    errors = [e.error for e in environments if math.isfinite(e.error)]
    if not errors:
        return SignError(math.nan, math.nan, math.nan, tuple(environments))
    return SignError(float(np.mean(errors)), float(np.quantile(errors, 0.9)), max(errors), tuple(environments))


@dataclass(frozen=True)
class McNemar:
    """Two networks on the same test points: how many only one of them gets right, and the exact two-sided p."""

    only_first: int
    only_second: int
    p: float


def mcnemar(first: ArrayLike, second: ArrayLike) -> McNemar:
    r"""Do two networks that share a test set differ in accuracy?

    Only the points that one gets right and the other wrong speak:
    :math:`p = \min(1, 2\, P(\mathrm{Bin}(b + c, 1/2) \le \min(b, c)))`.

    Args:
        first, second: for each test point, whether the network is right.

    Raises:
        ValueError: lengths that differ.

    Source: McNemar, Psychometrika 12, 1947; exact binomial form.

    Example:
        >>> mcnemar([1, 1, 1, 1, 0, 1], [0, 0, 0, 1, 0, 0])
        McNemar(only_first=4, only_second=0, p=0.125)
    """
    a, b = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"expected one truth value for each test point, got shapes {a.shape} and {b.shape}")
    only_first, only_second = int((a & ~b).sum()), int((b & ~a).sum())
    return McNemar(only_first, only_second, float(_exact(np.array(only_first), np.array(only_second))))


def resolved_pairs(correct: ArrayLike, *, level: float = 0.05) -> float:
    """Share of all pairs of networks whose accuracies differ by McNemar's test: what a ranking of them can be worth.

    Args:
        correct: ``(networks, points)``, whether each is right.
        level: of each test; that share of pairs is expected where all networks are equally good, or less.

    Example:
        >>> resolved_pairs([[1] * 30, [1] * 30, [0] * 30]).__round__(3)
        0.667
    """
    table = np.asarray(correct, dtype=bool)
    if table.ndim != 2 or len(table) < 2:
        raise ValueError(f"expected at least two networks on the same test points, got shape {table.shape}")
    right = table.astype(np.float32)
    only = (right @ (1 - right).T).astype(np.int64)  # counts, exact in float32 up to 16 million points
    upper = np.triu_indices(len(table), 1)
    b, c = only[upper], only.T[upper]
    return float((_exact(b, c) <= level).mean())


def _exact(b: NDArray[np.int64], c: NDArray[np.int64]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = np.minimum(1.0, 2 * stats.binom.cdf(np.minimum(b, c), b + c, 0.5))
    return found
