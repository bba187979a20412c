"""The trace, with an interval that contains it as often as it says.

Hutchinson (1990); deflation as in Gambhir, Stathopoulos and Orginos (2017); Hutch++ by Meyer, Musco, Musco and Woodruff (2021);
XTrace by Epperly, Tropp and Webber (2024).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import plotly.graph_objects as go
import torch

from flatminima.curvature.low_rank import grow_by_sketch, xtrace
from flatminima.curvature.probes import (
    LEAST,
    PILOT,
    Complement,
    Deflation,
    Lanczos,
    Pilot,
    Scatter,
    Work,
    grow,
    interval,
    random_signs,
    random_stream,
    relative,
    unit_images,
)
from flatminima.curvature.result import Progress, Result, number, probe_plot
from flatminima.objective import Objective
from flatminima.operators import GaussNewton, Hessian, Operator, as_operator

Method = Literal["auto", "hutchinson", "hutch++", "xtrace"]


@dataclass(frozen=True, kw_only=True)
class TraceResult(Result):
    """A trace and how far it can be trusted.

    Attributes:
        value: the estimate.
        error: its standard error, the rounding of the products included.
        interval: the 95 % interval.
        method: ``"exact"``, ``"hutchinson"``, ``"hutch++"`` or ``"xtrace"``.
        probes: random vectors behind the estimate.
        deflated: dimension of the subspace whose part is known and was not sampled.
        rtol: relative standard error asked for; ``converged`` means ``error <= rtol * |value|``.
        samples: the estimate of each probe.
    """

    value: float
    error: float
    interval: tuple[float, float]
    method: str
    probes: int
    deflated: int
    rtol: float
    samples: tuple[float, ...] = ()

    _bulk: ClassVar[frozenset[str]] = frozenset({"samples"})

    def _rows(self) -> Sequence[Sequence[str]]:
        low, high = self.interval
        return [
            ("trace", "standard error", "95 % low", "high", "method", "probes", "deflated"),
            (*map(number, (self.value, self.error, low, high)), self.method, str(self.probes), str(self.deflated)),
        ]

    def plot(self) -> go.Figure:
        """Every probe's own estimate, with the mean and its 95 % interval."""
        return probe_plot(self.samples, self.value, self.interval, "trace")


def trace(
    matrix: Objective | Operator,
    *,
    rtol: float = 0.01,
    method: Method = "auto",
    max_products: int | None = None,
    deflate: Deflation | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> TraceResult:
    r"""Trace of a symmetric matrix that is known through its products.

    .. math:: \mathrm{tr} A = \mathrm{tr}(Q^\top A Q) + \mathbb{E}_z\bigl[z^\top P A P z\bigr],\qquad P = I - QQ^\top

    with random signs :math:`z` and a subspace :math:`Q` that does not depend on them. The standard error comes from the
    scatter of all entries of :math:`z \odot PAPz` (see :mod:`flatminima.curvature.probes`), not from that of their few sums,
    which makes the interval right when probing stops at the error asked for, after few probes.

    The methods differ in :math:`Q`:

    - ``"hutchinson"``: the basis of ``deflate``, else none.
    - ``"auto"``: exact for the Hessian and the Gauss-Newton matrix of piecewise linear networks
      (:func:`~flatminima.curvature.piecewise_linear.exact_trace`). For others as ``"hutchinson"``; then, if a pilot of 4 probes
      predicts that more than 32 are needed, a Lanczos basis is added for as long as a product spent on it saves more than one
      probe.
    - ``"hutch++"``: a sketch of the range, about as many vectors as probes, two products each.
    - ``"xtrace"``: every probe serves for the sketch of all others, two products each. Its error is the one its authors give,
      and too small.
      It keeps three vectors of double precision a probe.

    Whenever the matrix has no more rows than probes would be needed, the diagonal is read off exactly instead.

    Args:
        matrix: an objective (its Hessian) or an operator, ``(n, n)``.
        rtol: relative standard error asked for.
        method: see above.
        max_products: give up there, with ``converged=False``; 1000 by default. A trace near zero is not resolved to any
            relative accuracy, and ends here.
        deflate: an :class:`~flatminima.curvature.lanczos.EigenResult` of the same matrix. Its products are not counted again.
        seed: of the random signs.
        progress: called with the products so far and the relative error (infinite while unknown).

    Returns:
        The trace in units of the matrix, its error and interval.

    Raises:
        ValueError: a bad argument, or ``deflate`` of another matrix; before any product.
        FloatingPointError: a product is not finite.

    Cost: one product each, 2 gradients for a Hessian. Memory: the subspace in double precision, and about eight vectors in the
    precision of the products.

    Example:
        >>> from flatminima.operators import Dense
        >>> found = trace(Dense(torch.diag(torch.arange(100.0))))
        >>> found.value, found.converged, found.probes
        (4950.0, True, 8)
    """
    op = as_operator(matrix)
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(get_args(Method))}, got {method!r}")
    work = Work(op, rtol, max_products, progress)
    part = Complement(op, deflate)
    if method == "auto" and (exact := _piecewise_linear(op)) is not None:
        return replace(exact, rtol=rtol)
    if part.rank >= op.n:
        return _result(work, part.trace, 0.0, math.inf, abs(part.trace), "exact", seed, part=part)
    if op.n <= min(2 * LEAST, work.limit):
        return _exact(work, seed)
    if method == "xtrace":
        found = xtrace(part, work, random_stream(seed, "xtrace"))
        scale = math.hypot(found.scale, found.value)
        count = len(found.estimates)
        return _result(
            work, found.value, found.error, count - 1 if count > 1 else math.inf, scale, "xtrace", seed, part=part,
            samples=found.estimates,
        )  # fmt: skip
    return _hutchinson(work, part, method, seed)


