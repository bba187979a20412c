"""Checks shared by the builders: shapes, sizes and choices, refused by name."""

from __future__ import annotations

from collections.abc import Sequence


def image_shape(model: str, input_shape: Sequence[int], smallest: int) -> tuple[int, int, int]:
    """`(channels, height, width)` of images whose sides are at least `smallest`."""
    if len(input_shape) != 3 or min(input_shape) < 1:
        raise ValueError(
            f"model {model!r} got input_shape {tuple(input_shape)}: expected images (channels, height, width)"
        )
    channels, height, width = input_shape
    if min(height, width) < smallest:
        raise ValueError(
            f"model {model!r} got images of {height}x{width}: expected at least {smallest}x{smallest} pixels"
        )
    return channels, height, width


def positive(model: str, **sizes: int) -> None:
    """Refuse sizes that are not integers above zero."""
    for option, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"option {option} of model {model!r} is {size!r}: expected an integer above zero")
