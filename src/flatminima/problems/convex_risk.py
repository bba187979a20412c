"""What is known about a risk or a sharpness, and expectations over fair bits: exact where few values occur, else sampled."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Literal, NamedTuple

import numpy as np
import torch
from scipy.stats import binom
from torch import Tensor

from flatminima.names import unknown

_EXACT = 2**20  # combinations that are enumerated
_BLOCK = 2**22  # numbers drawn at once


@dataclass(frozen=True)
class Risk:
    """A population risk and how it is known.

    Attributes:
        value: of the risk.
        error: 0 where it is exact; where it is bounded, the truth lies in ``[value, value + error]``; where it is sampled,
            the standard error.
        kind: ``"exact"`` (to rounding), ``"bounded"`` or ``"sampled"``.
        draws: fresh examples, where it is sampled.
    """

    value: float
    error: float = 0.0
    kind: Literal["exact", "bounded", "sampled"] = "exact"
    draws: int = 0

    @property
    def exact(self) -> bool:
        """Whether there is no error but rounding."""
        return self.kind == "exact"


class Sharpness(NamedTuple):
    r"""How far the empirical risk rises in a ball, :math:`\max_{\lVert v \rVert \le r} F_S(w + v) - F_S(w)`.

    Attributes:
        lower: the largest rise found; with ``exact`` the sharpness itself.
        upper: no rise in the ball is larger.
        direction: ``(d,)``, the displacement with the rise ``lower``.
        exact: whether a closed form applies; then ``lower == upper``.
    """

    lower: float
    upper: float
    direction: Tensor
    exact: bool


class Check(NamedTuple):
    """One condition of a theorem.

    Attributes:
        name: in symbols.
        holds: whether it does.
        value, limit: the two sides.
        hypothesis: whether it is a hypothesis of the printed theorem, not a step of its proof.
    """

    name: str
    holds: bool
    value: float
    limit: float
    hypothesis: bool = False


@dataclass(frozen=True)
class Certificate:
    """Whether a theorem says anything about this instance.

    Attributes:
        checks: one for each condition.
    """

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether every step of the proof holds here, whatever the theorem's range of parameters."""
        return all(check.holds for check in self.checks if not check.hypothesis)

    @property
    def covered(self) -> bool:
        """Whether the hypotheses hold as well."""
        return all(check.holds for check in self.checks)

    @property
    def failed(self) -> tuple[str, ...]:
        """The conditions that do not hold, with their two sides."""
        return tuple(f"{c.name} ({c.value:.4g}, limit {c.limit:.4g})" for c in self.checks if not c.holds)

    def __getitem__(self, name: str) -> Check:
        found = {check.name: check for check in self.checks}
        if name not in found:
            raise KeyError(unknown("condition", name, found))
        return found[name]


def expectation(
    phi: Callable[[Tensor], Tensor],
    constant: float,
    sizes: Sequence[int],
    on: Tensor,
    off: Tensor,
    *,
    draws: int,
    seed: int,
) -> Risk:
    r"""The mean of :math:`\phi(a + \sum_c (j_c\, u_c + (m_c - j_c)\, v_c))` over :math:`j_c \sim \mathrm{Bin}(m_c, \tfrac12)`.

    Classes with equal ``on`` and ``off`` are merged. Up to a million combinations are enumerated; beyond, ``draws`` are
    made. Classes of more than 2^40 columns are drawn from the normal limit, which is closer than a part in a million of
    their spread.

    Args:
        phi: elementwise, from ``(k,)`` to ``(k,)``.
        constant: :math:`a`.
        sizes: :math:`m_c`.
        on, off: :math:`u_c, v_c`, ``(classes,)``: the share of one column whose bit is 1 or 0.
        draws, seed: for the sampled case.

    Example:
        >>> expectation(lambda x: x.square(), 0.0, [2], torch.ones(1), torch.zeros(1), draws=0, seed=0).value
        1.5
    """
    on, off = on.double(), off.double()
    merged: dict[tuple[float, float], int] = {}
    for size, u, v in zip(sizes, on.tolist(), off.tolist(), strict=True):
        if u == v:
            constant += size * u
        else:
            merged[u, v] = merged.get((u, v), 0) + size
    if math.prod(size + 1 for size in merged.values()) <= _EXACT:
        values, chances = torch.tensor([constant], dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        for (u, v), size in merged.items():
            counts = torch.arange(size + 1, dtype=torch.float64)
            chance = torch.tensor(
                [math.comb(size, j) / 2**size for j in range(size + 1)]
                if size <= 64
                else binom.pmf(counts.numpy(), size, 0.5),
                dtype=torch.float64,
            )
            values = (values[:, None] + counts * u + (size - counts) * v).reshape(-1)
            chances = (chances[:, None] * chance).reshape(-1)
        return Risk(float(torch.dot(phi(values), chances)))
    if isinstance(draws, bool) or not isinstance(draws, Integral) or draws < 2:
        raise ValueError(f"draws counts fresh examples and must be at least 2 for a standard error, got {draws!r}")
    draws = int(draws)
    steps = torch.tensor([u - v for u, v in merged], dtype=torch.float64)
    base = constant + sum(size * v for (_, v), size in merged.items())
    generator, total, square = np.random.default_rng(seed), 0.0, 0.0
    rows = max(1, _BLOCK // len(merged))
    for first in range(0, draws, rows):
        counts = fair_counts(list(merged.values()), min(rows, draws - first), generator)
        found = phi(base + counts @ steps)
        total += float(found.sum())
        square += float(found.square().sum())
    mean = total / draws
    variance = max(0.0, square / draws - mean * mean) * draws / (draws - 1)
    return Risk(mean, math.sqrt(variance / draws), "sampled", draws)


def fair_counts(sizes: Sequence[int], rows: int, generator: np.random.Generator) -> Tensor:
    """How many of ``size`` fair coins show a one, ``(rows, len(sizes))``, float64."""
    if all(size == 1 for size in sizes):
        return torch.from_numpy(generator.integers(0, 2, (rows, len(sizes)), dtype=np.int8)).double()
    columns = [
        generator.binomial(size, 0.5, rows).astype(np.float64)
        if size < 2**40
        else size / 2 + math.sqrt(size) / 2 * generator.standard_normal(rows)
        for size in sizes
    ]
    return torch.from_numpy(np.stack(columns, axis=1))
