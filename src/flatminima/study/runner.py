"""Many independent jobs, on the processes of one machine or on a Ray cluster: one code path for both.

Every job runs with one computing thread, whatever the number of workers and wherever it runs, so that results do not depend
on it. What a job returns comes back to the caller as soon as the job has ended.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flatminima.study.executor import Executor, Job, Report, Work
from flatminima.study.local_executor import LocalExecutor
from flatminima.study.ray_executor import RayExecutor

__all__ = ["Report", "Work", "WorkerLostError", "run_jobs"]

ATTEMPTS = 3  # of a job whose process died: twice may be bad luck
_WAIT = 0.2


class WorkerLostError(RuntimeError):
    """The process of one job died at every attempt."""


def run_jobs(
    work: Work[Job],
    jobs: Sequence[Job],
    *,
    workers: int | None = None,
    ray: str | None = None,
    resources: Mapping[str, float] | None = None,
    done: Callable[[int, Any], None] = lambda index, result: None,
    part: Callable[[int, Any], None] = lambda index, item: None,
    progress: Callable[[int, float], None] = lambda index, fraction: None,
) -> None:
    """Call ``work(job, report)`` for every job, ``workers`` at a time.

    A job whose process dies (killed, out of memory, machine gone) is begun again, up to three times in all.

    Args:
        work: a module-level function; ``report(fraction)`` tells how far it is. A generator's result is the list of what it
            yields.
        jobs: picklable. A job is taken from the sequence when it is begun, also when it is begun again.
        workers: at once, at least 1. Default: one; on a cluster, as many as it has room for.
        ray: address of a Ray cluster (``host:port``, ``auto``, ``local``) instead of processes of this machine.
        resources: of a job on the cluster, such as ``{"num_gpus": 1}``; one core by default.
        done: called in this process with a job's index and what ``work`` returned for it, in the order of completion.
        part: called in this process with a job's index and what its generator yielded, soon after; parts can get lost with a
            process, and all of them are in the result.
        progress: called in this process with a job's index and the fraction done; 1 when it has ended.

    Raises:
        Exception: the first error of a job; jobs not yet begun are then cancelled, and running ones are ended.
        WorkerLostError: a job's process died three times.
        ClusterError: Ray is missing or does not answer.
        KeyboardInterrupt: passed on after the workers have been ended.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if not jobs:
        return
    executor: Executor = (
        LocalExecutor(work, min(workers or 1, len(jobs))) if ray is None else RayExecutor(work, ray, workers, resources)
    )
    try:
        _run(executor, jobs, done, part, progress)
    except BaseException:
        executor.kill()
        raise
    executor.close()


def _run(
    executor: Executor,
    jobs: Sequence[Job],
    done: Callable[[int, Any], None],
    part: Callable[[int, Any], None],
    progress: Callable[[int, float], None],
) -> None:
    waiting = deque(range(len(jobs)))
    attempts: Counter[int] = Counter()
    running = 0
    while waiting or running:
        while waiting and (executor.capacity is None or running < executor.capacity):
            index = waiting.popleft()
            attempts[index] += 1
            executor.submit(index, jobs[index])
            running += 1
        # What has ended well is kept before an error ends everything.
        for event in sorted(executor.events(_WAIT), key=lambda event: event.error is not None):
            if event.fraction is not None:
                progress(event.index, event.fraction)
                continue
            if event.part is not None:
                part(event.index, event.part[0])
                continue
            running -= 1
            if event.error is not None:
                raise event.error
            if event.ended:
                done(event.index, event.result)
                progress(event.index, 1.0)
            elif attempts[event.index] < ATTEMPTS:
                waiting.appendleft(event.index)
            else:
                raise WorkerLostError(f"job {event.index} ({jobs[event.index]}) ended {ATTEMPTS} times: {event.lost}")
