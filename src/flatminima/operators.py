"""Curvature matrices that are known only through their products with vectors.

What is multiplied is separate from how it is iterated: every estimator in :mod:`flatminima.curvature` takes an
:class:`Operator`, or an :class:`~flatminima.objective.Objective`, which stands for its Hessian.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flatminima.objective import Objective, ObjectiveError


class Operator(ABC):
    """A real symmetric ``(n, n)`` matrix ``A`` that can be multiplied: ``A @ v`` for ``v`` of shape ``(n,)`` or ``(n, k)``.

    A subclass sets the attributes in its constructor and implements :meth:`_apply`.

    Attributes:
        n: rows and columns.
        dtype, device: in which precision and where the products are formed.
        rounding: relative error of one product, about; the machine epsilon of ``dtype`` unless the subclass knows better.
        block_size: how many columns are best multiplied at once; 1 where a block costs what its columns cost one by one.
        notes: what a reader of a result must know about the products (how they are formed where it is not exact).
        products: columns multiplied so far.
        gradient_equivalents: their cost so far, in gradient evaluations of the model.
    """

    n: int
    dtype: torch.dtype
    device: torch.device
    block_size: int = 1
    products: int = 0
    gradient_equivalents: float = 0.0

    @property
    def rounding(self) -> float:
        """Relative error of one product, about."""
        return float(torch.finfo(self.dtype).eps)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of a result must know about the products."""
        return ()

    @abstractmethod
    def _apply(self, block: Tensor) -> Tensor:
        """Multiply a block ``(n, k)`` of this operator's dtype and device."""

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """Products ``(n,)`` or ``(n, k)`` as ``vectors``, in the dtype of ``vectors``, on this operator's device.

        Raises:
            ValueError: another shape or a non-floating dtype.
        """
        if vectors.dim() not in (1, 2) or vectors.shape[0] != self.n:
            raise ValueError(
                f"expected vectors ({self.n},) or ({self.n}, k), got a tensor of shape {tuple(vectors.shape)}"
            )
        if not vectors.is_floating_point():
            raise ValueError(f"expected floating-point vectors, got {vectors.dtype}")
        block = vectors if vectors.dim() == 2 else vectors[:, None]
        result = self._apply(block.to(device=self.device, dtype=self.dtype)).to(vectors.dtype)
        self.products += block.shape[1]
        return result if vectors.dim() == 2 else result[:, 0]


class Dense(Operator):
    """A matrix that is at hand; for tests, and for problems small enough to write down.

    Raises:
        ValueError: not square, or not symmetric to rounding.

    Example:
        >>> a = Dense(torch.diag(torch.tensor([2.0, 1.0])))
        >>> (a @ torch.tensor([1.0, 1.0])).tolist()
        [2.0, 1.0]
    """

    def __init__(self, matrix: Tensor) -> None:
        if not matrix.is_floating_point():
            raise ValueError(f"expected real floating-point entries, got {matrix.dtype}")
        if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"expected a square matrix, got a tensor of shape {tuple(matrix.shape)}")
        asymmetry = float((matrix - matrix.T).abs().max()) if matrix.numel() else 0.0
        if asymmetry > 100 * torch.finfo(matrix.dtype).eps * float(matrix.abs().max() if matrix.numel() else 0.0):
            raise ValueError(
                f"expected a symmetric matrix; entries differ from their mirror images by up to {asymmetry:.3g}"
            )
        self.matrix = matrix
        self.n, self.dtype, self.device = matrix.shape[0], matrix.dtype, matrix.device

    def _apply(self, block: Tensor) -> Tensor:
        return self.matrix @ block


