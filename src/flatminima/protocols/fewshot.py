"""F2M and incremental few-shot learning: one base network per kind of training and seed, then streams of few-shot sessions.

After Shi et al., "Overcoming Catastrophic Forgetting in Incremental Few-Shot Learning by Finding Flat Minima" (NeurIPS 2021,
arXiv:2111.01549).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flatminima.optim.flat_region import FlatRegion
from flatminima.protocols import fewshot_views
from flatminima.protocols.fewshot_base import BaseCell, new_network, run_base, weights_name
from flatminima.protocols.fewshot_cell import SessionCell, cell_name, run_sessions
from flatminima.protocols.fewshot_flatness import ProbeCell, probe_name, run_probe
from flatminima.protocols.fewshot_methods import ARMS, BASES, DEFAULT_METHODS, METHODS, base_settings, chosen_methods
from flatminima.protocols.fewshot_network import EmbeddingNetwork
from flatminima.protocols.fewshot_settings import FewShotSettings
from flatminima.protocols.fewshot_summary import summarise
from flatminima.protocols.fewshot_views import View, data_and_split
from flatminima.study.settings import SettingsError
from flatminima.study.store import ResultStore, StoreError, read_json, write_json
from flatminima.study.tasks import Result, run_tasks


@dataclass(frozen=True)
class Plan:
    """What an experiment consists of.

    Attributes:
        settings: of everything.
        methods: names, in the order of the tables.
        seeds: base trainings of every kind; a seed also decides class order and shots.
        draws: of shots, within every seed.
    """

    settings: FewShotSettings
    methods: tuple[str, ...]
    seeds: int
    draws: int

    @property
    def bases(self) -> list[str]:
        """Kinds of base training that the methods need."""
        return [base for base in BASES if any(METHODS[name].base == base for name in self.methods)]

    @property
    def streams(self) -> list[tuple[str, str]]:
        """Base and arm of every stream of sessions; methods that differ in the classifier alone share one."""
        wanted = {(METHODS[name].base, METHODS[name].arm) for name in self.methods}
        return [(base, arm) for base in BASES for arm in ARMS if (base, arm) in wanted]

    def base_cells(self) -> dict[str, BaseCell]:
        """The first stage, seed by seed, so that early results compare all methods."""
        made = [BaseCell(self.settings, base, seed, self.draws) for seed in range(self.seeds) for base in self.bases]
        return {cell.name: cell for cell in made}

    def second_stage(self) -> dict[str, tuple[str, int]]:
        """Tasks of the second stage by name, with the base and seed whose network they need.

        Those of a network stand together, so that a process can keep its activations.
        """
        named: dict[str, tuple[str, int]] = {}
        for seed in range(self.seeds):
            for base in self.bases:
                if self.settings.probe_rows:
                    named[probe_name(base, seed)] = base, seed
                for b, arm in self.streams:
                    if b == base:
                        named |= {cell_name(base, arm, seed, draw): (base, seed) for draw in range(self.draws)}
        return named


def plan(
    settings: FewShotSettings, methods: Sequence[str] = DEFAULT_METHODS, *, seeds: int = 3, draws: int = 5
) -> Plan:
    """Check an experiment before any work is spent: reads labels, makes every split and one network.

    Args:
        settings: of everything.
        methods: of :data:`~flatminima.protocols.fewshot_methods.METHODS`, or ``["all"]``.
        seeds: base networks of every kind.
        draws: of shots, within each seed.

    Raises:
        SettingsError, DataError: an unknown name, a number out of range, data or a model that cannot be used.
    """
    for name, value in (("seeds", seeds), ("draws", draws)):
        if value < 1:
            raise SettingsError(f"--{name} must be at least 1, got {value}")
    made = Plan(settings, tuple(chosen_methods(methods)), seeds, draws)
    for base in made.bases:
        base_settings(settings, base)  # refuses settings that its changes make impossible
    if settings.joint_iterations == 0:
        # cRT may take the features of the base network as they are.
        untrained = {"joint": "joint"} | ({"crt": "crt with --joint scratch"} if settings.joint == "scratch" else {})
        for name in made.methods:
            if name in untrained:
                raise SettingsError(
                    f"{untrained[name]} needs --joint-iterations of at least 1, got 0: it would be an untrained network"
                )
    for seed in range(seeds if settings.split is None else 1):
        data, split = data_and_split(settings, seed, draws)
        if "flat-swad" in made.bases and len(split.held_out) == 0:
            raise SettingsError(
                f"f2m-swad needs base images held out for its validation loss, and --held-out {settings.held_out:g} leaves none"
            )
        if seed == 0:
            if settings.crop is not None and settings.crop > data.shape[1]:
                raise SettingsError(f"crop {settings.crop} is larger than the stored {data.shape[1]} pixels")
            view = View(settings, data.train, split.train)
            network = new_network(settings, data, split, view, 0)
            with torch.no_grad():
                network.eval()(view.clean(data.train, split.train[:1]))
            _check_boxes(made, network)
    return made


def _check_boxes(made: Plan, network: EmbeddingNetwork) -> None:
    """Refuse a box that base training could not be begun in."""
    for base in made.bases:
        if BASES[base].kind in ("flat", "swad"):
            settings = base_settings(made.settings, base)
            try:
                FlatRegion(
                    network.region, settings.bound, relative=settings.relative, noise=settings.noise,
                    antithetic=settings.antithetic,
                )  # fmt: skip
            except ValueError as error:
                raise SettingsError(f"the box of the base {base}: {error}") from error


def open_store(settings: FewShotSettings, directory: Path) -> ResultStore:
    """The directory of an experiment. Methods, seeds and draws may grow; the settings may not change.

    Raises:
        StoreError: it holds something else.
    """
    return ResultStore(directory, {"experiment": "f2m", **settings.to_dict()})


def reproduce_f2m(
    made: Plan,
    directory: Path,
    *,
    workers: int | None = None,
    ray: str | None = None,
    run: bool = True,
    command: str = "flatminima reproduce f2m",
    progress: Callable[[str, float], None] = lambda name, fraction: None,
) -> dict[str, Any]:
    """Run an experiment, or what is left of it, and return its results.

    ``directory`` then holds ``splits/``, one JSON file of class order, shots and test rows per seed, and ``runs/``: a record
    and a file of weights per base network, a record per stream of sessions. What is there is not done again. The results do not
    depend on ``workers``, on ``ray`` or on interruptions, apart from the times.

    Args:
        made: from :func:`plan`.
        directory: where to.
        workers, ray: where to run; see :func:`~flatminima.study.runner.run_jobs`.
        run: ``False`` only puts together what is there, and says what is missing.
        command: recorded in the results.
        progress: called with a task's name and the fraction of it that is done.

    Raises:
        DataError: a picture cannot be read; before any training.
        StoreError: the directory holds something else, or other pictures or another split gave what it holds.
        SettingsError: nothing is there, and ``run`` is off.

    Example (worker processes import the calling script, so it needs its ``__main__`` guard)::

        if __name__ == "__main__":
            results = reproduce_f2m(plan(preset("digits"), seeds=1, draws=1), Path("runs/try"))
    """
    settings = made.settings
    if run and not all((directory / "runs" / f"{name}.json").exists() for name in made.base_cells()):
        _check_pictures(settings)
    store = open_store(settings, directory)
    resources = {"num_gpus": 1.0} if settings.device != "cpu" else None
    splits = _checked_splits(made, directory)
    if run:
        for path, content in splits.items():
            write_json(path, content)
        first = made.base_cells()
        for name in made.second_stage():
            progress(name, 0.0 if store.result(name) is None else 1.0)
        run_tasks(run_base, first, store, workers=workers, ray=ray, resources=resources, progress=progress)
        second = second_cells(made, store)
        run_tasks(_run_second, second, store, workers=workers, ray=ray, resources=resources, progress=progress)
    names = [*made.base_cells(), *made.second_stage()]
    records = {name: found for name in names if (found := store.result(name)) is not None}
    failures = [record for name in made.base_cells() if (record := records.get(name)) and record["failure"] is not None]
    if len(failures) == len(made.base_cells()):
        raise SettingsError(
            f"every base training diverged ({failures[0]['base']}: {failures[0]['failure']['reason']}): lower --lr, and choose "
            "another --out"
        )
    if not any(record["cell"] == "sessions" for record in records.values()):
        raise SettingsError(f"{directory} holds no finished stream of sessions yet; run it without --render")
    return summarise(made, records, command)


def _check_pictures(settings: FewShotSettings) -> None:
    """Decode every picture of a folder once: one that is broken would end the experiment hours later.

    Raises:
        DataError: it cannot be read.
    """
    data = fewshot_views.loaded(settings.data, settings.size)
    for images in (data.train,) if settings.validate else (data.train, data.test):
        if images.check is not None:
            images.check()


def second_cells(made: Plan, store: ResultStore) -> dict[str, SessionCell | ProbeCell]:
    """What is left of the second stage, on the base networks that are there; a base training that diverged has none.

    Raises:
        StoreError: a network that is needed is not there, or not the one its record is of.
    """
    cells: dict[str, SessionCell | ProbeCell] = {}
    left = {needed for name, needed in made.second_stage().items() if store.result(name) is None}
    for base_cell in made.base_cells().values():
        record = store.result(base_cell.name)
        if record is None or record["failure"] is not None or (base_cell.base, base_cell.seed) not in left:
            continue
        path = store.file(base_cell.name, ".safetensors")
        content = path.read_bytes() if path.is_file() else b""
        if weights_name(content) != record["weights"]:
            wrong = "not what its record says" if path.is_file() else "missing"
            raise StoreError(f"{path} is {wrong}; remove {store.file(base_cell.name, '.json')} to train it again")
        base, seed, digest = base_cell.base, base_cell.seed, str(record["weights"])
        if made.settings.probe_rows:
            probe = ProbeCell(made.settings, base, seed, made.draws, content, digest)
            cells[probe.name] = probe
        for b, arm in made.streams:
            if b == base:
                for draw in range(made.draws):
                    cell = SessionCell(made.settings, base, arm, seed, draw, made.draws, content, digest)
                    cells[cell.name] = cell
    return {name: cell for name, cell in cells.items() if store.result(name) is None}


def _run_second(cell: SessionCell | ProbeCell, report: Callable[[float], None]) -> Result:
    return Result(run_sessions(cell, report) if isinstance(cell, SessionCell) else run_probe(cell, report))


def _checked_splits(made: Plan, directory: Path) -> dict[Path, dict[str, Any]]:
    """The splits by their files, checked against those that finished runs have left, all of whose draws stay.

    The settings hold the name of the data and the path of a split, not what is in them.
    """
    folder = directory / "splits"
    folder.mkdir(exist_ok=True)
    wanted: dict[Path, dict[str, Any]] = {}
    for seed in range(made.seeds if made.settings.split is None else 1):
        path = folder / f"seed{seed}.json"
        new = data_and_split(made.settings, seed, made.draws)[1].to_dict()
        old = read_json(path)
        if old is not None:
            count = min(len(old.get("shots", ())), len(new["shots"]))
            draws = {name: count for name in ("shots", "files")}
            other = [
                name for name in new if _first(old.get(name), draws.get(name)) != _first(new[name], draws.get(name))
            ]
            if other:
                raise StoreError(
                    f"{path} has other {', '.join(other)} than the data give now: the pictures or the split have changed since "
                    "these runs; choose another --out"
                )
            new = max(old, new, key=lambda split: len(split["shots"]))
        wanted[path] = new
    return wanted


def _first(values: Any, count: int | None) -> Any:
    return values if count is None or values is None else values[:count]
