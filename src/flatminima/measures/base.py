"""What a measure is, what it returns, and the registry of all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Literal, TypeVar, cast

import torch

from flatminima.curvature.lanczos import EigenResult, eigenpairs
from flatminima.measures.invariance import Invariance
from flatminima.measures.options import MeasureOptions
from flatminima.names import unknown
from flatminima.objective import Objective, ObjectiveError
from flatminima.symmetries.kinds import KINDS

CostClass = Literal["cheap", "moderate", "expensive"]
_T = TypeVar("_T")


class NotApplicableError(ObjectiveError):
    """A measure is not defined, or its formula not valid, for this model, loss or data; the message says why."""


@dataclass(frozen=True)
class Measurement:
    """One number with what is needed to defend it.

    Attributes:
        name: of the measure.
        value: the number; NaN where the measure does not apply.
        error: its error, in the same unit; ``None`` when no bound or estimate exists.
        error_kind: what the error is: "standard error", "residual bound", "rounding", "lower bound, spread of starts", ...;
            "not applicable" where there is no number.
        converged: whether the accuracy asked for was reached.
        cost: spent on it, in gradient evaluations (work shared with an earlier measure is charged there).
        note: anything the reader of the number should know.
    """

    name: str
    value: float
    error: float | None
    error_kind: str
    converged: bool
    cost: float = 0.0
    note: str = ""

    @property
    def applies(self) -> bool:
        """Whether there is a number."""
        return self.error_kind != "not applicable"


@dataclass
class Workbench:
    """The objective under measurement, unlabelled inputs for the measures that look at some, and the work that they share."""

    objective: Objective
    options: MeasureOptions = field(default_factory=MeasureOptions)
    seed: int = 0
    probes: Any = None
    _shared: dict[str, Any] = field(default_factory=dict)
    _twins: list[Objective] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.objective.dtype in (torch.float16, torch.bfloat16):
            # Differences of losses are below half-precision rounding, and so are the displacements that cause them.
            self.objective = self.objective.to_dtype(torch.float32)

    @property
    def eigen(self) -> EigenResult:
        """Top eigenpair; computed once."""
        return self.shared(
            "eigen",
            lambda: eigenpairs(
                self.objective, rtol=self.options.rtol, max_products=self.options.max_products, seed=self.seed
            ),
        )

    @property
    def precise(self) -> Objective:
        """The objective in double precision; itself where it has that already."""
        if self.objective.dtype == torch.float64:
            return self.objective
        return self.shared("precise", lambda: self.adopt(self.objective.to_dtype(torch.float64)))

    def shared(self, key: str, make: Callable[[], _T]) -> _T:
        """What ``make`` returns, made once."""
        if key not in self._shared:
            self._shared[key] = make()
        return cast(_T, self._shared[key])

    def adopt(self, twin: Objective) -> Objective:
        """An objective derived from this one, whose evaluations count as this one's."""
        self._twins.append(twin)
        return twin

    @property
    def spent(self) -> float:
        """Cost so far in gradient evaluations."""
        return sum(f.evaluations.gradient_equivalents for f in (self.objective, *self._twins))

    def release(self) -> None:
        """Free the graphs that products keep between calls."""
        for f in (self.objective, *self._twins):
            f.release()


def _always(objective: Objective) -> str | None:
    return None


@dataclass(frozen=True)
class Measure:
    """A named measure.

    Attributes:
        name: key in the registry.
        label: for tables and plots.
        meaning: one sentence for the reader of a report.
        flatter_when: ``"lower"`` or ``"higher"`` if such a number means a flatter minimum, ``None`` if it says nothing
            about it.
        invariant_under: kinds of symmetry under which the number does not change, by theorem.
        compute: the measurement.
        changes_under: kinds under which it does change, shown on a network.
        almost_under: kinds under which it is invariant up to the epsilon of a normalisation layer.
        cost_class: ``"cheap"`` (a few passes), ``"moderate"`` (tens of gradients) or ``"expensive"`` (hundreds).
        default: whether it is measured unless asked otherwise.
        applies: the reason why the measure is not defined for an objective, or ``None``. Costs at most one forward pass.
        repair: measures with the same intention that are invariant where this one is not; the first that applies is best.
    """

    name: str
    label: str
    meaning: str
    flatter_when: str | None
    invariant_under: frozenset[str]
    compute: Callable[[Workbench], Measurement]
    changes_under: frozenset[str] = frozenset()
    almost_under: frozenset[str] = frozenset()
    cost_class: CostClass = "moderate"
    default: bool = False
    applies: Callable[[Objective], str | None] = _always
    repair: tuple[str, ...] = ()

    def invariance(self, kind: str) -> Invariance:
        """What the number does under a kind of symmetry; "unknown" where it is not defined, or nothing is proved or found."""
        if kind in self.invariant_under:
            return "invariant"
        if kind in self.almost_under:
            return "almost"
        return "changes" if kind in self.changes_under else "unknown"


MEASURES: dict[str, Measure] = {}

#: Words that stand for several measures.
GROUPS: dict[str, Callable[[Measure], bool]] = {
    "default": lambda m: m.default,
    "cheap": lambda m: m.cost_class == "cheap",
    "all": lambda m: True,
}