class OfObjective(Operator):
    """A matrix whose products an objective forms, at the model's own parameters or at ``theta``.

    A subclass implements ``_multiply``; what that costs the objective is counted here.
    """

    def __init__(self, objective: Objective, theta: Tensor | None = None) -> None:
        self.objective, self.theta = objective, theta
        self.n, self.dtype, self.device = objective.n, objective.dtype, objective.device

    @property
    def block_size(self) -> int:  # type: ignore[override]
        """How many columns are best multiplied at once."""
        return self.objective.block_size

    @property
    def rounding(self) -> float:
        """Relative error of one product, about."""
        return self.objective.rounding

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of a result must know about the products."""
        return self.objective.notes

    def _apply(self, block: Tensor) -> Tensor:
        before = self.objective.evaluations.gradient_equivalents
        result = self._multiply(block)
        self.gradient_equivalents += self.objective.evaluations.gradient_equivalents - before
        return result

    @abstractmethod
    def _multiply(self, block: Tensor) -> Tensor: ...


class Hessian(OfObjective):
    """The Hessian of an objective, at the model's own parameters or at ``theta``. Cost: 2 gradients a column (nominal).

    Example:
        >>> w = torch.nn.Linear(2, 1, bias=False).double()
        >>> x = torch.tensor([[3.0, 0.0], [0.0, 1.0]]).double()
        >>> f = Objective(w, torch.nn.functional.mse_loss, (x, torch.zeros(2, 1).double()))   # H = x'x = diag(9, 1)
        >>> (Hessian(f) @ torch.ones(2).double()).tolist()
        [9.0, 1.0]
    """

    def _multiply(self, block: Tensor) -> Tensor:
        return self.objective.hvp(block, self.theta)


class GaussNewton(OfObjective):
    r"""The generalised Gauss-Newton matrix :math:`\sum_i w_i J_i^\top H_{out,i} J_i`, positive semi-definite for a convex loss.

    It is the Hessian without the curvature of the network itself; both agree where the residuals vanish. Source: Schraudolph
    (2002). Cost: 2 gradients a column (nominal).

    Example:
        >>> f = Objective(torch.nn.Linear(1, 1), torch.nn.functional.mse_loss, (torch.ones(1, 1), torch.zeros(1, 1)))
        >>> (GaussNewton(f) @ torch.tensor([1.0, 0.0])).tolist()
        [2.0, 2.0]
    """

    def _multiply(self, block: Tensor) -> Tensor:
        return self.objective.ggnvp(block, self.theta)


class EmpiricalFisher(OfObjective):
    r"""The empirical Fisher matrix :math:`\frac1R \sum_r g_r g_r^\top`, :math:`g_r` the gradient of the loss of row *r*.

    It uses the observed targets, so it is not a curvature: at a point that fits them it vanishes (Kunstner et al., 2019).
    Cost: 2 gradients a column (nominal).

    Example:
        >>> w = torch.nn.Linear(1, 1, bias=False)
        >>> f = Objective(w, torch.nn.functional.mse_loss, (torch.ones(1, 1), torch.zeros(1, 1)))
        >>> g = f.gradient()
        >>> torch.allclose(EmpiricalFisher(f) @ torch.ones(1), g * g)
        True
    """

    def _multiply(self, block: Tensor) -> Tensor:
        return self.objective.fishervp(block, self.theta)


#: Draws targets from the model's predictive distribution: ``sampler(output, generator) -> targets``.
Sampler = Callable[[Tensor, torch.Generator], Tensor]


class Fisher(OfObjective):
    r"""The Fisher matrix :math:`\frac1R \sum_r \mathbb{E}_{y \sim p(\cdot | x_r)}[g_r g_r^\top]` of the model's predictions.

    Where the loss is the negative log-likelihood of a natural exponential family in the output, it equals the Gauss-Newton
    matrix, and is formed as that, exactly: cross entropy (softmax), binary cross entropy with logits, and the squared error
    (a Gaussian whose variance makes the loss its negative log-likelihood). For any other likelihood give a ``sampler``; the
    expectation is then a mean over ``draws`` draws of the targets, fixed by ``seed``: a Monte Carlo estimate of the matrix.

    Where the loss averages over *d* outputs a row (labels, pixels, tokens), it is the likelihood divided by *d*: the
    Gauss-Newton matrix is then the Fisher matrix divided by *d*, and the sampled one divided by its square.

    Args:
        objective: the function.
        theta: where; the model's own parameters by default.
        sampler: ``sampler(output, generator)`` -> targets of the shape that ``loss_fn`` takes.
        draws: of every target.
        seed: of the draws.

    Raises:
        ObjectiveError: the loss is no likelihood that is known here and there is no sampler.

    Cost: 2 gradients a column, times ``draws`` with a sampler. Source: Martens (2020), sections 5 and 9.

    Example:
        >>> f = Objective(torch.nn.Linear(2, 2), torch.nn.functional.cross_entropy, (torch.eye(2), torch.tensor([0, 1])))
        >>> v = torch.ones(f.n)
        >>> torch.equal(Fisher(f) @ v, GaussNewton(f) @ v)
        True
    """

    def __init__(
        self,
        objective: Objective,
        theta: Tensor | None = None,
        *,
        sampler: Sampler | None = None,
        draws: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(objective, theta)
        if draws < 1:
            raise ValueError(f"draws must be at least 1, got {draws}")
        if sampler is None and not _is_likelihood(objective.loss_fn):
            raise ObjectiveError(
                f"the Fisher matrix needs a loss that is a likelihood: {_name(objective.loss_fn)} is not known as one (known: "
                "cross_entropy, binary_cross_entropy_with_logits, mse_loss without weights); give a sampler(output, generator) "
                "-> targets, or use GaussNewton"
            )
        self._sampled = [objective.resampled(sampler, seed + draw, theta) for draw in range(draws)] if sampler else []

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of a result must know about the products."""
        drawn = (f"Fisher matrix from {len(self._sampled)} draws of the targets",) if self._sampled else ()
        return self.objective.notes + drawn

    def _multiply(self, block: Tensor) -> Tensor:
        if not self._sampled:
            return self.objective.ggnvp(block, self.theta)
        self.objective.evaluations.fishervp += len(self._sampled) * block.shape[1]
        total = torch.zeros_like(block)
        for drawn in self._sampled:
            total += drawn.fishervp(block, self.theta) / len(self._sampled)
        return total


def _is_likelihood(loss_fn: object) -> bool:
    if isinstance(loss_fn, nn.CrossEntropyLoss | nn.BCEWithLogitsLoss):
        return loss_fn.weight is None and getattr(loss_fn, "pos_weight", None) is None
    known = (F.cross_entropy, F.binary_cross_entropy_with_logits, F.mse_loss)
    return isinstance(loss_fn, nn.MSELoss) or loss_fn in known


def _name(loss_fn: object) -> str:
    return getattr(loss_fn, "__name__", type(loss_fn).__name__)


def as_operator(matrix: Objective | Operator) -> Operator:
    """The Hessian of an objective; an operator as it is.

    Raises:
        TypeError: anything else.
    """
    if isinstance(matrix, Objective):
        return Hessian(matrix)
    if isinstance(matrix, Operator):
        return matrix
    raise TypeError(f"expected an Objective or an Operator, got {type(matrix).__name__}; wrap a matrix in Dense(...)")
