r"""The Hessian of a loss in the outputs of row *i* as signed squares: :math:`H_i = \sum_k s_{ik} r_{ik} r_{ik}^\top`.

Two forms that nearly every loss has are recognised from products with random vectors, so that the loss may be written in
any way: a multiple of the softmax curvature :math:`\mathrm{diag}(p) - pp^\top` (cross entropy, also with label smoothing, class
weights or ignored targets) and a diagonal (squared error, binary cross entropy, Huber). Anything else costs one product an
output and an eigendecomposition a row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

#: A vector ``(rows, K)`` and its signs ``(rows,)``, ``None`` where all are positive.
Factor = tuple[Tensor, Tensor | None]
_Product = Callable[[Tensor], Tensor]


class CoupledRowsError(ValueError):
    """The loss of one row depends on the outputs of another one."""


class OutputCurvature(ABC):
    """The blocks :math:`H_i` of all rows of one evaluation of the loss."""

    #: Most factors a row.
    count: int

    @abstractmethod
    def factors(self, cut: slice) -> Iterator[Factor]:
        """Vectors of the rows in ``cut``: ``H_i`` is the signed sum of their squares."""


def output_curvature(loss: Callable[[Tensor], Tensor], outputs: Tensor) -> OutputCurvature:
    """Factor the Hessian of ``loss`` at ``outputs``, a tensor ``(rows, ...)``.

    Raises:
        CoupledRowsError: the Hessian is not block-diagonal in the rows.

    Cost: 6 Hessian products of the loss alone, and one an output where the form is not recognised.
    """
    shape = outputs.shape
    flat = outputs.detach().reshape(shape[0], -1)
    eps = torch.finfo(flat.dtype).eps
    generator = torch.Generator().manual_seed(0)

    def product_at(at: Tensor) -> _Product:
        return _hessian_product(loss, at.reshape(shape))

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(flat)

    product = product_at(flat)
    vector, scales = draw(*flat.shape), draw(flat.shape[0], 1)
    image = product(vector)
    largest = float(image.abs().max())
    # Between outputs that are all but certain there is nothing but rounding to compare, also a little away from them;
    # outputs of ordinary size tell. The draws are made only where the ones before did not settle it.
    if _coupled(product, vector, scales) and all(
        _coupled(product_at(at + draw(*flat.shape)), vector, scales) for at in (flat, torch.zeros_like(flat))
    ):
        raise CoupledRowsError(
            "the loss of one row depends on the outputs of other rows; a mean over rows of a loss of their own is needed"
        )
    if largest == 0.0 and not bool(product(draw(*flat.shape)).any()):
        return _Diagonal(torch.zeros_like(flat))
    if len(shape) == 2 and shape[1] > 1:
        weights = _softmax_weights(product_at, draw, flat, image, vector)
        if weights is not None:
            return _Softmax(flat.double().softmax(1), weights)
    diagonal = image / vector
    other = draw(*flat.shape)
    if bool(((product(other) - diagonal * other).abs() <= 1e3 * eps * diagonal.abs().amax(1, keepdim=True)).all()):
        ones = product(torch.ones_like(flat))  # no quotient of a small draw
        return _Diagonal(ones)
    return _Dense(product, flat)


def _softmax_weights(
    product_at: Callable[[Tensor], _Product], draw: Callable[..., Tensor], flat: Tensor, image: Tensor, vector: Tensor
) -> Tensor | None:
    """``c`` with ``H_i = c_i (diag p_i - p_i p_i')`` at the outputs and wherever else it is tried; None if there is none."""
    eps = torch.finfo(flat.dtype).eps
    # Found at outputs of ordinary size: at those of a trained model the curvature is next to nothing and its quotient noise.
    found: list[Tensor] = []
    for _ in range(2):
        at, direction = draw(*flat.shape), draw(*flat.shape)
        measured, expected = product_at(at)(direction).double(), _softmax_product(at, direction)
        weights = (direction * measured).sum(1) / (direction * expected).sum(1)
        found.append(weights)
        if not _agree(measured, weights[:, None] * expected, weights, eps):
            return None
    first, second = found
    if not _agree(first[:, None], second[:, None], first, eps):
        return None
    expected = first[:, None] * _softmax_product(flat, vector)
    return first if _agree(image.double(), expected, first, eps) else None


def _coupled(product: _Product, vector: Tensor, scales: Tensor) -> bool:
    """Whether scaling the rows of a vector does anything but scale the rows of its product."""
    image = product(vector)
    tolerance = 1e4 * torch.finfo(vector.dtype).eps * image.abs().max()
    return not bool((product(scales * vector) - scales * image).abs().max() <= tolerance)


def _agree(a: Tensor, b: Tensor, scale: Tensor, eps: float) -> bool:
    # NaN agrees with nothing; rows whose target is ignored have weight 0.
    return bool(((a - b).abs() <= 1e3 * eps * scale.abs()[:, None]).all())


def _softmax_product(outputs: Tensor, vector: Tensor) -> Tensor:
    p, v = outputs.double().softmax(1), vector.double()
    return p * (v - (p * v).sum(1, keepdim=True))


def _hessian_product(loss: Callable[[Tensor], Tensor], outputs: Tensor) -> _Product:
    with torch.enable_grad():
        at = outputs.detach().clone().requires_grad_()
        (slope,) = torch.autograd.grad(loss(at), at, create_graph=True, allow_unused=True)

    def product(vector: Tensor) -> Tensor:
        if slope is None or not slope.requires_grad:
            return torch.zeros_like(vector)
        (image,) = torch.autograd.grad(slope, at, vector.reshape(at.shape), retain_graph=True, allow_unused=True)
        return torch.zeros_like(vector) if image is None else image.reshape(vector.shape)

    return product


class _Softmax(OutputCurvature):
    r"""Closed-form Cholesky factor of :math:`\mathrm{diag}(p) - pp^\top`, of rank K - 1 (Tanabe and Sagae 1992, Theorem 1)."""

    def __init__(self, probabilities: Tensor, weights: Tensor) -> None:
        self._p, self._weights = probabilities, weights
        self.count = probabilities.shape[1] - 1
        # What remains after class k, summed from the end: 1 - cumsum would cancel.
        self._rest = probabilities.flip(1).cumsum(1).flip(1)

    def factors(self, cut: slice) -> Iterator[Factor]:
        p, rest = self._p[cut], self._rest[cut]
        weights = self._weights[cut]
        signs = None if bool((weights >= 0).all()) else weights.sign()
        for k in range(self.count):
            after = rest[:, k + 1]
            head = (weights.abs() * p[:, k] * after / rest[:, k]).sqrt()
            column = torch.zeros_like(p)
            column[:, k] = head
            column[:, k + 1 :] = -(p[:, k + 1 :] / after[:, None]) * head[:, None]
            yield column.nan_to_num_(nan=0.0), signs  # 0/0: no probability is left


class _Diagonal(OutputCurvature):
    def __init__(self, diagonal: Tensor) -> None:
        self._diagonal = diagonal.double()
        self._live = self._diagonal.any(0).nonzero()[:, 0].tolist()
        self.count = len(self._live)

    def factors(self, cut: slice) -> Iterator[Factor]:
        for k in self._live:
            value = self._diagonal[cut, k]
            vector = torch.zeros_like(self._diagonal[cut])
            vector[:, k] = value.abs().sqrt()
            yield vector, None if bool((value >= 0).all()) else value.sign()


class _Dense(OutputCurvature):
    def __init__(self, product: _Product, outputs: Tensor) -> None:
        self._product, self._outputs = product, outputs
        self.count = outputs.shape[1]

    def factors(self, cut: slice) -> Iterator[Factor]:
        columns = []
        for k in range(self.count):
            unit = torch.zeros_like(self._outputs)
            unit[:, k] = 1.0
            columns.append(self._product(unit)[cut].double())
        blocks = torch.stack(columns, dim=2)
        values, vectors = torch.linalg.eigh((blocks + blocks.mT) / 2)
        floor = self.count * torch.finfo(torch.float64).eps * values.abs().amax()
        for k in range(self.count):
            value = values[:, k]
            if bool((value.abs() > floor).any()):
                yield vectors[:, :, k] * value.abs().sqrt()[:, None], value.sign()
