r"""An orthonormal basis that grows by one product a step, and the matrix projected onto it.

The basis :math:`V` and the coefficients :math:`H` are kept in double precision and satisfy, for the products as they came,

.. math:: A V = V H + \beta\, v\, e_m^\top + D,

where :math:`v` is the next basis vector and :math:`D` holds what was dropped on purpose (restarts, exhausted directions; only
its column norms are kept). Every image is orthogonalised against the whole basis, twice: without that, rounding makes
converged eigenvalues reappear as "ghosts". Since all coefficients are there, the residual of a Ritz pair is known without
another product, and products that are not those of a symmetric matrix show.

Parlett, *The Symmetric Eigenvalue Problem* (1998), chapters 4, 6 and 13; Wu and Simon, *Thick-restart Lanczos method for large
symmetric eigenvalue problems* (2000).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flatminima.operators import Operator

_COLUMNS = 1 << 15  # the basis is rotated this many parameters at a time, so that a restart needs no second basis
_NOISE = 8.0  # products are trusted to this many times the rounding error that the operator states
_EXHAUSTED = (
    32.0  # a new direction this many rounding errors long is noise: the products of a deep network lose that much
)


class AsymmetryError(ValueError):
    """The products cannot be those of a symmetric matrix."""


class Krylov:
    """Basis, coefficients and residuals of a Lanczos run; the caller decides when to stop, to restart and to start afresh.

    Attributes:
        size: basis vectors so far, ``m``.
        beta: length of the part of the last image that lies outside the basis; 0 once the basis is invariant.
        scale: lower bound on the spectral norm, from all images so far.
        asymmetry: largest deviation of a coefficient column from its mirror image, absolute.
    """

    def __init__(self, operator: Operator, capacity: int, *, seed: int, start: Tensor | None, expected: int) -> None:
        n = operator.n
        self.operator, self.capacity, self.size = operator, min(capacity, n), 0
        self.beta, self.scale, self.asymmetry = 0.0, 0.0, 0.0
        self._previous = 0.0  # the beta before this one; 0 after a start
        self._generator = torch.Generator().manual_seed(seed)
        self._rows = self._empty(min(expected, self.capacity) + 1)
        self._coefficients = torch.zeros(self.capacity + 1, self.capacity, dtype=torch.float64)
        self._dropped = torch.zeros(self.capacity, dtype=torch.float64)
        self._start = torch.zeros(
            self.capacity, dtype=torch.float64
        )  # the first vector, in the coordinates of the basis
        self._start[0] = 1.0
        self._open = 0  # columns below this one had their residual dropped; images of later vectors fill it in
        first = self._draw() if start is None else start.detach().to(operator.device, torch.float64)
        largest = first.abs().max()  # against overflow and underflow of the squares
        torch.div(first, largest, out=self._rows[0])
        self._rows[0] /= self._rows[0].norm()

    @property
    def basis(self) -> Tensor:
        """Orthonormal columns ``(n, m)``, a view."""
        return self._rows[: self.size].T

    @property
    def projected(self) -> Tensor:
        """Symmetric part of ``V' A V``, ``(m, m)``, float64, on the CPU."""
        block = self._coefficients[: self.size, : self.size]
        return (block + block.T) / 2

    @property
    def _rounding(self) -> float:
        return max(self.operator.rounding, torch.finfo(torch.float64).eps)

    @property
    def noise(self) -> float:
        """Absolute error of a residual norm that the rounding of the products can hide."""
        return _NOISE * self._rounding * self.scale

    @property
    def exhausted(self) -> bool:
        """Whether the next vector would be nothing but the rounding of the last product."""
        return self.beta <= _EXHAUSTED * self._rounding * self.scale

    @property
    def invariant(self) -> bool:
        """Whether the basis would be invariant without rounding, which a short vector before the next one has magnified."""
        rounding, scale = self._rounding, self.scale
        magnified = _EXHAUSTED * rounding * scale * (scale / self._previous if self._previous else 1.0)
        return self.exhausted or self.beta <= min(magnified, math.pow(rounding, 2 / 3) * scale)

    def step(self) -> None:
        """One product: the next vector enters the basis, and its image gives the vector after it.

        Raises:
            FloatingPointError: the product is not finite.
            AsymmetryError: the coefficients are not those of a symmetric matrix.
        """
        m = self.size
        image = (self.operator @ self._rows[m]).contiguous()
        rows, coefficients = self._rows[: m + 1], torch.zeros(m + 1, dtype=torch.float64, device=image.device)
        # The three-term recurrence takes away nearly all that is in the basis, so that one sweep over it mostly suffices
        # to make the orthogonality exact; where the sweep shortens the image, rounding in the sweep counts: once more.
        low = max(0, m - 1)
        coefficients[low:] = rows[low:] @ image
        image.addmv_(rows[low:].T, coefficients[low:], alpha=-1)
        length = image.norm()
        for _ in range(3):
            overlap = rows @ image
            image.addmv_(rows.T, overlap, alpha=-1)
            coefficients += overlap
            before, length = length, image.norm()
            if float(length) > 0.7 * float(before):
                break
        column, beta = coefficients.cpu(), float(length)
        if not (math.isfinite(beta) and bool(torch.isfinite(column).all())):
            raise FloatingPointError(
                f"product {self.operator.products} contains NaN or infinity, while its vector is finite: the second "
                "derivative of the loss does not exist in this precision at this point; try Objective.to_dtype(torch.float64)"
            )
        self.scale = max(self.scale, math.hypot(float(column.norm()), beta))
        self._enter(column)
        self._previous = self.beta
        self.beta = beta if self.size < self.operator.n else 0.0
        if not self.exhausted:
            self._reserve(self.size)
            torch.div(image, beta, out=self._rows[self.size])
            self._coefficients[self.size, m] = beta

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Ritz values, ascending, and the rotations that take the basis to the Ritz vectors, as columns."""
        values, rotations = torch.linalg.eigh(self.projected)
        self.scale = max(self.scale, float(values.abs().max()))
        return values, rotations

    def ritz_since(self, first: int) -> tuple[Tensor, Tensor]:
        """Ritz values of the basis vectors from ``first`` on alone, and the part of their residuals that iterating reduces."""
        values, rotations = torch.linalg.eigh(self.projected[first:, first:])
        return values, (0.0 if self.exhausted else self.beta) * rotations[-1].abs()

    def _enter(self, column: Tensor) -> None:
        """Put a column of coefficients in place, and see whether it mirrors the row that is there."""
        m, open_ = self.size, self._open
        deviation = column[:m] - self._coefficients[m, :m]
        if open_:
            # What was dropped from these columns had this component along the new vector; here it comes back.
            dropped = self._dropped[:open_]
            returned = deviation[:open_].clone()
            self._coefficients[m, :open_] = column[:open_]
            deviation[:open_] = (returned.abs() - dropped).clamp(min=0)
            self._dropped[:open_] = (dropped.square() - returned.square()).clamp(min=0).sqrt()
        self._coefficients[: m + 1, m] = column
        self.size = m + 1
        self.asymmetry = max(self.asymmetry, float(deviation.norm()))
        rounding = self._rounding
        if self.asymmetry > math.sqrt(rounding) * self.scale:
            double = self.operator.dtype == torch.float64
            raise AsymmetryError(
                f"the products are not those of a symmetric matrix: u'Av and v'Au differ by {self.asymmetry:.3g}, the "
                f"matrix is of the order {self.scale:.3g}, and rounding explains {rounding * self.scale:.1g}. Either the "
                "function changes between products (data in another order, dropout, batch statistics), or a derivative of "
                "one of its operations is wrong, or "
                + (
                    "the loss is so small that rounding is all that double precision leaves of its second derivatives"
                    if double
                    else "this precision is too coarse for so small a loss: try Objective.to_dtype(torch.float64)"
                )
            )

    def residuals(self, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Residual norms of the Ritz vectors ``V @ rotation``, in three readings, each at least the one before.

        The part that iterating reduces; with what was dropped; with the asymmetry of the products within the basis and
        their rounding.
        """
        block = self._coefficients[: self.size, : self.size]
        skew = ((block - block.T) @ rotation / 2).norm(dim=0)
        outside = self.beta * rotation[-1].abs()
        whole = outside + self._dropped[: self.size] @ rotation.abs()
        total = torch.sqrt(whole.square() + skew.square()) + self.noise
        return torch.zeros_like(outside) if self.exhausted else outside, whole, total

    def overlaps(self, rotation: Tensor) -> Tensor:
        """How much of the Ritz vectors ``V @ rotation`` is along the vector that the iteration began with."""
        return (self._start[: self.size] @ rotation).abs()

    def compress(self, rotation: Tensor) -> None:
        """Keep only ``V @ rotation`` of the basis, ``(m, p)`` orthonormal columns; the next vector stays (thick restart)."""
        m, p = rotation.shape
        block = self._coefficients[:m, :m]
        kept = rotation.T @ block @ rotation
        lost = block @ rotation - rotation @ kept
        dropped = self._dropped[:m] @ rotation.abs() + lost.norm(dim=0)
        following = 0.0 if self.exhausted else self.beta
        if self.exhausted:
            dropped += self.beta * rotation[-1].abs()
        turn = rotation.T.to(self._rows.device)
        for i in range(0, self.operator.n, _COLUMNS):
            part = self._rows[:, i : i + _COLUMNS]
            part[:p] = turn @ part[:m]
        self._rows[p] = self._rows[m]
        self._coefficients.zero_()
        self._coefficients[:p, :p] = kept
        self._coefficients[p, :p] = following * rotation[-1]
        self._dropped.zero_()
        self._dropped[:p] = dropped
        start = rotation.T @ self._start[:m]
        self._start.zero_()
        self._start[:p] = start
        self.size = p
        self._open = p if self._open else 0

    def start_afresh(self) -> None:
        """Let the next vector be a random direction orthogonal to the basis, and drop the residual of what is in it."""
        m = self.size
        self._dropped[:m] += self._coefficients[m, :m].abs()
        if self.exhausted:
            self._dropped[m - 1] += self.beta
        self._coefficients[m, :m] = 0
        self._open = m
        self.beta = 0.0
        self._reserve(m)
        rows, fresh = self._rows[:m], self._draw()
        for _ in range(3):
            fresh.addmv_(rows.T, rows @ fresh, alpha=-1)
            fresh /= fresh.norm()
        self._rows[m] = fresh

    def combine(self, rotation: Tensor) -> Tensor:
        """Unit vectors ``V @ rotation``, ``(n, k)``, in the dtype of the operator."""
        result = torch.empty(self.operator.n, rotation.shape[1], dtype=self.operator.dtype, device=self._rows.device)
        turn = rotation.to(self._rows.device)
        for i in range(0, self.operator.n, _COLUMNS):
            result[i : i + _COLUMNS] = self._rows[: self.size, i : i + _COLUMNS].T @ turn
        return result

    def _draw(self) -> Tensor:
        drawn = torch.randn(self.operator.n, dtype=torch.float64, generator=self._generator)
        return drawn.to(self.operator.device)

    def _empty(self, rows: int) -> Tensor:
        return torch.empty(rows, self.operator.n, dtype=torch.float64, device=self.operator.device)

    def _reserve(self, row: int) -> None:
        if row >= len(self._rows):
            grown = self._empty(min(2 * row, self.capacity) + 1)
            grown[: self.size] = self._rows[: self.size]
            self._rows = grown
