"""SWAD under the DomainBed protocol: leave one domain out, read every method off the same trainings, compare on the target.

After Cha et al., "SWAD: Domain Generalization by Seeking Flat Minima" (NeurIPS 2021, arXiv:2102.08604), and Gulrajani and
Lopez-Paz, "In Search of Lost Domain Generalization" (ICLR 2021).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flatminima.names import unknown
from flatminima.protocols.domains_algorithms import ALGORITHMS, split_model
from flatminima.protocols.domains_cell import Cell, build, run_cell
from flatminima.protocols.domains_settings import DomainSettings
from flatminima.protocols.domains_summary import summarise
from flatminima.protocols.domains_views import View, divided, domain_data, without
from flatminima.study.settings import SettingsError
from flatminima.study.store import ResultStore
from flatminima.study.tasks import run_tasks

DEFAULT_ALGORITHMS = tuple(ALGORITHMS)


def cells(
    settings: DomainSettings,
    targets: Sequence[str] | None = None,
    *,
    seeds: int = 3,
    algorithms: Sequence[str] = DEFAULT_ALGORITHMS,
    draws: int = 1,
) -> dict[str, Cell]:
    """The trainings of an experiment by name, ERM's first: everything about SWAD is read off those.

    Reads the data set, so that whatever is wrong with it is said before any work is spent.

    Args:
        settings: of every training.
        targets: domains to leave out, each in turn; all by default.
        seeds: 0, 1, ...
        algorithms: of :data:`ALGORITHMS`.
        draws: of hyper-parameters; 1: the defaults only.

    Raises:
        SettingsError, DataError: an unknown name, a number out of range, data or a model that cannot be used.
    """
    for name, value in (("seeds", seeds), ("draws", draws)):
        if value < 1:
            raise SettingsError(f"--{name} must be at least 1, got {value}")
    if not algorithms or len(set(algorithms)) < len(algorithms):
        raise SettingsError(
            f"--algorithms must name at least one and none twice, got {', '.join(algorithms) or 'none'}"
        )
    for algorithm in algorithms:
        if algorithm not in ALGORITHMS:
            raise SettingsError(unknown("algorithm", algorithm, ALGORITHMS))
    data = domain_data(settings)
    chosen = list(data.domains) if targets is None else list(targets)
    domains = divided(data, settings.held_out, 0)
    for target in chosen:
        without(domains, target)
    if not chosen or len(set(chosen)) < len(chosen):
        raise SettingsError(
            f"--targets must name at least one domain and none twice, got {', '.join(chosen) or 'none'}"
        )
    model = build(settings, View(settings, data.natural), data.shape, len(data.classes), 0)
    if "coral" in algorithms:
        split_model(model)
    made = [
        Cell(settings, algorithm, target, seed, draw)
        for algorithm in algorithms
        for seed in range(seeds)
        for draw in range(draws)
        for target in chosen
    ]
    return {cell.name: cell for cell in made}


def open_store(settings: DomainSettings, directory: Path) -> ResultStore:
    """The directory of an experiment. Targets, seeds, algorithms and draws may grow; the settings may not change.

    Raises:
        StoreError: it holds something else.
    """
    return ResultStore(directory, {"experiment": "swad", **settings.to_dict()})


def reproduce_swad(
    tasks: Mapping[str, Cell],
    directory: Path,
    *,
    workers: int | None = None,
    ray: str | None = None,
    run: bool = True,
    command: str = "flatminima reproduce swad",
    beside: Sequence[Mapping[str, Any]] = (),
    progress: Callable[[str, float], None] = lambda name, fraction: None,
) -> dict[str, Any]:
    """Run an experiment, or what is left of it, and return its results.

    ``directory`` then holds ``runs/``, one record per training; what is there is not done again. The results do not depend on
    ``workers``, on ``ray`` or on interruptions, apart from the times.

    Args:
        tasks: of :func:`cells`.
        directory: where to.
        workers, ray: where to run; see :func:`~flatminima.study.runner.run_jobs`.
        run: ``False`` only puts together what is there, and says what is missing.
        command: recorded in the results.
        beside: results of other data sets, for the sign-flip test over all of them.
        progress: called with a training's name and the fraction of it that is done.

    Raises:
        StoreError: the directory holds something else.
        SettingsError: nothing is there, and ``run`` is off.

    Example (worker processes import the calling script, so it needs its ``__main__`` guard)::

        if __name__ == "__main__":
            results = reproduce_swad(cells(preset("rotated-mnist"), ["45"], seeds=1), Path("runs/try"))
    """
    settings = next(iter(tasks.values())).settings
    store = open_store(settings, directory)
    if run:
        accelerated = settings.device != "cpu"
        run_tasks(
            run_cell, tasks, store, workers=workers, ray=ray, resources={"num_gpus": 1.0} if accelerated else None,
            progress=progress,
        )  # fmt: skip
    records = {name: record for name in tasks if (record := store.result(name)) is not None}
    if not records:
        raise SettingsError(f"{directory} holds no finished run of this experiment yet; run it without --render")
    return summarise(settings, tasks, records, command, beside)
