"""A study from its file to its database: batches of networks on processes or a cluster, each record kept as it comes."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from flatminima.study import network_runs
from flatminima.study.claims import LEASE
from flatminima.study.database import StudyDatabase, StudyError
from flatminima.study.executor import Report
from flatminima.study.export import flattened
from flatminima.study.grid import Grid
from flatminima.study.parts import even_parts
from flatminima.study.run_spec import Record, RunSpec
from flatminima.study.runner import WorkerLostError, run_jobs
from flatminima.study.versions import current_version, differences

RunBatch: TypeAlias = Callable[[Sequence[RunSpec], Report], Iterable[Record]]
LARGEST_BATCH = 100  # beyond it an ensemble gains little, and workers would wait for the last one
_CLUSTER = 8  # workers that a cluster is taken to have where nobody says
_POLL = 1.0  # seconds between looks at what another process does


@dataclass(frozen=True)
class Progress:
    """Where a study stands.

    Attributes:
        total: networks.
        recorded: those with a record, whoever made it.
        underway: sum of the fractions done of the others.
        elsewhere: this process has nothing left to do but wait for runs that others have claimed.
    """

    total: int
    recorded: int
    underway: float = 0.0
    elsewhere: bool = False


def run_study(
    grid: Grid,
    path: Path,
    *,
    workers: int | None = None,
    ray: str | None = None,
    resources: Mapping[str, float] | None = None,
    batch: int | None = None,
    other_version: bool = False,
    extend: bool = False,
    meta: Mapping[str, Any] | None = None,
    progress: Callable[[Progress], None] = lambda progress: None,
    run_batch: RunBatch = network_runs.run_batch,
) -> dict[str, int]:
    """Make the networks of a study that its database does not hold yet.

    The records depend neither on ``workers``, ``ray`` and ``batch`` nor on interruptions. Several processes may be given the
    same file and share the work.

    Args:
        grid: the study.
        path: of the database; made if absent.
        workers, ray, resources: where to run; see :func:`~flatminima.study.runner.run_jobs`.
        batch: most networks that a worker is given at a time; by default so many that every worker gets some, and no more than
            are trained at once.
        other_version: go on although code, packages or data are not those of the finished runs. Which run was made with which
            is recorded.
        extend: the grid may have more networks than the database, as with more seeds. Looking at results and then adding runs
            until they please is optional stopping: decide it before.
        meta: more entries, such as the rules of decision, which have to be there before the first result.
        progress: called in this process.
        run_batch: a module-level function that makes the records of some networks, at once or one by one.

    Returns:
        The number of runs by status.

    Raises:
        StudyError: the file holds another study, or was made with another version (the differences are shown), or has results
            and other ``meta``; a worker runs another version; the disk is full. What was finished is kept.
        DataError: the data are not there.
        Exception: as of :func:`~flatminima.study.runner.run_jobs`.
    """
    if batch is not None and batch < 1:
        raise StudyError(f"batch must be at least 1, got {batch}")
    if workers is not None and workers < 1:
        raise StudyError(f"workers must be at least 1, got {workers}")
    runs = grid.runs()
    names = {run.data.name for run in runs}
    version = current_version(run_batch.__module__, names)
    with StudyDatabase(path, create=True) as database:
        about = {"study": grid.name, "description": grid.description, "digest": grid.digest, "grid": grid.text}
        database.begin(runs, {**about, **(meta or {})}, version)
        _check_grid(database, grid, runs, about, extend)
        _check_version(database, version, other_version)
        for key, value in (meta or {}).items():
            database.set_meta(key, value)
        share = batch or min(LARGEST_BATCH, math.ceil(len(runs) / (workers or (_CLUSTER if ray else 1))))
        known = run_batch is network_runs.run_batch  # another function may train as many at once as it likes
        at_once = network_runs.members_at_once if known and batch is None else None
        with _renewed(database):
            _run(database, _Work(run_batch, version), share, at_once, workers, ray, resources, progress)
        return database.counts()


@dataclass(frozen=True)
class _Work:
    """What a worker does with a batch; it refuses to do it with other code, packages or data than the driver."""

    run_batch: RunBatch
    version: Mapping[str, Any]

    def __call__(self, specs: Sequence[RunSpec], report: Report) -> Generator[Record, None, None]:
        names = {spec.data.name for spec in specs}
        expected = {**self.version, "data": {name: self.version["data"][name] for name in names}}
        if found := differences(expected, current_version(self.run_batch.__module__, names)):
            raise StudyError(
                f"a worker differs from the driver ({'; '.join(found)}): results would differ; "
                "use the same code, packages and data everywhere, and do not change them while a study runs"
            )
        yield from self.run_batch(specs, report)


class _Batches(Sequence[Sequence[RunSpec]]):
    """Batches of networks. Taking one claims it: what has a record by then, or somebody else has begun, is left out."""

    def __init__(self, database: StudyDatabase, batches: Sequence[Sequence[RunSpec]]) -> None:
        self._database = database
        self._batches = batches
        self.taken: dict[int, set[str]] = {}

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: Any) -> Any:
        specs = self._batches[index]
        free = set(self._database.claims.take([spec.id for spec in specs]))
        self.taken[index] = free
        return tuple(spec for spec in specs if spec.id in free)


class _Keeper:
    """Keeps records as they come, and tells how far the study is."""

    def __init__(self, database: StudyDatabase, batches: _Batches, progress: Callable[[Progress], None]) -> None:
        self._database = database
        self._batches = batches
        self._progress = progress
        self._left: dict[int, set[str]] = {}
        self._fraction: dict[int, float] = {}

    def part(self, index: int, record: Record) -> None:
        """One record of a batch."""
        if not isinstance(record, Record):
            raise TypeError(f"run_batch gave {record!r}: expected a Record")
        self._database.save(record)
        self._unrecorded(index).discard(record.id)
        self._tell()

    def done(self, index: int, records: Sequence[Record]) -> None:
        """All records of a batch, most of which came before."""
        for record in records:
            if record.id in self._unrecorded(index):
                self.part(index, record)
        if self._unrecorded(index):
            missed = ", ".join(sorted(run[:12] for run in self._unrecorded(index)))
            raise StudyError(f"run_batch gave no record of the runs {missed}: expected one of each")

    def fraction(self, index: int, fraction: float) -> None:
        """How far a batch is."""
        self._fraction[index] = fraction
        self._tell()

    def _unrecorded(self, index: int) -> set[str]:
        return self._left.setdefault(index, set(self._batches.taken[index]))

    def _tell(self) -> None:
        underway = 0.0
        for index, fraction in self._fraction.items():
            taken, left = len(self._batches.taken[index]), len(self._unrecorded(index))
            underway += max(0.0, fraction * taken - (taken - left))
        self._progress(_progress(self._database, underway=underway))


def _run(
    database: StudyDatabase,
    work: _Work,
    most: int,
    at_once: Callable[[RunSpec], int] | None,
    workers: int | None,
    ray: str | None,
    resources: Mapping[str, float] | None,
    progress: Callable[[Progress], None],
) -> None:
    progress(_progress(database))
    while waiting := database.waiting():
        free = set(database.claims.free([spec.id for spec in waiting]))
        if not free:
            progress(_progress(database, elsewhere=True))
            time.sleep(_POLL)
            continue
        batches = _Batches(database, make_batches((spec for spec in waiting if spec.id in free), most, at_once))
        keeper = _Keeper(database, batches, progress)
        try:
            run_jobs(
                work, batches, workers=workers, ray=ray, resources=resources,
                done=keeper.done, part=keeper.part, progress=keeper.fraction,
            )  # fmt: skip
        except WorkerLostError as error:
            raise StudyError(
                f"a worker died three times on the same batch of at most {most} networks, as when memory runs out; "
                "every finished run is kept: try a smaller batch or fewer workers"
            ) from error
    progress(_progress(database))


def _progress(database: StudyDatabase, underway: float = 0.0, elsewhere: bool = False) -> Progress:
    counts = database.counts()
    total = sum(counts.values())
    return Progress(total, total - counts["waiting"], underway, elsewhere)


@contextlib.contextmanager
def _renewed(database: StudyDatabase) -> Iterator[None]:
    """Claims are renewed while this lasts, and given back in the end."""
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(LEASE / 4):
            with contextlib.suppress(StudyError), StudyDatabase(database.path) as own:
                own.claims.renew(database.claims.owner)

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(StudyError):  # a full disk: they lapse with this process
            database.claims.release()


def _check_grid(
    database: StudyDatabase, grid: Grid, runs: Sequence[RunSpec], about: Mapping[str, Any], extend: bool
) -> None:
    if database.meta("digest") == grid.digest:
        return
    there, now = {spec.id for spec in database.specs()}, {spec.id for spec in runs}
    added, gone = len(now - there), len(there - now)
    if not added and not gone:  # levels in another order
        return
    if extend and not gone:
        history = [*(database.meta("extended") or []), {"added": added, "recorded": len(database.records())}]
        database.extend(runs, {**about, "extended": history})
        return
    advice = "extend it on purpose (--extend), or " if not gone else ""
    raise StudyError(
        f"{database.path} holds another study, {database.meta('study')!r}: {added} networks of this file are not in it and "
        f"{gone} of its {len(there)} are not in this file{_first_difference(database.specs(), runs)}; {advice}"
        "choose another database, or give the study file it was made with (flatminima study export --grid writes it)"
    )


def _first_difference(there: Sequence[RunSpec], now: Sequence[RunSpec]) -> str:
    """The fields in which the first networks that have no counterpart differ; where all are on one side, the first of them."""
    known, wanted = {spec.id for spec in there}, {spec.id for spec in now}
    gone, added = [s for s in there if s.id not in wanted], [s for s in now if s.id not in known]
    if not gone or not added:
        first = (gone + added)[0]
        cell = "".join(f"{name} {level!r}, " for name, level in first.cell)
        return f" (first {cell}subset {first.data.subset_seed}, seed {first.seed})"
    before, after = dict(flattened(gone[0].to_dict())), dict(flattened(added[0].to_dict()))
    fields = [
        f"{name} {before.get(name)!r} there and {after.get(name)!r} now"
        for name in dict.fromkeys([*before, *after])
        if before.get(name) != after.get(name)
    ]
    return f" ({', '.join(fields)})"


def _check_version(database: StudyDatabase, version: Mapping[str, Any], other_version: bool) -> None:
    counts = database.counts()
    recorded = sum(counts.values()) - counts["waiting"]
    found = differences(database.versions()[-1], version)
    if not found or not counts["waiting"]:
        database.use_version(version)
        return
    if (recorded or database.claims.living()) and not other_version:
        how = f"has {recorded} runs made" if recorded else "is at work: another process makes runs"
        raise StudyError(
            f"{database.path} {how} with another version ({'; '.join(found)}): the rest would not be "
            "comparable; restore that version, begin again in another database, or go on nevertheless with --other-version, "
            "which is recorded run by run"
        )
    database.add_version(version)


def make_batches(
    specs: Iterable[RunSpec], most: int, at_once: Callable[[RunSpec], int] | None = None
) -> list[Sequence[RunSpec]]:
    """Networks that can share an ensemble together, at most so many, in parts of about the same size.

    Args:
        specs: of the networks.
        most: in a batch.
        at_once: how many networks like this one are trained at once. A batch of more would keep a worker busy while others have
            nothing left to do.

    Example:
        >>> from flatminima.study.run_spec import DataSpec, ModelSpec
        >>> specs = [RunSpec("s", (), DataSpec("digits", n), ModelSpec("mlp"), seed=s) for n in (100, 50) for s in range(5)]
        >>> [(batch[0].data.rows, len(batch)) for batch in make_batches(specs, 3)]
        [(100, 3), (100, 2), (50, 3), (50, 2)]
    """
    groups: dict[object, list[RunSpec]] = {}
    for spec in specs:
        groups.setdefault(spec.ensemble, []).append(spec)
    batches: list[Sequence[RunSpec]] = []
    for group in groups.values():
        largest = most if at_once is None else min(most, at_once(group[0]))
        batches += even_parts(group, largest)
    return batches
