"""The main job: train, measure and audit the methods, run by run, and put the results together."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flatminima import data, models
from flatminima.audit import audit
from flatminima.curvature.density import density
from flatminima.data import Splits
from flatminima.measures import MeasureOptions, Workbench, measure
from flatminima.objective import NonFiniteLossError, Objective
from flatminima.study.checkpoint import CheckpointError
from flatminima.study.runner import run_jobs
from flatminima.study.settings import CompareSettings
from flatminima.study.store import RunStore, write_json
from flatminima.study.summary import summarise
from flatminima.study.target import Target
from flatminima.study.training import evaluate, train
from flatminima.symmetries import KINDS

LANDSCAPE_RADIUS = 0.25
LANDSCAPE_POINTS = 21
_DENSITY_RUNS, _DENSITY_STEPS = (
    3,
    20,
)  # enough for the shape of the bulk and its negative part; the band says how sure it is
_MICRO_BATCH = 256  # activations that stay in the cache: several times faster than larger pieces on a CPU
# A change of coordinates is seen at a coarser accuracy than a difference between methods; the errors enter the verdict.
_AUDIT_ACCURACY: dict[str, Any] = {"rtol": 0.05, "max_probes": 20, "max_products": 30, "ascent_starts": 1}
# Only exact changes of coordinates; kinds may be many, so that the members of all together are bounded.
_AUDIT_KINDS = tuple(name for name, kind in KINDS.items() if kind.exact and kind.preserves == "outputs")
_AUDIT_BUDGET = 2  # times audit_members
_TRAINING_SHARE = 0.6  # of a run's progress; the rest is measuring


@dataclass(frozen=True)
class RunJob:
    """One run of a comparison, for a worker process."""

    settings: CompareSettings
    directory: Path
    method: str
    seed: int

    @property
    def name(self) -> str:
        """Stem of the run's files."""
        return f"{self.method}-seed{self.seed}"


def compare(
    settings: CompareSettings,
    directory: Path,
    *,
    workers: int = 1,
    progress: Callable[[str, float], None] = lambda run, fraction: None,
) -> dict[str, Any]:
    """Run a comparison, or what is left of it, and return its results.

    ``directory`` then holds ``results.json`` (the returned dictionary) and ``runs/`` (weights and records). Runs that are
    finished there are not repeated; runs that are trained are only measured. The results do not depend on ``workers`` or on
    interruptions, apart from the entry ``"times"``.

    Args:
        settings: what to compare.
        directory: where to.
        workers: processes.
        progress: called with a run's name and the fraction of it that is done.

    Raises:
        DataError, StoreError: before any work is spent.

    Example (worker processes import the calling script, so it needs its ``__main__`` guard)::

        if __name__ == "__main__":
            compare(CompareSettings(methods=("sgd", "sam"), seeds=2, steps=100), Path("runs/try"))
    """
    splits = _splits(settings)  # refuses bad data before the directory is touched
    store = RunStore(directory, settings.to_dict())
    jobs = [RunJob(settings, directory, method, seed) for method in settings.methods for seed in range(settings.seeds)]
    left = [job for job in jobs if store.finished(job.name) is None]
    for job in jobs:
        progress(job.name, 0.0 if job in left else 1.0)
    run_jobs(execute, left, workers=workers, progress=lambda index, fraction: progress(left[index].name, fraction))
    records = [record for job in jobs if (record := store.finished(job.name)) is not None]
    network = models.build(settings.model, splits.input_shape, splits.classes, seed=0)
    results = summarise(settings, splits, sum(p.numel() for p in network.parameters()), records)
    write_json(directory / "results.json", results)
    return results


def target_of_run(path: Path, device: torch.device) -> Target | None:
    """Network, loss and measured rows of a run whose weights lie in a comparison's directory; ``None`` elsewhere.

    Raises:
        DataError: its data cannot be read.
    """
    settings = RunStore.settings_of(path)
    if settings is None:
        return None
    try:
        known = CompareSettings.from_dict(settings)
    except (KeyError, TypeError, ValueError):
        return None
    splits = _splits(known)
    model = models.build(known.model, splits.input_shape, splits.classes, seed=0).to(device).eval()
    rows = slice(0, known.measure_rows)
    return Target(model, F.cross_entropy, [(splits.train.x[rows], splits.train.y[rows])])


def execute(job: RunJob, progress: Callable[[float], None] = lambda fraction: None) -> None:
    """Do one run, from the last whole file it left; trains, measures, stores."""
    store = RunStore(job.directory, job.settings.to_dict())
    splits = _splits(job.settings)
    device = torch.device(job.settings.device)
    record, model = _stored(job, store, splits, device)
    if record is None or model is None:
        started = time.perf_counter()
        model, training = train(
            job.settings, job.method, job.seed, splits, lambda fraction: progress(_TRAINING_SHARE * fraction)
        )
        record = {"method": job.method, "seed": job.seed, **vars(training)}
        record["seconds"] = {"training": time.perf_counter() - started}
        store.save_trained(job.name, model, record)
    progress(_TRAINING_SHARE)
    started = time.perf_counter()
    if record["failure"] is None:
        try:
            record |= _measured(job, model.eval(), splits)
        except NonFiniteLossError as error:
            record["failure"] = {"step": record["steps"], "reason": f"while measuring: {error}"}
    record["status"] = "finished" if record["failure"] is None else "failed"
    record["seconds"]["measuring"] = time.perf_counter() - started
    store.save_finished(job.name, _finite(record))


