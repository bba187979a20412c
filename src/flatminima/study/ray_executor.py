"""Jobs on a Ray cluster.

Ray finds the machines and queues the jobs; losing a process or a machine is told to the runner, which decides, so that a
lost job is treated alike here and on one machine. Every machine needs the same version of flatminima and its own copy of the
data; ``FLATMINIMA_DATA`` is handed on where it is set.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
from collections.abc import Iterator, Mapping
from typing import Any

import torch

import flatminima
from flatminima.data.files import VARIABLE
from flatminima.study.executor import Event, Work, gathered

_HANDED_ON = (VARIABLE,)
_PATIENCE = 10.0  # seconds, for a machine to answer at all


class ClusterError(ValueError):
    """The cluster cannot be used; the message says why and what to do."""


class RayExecutor:
    """:class:`~flatminima.study.executor.Executor` on a Ray cluster.

    Args:
        work: a module-level function.
        address: what ``ray.init`` takes: ``host:port``, ``auto`` (the cluster this machine belongs to), ``local`` (a new one
            on this machine). A connection that is already there is used, whatever the address.
        capacity: jobs at once; ``None``: as many as the cluster has room for.
        resources: of a job, as Ray's ``remote`` takes them, such as ``{"num_gpus": 1}``. One core is the default.

    Raises:
        ClusterError: Ray is not installed, or no cluster answers.
    """

    def __init__(
        self, work: Work[Any], address: str, capacity: int | None, resources: Mapping[str, float] | None = None
    ) -> None:
        self.capacity = capacity
        self._ray = ray = _imported()
        self._ours = not ray.is_initialized()
        if self._ours:
            _connect(ray, address)
        self._work = ray.put(work)
        self._remote = ray.remote(max_retries=0, **{"num_cpus": 1, **(resources or {})})(_call)
        self._reports = ray.remote(num_cpus=0)(_Reports).remote()
        self._busy: dict[Any, int] = {}

    def submit(self, index: int, job: Any) -> None:
        """Queue the job at the cluster."""
        reference = self._remote.remote(self._work, job, index, self._reports, flatminima.__version__)
        self._busy[reference] = index

    def events(self, seconds: float) -> Iterator[Event]:
        """Reports first, then what has ended."""
        ray = self._ray
        done, _ = ray.wait(list(self._busy), num_returns=1, timeout=seconds)
        with contextlib.suppress(ray.exceptions.RayError):  # reports are a courtesy
            fractions, parts = ray.get(self._reports.take.remote(), timeout=10)
            for index, item in parts:
                yield Event(index, part=(item,))
            for index, fraction in fractions:
                yield Event(index, fraction=fraction)
        for reference in done:
            index = self._busy.pop(reference)
            try:
                yield Event(index, ended=True, result=ray.get(reference))
            except ray.exceptions.RayTaskError as error:
                yield Event(index, error=error.cause or error)
            except ray.exceptions.RayError as error:
                yield Event(index, lost=str(error).splitlines()[0] if str(error) else type(error).__name__)

    def close(self) -> None:
        """Leave the cluster, if it was entered here."""
        if self._ours:
            self._ray.shutdown()
        else:
            self._ray.kill(self._reports)

    def kill(self) -> None:
        """Cancel what runs and leave."""
        for reference in self._busy:
            with contextlib.suppress(self._ray.exceptions.RayError):
                self._ray.cancel(reference, force=True)
        self.close()


class _Reports:
    """Keeps the latest report of each job, and parts of results, until the driver takes them."""

    def __init__(self) -> None:
        self._latest: dict[int, float] = {}
        self._parts: list[tuple[int, Any]] = []

    def put(self, index: int, fraction: float) -> None:
        self._latest[index] = fraction

    def part(self, index: int, item: Any) -> None:
        self._parts.append((index, item))

    def take(self) -> tuple[list[tuple[int, float]], list[tuple[int, Any]]]:
        latest, self._latest = list(self._latest.items()), {}
        parts, self._parts = self._parts, []
        return latest, parts


def _imported() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ClusterError("--ray needs the package ray: install flatminima[ray]") from error
    return ray


def _connect(ray: Any, address: str) -> None:
    _probe(address)
    environment = {name: os.environ[name] for name in _HANDED_ON if os.environ.get(name)}
    try:
        ray.init(
            address=address, log_to_driver=False, logging_level=logging.WARNING,
            runtime_env={"env_vars": environment} if environment else None,
        )  # fmt: skip
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise _unusable(address, error) from error


def _probe(address: str) -> None:
    """Where nothing listens Ray itself tries for minutes, and then ends the whole process."""
    found = re.fullmatch(r"(?:ray://)?(.+):(\d+)", address)
    if found is None:
        return
    try:
        socket.create_connection((found[1].strip("[]"), int(found[2])), timeout=_PATIENCE).close()
    except (OSError, OverflowError) as error:
        raise _unusable(address, error) from error


def _unusable(address: str, error: Exception) -> ClusterError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ClusterError(
        f"--ray {address}: {reason}; give HOST:PORT of a cluster that is up (ray start --head prints it), "
        "auto for the one this machine belongs to, or local"
    )


def _call(work: Work[Any], job: Any, index: int, reports: Any, version: str) -> Any:
    if flatminima.__version__ != version:
        raise ClusterError(
            f"the driver runs flatminima {version} and a worker {flatminima.__version__}: results would differ; "
            "install the same version on every machine"
        )
    torch.set_num_threads(1)
    result = work(job, lambda fraction: reports.put.remote(index, fraction))
    return gathered(result, lambda item: reports.part.remote(index, item))
