"""Measures read off the Hessian: its top eigenvalue, its trace, and its quadratic form in the weights."""

from __future__ import annotations

import torch
from torch import Tensor

from flatminima.curvature.piecewise_linear import exact_diagonal, trace_if_exact, why_not
from flatminima.curvature.trace import trace as hessian_trace
from flatminima.measures.base import Measurement, NotApplicableError, Workbench, register
from flatminima.measures.invariance import (
    CHANGES_DISTANCES,
    CHANGES_RATIOS,
    CHANGES_RAY,
    KEEPS_DISTANCES,
    KEEPS_RATIOS,
    KEEPS_RAY,
    NEARLY,
)
from flatminima.objective import Objective, ObjectiveError
from flatminima.operators import OfObjective


@register(
    "lambda_max",
    "top Hessian eigenvalue",
    "Curvature of the loss in the sharpest direction; it changes with the scale of the weights.",
    invariant_under=KEEPS_DISTANCES,
    changes_under=CHANGES_DISTANCES,
    default=True,
    repair=("adaptive_sharpness",),
)
def lambda_max(bench: Workbench) -> Measurement:
    r""":math:`\lambda_{\max}(H)` by Lanczos; the error is a residual bound. Cost: 2 gradients a product."""
    eigen = bench.eigen
    return Measurement("lambda_max", eigen.value, eigen.error, "residual bound", eigen.converged)


@register(
    "trace",
    "Hessian trace",
    "Sum of all curvatures; it changes with the scale of the weights.",
    invariant_under=KEEPS_DISTANCES,
    changes_under=CHANGES_DISTANCES,
    default=True,
    repair=("orbit_minimal_trace", "adaptive_trace"),
)
def trace(bench: Workbench) -> Measurement:
    r""":math:`\mathrm{tr} H`, exact for piecewise linear networks, else by Hutchinson's estimator with deflation.

    The error is rounding or a standard error. Cost: as many gradients as the network has outputs, about; else 2 gradients a
    probe.
    """
    options = bench.options
    found = trace_if_exact(bench.objective)  # before eigenpairs are sought that it does not need
    if found is None:
        found = hessian_trace(
            bench.objective,
            rtol=options.rtol,
            max_products=options.max_probes,
            deflate=bench.eigen,
            seed=bench.seed + 1,
        )
    exact = found.method == "exact"
    kind, note = ("rounding", "exact") if exact else ("standard error", "")
    return Measurement("trace", found.value, found.error, kind, found.converged, note=note)


@register(
    "hutchinson_trace",
    "Hessian trace by random probes",
    "The Hessian trace as most papers estimate it, with its standard error, also where it could be had exactly.",
    invariant_under=KEEPS_DISTANCES,
    changes_under=CHANGES_DISTANCES,
    cost_class="expensive",
    repair=("orbit_minimal_trace", "adaptive_trace"),
)
def hutchinson_trace(bench: Workbench) -> Measurement:
    r""":math:`\frac1k \sum_j z_j^\top H z_j` with random signs :math:`z_j`, Hutchinson's estimator, nothing deflated.

    It stops at a relative standard error of ``rtol`` or after ``max_probes``. Cost: 2 gradients a probe.
    """
    options = bench.options
    found = hessian_trace(
        bench.objective, rtol=options.rtol, method="hutchinson", max_products=options.max_probes, seed=bench.seed + 1
    )
    note = f"{found.probes} probes" if found.probes else "exact: there are no more parameters than probes"
    return Measurement("hutchinson_trace", found.value, found.error, "standard error", found.converged, note=note)


@register(
    "w_hessian_w",
    "w'Hw",
    "Curvature along the weight vector itself: second derivative of the loss in their common scale.",
    invariant_under=KEEPS_RAY,
    almost_under=NEARLY,
    changes_under=CHANGES_RAY,
    default=True,
)
def w_hessian_w(bench: Workbench) -> Measurement:
    r""":math:`w^\top H w`, invariant under every linear reparameterisation that preserves the function.

    Evaluated on a double-precision copy, because rounding inside the product is not seen from outside; the error is the
    rounding of that. Cost: 2 gradients.
    """
    precise = bench.precise
    return quadratic_form("w_hessian_w", precise, precise.hvp(precise.point()))


