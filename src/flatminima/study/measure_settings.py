"""What to measure at one minimum, checked before any work is spent."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from flatminima.measures import MeasureOptions, resolve
from flatminima.names import unknown
from flatminima.objective import Objective
from flatminima.operators import EmpiricalFisher, Fisher, GaussNewton, Hessian, Operator
from flatminima.study.settings import SettingsError

#: Curvature matrices by the name of the option.
MATRICES: dict[str, Callable[[Objective], Operator]] = {
    "hessian": Hessian,
    "ggn": GaussNewton,
    "fisher": Fisher,
    "empirical-fisher": EmpiricalFisher,
}
MATRIX_LABELS = {
    "hessian": "Hessian",
    "ggn": "Gauss-Newton matrix",
    "fisher": "Fisher matrix",
    "empirical-fisher": "empirical Fisher matrix",
}


@dataclass(frozen=True)
class MeasureSettings:
    """What to measure, and how exactly. Only the measures by default; any of the first five fields asks for curvature too.

    Attributes:
        top: largest eigenvalues; with ``density`` 10 by default.
        smallest: smallest eigenvalues, iterated to ``rtol``. Without, the smallest one seen by the other work is given.
        density: whether to estimate the density of eigenvalues.
        trace: whether to compute the trace.
        layers: whether to take the matrix apart by layers.
        matrix: a key of :data:`MATRICES`. The measures are those of the Hessian in any case.
        rtol: relative residual asked of eigenvalues; 1e-3 by default. The measures take it too, where it is given.
        trace_rtol: relative standard error asked of traces.
        runs, steps: of the density.
        measures: names of the measures; the default ones by default.
        options: radii and accuracies of the measures.
        max_products: of the ``smallest`` eigenvalues, at most; by default what :func:`~flatminima.curvature.eigenpairs` takes.
        seed: of every random draw.
    """

    top: int | None = None
    smallest: int | None = None
    density: bool = False
    trace: bool = False
    layers: bool = False
    matrix: str = "hessian"
    rtol: float = 1e-3
    trace_rtol: float = 0.01
    runs: int = 10
    steps: int = 30
    measures: tuple[str, ...] = tuple(m.name for m in resolve())
    options: MeasureOptions = field(default_factory=MeasureOptions)
    max_products: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.matrix not in MATRICES:
            raise SettingsError(unknown("matrix", self.matrix, MATRICES))
        if self.matrix != "hessian" and not self.curvature:
            raise SettingsError(
                f"--matrix {self.matrix} says of which matrix, not what; add --top, --smallest, --density, --trace or --layers"
            )
        for name in ("rtol", "trace_rtol"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise SettingsError(f"--{name.replace('_', '-')} must be positive and finite, got {value}")
        for name, least, why in (
            ("top", 1, ""), ("smallest", 1, ""), ("runs", 2, " (one run has no error band)"), ("steps", 1, ""),
            ("max_products", self.smallest or 1, f" for {self.smallest} eigenvalues" if self.smallest else ""),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < least:
                raise SettingsError(f"--{name.replace('_', '-')} must be at least {least}{why}, got {value}")

    @property
    def curvature(self) -> bool:
        """Whether anything beside the measures is asked for."""
        return bool(self.top or self.smallest or self.density or self.trace or self.layers)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values, with the options of the measures among them."""
        found = asdict(self)
        options = found.pop("options")
        return {"curvature": self.curvature, **found, "measures": list(self.measures), "measure_options": options}
