r"""Orbit-minimal trace: the smallest Hessian trace among all rescalings of single units, which is the same for all of them.

A unit of a piecewise linear network can be written :math:`d` times larger if what reads it is divided by :math:`d`; the
diagonal of the Hessian then changes by :math:`d^{-2}` and :math:`d^2`. The trace along the orbit is a sum of products of
powers of the scales, whose infimum is a property of the orbit, not of the point on it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_matrix, csr_matrix
from torch import Tensor

from flatminima.batches import cut_rows
from flatminima.curvature.piecewise_linear import exact_diagonal, why_not
from flatminima.measures.balancing import balance
from flatminima.measures.base import Measurement, NotApplicableError, Workbench, register
from flatminima.measures.hessian import exact_diagonal_of, exact_rounding
from flatminima.measures.invariance import NEARLY
from flatminima.objective import Objective
from flatminima.symmetries import Rescaling, find_symmetries

_PROOF_ROWS = 16
_KINDS = ("relu-unit-rescaling", "norm-gain-rescaling")


@dataclass(frozen=True)
class OrbitMinimum:
    """The infimum of the trace over an orbit.

    Attributes:
        value: the infimum, to within ``gap`` below.
        gap: bound on its error from the optimisation, by weak duality; the rounding of the diagonal comes on top.
        trace: at the network itself.
        scales: site -> scales ``(units,)`` that approach the infimum.
        attained: whether some scales attain it; otherwise units die on the way (their scale goes to zero or infinity).
        refused: places where units cannot be rescaled, with the reason; they keep the scale they have.
    """

    value: float
    gap: float
    trace: float
    scales: dict[str, Tensor]
    attained: bool
    refused: tuple[tuple[str, str], ...]


def orbit_minimum(objective: Objective, diagonal: Tensor | None = None) -> OrbitMinimum:
    r"""Smallest trace of the Hessian over the scales of all units that can be rescaled.

    .. math:: \inf_d \sum_k h_k \Bigl(\frac{d_{in}(k)}{d_{out}(k)}\Bigr)^2, \qquad h = \mathrm{diag}(H) \ge 0

    where weight *k* is read from a unit with scale :math:`d_{in}` and writes one with scale :math:`d_{out}` (1 at inputs,
    outputs and wherever nothing can be rescaled). For one hidden layer that is :math:`c + 2\sum_u\sqrt{A_u B_u}` with
    :math:`A_u` the sum of :math:`h` over what writes unit *u*, :math:`B_u` over what reads it. In general it is a
    geometric programme, solved to rounding by Newton's method with a bound from its dual
    (:mod:`~flatminima.measures.balancing`).

    Args:
        objective: of a piecewise linear network; its units are found by :func:`~flatminima.symmetries.find_symmetries`.
        diagonal: of its Hessian ``(n,)``, if it is at hand.

    Raises:
        NotApplicableError: the network is not affine in each weight, tied weights among the reasons, or the loss is not
            convex in the outputs.

    Cost: that of the exact diagonal, about as many gradients as there are outputs; the optimisation needs none.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.ReLU(), torch.nn.Linear(1, 1, bias=False))
        >>> for layer, w in ((net[0], 4.0), (net[2], 0.5)):
        ...     _ = torch.nn.init.constant_(layer.weight, w)
        >>> f = Objective(net.double(), lambda out, y: out.square().mean() / 2, (torch.ones(1, 1).double(), torch.zeros(1)))
        >>> found = orbit_minimum(f)                      # H_11 = 0.5^2, H_22 = 4^2; 2 sqrt(4) on the whole orbit
        >>> round(found.trace, 9), round(found.value, 9)
        (16.25, 4.0)
    """
    reason = why_not(objective)
    if reason is not None:
        raise NotApplicableError(reason)
    h = (exact_diagonal(objective).values if diagonal is None else diagonal).double().cpu()
    if bool((h < -1e-12 * h.abs().max()).any()):
        raise NotApplicableError(
            "the diagonal of the Hessian has negative entries: the loss is not convex in the outputs"
        )
    sites, refused = _sites(objective)
    found = balance(_coefficients(objective, h.clamp(min=0), sites))
    scales, first = {}, 1
    for site in sites:
        own = torch.from_numpy(found.x[first : first + site.units] - found.x[0])
        scales[site.name], first = own.exp(), first + site.units
    return OrbitMinimum(found.value, found.gap, float(h.sum()), scales, found.attained, refused)


def _sites(objective: Objective) -> tuple[tuple[Rescaling, ...], tuple[tuple[str, str], ...]]:
    """Where units can be rescaled, proved on a few rows; and where not."""
    _, piece, _ = next(iter(objective._shares()))
    few = cut_rows(piece.inputs, piece.rows, slice(0, _PROOF_ROWS))
    search = find_symmetries(objective.model, few, kinds=_KINDS, mode=objective.mode)
    sites: list[Rescaling] = []
    scaled: set[tuple[str, float]] = set()
    for place in (place for symmetry in search.found for place in symmetry.places):
        assert isinstance(place, Rescaling)
        roles = {(entries.name, entries.power) for entries in place.entries}
        if not roles & scaled:  # batch norm before a ReLU is a site of both kinds
            sites.append(place)
            scaled |= roles
    return tuple(sites), search.rejected


def _coefficients(objective: Objective, h: Tensor, sites: tuple[Rescaling, ...]) -> csr_matrix:
    """Entry ``(v, u)``: the diagonal summed over weights that read unit *v* and write unit *u*; 0 is what has no scale."""
    reads: dict[str, Tensor] = {}
    writes: dict[str, Tensor] = {}
    first = 1
    for site in sites:
        for entries in site.entries:
            role = {1.0: writes, -1.0: reads}.get(entries.power)
            if role is None or entries.name in role:
                raise NotApplicableError(f"the units of {site.name} do not scale {entries.name} once, by d or 1/d")
            role[entries.name] = torch.where(entries.unit >= 0, entries.unit + first, 0)
        first += site.units
    rows, columns, values = [], [], []
    zero = torch.zeros((), dtype=torch.int64)
    for name, part in objective.split(h).items():
        read, written, part = _reduced(reads.get(name, zero), writes.get(name, zero), part.cpu())
        rows.append(read.reshape(-1).numpy())
        columns.append(written.reshape(-1).numpy())
        values.append(part.reshape(-1).numpy())
    coordinates: tuple[NDArray[np.int64], NDArray[np.int64]] = (np.concatenate(rows), np.concatenate(columns))
    found = coo_matrix((np.concatenate(values), coordinates), (first, first))
    return csr_matrix(found)


def _reduced(read: Tensor, written: Tensor, part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three in one shape, with the diagonal summed over the axes along which both units are the same."""
    dims = part.dim()
    read, written = (u.reshape((1,) * (dims - u.dim()) + tuple(u.shape)) for u in (read, written))
    same = [d for d in range(dims) if read.shape[d] == 1 and written.shape[d] == 1]
    if same:
        part = part.sum(same, keepdim=True)
    return read.expand(part.shape), written.expand(part.shape), part


