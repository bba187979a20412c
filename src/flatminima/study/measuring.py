"""Everything ``flatminima measure`` says about one minimum, as one JSON-ready structure.

This is in ``study`` and not in ``measures`` because it joins measures, spectra and layers into a record with its command and
its conclusions, as :mod:`flatminima.study.summary` does for comparisons.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

import flatminima
from flatminima.curvature import EigenResult, TraceResult, eigenpairs, exact_trace, why_not
from flatminima.curvature import trace as estimate_trace
from flatminima.curvature.spectrum import SpectrumResult, spectrum
from flatminima.measures import MEASURES, Measurement, Workbench
from flatminima.measures import measure as run_measures
from flatminima.objective import Objective, ObjectiveError
from flatminima.operators import Operator
from flatminima.study.layers import exact_layer_traces, layer_rows, layer_sum
from flatminima.study.measure_settings import MATRICES, MATRIX_LABELS, MeasureSettings
from flatminima.study.settings import SettingsError
from flatminima.study.stages import Stage, Work
from flatminima.study.words import describe

SCHEMA = 1

# On the diagonal of a network that is affine in each weight these are one and the same.
_SAME_DIAGONAL = ("hessian", "ggn", "fisher")


def measure_minimum(
    objective: Objective,
    settings: MeasureSettings | None = None,
    *,
    probes: Any = None,
    command: str = "",
    progress: Callable[[Stage], None] | None = None,
) -> dict[str, Any]:
    """Measure one minimum: the measures, and as asked for eigenvalues, trace, density and layers of its curvature.

    Work is shared: the leading eigenpairs serve for the density, the trace and the measure ``lambda_max``; the start vectors
    of the density for the trace; one exact pass for the traces of all layers.

    Args:
        objective: the loss as a function of the parameters.
        settings: what to measure, and how exactly.
        probes: unlabelled inputs, for measures that look at some.
        command: to be recorded.
        progress: called at the beginning, after every product and at the end of each part.

    Returns:
        The fields of ``measure.json``, which ``docs/measure.md`` documents: numbers with errors, costs, notes, and the
        conclusions in words. Infinity and NaN are ``None``.

    Raises:
        SettingsError: more eigenvalues than parameters; before any work.
        ObjectiveError: the matrix does not exist for this model or loss.

    Cost: the sum of the parts' costs, which the result holds.

    Example:
        >>> w = torch.nn.Linear(2, 1, bias=False).double()
        >>> x = torch.tensor([[3.0, 0.0], [0.0, 1.0]]).double()
        >>> f = Objective(w, torch.nn.functional.mse_loss, (x, torch.zeros(2, 1).double()))   # H = x'x = diag(9, 1)
        >>> found = measure_minimum(f, MeasureSettings(top=1, trace=True, measures=()))
        >>> round(found["eigenvalues"][0]["value"], 6), round(found["trace"]["value"], 6), found["trace"]["method"]
        (9.0, 10.0, 'exact')
    """
    settings = settings or MeasureSettings()
    for name, count in (("top", settings.top), ("smallest", settings.smallest)):
        if count is not None and count > objective.n:
            raise SettingsError(
                f"--{name} {count}: the {MATRIX_LABELS[settings.matrix]} has only {objective.n} eigenvalues, one for each of "
                f"the {objective.n} parameters"
            )
    bench = Workbench(objective, settings.options, settings.seed, probes)
    notes = list(objective.notes)
    if bench.objective.dtype != objective.dtype:
        notes.append(f"computed in {bench.objective.dtype}; the model's parameters are {objective.dtype}")
    objective, work = bench.objective, Work(progress)
    results: dict[str, Any] = {
        "schema": SCHEMA,
        "flatminima": flatminima.__version__,
        "command": command,
        "settings": settings.to_dict(),
        "model": {
            "name": type(objective.model).__name__, "parameters": objective.n, "dtype": _word(objective.dtype),
            "device": str(objective.device),
        },
        "data": {"rows": objective.rows, "weighting": objective.weighting},
        "matrix": {"name": settings.matrix, "label": MATRIX_LABELS[settings.matrix]},
    }  # fmt: skip
    found = _curvature(objective, settings, work, notes) if settings.curvature else _NOTHING
    results |= _at_the_point(objective, settings.curvature, work)
    results["measures"] = _measures(bench, settings, found, work)
    work.end()
    objective.release()
    results |= found
    results["notes"] = list(dict.fromkeys([*notes, *objective.notes]))
    total = {key: sum(cost[key] for cost in work.costs.values()) for key in ("products", "gradient_equivalents")}
    results["cost"] = total | {"parts": work.costs}
    results["times"] = work.seconds
    found = plain(results | describe(results))
    assert isinstance(found, dict)
    return found


_NOTHING: dict[str, Any] = {
    "eigenvalues": [], "smallest": None, "trace": None, "density": None, "shape": None, "layers": [], "layers_trace": None
}  # fmt: skip


def _curvature(objective: Objective, settings: MeasureSettings, work: Work, notes: list[str]) -> dict[str, Any]:
    op = MATRICES[settings.matrix](objective)
    same_diagonal = settings.matrix in _SAME_DIAGONAL
    layer_traces = exact_layer_traces(objective, work) if settings.layers and same_diagonal else None
    known = _exact_trace(objective, settings, layer_traces, work, notes) if settings.trace and same_diagonal else None
    found = _spectrum(op, settings, known, work)
    results = dict(_NOTHING)
    if found is not None:
        results |= _spectrum_fields(found)
        notes += found.notes
    bottom = None
    if settings.smallest:
        with work.part(f"smallest {settings.smallest}", "smallest", op, **_residual(settings)) as tell:
            bottom = eigenpairs(
                op, settings.smallest, which="smallest", rtol=settings.rtol, max_products=settings.max_products,
                seed=settings.seed, progress=tell,
            )  # fmt: skip
        results["eigenvalues"] = results["eigenvalues"] + _pairs(bottom, "smallest")
        notes += [f"smallest eigenvalues: {note}" for note in bottom.notes if note not in op.notes]
        results["smallest"] = {"value": bottom.value, "error": bottom.error, "converged": bottom.pair_converged[0]}
    total = found.trace if found is not None else known
    if settings.trace and total is None:
        with work.part("trace", "trace", op, **_standard_error(settings)) as tell:
            total = estimate_trace(op, rtol=settings.trace_rtol, deflate=bottom, seed=settings.seed, progress=tell)
    if total is not None:
        results["trace"] = _trace_fields(total)
        notes += [f"trace: {note}" for note in total.notes if note not in (*op.notes, *notes)]
    if found is not None:
        results["shape"] = _shape(found, bottom)
    if settings.layers:
        objective.release()
        results["layers"] = layer_rows(
            objective, MATRICES[settings.matrix], layer_traces, rtol=settings.rtol, trace_rtol=settings.trace_rtol,
            seed=settings.seed, exact=same_diagonal, work=work,
        )  # fmt: skip
        results["layers_trace"] = layer_sum(results["layers"])
    return results


def _exact_trace(
    objective: Objective,
    settings: MeasureSettings,
    layers: dict[str, dict[str, Any]] | None,
    work: Work,
    notes: list[str],
) -> TraceResult | None:
    if layers is not None:
        value, error = (math.fsum(part[key] for part in layers.values()) for key in ("value", "error"))
        return TraceResult(
            value=value, error=error, interval=(value - 2 * error, value + 2 * error), method="exact", probes=0, deflated=0,
            rtol=settings.trace_rtol, converged=True, products=0, gradient_equivalents=0.0, seed=settings.seed,
            notes=("the sum of the exact traces of the layers",),
        )  # fmt: skip
    if why_not(objective) is not None:
        return None
    try:
        work.begin("trace, exactly", "trace")
        known = replace(exact_trace(objective), rtol=settings.trace_rtol)
    except ObjectiveError as error:
        work.end()
        notes.append(f"the trace is estimated: {error}")
        return None
    work.end(known.gradient_equivalents)
    return known


def _spectrum(op: Operator, settings: MeasureSettings, known: TraceResult | None, work: Work) -> SpectrumResult | None:
    """The leading eigenpairs and what is computed with them; ``None`` where they are not asked for."""
    top = settings.top or (min(10, op.n) if settings.density else 0)
    if not top:
        return None
    before = op.products, op.gradient_equivalents
    estimated = settings.trace and known is None
    if settings.density:
        stages: dict[str, tuple[str, dict[str, Any]]] = {
            "eigenvalues": (f"top {top}", _residual(settings)),
            "density": ("density", {"expected": settings.runs * settings.steps}),
            "trace": ("trace", _standard_error(settings)),
        }
        found = spectrum(
            op, top=top, rtol=settings.rtol, trace_rtol=settings.trace_rtol, runs=settings.runs, steps=settings.steps,
            trace=estimated, seed=settings.seed, progress=work.progress,
            begin=lambda part: work.begin(stages[part][0], part, op, **stages[part][1]),
        )  # fmt: skip
        work.end()
        return found if estimated else replace(found, trace=known)
    with work.part(f"top {top}", "eigenvalues", op, **_residual(settings)) as tell:
        eigen = eigenpairs(op, top, rtol=settings.rtol, seed=settings.seed, progress=tell)
        smallest = _lower_end(op, eigen)
    if estimated:
        with work.part("trace", "trace", op, **_standard_error(settings)) as tell:
            known = estimate_trace(op, rtol=settings.trace_rtol, deflate=eigen, seed=settings.seed, progress=tell)
    return SpectrumResult(
        n=op.n, eigen=eigen, smallest=smallest, trace=known, density=None, converged=eigen.converged,
        products=op.products - before[0], gradient_equivalents=op.gradient_equivalents - before[1], seed=settings.seed,
        notes=eigen.notes,
    )  # fmt: skip


def _lower_end(op: Operator, eigen: EigenResult) -> tuple[float, float]:
    """The smallest Ritz value of the basis that found the largest, with its residual bound; one product."""
    _, rotation = torch.linalg.eigh(eigen.projected.double())
    vector = eigen.basis.double() @ rotation[:, 0].to(eigen.basis.device)
    vector = vector / vector.norm()
    image = op @ vector
    value = float(vector @ image)
    return value, float((image - value * vector).norm()) + op.rounding * float(image.norm())


def _residual(settings: MeasureSettings) -> dict[str, Any]:
    return {"quantity": "residual", "asked": settings.rtol}


def _standard_error(settings: MeasureSettings) -> dict[str, Any]:
    return {"quantity": "standard error", "asked": settings.trace_rtol}


# ----- as fields ------------------------------------------------------------------------------------------------------


def _pairs(eigen: EigenResult, end: str) -> list[dict[str, Any]]:
    rows = zip(eigen.values.tolist(), eigen.errors.tolist(), eigen.pair_converged, strict=True)
    return [
        {"end": end, "rank": rank, "value": value, "error": error, "converged": converged}
        for rank, (value, error, converged) in enumerate(rows, start=1)
    ]


def _trace_fields(found: TraceResult) -> dict[str, Any]:
    low, high = found.interval
    return {
        "value": found.value, "error": found.error, "low": low, "high": high, "method": found.method,
        "probes": found.probes, "deflated": found.deflated, "converged": found.converged,
    }  # fmt: skip


def _spectrum_fields(found: SpectrumResult) -> dict[str, Any]:
    value, error = found.smallest
    density = None
    if found.density is not None:
        everything = found.density.to_dict()
        fields = (
            "grid", "density", "low", "high", "bandwidth", "nodes", "weights", "outliers", "outlier_errors", "runs", "steps"
        )  # fmt: skip
        density = {name: everything[name] for name in fields}
    return {
        "eigenvalues": _pairs(found.eigen, "largest"),
        "smallest": {"value": value, "error": error, "converged": None},
        "density": density,
    }


def _shape(found: SpectrumResult, bottom: EigenResult | None) -> dict[str, Any]:
    """What follows from the eigenvalues, each as value, low and high."""
    if bottom is not None:
        found = replace(found, smallest=(bottom.value, bottom.error))
    names = ("condition", "negative_ratio", "negative_mass", "resolved_negative_mass")
    return {name: getattr(found, name) for name in names} | {"condition_numbers": found.condition_numbers}


def _at_the_point(objective: Objective, gradient: bool, work: Work) -> dict[str, Any]:
    """Loss, and length of the gradient, with the rounding that a second precision reveals."""
    if not gradient:
        return {"loss": objective.loss(), "loss_error": None, "gradient": None}
    with work.part("loss and gradient", "gradient"):
        loss, slope = objective.loss_and_gradient()
        other = torch.float32 if objective.dtype == torch.float64 else torch.float64
        try:
            loss_twin, slope_twin = objective.to_dtype(other).loss_and_gradient()
        except (RuntimeError, ValueError, TypeError):  # a model or a device that knows one precision alone
            loss_error = slope_error = None
        else:
            # The rounding of the less exact of the two is seen; that of the other is smaller by the ratio of the epsilons.
            scale = min(1.0, torch.finfo(objective.dtype).eps / torch.finfo(torch.float32).eps)
            loss_error = scale * abs(loss - loss_twin)
            slope_error = scale * float((slope.double() - slope_twin.double()).norm())
    work.costs["gradient"]["gradient_equivalents"] += 2.0
    return {
        "loss": loss,
        "loss_error": loss_error,
        "gradient": {"norm": float(slope.double().norm()), "error": slope_error},
    }


def _measures(bench: Workbench, settings: MeasureSettings, found: dict[str, Any], work: Work) -> dict[str, Any]:
    """The measures; eigenvalue and trace are not measured a second time."""
    shared: dict[str, Measurement] = {}
    if settings.matrix == "hessian":
        if settings.top or settings.density:
            top = found["eigenvalues"][0]
            shared["lambda_max"] = Measurement(
                "lambda_max", top["value"], top["error"], "residual bound", top["converged"], note="see the eigenvalues"
            )
        if found["trace"] is not None:
            total = found["trace"]
            kind = "rounding" if total["method"] == "exact" else "standard error"
            shared["trace"] = Measurement(
                "trace", total["value"], total["error"], kind, total["converged"], note="see the trace"
            )
    names = [name for name in settings.measures if name not in shared]
    if names:
        with work.part("measures", "measures"):
            measured = run_measures(bench.objective, names, workbench=bench)
        work.costs["measures"]["gradient_equivalents"] += sum(m.cost for m in measured.values())
        shared |= measured
    return {
        name: vars(shared[name]) | {"label": MEASURES[name].label} for name in MEASURES if name in settings.measures
    }


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def plain(value: Any) -> Any:
    """JSON-ready values: infinity and NaN become ``None``, tuples lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value
