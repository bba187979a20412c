"""Which process is about to make which run of a study, so that two of them on one file do not do the same work."""

from __future__ import annotations

import os
import secrets
import socket
import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

LEASE = 120.0  # seconds without a renewal after which a claim is void


class Claims:
    """Claims of this process in the database of a study.

    A claim holds until its run is recorded, it is released, its process is gone (on this machine), or it was not renewed for
    ``LEASE`` seconds (elsewhere).

    Args:
        connection: to the database.
        rows: answers a query.
        transaction: makes what is done within it one transaction.
    """

    def __init__(
        self,
        connection: sqlite3.Connection,
        rows: Callable[..., list[Any]],
        transaction: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._connection = connection
        self._rows = rows
        self._transaction = transaction
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"

    def take(self, runs: Sequence[str]) -> list[str]:
        """Those of these runs that are neither recorded nor claimed by a living process; they are claimed now."""
        with self._transaction():
            free = self.free(runs)
            rows = ((self.owner, time.time() + LEASE, run) for run in free)
            self._connection.executemany("UPDATE runs SET owner = ?, lease = ? WHERE id = ?", rows)
            return free

    def free(self, runs: Sequence[str]) -> list[str]:
        """The same, and nothing is claimed."""
        now = time.time()
        query = "SELECT id, owner, lease FROM runs WHERE status IS NULL"
        claimed = {
            run: owner is not None and owner != self.owner and _alive(owner, lease, now)
            for run, owner, lease in self._rows(query)
        }
        return [run for run in runs if not claimed.get(run, True)]

    def renew(self, owner: str | None = None) -> None:
        """Hold the claims for another ``LEASE`` seconds; ``owner`` from a thread with a connection of its own."""
        with self._transaction():
            values = time.time() + LEASE, owner or self.owner
            self._connection.execute("UPDATE runs SET lease = ? WHERE owner = ?", values)

    def release(self) -> None:
        """Give the claims back."""
        with self._transaction():
            self._connection.execute("UPDATE runs SET owner = NULL, lease = NULL WHERE owner = ?", (self.owner,))

    def living(self) -> dict[str, int]:
        """Process that works on the study -> the number of runs it has claimed."""
        query = "SELECT owner, max(lease), count(*) FROM runs WHERE owner IS NOT NULL GROUP BY owner"
        now = time.time()
        return {owner: count for owner, lease, count in self._rows(query) if _alive(owner, lease, now)}


def _alive(owner: str, lease: float, now: float) -> bool:
    if lease < now:
        return False
    host, process, _ = owner.rsplit(":", 2)
    if host != socket.gethostname() or os.name != "posix":  # elsewhere signal 0 is no question but an interrupt
        return True
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
