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
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing.queues import SimpleQueue
from typing import Any, TypeVar

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
    stop = context.Event()
    pool = ProcessPoolExecutor(
        min(workers, len(jobs)), mp_context=context, initializer=_start, initargs=(queue, stop, os.getpid())
    )
    try:
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
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def _start(queue: SimpleQueue[tuple[int, float]], stop: Any, parent: int) -> None:
    global _reports
    _reports = queue
    torch.set_num_threads(1)
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    threading.Thread(target=_end_with_parent, args=(stop, parent), daemon=True).start()


def _end_with_parent(stop: Any, parent: int) -> None:
    while os.getppid() == parent and not stop.is_set():
        time.sleep(0.2)
    os._exit(1)


def _work(work: Callable[[Job, Progress], None], job: Job, index: int) -> None:
    def report(fraction: float) -> None:
        if _reports is not None:
            _reports.put((index, fraction))

    work(job, report)
