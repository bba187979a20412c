"""What a monitored value means to SWAD: which direction is better, how much worse is bad, what a NaN counts as."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from torch import Tensor

from flatminima.names import unknown

Variant: TypeAlias = Literal["paper", "released"]
Direction: TypeAlias = Literal["min", "max"]
ToleranceMode: TypeAlias = Literal["relative", "absolute"]
NanPolicy: TypeAlias = Literal["bad", "raise", "released"]


@dataclass(frozen=True)
class Metric:
    """The settings of :class:`~flatminima.averaging.SWAD` that concern the value; inside the rules less is better."""

    tolerance: float
    direction: Direction
    tolerance_mode: ToleranceMode
    nan: NanPolicy

    @classmethod
    def checked(
        cls, tolerance: float, variant: Variant, direction: Direction, mode: ToleranceMode, nan: NanPolicy | None
    ) -> Metric:
        """From SWAD's arguments; TypeError or ValueError for what does not fit."""
        if not (math.isfinite(tolerance) and tolerance >= 0):
            raise ValueError(f"tolerance={tolerance} must be a finite fraction >= 0, such as 0.3 for 30 %.")
        nan = nan if nan is not None else ("released" if variant == "released" else "bad")
        for name, given, valid in (
            ("variant", variant, get_args(Variant)),
            ("direction", direction, get_args(Direction)),
            ("tolerance_mode", mode, get_args(ToleranceMode)),
            ("nan policy", nan, get_args(NanPolicy)),
        ):
            if given not in valid:
                raise ValueError(unknown(name, given, valid))
        if nan == "released" and variant != "released":
            raise ValueError("nan='released' is part of variant='released'; the paper's rule knows 'bad' and 'raise'.")
        if direction == "max" and mode == "relative" and tolerance >= 1:
            raise ValueError(
                f"tolerance={tolerance} of a value to be maximised accepts everything above 0: nothing would end the "
                "valley. Use a fraction below 1, or tolerance_mode='absolute'."
            )
        return cls(float(tolerance), direction, mode, nan)

    def number(self, value: float | Tensor) -> float:
        """The value as a number of which less is better."""
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(
                f"evaluate() takes one number, got a tensor of shape {tuple(value.shape)}. Reduce it first."
            )
        if isinstance(value, bool) or not hasattr(value, "__float__"):
            raise TypeError(f"evaluate() takes one number, got {value!r}. Pass the validation loss itself.")
        number = float(value)
        if self.tolerance_mode == "relative" and math.isfinite(number) and number <= 0:
            raise ValueError(
                f"evaluate() got {number}, but a tolerance relative to the mean means something only for values > 0. "
                "Pass a loss such as cross-entropy, or use tolerance_mode='absolute'."
            )
        if self.nan == "raise" and not math.isfinite(number):
            raise ValueError(f"evaluate() got {number}. Look for its cause, or use nan='bad' to go on after it.")
        return self.shown(number)

    def shown(self, number: float) -> float:
        """From the number of which less is better to the user's value, and back."""
        return number if self.direction == "min" else -number

    def ceiling(self, mean: float) -> float:
        """The threshold that belongs to the mean of a window (of numbers of which less is better)."""
        if self.tolerance_mode == "absolute":
            return mean + self.tolerance
        return mean * (1.0 + self.tolerance) if self.direction == "min" else mean * (1.0 - self.tolerance)
