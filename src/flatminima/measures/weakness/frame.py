"""Coordinates of feature space: an exact frame in which proofs are checked, a whitened one in which they are sought.

Which classes a linear layer can still give to a probe does not change under invertible affine maps of feature space,
because its biases absorb translations and its weights the rest. So a search may take place in any coordinates; a proof
must not depend on the rounding of the map. The *frame* therefore only subtracts one number and divides by one power of
two per unit: every coordinate it computes has a relative error of at most one rounding, which the bounds of
:mod:`.proofs` include.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from flatminima.measures.weakness.features import ArrayLike, FeatureError, FloatArray, IntArray, class_labels, matrix

# A unit is centred only if its mean exceeds its spread this many times: without a shift zeros stay zeros, which proofs use.
_CENTRE = 1024.0
# Directions of the standardised features below this, relative to the largest, carry rounding and are left out of the search.
_RANK = 1e-10
_LARGEST = 1e150


@dataclass(frozen=True, eq=False)
class Frame:
    """Exact affine coordinates ``z = ((phi - shift) / 2**exponent, 1)`` on the units that vary.

    Attributes:
        units: indices of the units that vary over training points and probes; the others are absorbed by the bias.
        shift: subtracted from each of them.
        exponent: of the power of two that divides each.
    """

    units: IntArray
    shift: FloatArray
    exponent: IntArray

    @property
    def dimension(self) -> int:
        """Coordinates, the constant 1 included."""
        return len(self.units) + 1

    def __call__(self, phi: FloatArray) -> FloatArray:
        """Coordinates ``(rows, dimension)``, each within one rounding of the exact value (or 5e-324)."""
        away = phi[:, self.units] - self.shift
        scaled = np.ldexp(away, -self.exponent)
        # An underflow must not look like a zero: proofs count exact zeros.
        scaled = np.where((scaled == 0) & (away != 0), np.copysign(5e-324, away), scaled)
        return np.concatenate([scaled, np.ones((len(phi), 1))], axis=1)


@dataclass(frozen=True, eq=False)
class FeatureProblem:
    """Training features with labels, and probes, checked and in both coordinates.

    Attributes:
        train: ``(n, d)``, as given, in float64.
        labels: ``(n,)``.
        probes: ``(m, d)``.
        classes: K.
        frame: exact coordinates.
        centre, turn: of the search coordinates, ``(z - centre) @ turn``.
    """

    train: FloatArray
    labels: IntArray
    probes: FloatArray
    classes: int
    frame: Frame
    centre: FloatArray
    turn: FloatArray

    @classmethod
    def of(cls, train: ArrayLike, labels: ArrayLike, probes: ArrayLike, classes: int | None) -> FeatureProblem:
        """Check the arrays and choose the frame; raises :class:`FeatureError` naming what is wrong."""
        if classes is not None and classes < 2:
            raise FeatureError(f"classes must be at least 2, got {classes}")
        given, asked = matrix(train, "training features"), matrix(probes, "probe features")
        if given.shape[1] != asked.shape[1]:
            raise FeatureError(
                f"training features have {given.shape[1]} units, probe features {asked.shape[1]}: expected the same"
            )
        target = class_labels(labels, "labels", len(given), classes)
        count = classes if classes is not None else max(int(target.max()) + 1, 2)
        both = np.concatenate([given, asked])
        low, high = both.min(0), both.max(0)
        size = np.maximum(np.abs(low), np.abs(high))
        if size.max(initial=0.0) > _LARGEST:
            raise FeatureError(
                f"unit {size.argmax()} reaches {size.max():.3g}: features beyond {_LARGEST:g} overflow, divide them"
            )
        units = np.flatnonzero(high > low)
        mean, spread = both[:, units].mean(0), (high - low)[units]
        shift = np.where(np.abs(mean) > _CENTRE * spread, mean, 0.0)
        deviation = np.sqrt((((both[:, units] - mean) / spread) ** 2).mean(0)) * spread
        exponent = np.rint(np.log2(np.where(deviation > 0, deviation, spread))).astype(np.int64)
        frame = Frame(units, shift, exponent)
        return cls(given, target, asked, count, frame, *_whitening(frame(both)[:, :-1]))

    @cached_property
    def z_train(self) -> FloatArray:
        """Training points in the frame."""
        return self.frame(self.train)

    @cached_property
    def z_probes(self) -> FloatArray:
        """Probes in the frame."""
        return self.frame(self.probes)

    @property
    def rank(self) -> int:
        """Directions in which the features vary beyond rounding."""
        return int(self.turn.shape[1])

    def whiten(self, z: FloatArray) -> FloatArray:
        """Frame to search coordinates: mean 0, covariance 1 over training points and probes, and a constant 1."""
        return np.concatenate([(z[:, :-1] - self.centre) @ self.turn, np.ones((len(z), 1))], axis=1)

    def to_frame(self, weights: FloatArray) -> FloatArray:
        """Weights ``(..., K, rank + 1)`` on search coordinates as weights ``(..., K, dimension)`` on the frame."""
        slopes = weights[..., :-1] @ self.turn.T
        return np.concatenate([slopes, weights[..., -1:] - (slopes @ self.centre)[..., None]], axis=-1)

    def with_point(self, phi: FloatArray, label: int) -> FeatureProblem:
        """The same probes and coordinates with one more labelled point."""
        return replace(self, train=np.vstack([self.train, phi]), labels=np.append(self.labels, label))


def _whitening(points: FloatArray) -> tuple[FloatArray, FloatArray]:
    centre = points.mean(0)
    centred = points - centre
    scale = centred.std(0)
    scale[scale == 0] = 1.0
    _, singular, right = np.linalg.svd(centred / scale, full_matrices=False)
    kept = singular > _RANK * max(float(singular.max(initial=0.0)), 1e-300)
    return centre, (right[kept] / scale).T * (np.sqrt(len(points)) / singular[kept])
