"""What to use instead of a number that moved."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from flatminima.measures import MEASURES, Measurement

#: Invariant under every linear kind of symmetry: what is left where no measure of the same intention survives.
ALONG_THE_WEIGHTS = ("w_hessian_w", "fisher_rao")


@dataclass(frozen=True)
class Repair:
    """A measure to use instead.

    Attributes:
        name: of it.
        moves_under: the kinds found here under which it is not invariant by theorem; empty: it is, under all of them.
        same_intention: whether it asks the same question; else it is invariant curvature of another kind.
        measurement: of it at the network, where it was measured.
    """

    name: str
    moves_under: tuple[str, ...]
    same_intention: bool
    measurement: Measurement | None


def repair_of(
    name: str, kinds: Collection[str], measurements: dict[str, Measurement], defined: Collection[str]
) -> Repair | None:
    """The best substitute for a measure on a network with these kinds of symmetry, or ``None``.

    First one of the same intention that is invariant under all of them; then curvature along the weights, if the measure was
    one of flatness; then one of the same intention that is invariant under some.

    Args:
        name: of the measure that moved.
        kinds: of function-preserving symmetries found.
        measurements: made at the network.
        defined: names of measures that apply here.
    """

    def candidate(other: str, same: bool) -> Repair:
        moves = tuple(kind for kind in kinds if MEASURES[other].invariance(kind) not in ("invariant", "almost"))
        found = measurements.get(other)
        return Repair(other, moves, same, found if found is not None and found.applies else None)

    entry = MEASURES[name]
    same = [candidate(other, True) for other in entry.repair if other in defined]
    flat = entry.flatter_when is not None
    along = [candidate(other, False) for other in ALONG_THE_WEIGHTS if flat and other in defined and other != name]
    whole = [found for found in (*same, *along) if not found.moves_under]
    own = {kind for kind in kinds if entry.invariance(kind) not in ("invariant", "almost")}
    partial = [found for found in same if set(found.moves_under) < own]
    return next(iter((*whole, *sorted(partial, key=lambda found: len(found.moves_under)))), None)


def with_repairs(names: Collection[str]) -> list[str]:
    """Measures, and those that would be used instead of them."""
    chosen = dict.fromkeys(names)
    for name in names:
        chosen |= dict.fromkeys(MEASURES[name].repair)
    chosen |= dict.fromkeys(ALONG_THE_WEIGHTS)
    return [name for name in MEASURES if name in chosen]
