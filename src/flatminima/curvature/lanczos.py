"""The largest Hessian eigenvalue by Lanczos, stopped on its own residual bound.

The basis is kept in double precision and every new vector is orthogonalised twice against all earlier ones: without that,
rounding makes converged eigenvalues reappear as "ghosts", and a bound computed from the recurrence is worth nothing.
Parlett, *The Symmetric Eigenvalue Problem* (1998), chapters 4 and 13.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flatminima.objective import Objective


@dataclass(frozen=True)
class EigenResult:
    """One eigenpair of a Hessian, with a bound on its error.

    Attributes:
        value: Ritz value, the estimate of the largest (algebraic) eigenvalue.
        error: residual norm ``|H u - value u|``, measured with one extra product: an eigenvalue of ``H`` lies within it.
        vector: unit Ritz vector ``(n,)``.
        converged: whether ``error <= rtol * |value|``.
        products: Hessian-vector products spent.
        basis: orthonormal Krylov basis ``(n, m)``, double precision; reused to deflate the trace.
        diagonal: Rayleigh quotients of the basis vectors, ``(m,)``; they sum to the trace of ``H`` on the basis.
    """

    value: float
    error: float
    vector: Tensor
    converged: bool
    products: int
    basis: Tensor
    diagonal: Tensor


def top_eigenpair(objective: Objective, *, rtol: float = 1e-3, max_products: int = 100, seed: int = 0) -> EigenResult:
    r"""Largest algebraic eigenvalue :math:`\lambda_{\max}(H)` and its eigenvector.

    Lanczos from a seeded Gaussian vector, until the residual bound :math:`\beta_m |s_m|` of the top Ritz pair is at most
    ``rtol`` times its value; then the residual is measured with one product more. The residual bounds the distance to *an*
    eigenvalue; that it is the largest is certain only up to the start vector's overlap with it, which a
    Gaussian start makes generic.

    Args:
        objective: the function.
        rtol: relative residual asked for.
        max_products: give up there, with ``converged=False``; at least 2.
        seed: of the start vector.

    Cost: 2 gradients a product. Memory: one double-precision vector a product.

    Example:
        >>> from flatminima.objective import Objective
        >>> w = torch.nn.Linear(2, 1, bias=False).double()
        >>> x = torch.tensor([[3.0, 0.0], [0.0, 1.0]]).double()
        >>> f = Objective(w, torch.nn.functional.mse_loss, (x, torch.zeros(2, 1).double()))   # H = x'x = diag(9, 1)
        >>> round(top_eigenpair(f).value, 6)
        9.0
    """
    if rtol <= 0:
        raise ValueError(f"rtol must be positive, got {rtol}")
    if max_products < 2:
        raise ValueError(f"max_products must be at least 2 (one step and the residual), got {max_products}")
    n = objective.n
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(n, dtype=torch.float64, generator=generator).to(objective.device)
    vectors = [start / start.norm()]
    alphas: list[float] = []
    betas: list[float] = []
    steps = min(n, max_products - 1)
    for _ in range(steps):
        image = _product(objective, vectors[-1])
        alphas.append(float(image @ vectors[-1]))
        basis = torch.stack(vectors, dim=1)
        for _ in range(2):
            image -= basis @ (basis.T @ image)
        beta = float(image.norm())
        values, rotations = torch.linalg.eigh(_tridiagonal(alphas, betas))
        scale = max(abs(float(values[-1])), abs(float(values[0])))
        # Below the rounding error of the products the Krylov space is invariant: nothing more to find.
        exhausted = beta <= torch.finfo(objective.dtype).eps * max(scale, torch.finfo(torch.float64).tiny)
        if exhausted or beta * abs(float(rotations[-1, -1])) <= rtol * abs(float(values[-1])):
            break
        betas.append(beta)
        vectors.append(image / beta)
    basis = torch.stack(vectors[: len(alphas)], dim=1)
    values, rotations = torch.linalg.eigh(_tridiagonal(alphas, betas[: len(alphas) - 1]))
    value = float(values[-1])
    vector = basis @ rotations[:, -1].to(basis.device)
    vector /= vector.norm()
    error = float((_product(objective, vector) - value * vector).norm())
    return EigenResult(
        value=value,
        error=error,
        vector=vector.to(objective.dtype),
        converged=error <= rtol * abs(value),
        products=len(alphas) + 1,
        basis=basis,
        diagonal=torch.tensor(alphas, dtype=torch.float64),
    )


def _product(objective: Objective, vector: Tensor) -> Tensor:
    return objective.hvp(vector.to(objective.dtype)).double()


def _tridiagonal(alphas: list[float], betas: list[float]) -> Tensor:
    off = torch.tensor(betas[: len(alphas) - 1], dtype=torch.float64)
    return torch.diag(torch.tensor(alphas, dtype=torch.float64)) + torch.diag(off, 1) + torch.diag(off, -1)
