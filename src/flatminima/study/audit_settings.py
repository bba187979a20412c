"""What to audit, checked before any work is spent."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from flatminima.audit import DEFAULT_OPTIONS
from flatminima.measures import MeasureOptions, resolve
from flatminima.names import unknown
from flatminima.study.settings import SettingsError
from flatminima.symmetries import KINDS

MODES = ("eval", "train")


@dataclass(frozen=True)
class AuditSettings:
    """What ``flatminima audit`` does; the fields are the arguments of :func:`flatminima.audit.audit`.

    Attributes:
        measures: names or groups; by default the default ones and what would be used instead of them.
        kinds: of symmetry; all by default.
        members: random members of each kind; by default 5 for one minimum and 2 for each of two.
        checks: how many of these are measured for what is declared invariant; by default 2 for one and 1 for each of two.
        max_scale: of the members.
        mode: ``"eval"`` or ``"train"``.
        options: of the measures.
        seed: of every random draw.
    """

    measures: tuple[str, ...] | None = None
    kinds: tuple[str, ...] | None = None
    members: int | None = None
    checks: int | None = None
    max_scale: float = 20.0
    mode: str = "eval"
    options: MeasureOptions = DEFAULT_OPTIONS
    seed: int = 0

    def __post_init__(self) -> None:
        resolve(self.measures)
        for kind in self.kinds or ():
            if kind not in KINDS:
                raise SettingsError(unknown("kind of symmetry", kind, KINDS))
        for name in ("members", "checks"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingsError(f"--{name} must be at least 1, got {value}")
        if not (math.isfinite(self.max_scale) and self.max_scale > 1):
            raise SettingsError(f"--max-scale must be finite and above 1, got {self.max_scale}")
        if self.mode not in MODES:
            raise SettingsError(unknown("--mode", self.mode, MODES))

    def counts(self, minima: int) -> dict[str, int]:
        """``members`` and ``checks`` for each of so many minima."""
        members, checks = (5, 2) if minima == 1 else (2, 1)
        return {"members": self.members or members, "checks": self.checks or checks}

    def to_dict(self, minima: int) -> dict[str, Any]:
        """JSON-ready values, with the options of the measures among them."""
        found = asdict(self) | self.counts(minima)
        options = found.pop("options")
        lists = {name: None if found[name] is None else list(found[name]) for name in ("measures", "kinds")}
        return {**found, **lists, "measure_options": options}
