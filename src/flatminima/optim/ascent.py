"""What one perturbation did."""

from __future__ import annotations

from collections.abc import Callable


class Ascent:
    """What one perturbation did.

    Attributes:
        norm: length of the direction before it was scaled to the radius; for SAM the norm of the gradient.
        skipped: why nothing can be done with this gradient (NaN, infinite), or None.
        moved: whether the weights are displaced.
    """

    def __init__(
        self, norm: float, skipped: str | None = None, measure: Callable[[], tuple[float, float]] | None = None
    ):
        self.norm, self.skipped, self.moved = norm, skipped, measure is not None
        self._measure: Callable[[], tuple[float, float]] | None = measure
        self._realised: tuple[float, float] | None = None

    @property
    def radius(self) -> float:
        """Length of the move that survived rounding; ask before the weights are restored."""
        return self._found()[0]

    @property
    def cosine(self) -> float:
        """Cosine between the move that survived rounding and the intended one; ask before the weights are restored."""
        return self._found()[1]

    def _found(self) -> tuple[float, float]:
        if not self.moved:
            return 0.0, float("nan")
        if self._realised is None:
            assert self._measure is not None
            self._realised = self._measure()
        return self._realised

    def close(self) -> None:
        """The weights are back: let go of the gradients that a measurement would have needed."""
        self._measure = _too_late

    def __repr__(self) -> str:
        """Norm, and what became of it."""
        return f"Ascent(norm={self.norm:.6g}, moved={self.moved}, skipped={self.skipped!r})"


def _too_late() -> tuple[float, float]:
    raise RuntimeError("the weights are back already: ask for radius and cosine while they are displaced")