def register(
    name: str,
    label: str,
    meaning: str,
    *,
    flatter_when: str | None = "lower",
    invariant_under: frozenset[str] = frozenset(),
    changes_under: frozenset[str] = frozenset(),
    almost_under: frozenset[str] = frozenset(),
    cost_class: CostClass = "moderate",
    default: bool = False,
    applies: Callable[[Objective], str | None] = _always,
    repair: tuple[str, ...] = (),
) -> Callable[[Callable[[Workbench], Measurement]], Callable[[Workbench], Measurement]]:
    """Enter a function ``Workbench -> Measurement`` into :data:`MEASURES`.

    Raises:
        ValueError: an unknown kind of symmetry, or one that is declared twice.
    """
    declared = [*invariant_under, *changes_under, *almost_under]
    for kind in declared:
        if kind not in KINDS:
            raise ValueError(f"{name}: {unknown('kind of symmetry', kind, KINDS)}")
        if declared.count(kind) > 1:
            raise ValueError(f"{name}: what it does under {kind} is declared twice")

    def enter(compute: Callable[[Workbench], Measurement]) -> Callable[[Workbench], Measurement]:
        MEASURES[name] = Measure(
            name, label, meaning, flatter_when, invariant_under, compute, changes_under, almost_under, cost_class,
            default, applies, repair,
        )  # fmt: skip
        return compute

    return enter


def arrange(*families: ModuleType) -> None:
    """Order :data:`MEASURES` by the modules that hold them; what belongs to none of them comes last."""
    order = {family.__name__: position for position, family in enumerate(families)}
    found = sorted(MEASURES.items(), key=lambda item: order.get(item[1].compute.__module__, len(order)))
    MEASURES.clear()
    MEASURES.update(found)


def resolve(names: Iterable[str] | None = None) -> list[Measure]:
    """The measures of these names, in registry order; the default ones by default.

    Args:
        names: of measures or of groups: ``"default"``, ``"cheap"``, ``"all"``.

    Raises:
        ValueError: an unknown name; the valid ones are listed, nearest first.

    Example:
        >>> "lambda_max" in [m.name for m in resolve()], "orbit_minimal_trace" in [m.name for m in resolve()]
        (True, False)
        >>> [m.name for m in resolve(["trace", "lambda_max"])]
        ['lambda_max', 'trace']
    """
    wanted = ["default"] if names is None else list(names)
    for name in wanted:
        if name not in MEASURES and name not in GROUPS:
            raise ValueError(unknown("measure", name, [*MEASURES, *GROUPS]))
    groups = [GROUPS[name] for name in wanted if name in GROUPS]
    return [m for m in MEASURES.values() if m.name in wanted or any(holds(m) for holds in groups)]


def measure(
    objective: Objective,
    names: Iterable[str] | None = None,
    *,
    options: MeasureOptions | None = None,
    seed: int = 0,
    probes: Any = None,
    workbench: Workbench | None = None,
) -> dict[str, Measurement]:
    """Measure a minimum.

    Args:
        objective: the loss as a function of the parameters.
        names: which measures, or groups of them (see :func:`resolve`); the default ones by default.
        options: radii and accuracies.
        seed: of every random draw; the same seed gives the same numbers on the same machine.
        probes: inputs without targets, as the model takes them, for measures of what the features leave open there.
        workbench: pass one to reuse its eigenpair afterwards; ``options``, ``seed`` and ``probes`` are then its own.

    Returns:
        ``{name: Measurement}`` in registry order. A measure that does not apply to this model, loss or data is there with the
        value NaN, ``error_kind="not applicable"`` and the reason in its ``note``.

    Raises:
        ValueError: an unknown name; before any work.
        NonFiniteLossError: the loss or a derivative is NaN or infinite; the batch is named.

    Cost: the sum of the measurements' ``cost``, in gradient evaluations.

    Example:
        >>> import torch
        >>> w = torch.nn.Linear(2, 1, bias=False).double()
        >>> x = torch.tensor([[3.0, 0.0], [0.0, 1.0]]).double()
        >>> f = Objective(w, torch.nn.functional.mse_loss, (x, torch.zeros(2, 1).double()))   # H = x'x = diag(9, 1)
        >>> found = measure(f, ["lambda_max", "minimum_margin"])
        >>> round(found["lambda_max"].value, 6), found["minimum_margin"].note
        (9.0, 'the targets are not classes: torch.float64')
    """
    bench = workbench or Workbench(objective, options or MeasureOptions(), seed, probes)
    results: dict[str, Measurement] = {}
    for entry in resolve(names):
        before = bench.spent
        reason = entry.applies(bench.objective)
        if reason is None:
            try:
                found = entry.compute(bench)
            except NotApplicableError as error:
                reason = str(error)
        if reason is not None:
            found = Measurement(entry.name, math.nan, None, "not applicable", False, note=reason)
        results[entry.name] = Measurement(
            entry.name, found.value, found.error, found.error_kind, found.converged, bench.spent - before, found.note
        )
    bench.release()
    return results
