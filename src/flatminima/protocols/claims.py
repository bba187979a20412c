"""A statement about numbers, what was expected, what was measured, and a verdict in words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

#: Where an expected value comes from.
PAPER = "paper"  # the statement is in its abstract
DERIVED = "derived"  # a formula with a proof
RECORDED = "recorded"  # the number of an earlier run of the same recipe, written down before this code


@dataclass
class Claim:
    """One row of a reproduction.

    Args:
        statement: in words.
        parameters: of the case.
        source: :data:`PAPER`, :data:`DERIVED` or :data:`RECORDED`.

    Example:
        >>> claim = Claim("the root of 2", {}, DERIVED)
        >>> claim.close("root", 1.4142, 2**0.5, rtol=1e-4)
        >>> claim.verdict
        'reproduced'
        >>> claim.close("square", 2.0, 1.9, rtol=1e-4)
        >>> claim.verdict
        'not reproduced: square is 1.9, expected 2 to 0.0001 relative'
    """

    statement: str
    parameters: Mapping[str, Any]
    source: str
    expected: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """ "reproduced", or why not."""
        return "not reproduced: " + "; ".join(self.failures) if self.failures else "reproduced"

    def close(
        self, name: str, expected: float, measured: float | None, *, rtol: float = 0.0, atol: float = 0.0
    ) -> None:
        """Compare two numbers; the allowed difference is ``atol + rtol * |expected|``."""
        self.expected[name], self.measured[name] = expected, measured
        found = math.nan if measured is None else measured
        if not abs(found - expected) <= atol + rtol * abs(expected):
            within = " and ".join([f"{rtol:g} relative"] * (rtol > 0) + [f"{atol:g}"] * (atol > 0)) or "the last bit"
            self.failures.append(f"{name} is {_shown(measured)}, expected {_shown(expected)} to {within}")

    def same(self, name: str, expected: Any, measured: Any) -> None:
        """Compare two things that are equal or not."""
        self.expected[name], self.measured[name] = expected, measured
        if expected != measured:
            self.failures.append(f"{name} is {_shown(measured)}, expected {_shown(expected)}")

    def at_most(self, name: str, bound: float, measured: float | None) -> None:
        """Compare with an upper bound; a missing number is a failure."""
        self.expected[name], self.measured[name] = f"≤ {bound:.9g}", measured
        if measured is None or not measured <= bound:
            self.failures.append(f"{name} is {_shown(measured)}, expected at most {bound:.9g}")

    def at_least(self, name: str, bound: float, measured: float | None) -> None:
        """Compare with a lower bound; a missing number is a failure."""
        self.expected[name], self.measured[name] = f"≥ {bound:.9g}", measured
        if measured is None or not measured >= bound:
            self.failures.append(f"{name} is {_shown(measured)}, expected at least {bound:.9g}")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; NaN and infinity become ``None``."""
        return {
            "statement": self.statement,
            "parameters": finite(dict(self.parameters)),
            "source": self.source,
            "expected": finite(self.expected),
            "measured": finite(self.measured),
            "verdict": self.verdict,
            "reproduced": not self.failures,
        }


def finite(value: Any) -> Any:
    """JSON-ready copy: NaN and infinity become ``None``, arrays and tuples become lists."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return value


def signed(value: float, digits: str = ".2f") -> str:
    """A number with its sign, a minus being a minus.

    Example:
        >>> signed(-0.314), signed(0.2)
        ('−0.31', '+0.20')
    """
    return f"{value:+{digits}}".replace("-", "−")


def holds(low: float, high: float, published: float) -> bool:
    """Whether an interval holds a published figure, which stands for every number that is rounded to its last digit.

    Example:
        >>> holds(1.17, 1.58, 1.6), holds(1.17, 1.54, 1.6)
        (True, False)
    """
    figure = Decimal(repr(published))
    half = Decimal((0, (5,), int(figure.as_tuple().exponent) - 1))
    return low <= float(figure + half) and float(figure - half) <= high


def _shown(value: Any) -> str:
    return "missing" if value is None else f"{value:.9g}" if isinstance(value, float) else str(value)
