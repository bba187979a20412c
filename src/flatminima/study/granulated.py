"""Does a measure follow the outcome along each hyper-parameter by itself? Granulated Kendall and conditional information."""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Settings: TypeAlias = "Sequence[Mapping[str, Hashable]]"
"""For each network: hyper-parameter -> value."""


@dataclass(frozen=True)
class GranulatedKendall:
    """Kendall's tau along single axes.

    Attributes:
        psi: axis -> mean of tau over all settings of the other axes.
        mean: of these over the axes; NaN for none.
        lines: axis -> settings of the others with at least two values along it.
    """

    psi: dict[str, float]
    mean: float
    lines: dict[str, int]


@dataclass(frozen=True)
class ConditionalInformation:
    """What the sign of a measure's difference says about the sign of the outcome's.

    Attributes:
        score: least of ``by_set``; NaN where there is no pair.
        by_set: hyper-parameters held fixed -> normalised information, from 0 (nothing) to 1 (everything).
        pairs: the same -> pairs of networks that agree in them and differ in measure and outcome.
    """

    score: float
    by_set: dict[tuple[str, ...], float]
    pairs: dict[tuple[str, ...], int]


def granulated_kendall(
    settings: Settings, measure: ArrayLike, outcome: ArrayLike, *, held: Sequence[str] = ()
) -> GranulatedKendall:
    r"""Granulated Kendall coefficients.

    .. math:: \psi_i = \operatorname{mean}_{\text{others}} \tau(\text{line along } i), \qquad
        \tau = \frac{\sum_{a<b} \operatorname{sgn} \Delta\mu\, \operatorname{sgn} \Delta g}{\binom{l}{2}}, \qquad
        \Psi = \operatorname{mean}_i \psi_i

    A measure that follows the outcome only because both follow the learning rate has :math:`\psi` near 0 along every other
    axis.

    Args:
        settings: hyper-parameters of each network, the same names for all.
        measure, outcome: a number for each; networks with a NaN are left out.
        held: names, such as the seed, that are equal on a line and have no :math:`\psi` of their own.

    Raises:
        ValueError: lengths that differ, names that differ, or two networks with the same settings (name the seed too).

    Source: Jiang et al., "Fantastic generalization measures and where to find them", 2020 (1912.02178), equation 6.

    Example:
        >>> settings = [{"lr": lr, "width": w} for w in (1, 2) for lr in (1, 2, 3)]
        >>> found = granulated_kendall(settings, [1, 3, 2, 4, 5, 6], [0.1, 0.2, 0.3, 0.25, 0.28, 0.35])
        >>> {axis: round(psi, 3) for axis, psi in found.psi.items()}, round(found.mean, 3)
        ({'lr': 0.667, 'width': 1.0}, 0.833)
    """
    axes, kept, mu, g = checked(settings, measure, outcome)
    psi, lines = {}, {}
    for axis in axes:
        if axis in held or len({setting[axis] for setting in kept}) < 2:
            continue
        taus = [_tau(mu[rows], g[rows]) for rows in lines_along(kept, axis)]
        if taus:
            psi[axis], lines[axis] = float(np.mean(taus)), len(taus)
    return GranulatedKendall(psi, float(np.mean(list(psi.values()))) if psi else math.nan, lines)


def lines_along(settings: Settings, axis: str) -> Iterator[NDArray[np.intp]]:
    """Networks that differ in one axis only, at least two at a time, in the order of the settings.

    Raises:
        ValueError: two networks have the same settings.
    """
    groups: dict[tuple[Any, ...], dict[Hashable, int]] = {}
    for row, setting in enumerate(settings):
        line = groups.setdefault(tuple(value for name, value in setting.items() if name != axis), {})
        if setting[axis] in line:
            raise ValueError(f"two networks have the settings {dict(setting)}: tell them apart, say by their seed")
        line[setting[axis]] = row
    for line in groups.values():
        if len(line) > 1:
            yield np.array(list(line.values()))


def conditional_information(
    settings: Settings, measure: ArrayLike, outcome: ArrayLike, *, held: Sequence[str] = (), most: int = 2
) -> ConditionalInformation:
    r"""The conditional information score.

    .. math:: K = \min_{|S| \le 2} \frac{I(V_\mu; V_g \mid U_S)}{H(V_g \mid U_S)}, \qquad
        V = \operatorname{sgn}(\text{difference over an ordered pair})

    over pairs of networks that agree in the hyper-parameters S, with the probabilities of each value :math:`U_S` taken by
    counting. Both orders of a pair count, so that :math:`H = 1` bit, and a value whose pairs are concordant with frequency q
    adds :math:`1 - h_2(q)`. Pairs that tie in one of the two are left out. Counting is biased upwards where pairs are few.

    Args:
        settings, measure, outcome: as for :func:`granulated_kendall`.
        held: names that are never in S, such as the seed.
        most: size of the largest S.

    Source: Jiang et al. (1912.02178), section 2.2.3; pairs that agree in S as its authors' competition scores them.

    Example:
        >>> settings = [{"lr": lr, "width": w} for lr in (1, 2) for w in (1, 2)]
        >>> conditional_information(settings, [1, 2, 3, 4], [1, 2, 3, 4]).score
        1.0
    """
    axes, kept, mu, g = checked(settings, measure, outcome)
    names = [axis for axis in axes if axis not in held and len({setting[axis] for setting in kept}) > 1]
    by_set, pairs = {}, {}
    for size in range(most + 1):
        for fixed in itertools.combinations(names, size):
            groups: dict[tuple[Any, ...], list[int]] = {}
            for row, setting in enumerate(kept):
                groups.setdefault(tuple(setting[name] for name in fixed), []).append(row)
            total, information = 0, 0.0
            for rows in groups.values():
                signs = _signs(mu[rows], g[rows])
                count = int(np.count_nonzero(signs))
                if count:
                    total += count
                    information += count * (1.0 - _entropy(int((signs > 0).sum()) / count))
            if total:
                by_set[fixed], pairs[fixed] = information / total, total
    return ConditionalInformation(min(by_set.values(), default=math.nan), by_set, pairs)


def checked(
    settings: Settings, measure: ArrayLike, outcome: ArrayLike
) -> tuple[list[str], list[Mapping[str, Hashable]], NDArray[np.float64], NDArray[np.float64]]:
    """Names of the axes, and the networks that have both numbers."""
    mu, g = np.asarray(measure, dtype=np.float64), np.asarray(outcome, dtype=np.float64)
    if not len(settings) == len(mu) == len(g):
        raise ValueError(
            f"got {len(settings)} settings, {len(mu)} values and {len(g)} outcomes: expected as many of each"
        )
    axes = list(settings[0]) if settings else []
    for setting in settings:
        if list(setting) != axes:
            raise ValueError(f"settings name {list(setting)} and {axes}: expected the same, in the same order")
    there = np.flatnonzero(np.isfinite(mu) & np.isfinite(g))
    return axes, [settings[int(row)] for row in there], mu[there], g[there]


def _signs(mu: NDArray[np.float64], g: NDArray[np.float64]) -> NDArray[np.float64]:
    upper = np.triu_indices(len(mu), 1)
    found: NDArray[np.float64] = np.sign(mu[:, None] - mu)[upper] * np.sign(g[:, None] - g)[upper]
    return found


def _tau(mu: NDArray[np.float64], g: NDArray[np.float64]) -> float:
    return float(_signs(mu, g).mean())


def _entropy(q: float) -> float:
    return 0.0 if q in (0.0, 1.0) else -(q * math.log2(q) + (1 - q) * math.log2(1 - q))
