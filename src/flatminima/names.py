"""Names a person typed: the valid ones, nearest first."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest_first(given: str, valid: Iterable[str]) -> list[str]:
    """The valid names ordered by similarity to the given one (ties keep their order); case is ignored.

    Similarity is the matching-blocks ratio of Ratcliff and Obershelp (`difflib.SequenceMatcher`).

    Example:
        >>> nearest_first("fashion_mnist", ["digits", "mnist", "fashion-mnist"])
        ['fashion-mnist', 'mnist', 'digits']
    """
    wanted = given.casefold()
    return sorted(valid, key=lambda name: -difflib.SequenceMatcher(None, wanted, name.casefold()).ratio())


def unknown(kind: str, given: object, valid: Iterable[str]) -> str:
    """The sentence of an error about an unknown name.

    Example:
        >>> unknown("data set", "cifar", ["digits", "cifar10"])
        "unknown data set 'cifar': expected one of cifar10, digits (nearest first)"
    """
    return f"unknown {kind} {given!r}: expected one of {', '.join(nearest_first(str(given), valid))} (nearest first)"
