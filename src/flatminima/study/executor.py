"""What the runner needs of a place where jobs run, whether that is this machine or a cluster."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, TypeVar

Job = TypeVar("Job")
Report: TypeAlias = Callable[[float], None]
Work: TypeAlias = Callable[[Job, Report], Any]


@dataclass(frozen=True)
class Event:
    """Something that happened to the job at ``index``.

    Exactly one of these holds: it is ``fraction`` done; it made a ``part`` of its result, in a tuple of one; it ``ended`` with
    ``result``; it raised ``error``; its process is ``lost`` (killed, out of memory, machine gone), which says nothing about the
    job itself.
    """

    index: int
    fraction: float | None = None
    part: tuple[Any] | None = None
    ended: bool = False
    result: Any = None
    error: BaseException | None = None
    lost: str = ""


def gathered(result: Any, part: Callable[[Any], None]) -> Any:
    """What a job returned; from a generator, the list of what it yields, each told to ``part`` as it comes."""
    if not isinstance(result, Generator):
        return result
    parts = []
    for item in result:
        parts.append(item)
        part(item)
    return parts


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