def _stored(
    job: RunJob, store: RunStore, splits: Splits, device: torch.device
) -> tuple[dict[str, Any] | None, nn.Module | None]:
    """Record and network of a training that is whole on disk, else nothing: without its weights it has to be repeated."""
    record = store.trained(job.name)
    if record is None:
        return None, None
    model = models.build(job.settings.model, splits.input_shape, splits.classes, seed=job.seed).to(device)
    try:
        store.load_trained(job.name, model)
    except CheckpointError:
        return None, None
    return record, model


def _measured(job: RunJob, model: nn.Module, splits: Splits) -> dict[str, Any]:
    settings, device = job.settings, torch.device(job.settings.device)
    found: dict[str, Any] = {}
    for name in ("train", "validation", "test"):
        found[f"{name}_loss"], found[f"{name}_accuracy"] = evaluate(model, getattr(splits, name), device)
    x, y = splits.train.x[: settings.measure_rows], splits.train.y[: settings.measure_rows]
    options = MeasureOptions(rho=settings.rho or MeasureOptions.rho)
    bench = Workbench(Objective(model, F.cross_entropy, (x, y), micro_batch=_MICRO_BATCH), options, job.seed)
    measurements = measure(bench.objective, workbench=bench)
    found["measures"] = {name: {k: v for k, v in vars(m).items() if k != "name"} for name, m in measurements.items()}
    found["landscape"] = _landscape(bench, job.seed)
    found["density"] = _density(bench, job.seed)
    found["audit"], found["proofs"], found["rejected"] = None, {}, []
    if job.seed == 0 and settings.audit_members:
        rows = slice(0, settings.audit_rows)
        report = audit(
            model, F.cross_entropy, (x[rows].to(device), y[rows].to(device)), measures=["default"], kinds=_AUDIT_KINDS,
            members=settings.audit_members, checks=1, budget=_AUDIT_BUDGET * settings.audit_members, laws=False,
            options=replace(options, **_AUDIT_ACCURACY), seed=settings.data_seed,
        )  # fmt: skip
        fields = report.to_dict()
        found["audit"], found["proofs"], found["rejected"] = fields["changes"], report.proofs, fields["rejected"]
        found["audit_verdict"] = report.verdicts
    return found


def _density(bench: Workbench, seed: int) -> dict[str, Any]:
    """The density of Hessian eigenvalues with its band, the top eigenvalue taken out exactly."""
    found = density(bench.objective, runs=_DENSITY_RUNS, steps=_DENSITY_STEPS, deflate=bench.eigen, seed=seed)
    everything = found.to_dict()
    fields = (
        "grid",
        "density",
        "low",
        "high",
        "bandwidth",
        "negative_mass",
        "smallest",
        "largest",
        "runs",
        "steps",
        "products",
    )
    return {name: everything[name] for name in fields}


def _landscape(bench: Workbench, seed: int) -> dict[str, Any]:
    """Loss along a random unit direction and the top eigenvector, with the curvature measured at the centre."""
    objective = bench.objective
    w = objective.point()
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(objective.n, dtype=torch.float64, generator=generator).to(w)
    alphas = torch.linspace(-LANDSCAPE_RADIUS, LANDSCAPE_RADIUS, LANDSCAPE_POINTS).tolist()

    def along(direction: Tensor) -> list[float | None]:
        losses: list[float | None] = []
        for alpha in alphas:
            try:
                losses.append(objective.loss(w + alpha * direction))
            except NonFiniteLossError:
                losses.append(None)
        return losses

    random = random / random.norm()
    top = bench.eigen.vector.to(w)
    start = objective.loss_and_gradient()
    return {
        "alpha": alphas,
        "random": along(random),
        "random_slope": float(start[1] @ random),
        "random_curvature": float(random @ objective.hvp(random)),
        "top": along(top),
        "top_slope": float(start[1] @ top),
        "top_curvature": bench.eigen.value,
    }


@functools.lru_cache(maxsize=1)
def _splits_of(name: str, train_size: int | None, seed: int) -> Splits:
    return data.load(name, train_size=train_size, seed=seed)


def _splits(settings: CompareSettings) -> Splits:
    return _splits_of(settings.data, settings.train_size, settings.data_seed)


def _finite(tree: Any) -> Any:
    """JSON has no NaN and no infinity: such a number is absent, and the verdicts and failures say why."""
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
