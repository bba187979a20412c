"""The trace of the Hessian, with a standard error.

A Krylov basis that an eigenvalue computation leaves behind spans the directions that make the probes scatter: on it the
trace is known exactly, and only the complement is sampled. Hutchinson (1990); deflation as in Gambhir, Stathopoulos and
Orginos (2017).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flatminima.curvature.lanczos import EigenResult
from flatminima.objective import Objective


@dataclass(frozen=True)
class TraceResult:
    """A trace and how far it can be trusted.

    Attributes:
        value: the estimate.
        error: standard error of the mean over probes; 0 when the deflation basis spans the whole space.
        converged: whether ``error <= rtol * |value|``.
        products: Hessian-vector products spent here (those of the deflation basis not included).
        probes: random vectors used.
    """

    value: float
    error: float
    converged: bool
    products: int
    probes: int


def trace(
    objective: Objective,
    *,
    rtol: float = 0.02,
    max_probes: int = 100,
    min_probes: int = 10,
    deflate: EigenResult | None = None,
    seed: int = 0,
) -> TraceResult:
    r"""Trace of the Hessian by Hutchinson's estimator.

    .. math:: \mathrm{tr} H = \mathrm{tr}(Q^\top H Q) + \mathbb{E}_z\bigl[z^\top P H P z\bigr],\qquad P = I - QQ^\top

    with Rademacher probes :math:`z` and :math:`Q` the basis of ``deflate`` (empty by default), whose exact part is known
    already. Probes are drawn until the standard error is at most ``rtol`` times the estimate. That rule looks at the error it
    stops on, so it stops a little early; ``min_probes`` keeps the effect small.

    Args:
        objective: the function.
        rtol: relative standard error asked for.
        max_probes: give up there, with ``converged=False``.
        min_probes: never trust a standard error from fewer; at least 2.
        deflate: result of :func:`~flatminima.curvature.top_eigenpair` for the same objective.
        seed: of the probes.

    Cost: 2 gradients a probe.

    Example:
        >>> from flatminima.objective import Objective
        >>> w = torch.nn.Linear(2, 1, bias=False).double()
        >>> x = torch.tensor([[3.0, 0.0], [0.0, 1.0]]).double()
        >>> f = Objective(w, torch.nn.functional.mse_loss, (x, torch.zeros(2, 1).double()))   # H = x'x = diag(9, 1)
        >>> round(trace(f).value, 6)
        10.0
    """
    if rtol <= 0:
        raise ValueError(f"rtol must be positive, got {rtol}")
    if not 2 <= min_probes <= max_probes:
        raise ValueError(f"need 2 <= min_probes <= max_probes, got {min_probes} and {max_probes}")
    exact, basis = 0.0, None
    if deflate is not None:
        exact, basis = float(deflate.diagonal.sum()), deflate.basis
        if basis.shape[0] != objective.n:
            raise ValueError(
                f"deflate belongs to an objective of {basis.shape[0]} parameters, this one has {objective.n}; pass the "
                "result of top_eigenpair for the same objective"
            )
        if basis.shape[1] == objective.n:
            return TraceResult(exact, 0.0, True, 0, 0)
    generator = torch.Generator().manual_seed(seed)
    samples: list[float] = []
    value, error = math.nan, math.inf
    while len(samples) < max_probes:
        samples.append(_sample(objective, basis, generator))
        if len(samples) >= min_probes:
            drawn = torch.tensor(samples, dtype=torch.float64)
            value = exact + float(drawn.mean())
            error = float(drawn.std()) / math.sqrt(len(samples))
            if error <= rtol * abs(value):
                break
    return TraceResult(value, error, error <= rtol * abs(value), len(samples), len(samples))


def _sample(objective: Objective, basis: Tensor | None, generator: torch.Generator) -> float:
    signs = torch.randint(0, 2, (objective.n,), generator=generator).to(objective.device, torch.float64) * 2 - 1
    if basis is not None:
        signs = signs - basis @ (basis.T @ signs)
    return float(signs @ objective.hvp(signs.to(objective.dtype)).double())
