"""Judge: which numbers survive a change of coordinates that changes no prediction.

A measure is evaluated at the network and at random members of its function-preserving reparameterisations. Members are proved
first, in double precision; a measure that moves by more than its own error says something about the coordinates, not about
the function.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flatminima.measures import MEASURES, Measurement, MeasureOptions, measure
from flatminima.measures.base import resolve
from flatminima.objective import LossFn, Objective, ObjectiveError, batches
from flatminima.symmetries import find_symmetries, prove

# Numbers that must agree exactly are compared with this relative slack for double-precision rounding.
_ROUNDING = 1e-6
RESOLVED = 2.0  # a measure whose error hides a change by this factor has not been shown to survive
_KINDS = ("relu-layer-rescaling", "relu-unit-rescaling")  # the kinds whose members are measured
_PROBE_ROWS = 64  # of the first batch, to find the symmetries
_PROOF_ROWS = 1024  # of the first batch, to prove every member


@dataclass(frozen=True)
class Change:
    """How one measure moved over the members of one symmetry.

    Attributes:
        measure: its name.
        symmetry: kind of reparameterisation.
        values: the measure at each member.
        max_ratio: largest ``max(|new/old|, |old/new|)``; infinite when the sign changes or a value vanishes.
        significant: whether any member moved it by more than three combined errors.
    """

    measure: str
    symmetry: str
    values: tuple[float, ...]
    max_ratio: float
    significant: bool


@dataclass(frozen=True)
class AuditReport:
    """Result of :func:`audit`; prints as a table.

    Attributes:
        measurements: the measures at the network itself.
        changes: one entry per measure and symmetry.
        proofs: symmetry -> largest relative change of an output over its members, in double precision.
        rejected: ``(site, reason)`` of what was looked at and refused.
        members: random members per symmetry.
    """

    measurements: dict[str, Measurement]
    changes: tuple[Change, ...]
    proofs: dict[str, float]
    rejected: tuple[tuple[str, str], ...]
    members: int

    @property
    def verdicts(self) -> dict[str, str]:
        """Measure -> "survives", "changes up to x...", "undecided: ...", "does not apply", or "not tested" without symmetry."""
        return {name: self._verdict(name) for name in self.measurements}

    def max_ratio(self) -> dict[str, dict[str, float]]:
        """Measure -> symmetry -> largest change factor."""
        table: dict[str, dict[str, float]] = {name: {} for name in self.measurements}
        for change in self.changes:
            table[change.measure][change.symmetry] = change.max_ratio
        return table

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        ratios: dict[str, dict[str, Any]] = {name: {} for name in self.measurements}
        for c in self.changes:
            ratios[c.measure][c.symmetry] = {
                "max_ratio": c.max_ratio,
                "values": list(c.values),
                "significant": c.significant,
            }
        return {
            "measurements": {name: vars(m) for name, m in self.measurements.items()},
            "changes": ratios,
            "verdict": self.verdicts,
            "proofs": self.proofs,
            "rejected": [list(pair) for pair in self.rejected],
            "members": self.members,
        }

    def __str__(self) -> str:
        kinds = list(self.proofs)
        head = ["measure", "value", "error", *kinds, "verdict"]
        ratios = self.max_ratio()
        rows = [
            [
                name,
                f"{m.value:.4g}",
                "" if m.error is None else f"{m.error:.1g}",
                *[f"x{ratios[name][kind]:.4g}" if kind in ratios[name] else "" for kind in kinds],
                self.verdicts[name],
            ]
            for name, m in self.measurements.items()
        ]
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]
        ]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])

    def _verdict(self, name: str) -> str:
        mine = [c for c in self.changes if c.measure == name]
        if not self.measurements[name].applies:
            return "does not apply"
        if not mine:
            return "not tested"
        moved = [c for c in mine if c.significant]
        if not moved:
            widest = max(c.max_ratio for c in mine)
            return "survives" if widest < RESOLVED else f"undecided: x{widest:.3g} is within its error"
        worst = max(c.max_ratio for c in moved)
        factor = "sign changes" if math.isinf(worst) else f"changes up to x{worst:.3g}"
        broken = [c.symmetry for c in moved if c.symmetry in MEASURES[name].invariant_under]
        return factor + (f" although declared invariant under {', '.join(broken)}" if broken else "")


def audit(
    model: nn.Module,
    loss_fn: LossFn,
    data: tuple[Any, Any] | Iterable[Any],
    *,
    measures: Iterable[str] | None = None,
    members: int = 5,
    max_scale: float = 20.0,
    options: MeasureOptions | None = None,
    seed: int = 0,
) -> AuditReport:
    r"""Evaluate measures along the function-preserving reparameterisations of a model.

    For each kind of symmetry found, ``members`` random maps :math:`\theta \mapsto D\theta` with log-uniform scales in
    ``[1/max_scale, max_scale]`` are applied to double-precision copies of the model, proved to leave the outputs alone, and
    measured with the same random draws. The model itself is not touched.

    Args:
        model: any module.
        loss_fn: mean loss over the rows.
        data: one ``(x, y)`` pair or an iterable of pairs, as for :class:`~flatminima.Objective`; inputs are one tensor each.
        measures: names or groups of names; the default ones by default.
        members: random members per symmetry.
        max_scale: largest scale factor.
        options: radii and accuracies of the measures.
        seed: of the members and of the measures.

    Raises:
        ValueError: unknown measure, fewer than one member, ``max_scale`` not finite and above 1.

    Cost: the measures, times one plus ``members`` times the number of symmetries.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> x, y = torch.randn(8, 2), torch.randint(0, 2, (8,))
        >>> report = audit(net, nn.functional.cross_entropy, (x, y), measures=["w_hessian_w", "parameter_norm"], members=2)
        >>> report.verdicts["w_hessian_w"]
        'survives'
    """
    if members < 1:
        raise ValueError(f"members must be at least 1, got {members}")
    if not (math.isfinite(max_scale) and max_scale > 1):
        raise ValueError(f"max_scale must be finite and above 1, got {max_scale}")
    names = [m.name for m in resolve(measures)]
    pairs = [(_double(x), _double(y)) for x, y in batches(data)]
    original = copy.deepcopy(model).double()
    # The one construction that checks the function; its copies below are the same function in other coordinates.
    Objective(original, loss_fn, pairs)
    base = _measure(original, loss_fn, pairs, names, options, seed)
    tested = [name for name in names if base[name].applies]
    inputs = pairs[0][0]
    search = find_symmetries(original, inputs[:_PROBE_ROWS], kinds=_KINDS)
    generator = torch.Generator().manual_seed(seed)
    changes: list[Change] = []
    proofs: dict[str, float] = {}
    for symmetry in search.found:
        measured: list[dict[str, Measurement]] = []
        worst = 0.0
        for _ in range(members):
            member = symmetry.member(generator, max_scale)
            proof = prove(original, member, inputs[:_PROOF_ROWS])
            if not proof.preserved:
                raise RuntimeError(
                    f"{symmetry.kind} was found in this model, but a member changes its outputs by {proof.max_change:.2g} "
                    "(relative); the audit would be meaningless. Lower max_scale if the outputs are ill-conditioned"
                )
            worst = max(worst, proof.max_change)
            measured.append(_measure(member.apply(original), loss_fn, pairs, tested, options, seed))
        proofs[symmetry.kind] = worst
        changes += [_change(name, symmetry.kind, base[name], [m[name] for m in measured]) for name in tested]
    return AuditReport(base, tuple(changes), proofs, tuple(search.rejected), members)


def _measure(
    model: nn.Module,
    loss_fn: LossFn,
    data: list[tuple[Any, Any]],
    names: list[str],
    options: MeasureOptions | None,
    seed: int,
) -> dict[str, Measurement]:
    return measure(Objective(model, loss_fn, data, check=False), names, options=options, seed=seed)


def _change(name: str, kind: str, base: Measurement, moved: list[Measurement]) -> Change:
    significant = False
    worst = 1.0
    for m in moved:
        if m.value == base.value:  # both may be zero, or infinite
            continue
        ratio = m.value / base.value if base.value else math.inf
        worst = max(worst, math.inf if ratio <= 0 else max(ratio, 1 / ratio))
        error = math.hypot(_known_error(m), _known_error(base))
        slack = 3 * error + _ROUNDING * max(abs(base.value), abs(m.value))
        significant |= not (math.isfinite(slack) and abs(m.value - base.value) <= slack)
    return Change(name, kind, tuple(m.value for m in moved), worst, significant)


def _known_error(m: Measurement) -> float:
    # The spread of two ascents is no error of the maximum, and the ascents themselves are deterministic.
    return 0.0 if m.error is None or m.error_kind.startswith("lower bound") else m.error


def _double(value: Any) -> Any:
    if not isinstance(value, Tensor):
        raise ObjectiveError(f"an audit needs batches of two tensors, (inputs, targets); got a {type(value).__name__}")
    return value.double() if value.is_floating_point() else value