def _piecewise_linear(op: Operator) -> TraceResult | None:
    from flatminima.curvature.piecewise_linear import trace_if_exact  # which returns this module's result

    if not isinstance(op, Hessian | GaussNewton) or op.theta is not None:
        return None
    return trace_if_exact(op.objective)


def _hutchinson(work: Work, part: Complement, method: Method, seed: int) -> TraceResult:
    op = work.op
    stream = random_stream(seed, "probes")
    pilot = Pilot(part, work, min(PILOT, work.limit), stream)
    scatter = pilot.scatter(op)
    # A trace near zero would ask for any number of probes; more than ten times what may be spent need not be told apart.
    finest = math.sqrt(scatter.variance / (10 * work.limit))

    def needed(chain: Lanczos | None = None) -> float:
        seen = pilot.scatter(op)
        value = part.trace + (math.fsum(chain.diagonal) if chain else 0.0) + seen.value
        goal = max(work.rtol * abs(value), finest)
        return _probes(seen.variance, goal) if goal else 0.0

    known = part.rank
    if method == "hutch++":
        grow_by_sketch(part, pilot, work, needed, random_stream(seed, "sketch"))
    elif method == "auto" and (before := needed()) > 4 * LEAST:
        grow(part, pilot, work, needed, random_stream(seed, "lanczos"), before)
    if part.rank > known:
        scatter = Scatter(op)
    pilot.release()
    if scatter.count < LEAST:
        _probe(work, part, scatter, min(LEAST - scatter.count, work.left), stream)
    scale = scatter.image_norm
    while True:
        value, variance = part.trace + scatter.value, scatter.variance
        error = math.sqrt(variance / scatter.count)
        work.tell(relative(error, value))
        goal = work.rtol * abs(value)
        floor = op.rounding * math.hypot(scale, value)
        if error <= math.sqrt(max(goal**2 - floor**2, 0.0)) or error <= floor / 2 or work.left < 1:
            break
        planned = math.ceil(_probes(variance, goal)) if goal > error / 1e6 else math.inf
        more = max(1, planned - scatter.count)
        if op.n <= min(more, work.left):
            return _exact(work, seed)
        _probe(work, part, scatter, int(min(more, work.left)), stream)
    name = "hutch++" if method == "hutch++" else "hutchinson"
    return _result(
        work, value, error, scatter.freedom, math.hypot(scale, value), name, seed, part=part,
        samples=[part.trace + x for x in scatter.samples],
    )  # fmt: skip


def _probes(variance: float, goal: float) -> float:
    """Probes that reach a standard error; the square of a tiny goal would be zero."""
    ratio = math.sqrt(variance) / goal
    return ratio * ratio


def _probe(work: Work, part: Complement, scatter: Scatter, count: int, stream: torch.Generator) -> None:
    op = work.op
    for size in work.blocks(count):
        drawn = [random_signs(op.n, stream, op.device).double() for _ in range(size)]
        image = part @ torch.stack(drawn, dim=1)
        for i, signs in enumerate(drawn):
            scatter.add(signs, image[:, i])
        value = part.trace + scatter.value
        work.tell(relative(math.sqrt(scatter.variance / scatter.count), value) if scatter.count > 1 else math.inf)


def _exact(work: Work, seed: int) -> TraceResult:
    """The diagonal read off with unit vectors, ``n`` products."""
    diagonal: list[float] = []
    squares = 0.0
    for rows, image in unit_images(work):
        diagonal += image[rows, torch.arange(len(rows), device=image.device)].tolist()
        squares += float(image.square().sum())
    value = math.fsum(diagonal)
    return _result(work, value, 0.0, math.inf, math.hypot(math.sqrt(squares), value), "exact", seed)


def _result(
    work: Work,
    value: float,
    error: float,
    freedom: float,
    scale: float,
    method: str,
    seed: int,
    *,
    part: Complement | None = None,
    samples: Sequence[float] = (),
) -> TraceResult:
    rounding = work.op.rounding * scale
    total = math.hypot(error, rounding)
    low, high = interval(value, error, freedom)
    half = math.hypot(high - value, interval(0.0, rounding)[1])
    converged = total <= work.rtol * abs(value)
    notes = list(work.op.notes)
    if method == "xtrace" and error:
        notes.append(
            "the estimates of XTrace depend on each other, so its 95 % interval is too short (it held the truth in 78 to 94 % "
            "of trials); method='auto' has one that holds"
        )
    if not converged and rounding >= total / 2:
        notes.append(
            f"rtol={number(work.rtol)} is out of reach: the rounding of the products alone is {number(rounding)}; "
            + (
                "the second derivatives of so small a loss are lost to it"
                if work.op.dtype == torch.float64
                else "use products of higher precision"
            )
        )
    elif not converged:
        notes.append(
            f"stopped after {work.products} products at a relative error of {number(relative(total, value))}; "
            + ("the trace is not told from zero" if low <= 0 <= high else "raise max_products or rtol")
        )
    work.tell(relative(total, value))
    return TraceResult(
        value=value, error=total, interval=(value - half, value + half), method=method, probes=len(samples),
        deflated=part.rank if part else 0, rtol=work.rtol, samples=tuple(samples), converged=converged,
        products=work.products, gradient_equivalents=work.gradient_equivalents, seed=seed, notes=tuple(notes),
    )  # fmt: skip