def quadratic_form(name: str, objective: Objective, image: Tensor) -> Measurement:
    """``w'(Aw)`` of a double-precision objective, with the rounding of the product."""
    w = objective.point()
    largest = float(image.abs().max()) or 1.0  # the squares of a tiny product would be zero
    error = objective.rounding * objective.n**0.5 * largest * float(w.norm() * (image / largest).norm())
    return Measurement(name, float(w @ image), error, "rounding", True)


@register(
    "adaptive_trace",
    "Hessian trace in relative units",
    "Sum of w_i^2 H_ii: the Hessian trace when every weight is measured in units of its own size.",
    invariant_under=KEEPS_RATIOS,
    almost_under=NEARLY,
    changes_under=CHANGES_RATIOS,
)
def adaptive_trace(bench: Workbench) -> Measurement:
    r""":math:`\sum_i w_i^2 H_{ii} = \mathrm{tr}(T H T)` with :math:`T = \mathrm{diag}|w|`.

    Exact for piecewise linear networks (:func:`flatminima.curvature.exact_diagonal`), else by Hutchinson's estimator on
    :math:`T H T` with a standard error; it is twice the second-order average-case adaptive sharpness times n / rho^2. Source:
    Kwon et al. (2021) for T; Tsuzuku et al. (2020) for the invariance. Cost: as many gradients as outputs; else 2 a probe.
    """
    diagonal = curvature_diagonal(bench)
    options = bench.options
    if isinstance(diagonal, Tensor):
        w = bench.precise.point()
        terms = w.cpu().square() * diagonal
        error = exact_rounding(bench) * float(terms.abs().sum())
        return Measurement("adaptive_trace", float(terms.sum()), error, "rounding", True, note="exact")
    operator = Relative(bench.objective)
    found = hessian_trace(operator, rtol=options.rtol, max_products=options.max_probes, seed=bench.seed + 1)
    return Measurement("adaptive_trace", found.value, found.error, "standard error", found.converged)


def curvature_diagonal(bench: Workbench) -> Tensor | str:
    """The exact diagonal of the Hessian ``(n,)`` in float64 on the CPU, or the reason why there is none; shared."""

    def make() -> Tensor | str:
        objective = bench.objective
        if objective.process_group is not None:
            return "the data are spread over several processes"
        reason = why_not(objective)
        if reason is not None:
            return reason
        try:
            return exact_diagonal(bench.precise).values
        except ObjectiveError as error:
            return str(error)

    return bench.shared("curvature diagonal", make)


def exact_diagonal_of(bench: Workbench) -> Tensor:
    """As :func:`curvature_diagonal`.

    Raises:
        NotApplicableError: there is none.
    """
    found = curvature_diagonal(bench)
    if isinstance(found, str):
        raise NotApplicableError(found)
    return found


def exact_rounding(bench: Workbench) -> float:
    """Relative rounding of the exact diagonal."""
    return 16 * max(torch.finfo(torch.float64).eps, bench.precise.pass_rounding)


class Relative(OfObjective):
    r"""The Hessian in units of the weights, :math:`T H T` with :math:`T = \mathrm{diag}|w|`. Cost: 2 gradients a column.

    Example:
        >>> w = torch.nn.Linear(2, 1, bias=False).double()
        >>> _ = w.weight.data.copy_(torch.tensor([[2.0, -1.0]]))
        >>> x = torch.tensor([[3.0, 0.0], [0.0, 1.0]]).double()
        >>> f = Objective(w, torch.nn.functional.mse_loss, (x, torch.zeros(2, 1).double()))   # H = diag(9, 1)
        >>> (Relative(f) @ torch.ones(2).double()).tolist()
        [36.0, 1.0]
    """

    def __init__(self, objective: Objective) -> None:
        super().__init__(objective)
        self.scale = objective.point().double().abs()[:, None]

    def _multiply(self, block: Tensor) -> Tensor:
        image = self.scale * self.objective.hvp((self.scale * block).to(self.dtype))
        return image.to(self.dtype)
