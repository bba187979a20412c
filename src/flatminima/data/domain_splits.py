"""How the rows of one domain are divided, and how batches are drawn from them for ever."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import torch

from flatminima.data.splits import DataError, IntArray


def seed_hash(*parts: object) -> int:
    """DomainBed's hash of anything to a seed below 2**31: the MD5 of the tuple's text.

    Example:
        >>> seed_hash(0, 1) == int(hashlib.md5(b"(0, 1)").hexdigest(), 16) % 2**31
        True
    """
    return int(hashlib.md5(str(parts).encode(), usedforsecurity=False).hexdigest(), 16) % 2**31


def domain_split(rows: int, held_out: float, trial_seed: int, domain: int) -> tuple[IntArray, IntArray]:
    """Divide the rows of the domain at index ``domain`` exactly as DomainBed does.

    Rows 0..n-1 are shuffled by ``RandomState(seed_hash(trial_seed, domain))``; the first ``floor(held_out * n)`` are held out.
    The division depends on nothing else: not on the target, not on the algorithm.

    Returns:
        (rows to train on, rows held out), both in shuffled order.

    Raises:
        DataError: a part would be empty.

    Example:
        >>> kept, out = domain_split(10, 0.2, trial_seed=0, domain=1)
        >>> len(kept), len(out), sorted([*kept, *out]) == list(range(10))
        (8, 2, True)
    """
    order = np.arange(rows)
    np.random.RandomState(seed_hash(trial_seed, domain)).shuffle(order)
    count = int(held_out * rows)
    if not 0 < count < rows:
        raise DataError(
            f"domain number {domain} has {rows} rows, of which {held_out:g} are {count}: expected at least one row to hold out "
            "and one to train on"
        )
    return order[count:], order[:count]


class DomainSampler:
    """Batches of rows of one domain without an end, each row drawn independently with replacement.

    There are no epochs: domains differ in size and every batch takes as many rows from each. The stream depends on
    the seed and on the domain's index alone, whatever the other domains are.

    Args:
        rows: to draw from.
        size: rows a batch.
        seed: of the stream.
        domain: index of the domain.

    Example:
        >>> sampler = DomainSampler(np.array([3, 5, 8]), 4, seed=0, domain=1)
        >>> batch = next(sampler)
        >>> len(batch), set(batch.tolist()) <= {3, 5, 8}
        (4, True)
    """

    def __init__(self, rows: IntArray, size: int, *, seed: int, domain: int) -> None:
        if size < 1 or len(rows) == 0:
            raise DataError(f"a batch of {size} rows cannot be drawn from {len(rows)}")
        self.rows = rows
        self.size = size
        self._generator = torch.Generator().manual_seed(seed_hash("batches", seed, domain))

    def __iter__(self) -> Iterator[IntArray]:
        return self

    def __next__(self) -> IntArray:
        chosen = torch.randint(len(self.rows), (self.size,), generator=self._generator)
        rows: IntArray = self.rows[chosen.numpy()]
        return rows
