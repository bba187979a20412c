r"""Inertia of the Hessian: how many eigenvalues are positive, how many negative.

Sylvester's law: :math:`A^{-\top} H A^{-1}` has the inertia of :math:`H`, so every linear reparameterisation leaves both
numbers. With rounding, "zero" is a threshold relative to the largest eigenvalue, and that threshold is not invariant: a
rescaling by :math:`d` can move an eigenvalue by :math:`d^{\pm 2}` against it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flatminima.curvature.dense import dense
from flatminima.curvature.density import density
from flatminima.measures.base import Measurement, Workbench, register
from flatminima.measures.invariance import ALL, CONDITIONAL, NEARLY

_RUNS, _STEPS = 8, 60


@dataclass(frozen=True)
class Inertia:
    """Numbers of eigenvalues above, below and within the threshold.

    Attributes:
        positive, negative: value and error.
        threshold: absolute.
        gap: of the exact path: the factor between the smallest eigenvalue that counts and the largest that does not.
        exact: whether every eigenvalue was computed.
    """

    positive: tuple[float, float]
    negative: tuple[float, float]
    threshold: float
    gap: float
    exact: bool


def eigenvalue_counts(values: Tensor, relative_threshold: float) -> Inertia:
    """The inertia of a matrix with these eigenvalues.

    Example:
        >>> found = eigenvalue_counts(torch.tensor([-1.0, 1e-9, 2.0, 5.0]), 1e-6)
        >>> found.positive[0], found.negative[0]
        (2.0, 1.0)
    """
    sizes = values.abs()
    threshold = relative_threshold * float(sizes.max())
    zeros, others = sizes[sizes <= threshold], sizes[sizes > threshold]
    gap = float(others.min() / zeros.max()) if len(zeros) and len(others) and float(zeros.max()) > 0 else math.inf
    positive, negative = float((values > threshold).sum()), float((values < -threshold).sum())
    return Inertia((positive, 0.0), (negative, 0.0), threshold, gap, True)


def _inertia(bench: Workbench) -> Inertia:
    def make() -> Inertia:
        options, precise = bench.options, bench.precise
        if precise.n <= options.dense_limit:
            return eigenvalue_counts(torch.linalg.eigvalsh(dense(precise, max_n=precise.n)), options.zero_threshold)
        found = density(precise, runs=_RUNS, steps=_STEPS, seed=bench.seed)
        threshold = max(options.zero_threshold * max(abs(found.range[0]), abs(found.range[1])), found.rounding)
        below, not_above = found.mass_below(-threshold), found.mass_below(threshold)
        return Inertia(
            (found.n * (1 - not_above[0]), found.n * _reach(not_above)), (found.n * below[0], found.n * _reach(below)),
            threshold, math.nan, False,
        )  # fmt: skip

    return bench.shared("inertia", make)


def _reach(mass: tuple[float, float, float]) -> float:
    value, low, high = mass
    return max(value - low, high - value)


def _measured(name: str, bench: Workbench, count: tuple[float, float], found: Inertia) -> Measurement:
    if found.exact:
        clear = found.gap >= 10
        note = f"of {bench.objective.n} eigenvalues; zero is below {found.threshold:.2g}, and " + (
            "none is near that"
            if found.gap == math.inf
            else f"a factor {found.gap:.2g} parts what counts from what does not"
        )
        return Measurement(name, count[0], 0.0, "exact", clear, note=note)
    note = (
        f"of {bench.objective.n} eigenvalues, from their density: the 95 % interval holds what {_STEPS} Lanczos steps "
        f"cannot know, most of it next to zero (threshold {found.threshold:.2g}); exact up to dense_limit parameters"
    )
    return Measurement(name, count[0], count[1], "95 % interval", False, note=note)


# Sylvester's law holds for affine maps. Behind the gain of a normalisation a residual stream is turned by a map that is not
# affine, under which the signs are those of before at stationary points only.
_CHANGES = frozenset({"dead-unit", "temperature", "residual-stream"})
_INVARIANT = ALL - CONDITIONAL - _CHANGES - NEARLY


@register(
    "positive_eigenvalues",
    "positive eigenvalues",
    "Number of directions in which the loss curves upwards; rescaling cannot change it.",
    flatter_when=None,
    invariant_under=_INVARIANT,
    almost_under=NEARLY,
    changes_under=_CHANGES,
    cost_class="expensive",
)
def positive_eigenvalues(bench: Workbench) -> Measurement:
    """Eigenvalues of the Hessian above ``zero_threshold`` times the largest absolute one.

    Exact, from the dense Hessian in double precision, up to ``dense_limit`` parameters (n products); beyond, from the
    density of eigenvalues (480 products) with the reach of its 95 % interval, which is wide where many eigenvalues are
    near zero.
    """
    found = _inertia(bench)
    return _measured("positive_eigenvalues", bench, found.positive, found)


@register(
    "negative_eigenvalues",
    "negative eigenvalues",
    "Number of directions in which the loss curves downwards; rescaling cannot change it.",
    flatter_when=None,
    invariant_under=_INVARIANT,
    almost_under=NEARLY,
    changes_under=_CHANGES,
    cost_class="expensive",
)
def negative_eigenvalues(bench: Workbench) -> Measurement:
    """Eigenvalues of the Hessian below minus the threshold; as :func:`positive_eigenvalues`, with which it shares the work."""
    found = _inertia(bench)
    return _measured("negative_eigenvalues", bench, found.negative, found)
