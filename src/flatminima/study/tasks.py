"""Named tasks fanned out over processes or a cluster, each result kept as soon as it is there.

This is the whole of resuming: a task whose record is in the store is not done again. Results travel to the driver, which alone
writes, so workers on other machines need no shared disk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flatminima.study.executor import Job, Work
from flatminima.study.runner import run_jobs
from flatminima.study.store import ResultStore


@dataclass(frozen=True)
class Result:
    """What a task may return instead of a bare record.

    Attributes:
        record: for JSON, not empty; NaN and infinity are refused.
        files: suffix -> content, such as ``{".safetensors": ...}``, kept beside the record.
    """

    record: dict[str, Any]
    files: Mapping[str, bytes] = field(default_factory=dict)


def run_tasks(
    work: Work[Job],
    tasks: Mapping[str, Job],
    store: ResultStore,
    *,
    workers: int | None = None,
    ray: str | None = None,
    resources: Mapping[str, float] | None = None,
    progress: Callable[[str, float], None] = lambda name, fraction: None,
) -> dict[str, dict[str, Any]]:
    """Do the tasks that the store does not hold yet, and return the records of all, in the order given.

    Args:
        work: a module-level function of the task and ``report(fraction)``; returns the record, or a :class:`Result`.
        tasks: name -> what ``work`` is given, picklable.
        store: where records are looked up and kept.
        workers, ray, resources: where to run; see :func:`~flatminima.study.runner.run_jobs`.
        progress: called with a task's name and the fraction done; at the beginning once for every task.

    Raises:
        Exception: as :func:`~flatminima.study.runner.run_jobs`. What was finished by then is kept.

    The records do not depend on ``workers``, on ``ray`` or on interruptions, as long as ``work`` does not.

    Example:
        >>> import pathlib, tempfile
        >>> store = ResultStore(pathlib.Path(tempfile.mkdtemp()) / "squares", {"power": 2})
        >>> store.save("three", {"square": 9})
        >>> run_tasks(pow, {"three": 3}, store)  # nothing is left to do
        {'three': {'square': 9}}
    """
    left = [name for name in tasks if store.result(name) is None]
    for name in tasks:
        progress(name, 0.0 if name in left else 1.0)

    def keep(index: int, found: Any) -> None:
        result = found if isinstance(found, Result) else Result(found)
        if not isinstance(result.record, dict) or not result.record:
            raise TypeError(
                f"task {left[index]!r} returned {result.record!r}: expected a record, a dictionary with entries"
            )
        store.save(left[index], result.record, result.files)

    run_jobs(
        work, [tasks[name] for name in left], workers=workers, ray=ray, resources=resources, done=keep,
        progress=lambda index, fraction: progress(left[index], fraction),
    )  # fmt: skip
    return {name: record for name in tasks if (record := store.result(name)) is not None}
