"""What the runner needs of a place where jobs run, whether that is this machine or a cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, TypeVar

Job = TypeVar("Job")
Report: TypeAlias = Callable[[float], None]
Work: TypeAlias = Callable[[Job, Report], Any]


@dataclass(frozen=True)
class Event:
    """Something that happened to the job at ``index``.

    Exactly one of these holds: it is ``fraction`` done; it ``ended`` with ``result``; it raised ``error``; its process is
    ``lost`` (killed, out of memory, machine gone), which says nothing about the job itself.
    """

    index: int
    fraction: float | None = None
    ended: bool = False
    result: Any = None
    error: BaseException | None = None
    lost: str = ""


class Executor(Protocol):
    """A place where jobs run, each in a process with one computing thread.

    Attributes:
        capacity: how many jobs to submit at once; ``None``: all, because somebody else queues them.
    """

    capacity: int | None

    def submit(self, index: int, job: Any) -> None:
        """Begin a job, or queue it."""

    def events(self, seconds: float) -> Iterable[Event]:
        """What happened since the last call; waits at most about ``seconds`` when nothing did."""

    def close(self) -> None:
        """All jobs have ended: free what was taken."""

    def kill(self) -> None:
        """End the running jobs now and free what was taken."""