def _why_not(objective: Objective) -> str | None:
    if objective.process_group is not None:
        return "the data are spread over several processes"
    return why_not(objective)


@register(
    "orbit_minimal_trace",
    "orbit-minimal trace",
    "Smallest Hessian trace that rescaling single units can reach: one number for all rescaled copies of a network.",
    invariant_under=frozenset(
        {
            "unit-permutation",
            "relu-layer-rescaling",
            "relu-unit-rescaling",
            "norm-gain-rescaling",
            "layernorm-shift",
            "softmax-shift",
            "dead-unit",
        }
    ),
    changes_under=NEARLY | {"residual-stream", "duplicate-unit", "temperature"},
    applies=_why_not,
)
def orbit_minimal_trace(bench: Workbench) -> Measurement:
    """The infimum of the trace over the scales of all units, with a duality gap; see :func:`orbit_minimum`.

    The error is the gap plus the rounding of the diagonal. Cost: about as many gradients as outputs, shared with
    the trace in relative units.
    """
    diagonal = exact_diagonal_of(bench)
    found = orbit_minimum(bench.precise, diagonal)
    error = found.gap + exact_rounding(bench) * found.value
    units = sum(len(scales) for scales in found.scales.values())
    note = f"over the scales of {units} units; the trace itself is {found.trace:.6g}"
    if found.refused:
        note += "; not rescaled: " + "; ".join(f"{site} ({reason})" for site, reason in found.refused)
    converged = error <= 1e-6 * found.value or found.value == 0
    return Measurement("orbit_minimal_trace", found.value, error, "duality gap", converged, note=note)
