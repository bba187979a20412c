"""Many independent jobs on the processes of one machine.

Every job runs in a process of its own pool with one computing thread, whatever the number of workers, so that results do not
depend on it. Workers watch their parent and end with it, also when it is killed.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing.queues import SimpleQueue
from typing import TypeVar

import torch

Job = TypeVar("Job")
Progress = Callable[[float], None]

_reports: SimpleQueue[tuple[int, float]] | None = None


def run_jobs(
    work: Callable[[Job, Progress], None],
    jobs: Sequence[Job],
    *,
    workers: int,
    progress: Callable[[int, float], None] = lambda index, fraction: None,
) -> None:
    """Call ``work(job, report)`` for every job, ``workers`` at a time.

    Args:
        work: a module-level function; ``report(fraction)`` tells how far it is.
        jobs: picklable.
        workers: processes, at least 1.
        progress: called in this process with a job's index and the fraction done; 1 when it has ended.

    Raises:
        Exception: the first error of a job; jobs not yet begun are then cancelled, and running ones are ended.
        KeyboardInterrupt: passed on after the workers have been ended.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if not jobs:
        return
    context = multiprocessing.get_context("spawn")
    queue: SimpleQueue[tuple[int, float]] = context.SimpleQueue()
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        min(workers, len(jobs)), mp_context=context, initializer=_start, initargs=(queue, os.getpid())
    )
    try:
        with _interrupts_ignored():
            pending: dict[Future[None], int] = {pool.submit(_work, work, job, i): i for i, job in enumerate(jobs)}
        while pending:
            done, _ = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
            while not queue.empty():
                progress(*queue.get())
            for future in done:
                index = pending.pop(future)
                future.result()
                progress(index, 1.0)
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    pool.shutdown()


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Processes started within inherit this: Ctrl-C reaches the whole group, and the parent alone decides."""
    try:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _start(queue: SimpleQueue[tuple[int, float]], parent: int) -> None:
    global _reports
    _reports = queue
    torch.set_num_threads(1)
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # where it was not inherited
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def _work(work: Callable[[Job, Progress], None], job: Job, index: int) -> None:
    def report(fraction: float) -> None:
        if _reports is not None:
            _reports.put((index, fraction))

    work(job, report)
