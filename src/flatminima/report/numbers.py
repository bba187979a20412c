"""How a number is written: rounded to what its error supports, the same in the page and in the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

MISSING = "–"
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def as_float(value: object) -> float | None:
    """Return a JSON value as a float, and ``None`` for null, NaN, booleans and everything that is not a number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    number = float(value)
    return None if math.isnan(number) else number


def as_finite(value: object) -> float | None:
    """Return a JSON value as a finite float, or ``None``: what a plot can show."""
    number = as_float(value)
    return None if number is None or math.isinf(number) else number


def _exponent(value: float) -> int:
    return math.floor(math.log10(abs(value))) if value else 0


def _fixed(value: float, decimals: int) -> str:
    rounded = round(value, decimals)
    return f"{rounded + 0.0:.{max(decimals, 0)}f}".replace("-", "−")


def _power(exponent: int) -> str:
    return f"10{str(exponent).translate(_SUPERSCRIPTS)}"


def _shared_exponent(*values: float) -> int:
    """The power of ten to take out of numbers that are printed together; 0 where plain digits read well."""
    exponent = _exponent(max(values, key=abs))
    return exponent if exponent < -3 or exponent >= 5 else 0


def plain(value: object, digits: int = 4) -> str:
    """Write one number to ``digits`` significant digits.

    >>> plain(0.123456), plain(-1234567.0), plain(9.999e-5, 2), plain(None)
    ('0.1235', '−1.235 × 10⁶', '1.0 × 10⁻⁴', '–')
    """
    number = as_float(value)
    if number is None:
        return MISSING
    if math.isinf(number):
        return "∞" if number > 0 else "−∞"
    if number:  # round first: 9.999e-5 to two digits is 1.0e-4, with another exponent
        number = float(f"{number:.{digits - 1}e}")
    power = _shared_exponent(number)
    scaled = number / 10.0**power
    text = _fixed(scaled, digits - 1 - _exponent(scaled)) if scaled else "0"
    return f"{text} × {_power(power)}" if power else text


def integer(value: object) -> str:
    """Write a count with thin spaces between thousands.

    >>> integer(1797)
    '1\u202f797'
    """
    number = as_finite(value)
    return MISSING if number is None else f"{round(number):,}".replace(",", "\u202f").replace("-", "−")


def with_error(value: object, error: object) -> str:
    """Write ``value ± error``: two significant digits of the error, and the value to the same decimal.

    >>> with_error(12.3456, 0.789), with_error(123456.0, 2345.0), with_error(0.5, None)
    ('12.35 ± 0.79', '(1.235 ± 0.023) × 10⁵', '0.5000')
    """
    number, spread = as_finite(value), as_finite(error)
    if number is None or spread is None or spread <= 0.0:
        return plain(value)
    if spread < 1e-6 * abs(number):  # digits that nobody reads: say how small the error is instead
        return f"{plain(number, 6)} (± {plain(spread, 1)})"
    power = _shared_exponent(number, spread)
    scale = 10.0**power
    decimals = 1 - _exponent(spread / scale)
    text = f"{_fixed(number / scale, decimals)} ± {_fixed(spread / scale, decimals)}"
    return f"({text}) × {_power(power)}" if power else text


def difference(value: object, low: object, high: object) -> str:
    """Write a signed difference with its interval, or alone where there is none.

    >>> difference(-3.21, -4.12, -2.3), difference(0.5, None, None)
    ('−3.21 [−4.12, −2.30]', '+0.5000')
    """
    number, lower, upper = as_finite(value), as_finite(low), as_finite(high)
    if number is None:
        return MISSING
    sign = "+" if number > 0 else ""
    if lower is None or upper is None or upper <= lower:
        return sign + plain(number)
    power = _shared_exponent(number, lower, upper)
    scale = 10.0**power
    # Half the width decides the digits; a difference known far better than its size keeps at most six of them.
    decimals = min(1 - _exponent((upper - lower) / 2.0 / scale), 5 - _exponent(number / scale))
    text = ", ".join(_fixed(end / scale, decimals) for end in (lower, upper))
    text = f"{sign}{_fixed(number / scale, decimals)} [{text}]"
    return f"{text} × {_power(power)}" if power else text


def change_factor(ratios: Mapping[str, Any], kind: str) -> float | None:
    """Look up a change factor; JSON has no infinity, so a factor that is there but null is infinite.

    >>> change_factor({"a": 2.0, "b": None}, "a"), change_factor({"a": 2.0, "b": None}, "b"), change_factor({}, "c")
    (2.0, inf, None)
    """
    if kind in ratios and ratios[kind] is None:
        return math.inf
    return as_float(ratios.get(kind))


def factor(ratio: object) -> str:
    """Write a change factor: three digits, more where it is within a percent of one.

    >>> factor(385.2), factor(1.0000001)
    ('×385', '×1.0000')
    """
    number = as_float(ratio)
    if number is None:
        return MISSING
    if math.isinf(number):
        return "×∞"
    return "×" + (plain(number, 5) if abs(number - 1.0) < 0.01 else plain(number, 3))
