r"""What a diagonal symmetry must do to the Hessian trace, predicted from the network itself.

Under :math:`\theta' = D\theta` with :math:`f(D\theta) = f(\theta)` for all :math:`\theta`, :math:`H' = D^{-\top} H D^{-1}`.
For a diagonal :math:`D`

.. math:: \mathrm{tr} H' = \sum_k H_{kk} / d_k^2 ,

so the part of the trace that lies in weights divided by :math:`\beta` grows by :math:`\beta^2`: for one layer scale
:math:`\mathrm{tr} H' = a/\beta^2 + b\,\beta^2 + c`, and a large inflation is :math:`\beta^2` times the share
:math:`b/\mathrm{tr} H`. A factor without its scale and its share says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flatminima.audit.bench import Bench
from flatminima.audit.judge import ERRORS, ROUNDING, error_of
from flatminima.audit.orbit import Orbit
from flatminima.curvature.piecewise_linear import exact_diagonal, why_not
from flatminima.curvature.probes import random_signs, random_stream
from flatminima.measures import Measurement
from flatminima.objective import Objective, ObjectiveError

_LIMIT = 5 * 10**7  # numbers that all scales of all members may take together


@dataclass(frozen=True)
class Part:
    """The curvature of one parameter tensor under one member.

    Attributes:
        name: of the tensor.
        share: of the trace at the network itself.
        factor: by which it changes: ``1/d^2`` where all of it is multiplied by *d*, else the mean of that over its diagonal.
        scale: the *d* if it is one number, else ``None``.
    """

    name: str
    share: float
    factor: float
    scale: float | None


@dataclass(frozen=True)
class TraceLaw:
    """The Hessian trace of every member of one diagonal symmetry, predicted and measured.

    Attributes:
        symmetry: its kind.
        trace: at the network itself.
        predicted: at each member.
        predicted_errors: rounding, or standard errors where the diagonal is sampled.
        measured: at each member, by measuring there; NaN where it was not.
        measured_errors: of these.
        exact: whether the diagonal is exact.
        most: the member whose trace changes most.
        parts: the parameters that this member changes, the largest part of its trace first.
        growing: share of the trace in weights that it makes smaller, whose curvature grows.
    """

    symmetry: str
    trace: float
    predicted: tuple[float, ...]
    predicted_errors: tuple[float, ...]
    measured: tuple[float, ...]
    measured_errors: tuple[float, ...]
    exact: bool
    most: int
    parts: tuple[Part, ...]
    growing: float

    @property
    def agrees(self) -> bool:
        """Whether every measured trace is the predicted one within three combined errors."""
        rows = zip(self.predicted, self.predicted_errors, self.measured, self.measured_errors, strict=True)
        return all(
            abs(p - m) <= ERRORS * math.hypot(e, s) + ROUNDING * max(abs(p), abs(m))
            for p, e, m, s in rows
            if math.isfinite(m)
        )

    @property
    def factor(self) -> float:
        """By which the trace of the member that changes most does so."""
        return self.predicted[self.most] / self.trace if self.trace else math.inf


def trace_laws(
    bench: Bench, orbits: Sequence[Orbit], measured: dict[str, list[Measurement]]
) -> tuple[tuple[TraceLaw, ...], str]:
    """The law of every diagonal symmetry among the orbits, and a note where there is none.

    Args:
        bench: the network.
        orbits: whose members were measured.
        measured: kind -> the trace at its members; may be shorter than the orbit.

    Cost: that of the exact diagonal; where there is none, ``max_probes`` Hessian products for all members of all orbits.
    """
    objective = bench.objective
    diagonal = [
        (orbit, measured[orbit.kind]) for orbit in orbits if orbit.kind in measured and _is_diagonal(bench, orbit)
    ]
    count = sum(len(values) for _, values in diagonal)
    if not count:
        return (), ""
    if count * objective.n > _LIMIT:
        return (), f"the trace was not predicted: {count} members of {objective.n:,} scales each are too many to keep"
    weights = [[_scales(bench, orbit, i).pow(-2) for i in range(len(values))] for orbit, values in diagonal]
    flat = torch.stack([w for row in weights for w in row])
    with bench.lifted():
        samples, diag, exact = _sampled(objective, flat, bench.options.max_probes, bench.seed)
    laws, start = [], 0
    for orbit, values in diagonal:
        own = samples[:, start : start + len(values)]
        laws.append(_law(objective, orbit, values, own, samples[:, -1], diag, flat[start : start + len(values)], exact))
        start += len(values)
    return tuple(laws), ""


def _is_diagonal(bench: Bench, orbit: Orbit) -> bool:
    """Whether the maps are linear with a diagonal matrix: they then do to any vector what they do to its entries."""
    if not orbit.symmetry.linear or orbit.symmetry.orthogonal or not orbit.function_preserving or not orbit.members:
        return False
    member, n = orbit.member(0), sum(p.numel() for p in bench.model.parameters())
    vector = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    both = member.linear_part(bench.model, torch.stack([torch.ones(n, dtype=torch.float64), vector], 1))
    return torch.allclose(both[:, 1], both[:, 0] * vector, rtol=1e-9, atol=0.0)


def _scales(bench: Bench, orbit: Orbit, index: int) -> Tensor:
    """The diagonal of a member, for the parameters of the objective, ``(n,)``."""
    parameters = dict(bench.model.named_parameters())
    sizes = [p.numel() for p in parameters.values()]
    d = orbit.member(index).linear_part(bench.model, torch.ones(sum(sizes), dtype=torch.float64))
    parts = dict(zip(parameters, d.split(sizes), strict=True))
    return torch.cat([parts[name] for name in bench.objective.parameter_names])


def _sampled(objective: Objective, weights: Tensor, probes: int, seed: int) -> tuple[Tensor, Tensor, bool]:
    """Samples of ``sum_k w_k H_kk`` for every row of weights and, last, for ones; the mean diagonal; whether it is exact."""
    if why_not(objective) is None:
        try:
            h = exact_diagonal(objective).values
        except ObjectiveError:  # the loss is no mean over rows
            pass
        else:
            return torch.cat([weights @ h, h.sum()[None]])[None], h, True
    stream = random_stream(seed, "law of the trace")
    rows, total = [], torch.zeros(objective.n, dtype=torch.float64)
    for _ in range(probes):
        signs = random_signs(objective.n, stream, objective.device).double()
        h = (signs * objective.hvp(signs)).double().cpu()
        rows.append(torch.cat([weights @ h, h.sum()[None]]))
        total += h
    objective.release()
    return torch.stack(rows), total / probes, False


def _law(
    objective: Objective,
    orbit: Orbit,
    measured: Sequence[Measurement],
    samples: Tensor,
    own: Tensor,
    diag: Tensor,
    weights: Tensor,
    exact: bool,
) -> TraceLaw:
    predicted = samples.mean(0)
    rounding = objective.rounding * (weights @ diag.abs())
    errors = rounding if exact else samples.std(0) / math.sqrt(len(samples))
    trace = float(own.mean())
    changes = [max(abs(p / trace), abs(trace / p)) if p * trace > 0 else math.inf for p in predicted.tolist()]
    most = changes.index(max(changes))
    resolved = exact or (
        abs(trace) > ERRORS * float(own.std()) / math.sqrt(len(own))
        and abs(float(predicted[most])) > ERRORS * float(errors[most])
    )
    parts = _parts(objective, diag, weights[most], trace) if resolved and trace else ()
    growing = float(diag[weights[most] > 1].sum()) / trace if resolved and trace else math.nan
    return TraceLaw(
        orbit.kind, trace, tuple(predicted.tolist()), tuple(errors.tolist()), tuple(m.value for m in measured),
        tuple(error_of(m) for m in measured), exact, most, parts, growing,
    )  # fmt: skip


def _parts(objective: Objective, diag: Tensor, weights: Tensor, trace: float) -> tuple[Part, ...]:
    """The parameters by their part of the member's trace; those that it leaves alone are not among them."""
    found = []
    blocks = zip(objective.split(diag).items(), objective.split(weights).values(), strict=True)
    for (name, h), w in blocks:
        own, moved = float(h.sum()), float((h * w).sum())
        if bool((w != 1).any()) and own:
            uniform = bool(torch.allclose(w, w.flatten()[0].expand_as(w), rtol=1e-12))
            found.append(
                (moved, Part(name, own / trace, moved / own, float(w.flatten()[0]) ** -0.5 if uniform else None))
            )
    return tuple(part for _, part in sorted(found, key=lambda item: -abs(item[0])))
