"""A sequence cut evenly: the last part is not a remnant for which the others wait."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def even_parts(items: Sequence[T], most: int) -> Iterator[Sequence[T]]:
    """As few parts as hold at most so many items each, of about the same length, in order.

    Example:
        >>> list(even_parts(range(5), 3)), list(even_parts([], 3))
        ([range(0, 3), range(3, 5)], [])
    """
    if not items:
        return
    size = math.ceil(len(items) / math.ceil(len(items) / most))
    for start in range(0, len(items), size):
        yield items[start : start + size]
