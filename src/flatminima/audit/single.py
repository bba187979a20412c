"""The audit of one minimum: measures, evaluated along the symmetries of a network."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from flatminima.audit.bench import Bench
from flatminima.audit.judge import Change, judge
from flatminima.audit.law import trace_laws
from flatminima.audit.orbit import Orbit, find_orbits, keeps_outputs, left_out, loss_change
from flatminima.audit.repair import with_repairs
from flatminima.audit.report import AuditReport
from flatminima.measures import MEASURES, Measurement, MeasureOptions, resolve, unseen
from flatminima.measures.invariance import FUNCTION_PRESERVING, NEARLY
from flatminima.names import unknown
from flatminima.objective import LossFn
from flatminima.symmetries import KINDS, Symmetry

#: One ascent, from the gradient: a random start is not carried along by a permutation, so that it would move by itself.
DEFAULT_OPTIONS = MeasureOptions(ascent_starts=1, max_probes=40, draws=32)

Progress = Callable[[str, int, int], None]


def audit(
    model: nn.Module,
    loss_fn: LossFn | None,
    data: Any,
    *,
    measures: Iterable[str] | None = None,
    kinds: Iterable[str] | None = None,
    members: int = 5,
    checks: int = 2,
    max_scale: float = 20.0,
    options: MeasureOptions | None = None,
    mode: str = "eval",
    probes: Any = None,
    hints: Iterable[Symmetry] = (),
    laws: bool = True,
    budget: int | None = None,
    seed: int = 0,
    progress: Progress = lambda what, done, total: None,
) -> AuditReport:
    r"""Evaluate measures along the symmetries of a network: which of them are statements about its function?

    Every kind of symmetry that the network admits is found and proved (:func:`~flatminima.symmetries.find_symmetries`). For
    each, random maps :math:`\theta \mapsto D\theta + t` with scales log-uniform in ``[1/max_scale, max_scale]`` are applied to
    double-precision copies, proved to leave the outputs alone, and measured with the same random draws. What a measure
    does there is compared with what it declares. The model itself is not touched.

    Args:
        model: any module.
        loss_fn: mean loss over the rows; ``None`` where the model computes it (Hugging Face, batches with labels).
        data: as for :class:`~flatminima.Objective`: ``(inputs, targets)``, dictionaries, or an iterable of such batches.
        measures: names or groups of names; by default the default ones, what would be used instead of them, and with probes
            those that look at them.
        kinds: of symmetry to look for (:data:`~flatminima.symmetries.KINDS`); all by default.
        members: random members of each kind, for measures that change under it or say nothing.
        checks: how many of these are measured for what is declared invariant under the kind, which only has to be checked, and
            of kinds that keep no more than probabilities or predictions.
        max_scale: size of the maps, see :meth:`Symmetry.member`.
        options: radii and accuracies of the measures; :data:`DEFAULT_OPTIONS` by default, with one start of each ascent.
        mode: ``"eval"``, or ``"train"`` for batch statistics.
        probes: unlabelled inputs, as the model takes them, for the pair proxy and the activation patterns.
        hints: symmetries that you know of; proved like all others.
        laws: whether to predict the Hessian trace of members of diagonal kinds (:class:`TraceLaw`).
        budget: most members in all kinds together; kinds then get fewer than ``members``, and each at least one.
        seed: of the members and of the measures. A member depends on the seed, its kind and its number alone.
        progress: called with what is at work, and the number of members measured so far and in all.

    Returns:
        An :class:`AuditReport`. A model that cannot be followed, or has no symmetry, gives measures that are "not tested".

    Raises:
        ValueError: unknown measure or kind, ``members`` or ``checks`` below 1, ``max_scale`` not finite and above 1.
        ObjectiveError: data without targets, or no function that can be measured.
        NonFiniteLossError: the loss is NaN or infinite; the batch is named.

    Cost: the measures, times one plus, for each kind, ``checks`` (declared invariant) or ``members`` (others).

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> x, y = torch.randn(8, 2), torch.randint(0, 2, (8,))
        >>> report = audit(net, nn.functional.cross_entropy, (x, y), measures=["w_hessian_w", "parameter_norm"], members=2)
        >>> report.verdicts
        {'w_hessian_w': 'invariant', 'parameter_norm': 'changes'}
    """
    names = _default(probes) if measures is None else [m.name for m in resolve(measures)]
    wanted = None if kinds is None else list(kinds)
    _check(wanted, max_scale, members=members, checks=checks, budget=1 if budget is None else budget)
    clock = Clock()
    with clock("measures at the network"):
        bench = Bench(model, loss_fn, data, options or DEFAULT_OPTIONS, mode, seed, probes)
        base = bench.at_the_network(names)
        shown = base | bench.ascended_again(base)
        defined = bench.applicable(MEASURES)
        with bench.lifted():
            slope, descent = _slope(bench)
    tested = [name for name in names if base[name].applies]

    def count(symmetry: Symmetry) -> int:
        # A kind under which everything is declared invariant needs no more members than are checked.
        return max([_due(name, symmetry, members, checks) for name in tested], default=0)

    with clock("symmetries found and proved"):
        orbits, rejected = find_orbits(bench, wanted, hints, count, max_scale, budget)
    total, done = sum(orbit.members for orbit in orbits), 0
    kept: list[Orbit] = []
    measured: dict[str, list[dict[str, Measurement]]] = {}
    for orbit in orbits:
        due = {name: _due(name, orbit.symmetry, members, checks) for name in tested}
        losses, rows = [], []
        with clock("measures at the members"):
            for index in range(orbit.members):
                progress(orbit.kind, done, total)
                twin = orbit.member(index).apply(bench.model)
                loss, found = bench.measured(twin, [name for name in tested if index < due[name]])
                losses.append(loss)
                rows.append(found)
                done += 1
        reason = left_out(orbit, bench.loss, losses)
        if reason is None:
            kept.append(replace(orbit, loss_change=loss_change(bench.loss, losses)))
            measured[orbit.kind] = rows
        else:
            rejected.append((orbit.kind, reason))
    progress("", total, total)
    with clock("law of the trace"):
        traces = {kind: [row["trace"] for row in rows if "trace" in row] for kind, rows in measured.items()}
        found_laws, note = trace_laws(bench, kept, traces) if laws and "trace" in tested else ((), "")
    mixing = {orbit.kind for orbit in kept if orbit.mixes_frozen(bench.model)}
    cost = sum(m.cost for m in base.values()) + sum(
        m.cost for rows in measured.values() for row in rows for m in row.values()
    )
    return AuditReport(
        measurements=shown,
        changes=tuple(
            _change(name, orbit, base[name], measured[orbit.kind], mixed=orbit.kind in mixing)
            for name in tested
            for orbit in kept
        ),
        orbits=tuple(kept),
        laws=found_laws,
        rejected=tuple(rejected),
        loss=bench.loss,
        gradient_norm=slope,
        descent=descent,
        parameters=bench.objective.n,
        rows=bench.objective.rows,
        classifies=bench.classifies,
        members=members,
        checks=checks,
        defined=tuple(defined),
        kinds=None if wanted is None else tuple(wanted),
        notes=(*bench.notes, note) if note else bench.notes,
        cost=cost,
        times=clock.seconds,
    )


def _default(probes: Any) -> list[str]:
    chosen = with_repairs([m.name for m in resolve()])
    return chosen if probes is None else [*chosen, *unseen.NAMES]


class Clock:
    """Seconds by part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Count what happens inside for a part."""
        started = time.perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - started


def _check(kinds: list[str] | None, max_scale: float, **counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    if not (math.isfinite(max_scale) and max_scale > 1):
        raise ValueError(f"max_scale must be finite and above 1, got {max_scale}")
    for kind in kinds or ():
        if kind not in KINDS:
            raise ValueError(unknown("kind of symmetry", kind, KINDS))


def _slope(bench: Bench) -> tuple[float, float]:
    """Length of the gradient, and the share of the loss that the best step along it would take away, to second order."""
    gradient = bench.objective.gradient()
    squared, curvature = float(gradient @ gradient), float(gradient @ bench.objective.hvp(gradient))
    if not squared:
        return 0.0, 0.0
    gain = squared**2 / (2 * curvature) if curvature > 0 else math.inf
    return math.sqrt(squared), gain / abs(bench.loss) if bench.loss else math.inf


def _due(name: str, symmetry: Symmetry, members: int, checks: int) -> int:
    """At how many members of a symmetry a measure is due."""
    told = not keeps_outputs(symmetry) or MEASURES[name].invariance(symmetry.kind) in ("invariant", "almost")
    return min(checks, members) if told else members


def _change(name: str, orbit: Orbit, base: Measurement, rows: list[dict[str, Measurement]], *, mixed: bool) -> Change:
    """What became of a measure; `mixed` where what is declared does not hold, because some parameters are frozen."""
    values = [row[name] for row in rows if name in row]
    declared = MEASURES[name].invariance(orbit.kind)
    if mixed and declared in ("invariant", "almost") and not _is_of_function(name):
        declared = "unknown"
    return judge(name, orbit.kind, declared, base, values)


def _is_of_function(name: str) -> bool:
    """Whether a measure looks at outputs and features only, whichever parameters are frozen."""
    every = FUNCTION_PRESERVING - NEARLY - {"dead-unit", "softmax-shift"}
    return every <= MEASURES[name].invariant_under
