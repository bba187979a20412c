"""One network of a study: how it is made and what is measured on it, and the record of what was found.

Both are plain: they travel to workers, into JSON and into the database of a study, and carry no tensors.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, ClassVar, TypeAlias

from pydantic import Field

Scalar: TypeAlias = str | int | float | bool
Option: TypeAlias = Scalar | tuple[Scalar, ...]
Options: TypeAlias = tuple[tuple[str, Option], ...]
"""Keyword arguments in a form that can be hashed; ``dict`` of it gives them back."""

SUBSET_RULES = ("permutation", "choice", "stratified")
SCALES = ("unit", "standardised")
OPTIMISERS = ("sgd",)
SCHEDULES = ("constant", "step", "cosine")
STOP_RULES = ("loss", "accuracy", "never")
STATUSES = ("finished", "missed", "failed")
PREDICTIONS = "predictions.uint8"  # artefact: the class of every test row, a byte each

# What a settings file is held to; code that makes these objects itself is not checked.
_STRICT = {"strict": True, "extra": "forbid", "allow_inf_nan": False}
_Seed: TypeAlias = Annotated[int, Field(ge=0, lt=2**63)]
_Count: TypeAlias = Annotated[int, Field(ge=1, lt=2**63)]  # what tables of integers hold
_Positive: TypeAlias = Annotated[float, Field(gt=0)]
_NotNegative: TypeAlias = Annotated[float, Field(ge=0)]


@dataclass(frozen=True)
class DataSpec:
    """Which rows a network is trained, probed and tested on.

    Attributes:
        name: of the data set.
        rows: of the training subset.
        subset_seed: of the draw of these rows.
        subset_rule: ``permutation``: the first rows of ``torch.randperm`` (nested over ``rows``); ``choice``: NumPy's legacy
            ``choice`` without replacement (not nested); ``stratified``: equal shares of the classes.
        scale: of the pixels; ``unit``: in [0, 1]; ``standardised``: by mean and deviation of the training subset.
        probes: unseen rows that the pair proxy asks about.
        probe_seed: of their draw.
        split_seed: of the cut of the evaluation rows into halves a and b.
        measure_rows: the measures see the first so many rows of the training subset; all by default.
    """

    __pydantic_config__: ClassVar[Any] = _STRICT
    name: str
    rows: _Count
    subset_seed: _Seed = 42
    subset_rule: str = "permutation"
    scale: str = "unit"
    probes: Annotated[int, Field(ge=0)] = 100
    probe_seed: _Seed = 99
    split_seed: _Seed = 0
    measure_rows: _Count | None = None


@dataclass(frozen=True)
class ModelSpec:
    """A network of :mod:`flatminima.models`: its name there and its options, such as ``(("hidden", (64, 8)),)``."""

    name: str
    options: Options = ()

    @property
    def keywords(self) -> dict[str, Option]:
        """The options as keyword arguments of :func:`flatminima.models.build`."""
        return dict(self.options)


@dataclass(frozen=True)
class OptimiserSpec:
    """How the loss, the mean cross entropy, is minimised.

    Attributes:
        name: one of ``OPTIMISERS``.
        lr: step size at the beginning.
        batch_size: rows a step; the last batch of an epoch may be shorter.
        momentum, weight_decay: as of ``torch.optim.SGD``.
        schedule: ``constant``; ``step``: multiplied by ``drop_factor`` at each of ``drops``; ``cosine`` to 0 at the last epoch.
        drops: fractions of the most epochs.
        drop_factor: of each drop.
    """

    __pydantic_config__: ClassVar[Any] = _STRICT
    name: str = "sgd"
    lr: _Positive = 0.1
    batch_size: _Count = 64
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: _NotNegative = 0.0
    schedule: str = "constant"
    drops: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = ()
    drop_factor: _Positive = 0.1


@dataclass(frozen=True)
class StopSpec:
    """When training ends. A run that reaches a cap before its threshold is ``missed``, never dropped.

    Attributes:
        rule: ``loss``: mean training cross entropy at most ``threshold``; ``accuracy``: training accuracy at least
            ``threshold``; ``never``: at the cap, which is then no miss.
        threshold: of the rule; ``None`` for ``never``.
        check_every: epochs between two looks.
        max_epochs: the cap; the last epoch is looked at too.
        max_steps: a second cap; what comes first counts. ``None``: none.
        rows: the rule looks at the first so many training rows; all by default.
        fixed_steps: the second criterion: accuracies and measures are also taken after exactly so many steps, whatever the
            rule says, under names that begin with ``fixed.``; ``None``: not.
    """

    __pydantic_config__: ClassVar[Any] = _STRICT
    rule: str = "loss"
    threshold: _NotNegative | None = 0.01
    check_every: _Count = 1
    max_epochs: _Count = 500
    max_steps: _Count | None = None
    rows: _Count | None = None
    fixed_steps: _Count | None = None


@dataclass(frozen=True)
class MeasureSpec:
    """A measure by its name in the registry; its value is recorded as ``measure.<label>``.

    Attributes:
        name: in the registry of measures, or one that a study adds.
        options: of this measure alone.
        label: tells two uses of one measure apart; the name by default.
        orbit: also measured after an independent random function-preserving move of the network, as ``orbit.<label>``.
        repeats: independent repetitions, for the reliability of an estimate: ``repeat.<label>.1`` and on.
    """

    __pydantic_config__: ClassVar[Any] = _STRICT
    name: str
    options: Options = ()
    label: str = ""
    orbit: bool = False
    repeats: _Count = 1

    def __post_init__(self) -> None:
        if not self.label:
            object.__setattr__(self, "label", self.name)


@dataclass(frozen=True)
class RunSpec:
    """Everything that decides one network and its numbers.

    Networks are made and measured by :func:`flatminima.study.network_runs.run_batch`, which is given some specifications and
    ``report(fraction)``, and returns or yields one :class:`Record` for each, in any order.

    Attributes:
        study: name of the study.
        cell: factor -> value, in the order of the grid; hashed as pairs, see :attr:`factors`.
        data, model, optimiser, stop: how the network is made.
        seed: of the initial weights.
        order_seed: of the order of the rows.
        measures: what is measured on it.

    Example:
        >>> spec = RunSpec("tiny", (("lr", 0.1),), DataSpec("digits", 250), ModelSpec("mlp", (("hidden", (64, 8)),)), seed=3)
        >>> len(spec.id), spec.factors, RunSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
        (64, {'lr': 0.1}, True)
    """

    study: str
    cell: tuple[tuple[str, Option], ...]
    data: DataSpec
    model: ModelSpec
    optimiser: OptimiserSpec = OptimiserSpec()
    stop: StopSpec = StopSpec()
    seed: int = 0
    order_seed: int = 0
    measures: tuple[MeasureSpec, ...] = ()

    @property
    def factors(self) -> dict[str, Option]:
        """The cell as a dictionary."""
        return dict(self.cell)

    @cached_property
    def id(self) -> str:
        """SHA-256 of the canonical JSON (sorted keys, no spaces) in hexadecimal; the same on every machine."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def ensemble(self) -> tuple[object, ...]:
        """Equal for networks that one ensemble can train together: same shapes, same number of steps per epoch."""
        return (
            self.data.name,
            self.data.rows,
            self.data.scale,
            self.model,
            self.optimiser.name,
            self.optimiser.batch_size,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary for JSON; ``cell`` and options become dictionaries."""
        plain = dataclasses.asdict(self)
        plain["cell"] = _plain(self.cell)
        plain["model"]["options"] = _plain(self.model.options)
        for measure, made in zip(plain["measures"], self.measures, strict=True):
            measure["options"] = _plain(made.options)
        plain["measures"] = list(plain["measures"])
        plain["optimiser"]["drops"] = list(self.optimiser.drops)
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> RunSpec:
        """The inverse of :meth:`to_dict`, also after JSON."""
        model, optimiser = plain["model"], plain["optimiser"]
        return cls(
            study=plain["study"],
            cell=frozen_options(plain["cell"]),
            data=DataSpec(**plain["data"]),
            model=ModelSpec(model["name"], frozen_options(model["options"])),
            optimiser=OptimiserSpec(**{**optimiser, "drops": tuple(optimiser["drops"])}),
            stop=StopSpec(**plain["stop"]),
            seed=plain["seed"],
            order_seed=plain["order_seed"],
            measures=tuple(MeasureSpec(**{**m, "options": frozen_options(m["options"])}) for m in plain["measures"]),
        )


def frozen_options(options: Mapping[str, Any]) -> Options:
    """Pairs that can be hashed; lists become tuples.

    Example:
        >>> frozen_options({"hidden": [64, 8]})
        (('hidden', (64, 8)),)
    """
    return tuple((name, tuple(value) if isinstance(value, (list, tuple)) else value) for name, value in options.items())


def _plain(options: Options) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in options}


@dataclass(frozen=True)
class Record:
    """What was found on one network.

    Attributes:
        id: of the :class:`RunSpec`.
        spec: the same as a dictionary.
        status: ``finished``; ``missed``: the stop criterion was not met within the cap (what could be measured is there);
            ``failed``: no network (``reason`` says why, such as a loss that is NaN from some epoch on).
        reason: in words, for the last two.
        values: name -> finite number: ``train.*``, ``test.*``, ``covariate.*``, ``measure.*``, ``orbit.*``.
        missing: name -> why there is no number.
        artefacts: name -> content, such as ``weights.safetensors``.
        seconds: computing time.

    Raises:
        ValueError: an unknown status, a reason that is missing, or a value that is not finite.

    Example:
        >>> Record("0" * 64, {}, "finished", values={"test.accuracy": float("nan")})
        Traceback (most recent call last):
        ValueError: value 'test.accuracy' of run 000000000000 is nan: expected a finite number, or its name in missing
    """

    id: str
    spec: dict[str, Any]
    status: str
    reason: str = ""
    values: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    artefacts: dict[str, bytes] = field(default_factory=dict)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        run = self.id[:12]
        if self.status not in STATUSES:
            raise ValueError(f"status of run {run} is {self.status!r}: expected one of {', '.join(STATUSES)}")
        if self.status != "finished" and not self.reason:
            raise ValueError(f"run {run} is {self.status} and gives no reason: expected one in words")
        for name, value in self.values.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(
                    f"value {name!r} of run {run} is {value!r}: expected a finite number, or its name in missing"
                )
        both = self.values.keys() & self.missing.keys()
        if both:
            raise ValueError(f"run {run} gives {sorted(both)[0]!r} as a value and as missing: expected one of the two")
