"""Jobs on the processes of this machine.

Every worker is a process pool of one, so that a worker that dies takes one job with it and no other. Workers watch their
parent and end with it, also when it is killed.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import SpawnContext
from multiprocessing.queues import SimpleQueue
from typing import Any, TypeAlias

import torch

from flatminima.study.executor import Event, Job, Work, gathered

_Message: TypeAlias = "tuple[int, float | str]"  # a fraction, or the file of a part of a result
_reports: SimpleQueue[_Message] | None = None


class _Worker:
    """One process, started at its first job.

    Its reports have a queue of their own: a killed writer keeps the lock. They are short enough for the pipe to take whole, as
    a reader would wait for ever for the rest of one; parts of results therefore travel in files, and only their paths here.
    """

    def __init__(self, context: SpawnContext, folder: str) -> None:
        self.queue: SimpleQueue[_Message] = context.SimpleQueue()
        self.pool = ProcessPoolExecutor(
            1, mp_context=context, initializer=_start, initargs=(self.queue, os.getpid(), folder)
        )


class LocalExecutor:
    """:class:`~flatminima.study.executor.Executor` on ``workers`` spawned processes."""

    def __init__(self, work: Work[Any], workers: int) -> None:
        self.capacity: int | None = workers
        self._work = work
        self._folder = tempfile.mkdtemp(prefix="flatminima-")
        self._context = multiprocessing.get_context("spawn")
        self._others = set(multiprocessing.active_children())
        self._free: list[_Worker] = []
        self._busy: dict[Future[Any], tuple[int, _Worker]] = {}

    def submit(self, index: int, job: Any) -> None:
        """Give the job to a free worker, or to a new one."""
        worker = self._free.pop() if self._free else _Worker(self._context, self._folder)
        with _interrupts_ignored():
            self._busy[worker.pool.submit(_call, self._work, job, index, self._folder)] = index, worker

    def events(self, seconds: float) -> Iterator[Event]:
        """Reports first, then what has ended."""
        done, _ = wait(self._busy, timeout=seconds, return_when=FIRST_COMPLETED)
        for _, worker in self._busy.values():
            while not worker.queue.empty():
                index, message = worker.queue.get()
                yield Event(index, part=_read(message)) if isinstance(message, str) else Event(index, fraction=message)
        for future in done:
            index, worker = self._busy.pop(future)
            error = future.exception()
            if isinstance(error, BrokenProcessPool):
                worker.pool.shutdown(wait=False)
                yield Event(index, lost="its process was killed, or ran out of memory")
                continue
            self._free.append(worker)
            yield Event(index, error=error) if error else Event(index, ended=True, result=future.result())

    def close(self) -> None:
        """Wait for the idle processes to end."""
        for worker in self._free:
            worker.pool.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)

    def kill(self) -> None:
        """Terminate every process that was started here."""
        for worker in [*self._free, *(worker for _, worker in self._busy.values())]:
            worker.pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - self._others:
            process.terminate()
        shutil.rmtree(self._folder, ignore_errors=True)


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


def _start(queue: SimpleQueue[_Message], parent: int, folder: str) -> None:
    global _reports
    _reports = queue
    torch.set_num_threads(1)
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # where it was not inherited
    threading.Thread(target=_end_with_parent, args=(parent, folder), daemon=True).start()


def _end_with_parent(parent: int, folder: str) -> None:
    while os.getppid() == parent:
        time.sleep(0.2)
    shutil.rmtree(folder, ignore_errors=True)  # the parent was killed and could not
    os._exit(1)


def _call(work: Work[Job], job: Job, index: int, folder: str) -> Any:
    def report(fraction: float) -> None:
        if _reports is not None:
            _reports.put((index, fraction))

    def part(item: Any) -> None:
        if _reports is None:
            return
        path = ""
        try:
            handle, path = tempfile.mkstemp(dir=folder)
            with os.fdopen(handle, "wb") as stream:
                pickle.dump(item, stream)
        except OSError:  # no room: it comes with the result
            if path:
                os.unlink(path)
        else:
            _reports.put((index, path))

    return gathered(work(job, report), part)


def _read(path: str) -> tuple[Any]:
    with open(path, "rb") as stream:
        item = pickle.load(stream)
    os.unlink(path)
    return (item,)
