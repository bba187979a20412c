"""What a data set is once it is loaded: three splits of tensors, checked and standardised by the train split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IntArray = NDArray[np.int64]
PixelArray = NDArray[np.uint8]


class DataError(ValueError):
    """Data that cannot be used: the message says what was found, what was expected and what to do."""


@dataclass(frozen=True, eq=False)
class TensorSplit:
    """Inputs `x`, float32 `(rows, *input_shape)`, and labels `y`, int64 `(rows,)`."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True, eq=False)
class Splits:
    """A data set cut into train, validation and test.

    `x` is standardised per channel by the mean and the standard deviation of the train split. `note` says in one or
    two sentences where the rows come from and how they were cut.
    """

    name: str
    train: TensorSplit
    validation: TensorSplit
    test: TensorSplit
    classes: tuple[str, ...]
    input_shape: tuple[int, ...]
    note: str


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """Images whose labels are known before any pixel is decoded: `pixels(rows)` is uint8 `(len(rows), C, H, W)`.

    `check()`, where there is one, opens every image without decoding it and names the first that is none. `names`, where
    the files have names, is one per row.
    """

    labels: IntArray
    pixels: Callable[[IntArray], PixelArray]
    check: Callable[[], None] | None = None
    names: Sequence[str] | None = None

    def subset(self, rows: IntArray) -> LabelledImages:
        """The given rows, in that order; nothing is decoded."""
        names = None if self.names is None else [self.names[row] for row in rows]
        return LabelledImages(self.labels[rows], lambda chosen: self.pixels(rows[chosen]), self.check, names)


def validate(x: Tensor, y: Tensor, classes: int | Sequence[str], *, split: str = "data") -> None:
    """Check that `(x, y)` can train a classifier, before any work is spent; return nothing.

    Args:
        x: floating-point inputs, `(rows, ...)`.
        y: int64 labels in `0..classes-1`, `(rows,)`.
        classes: the number of classes, or their names.
        split: what the rows are called in the error.

    Raises:
        DataError: no rows, different numbers of rows, another dtype or shape, a label out of range, NaN or infinity
            in the inputs. The split and the first offending row are named.

    Example:
        >>> import torch
        >>> validate(torch.zeros(2, 3), torch.tensor([0, 7]), 5, split="train")
        Traceback (most recent call last):
        flatminima.data.splits.DataError: label out of range in split 'train', row 1: got 7, expected 0..4 (5 classes)
    """
    count = classes if isinstance(classes, int) else len(classes)
    if count < 1:
        raise DataError(f"split {split!r} has {count} classes: expected at least one")
    if y.ndim != 1 or y.dtype != torch.int64:
        raise DataError(
            f"labels of split {split!r} are {y.dtype} of shape {tuple(y.shape)}: expected torch.int64 of shape (rows,)"
        )
    if x.ndim < 2 or not x.is_floating_point():
        raise DataError(
            f"inputs of split {split!r} are {x.dtype} of shape {tuple(x.shape)}: "
            "expected a floating-point tensor of shape (rows, ...)"
        )
    if len(x) != len(y):
        raise DataError(f"split {split!r} has {len(x)} inputs but {len(y)} labels: expected one label per input")
    if x.numel() == 0:
        raise DataError(
            f"empty data set: split {split!r} has inputs of shape {tuple(x.shape)}, expected at least one row"
        )
    outside = (y < 0) | (y >= count)
    if outside.any():
        row = _first(outside)
        raise DataError(
            f"label out of range in split {split!r}, row {row}: got {int(y[row])}, "
            f"expected 0..{count - 1} ({count} classes)"
        )
    if not torch.isfinite(x).all():
        broken = ~torch.isfinite(x).flatten(1).all(1)
        row = _first(broken)
        kind = "NaN" if torch.isnan(x[row]).any() else "infinity"
        raise DataError(
            f"{kind} in the inputs of split {split!r}, row {row} "
            f"({int(broken.sum())} of {len(x)} rows are not finite): remove or repair these rows"
        )


def _first(mask: Tensor) -> int:
    return int(mask.nonzero()[0])


def stratified_choice(strata: IntArray, size: int, rng: np.random.Generator) -> tuple[IntArray, IntArray]:
    """Choose `size` of the positions `0..len(strata)-1` so that every stratum is represented in proportion.

    A stratum of `c` of the `n` rows gets `size * c / n` of them, rounded by largest remainders (ties: the lower
    stratum), so it is off by less than one row. Both results, the chosen positions and the others, are in random
    order: a reader who does not shuffle still sees mixed classes.

    Example:
        >>> chosen, rest = stratified_choice(np.array([0, 0, 0, 0, 1, 1]), 3, np.random.default_rng(0))
        >>> sorted(np.array([0, 0, 0, 0, 1, 1])[chosen].tolist()), len(rest)
        ([0, 0, 1], 3)
    """
    rows = len(strata)
    if not 0 <= size <= rows:
        raise ValueError(f"cannot choose {size} of {rows} rows")
    order = rng.permutation(rows)
    _, stratum, counts = np.unique(strata[order], return_inverse=True, return_counts=True)
    shares = size * counts  # in units of 1/rows: integers, so that no rounding decides who gets a row
    quota = shares // max(rows, 1)
    by_remainder = np.argsort(-(shares % max(rows, 1)), kind="stable")
    quota[by_remainder[: size - int(quota.sum())]] += 1
    # Rank of every position within its own stratum, in the random order.
    grouped = np.argsort(stratum, kind="stable")
    rank = np.empty(rows, dtype=np.int64)
    rank[grouped] = np.arange(rows) - np.repeat(np.cumsum(counts) - counts, counts)
    taken = rank < quota[stratum]
    return order[taken], order[~taken]


def channel_statistics(pixels: PixelArray) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation of each channel of `(N, C, H, W)`, float64 `(C,)`.

    A constant channel gets deviation 1. Taken from the histogram of the 256 values: exact sums, and
    no float copy of the data.
    """
    values = np.arange(256, dtype=np.float64)
    means, deviations = [], []
    for channel in range(pixels.shape[1]):
        share = np.bincount(pixels[:, channel].ravel(), minlength=256) / pixels[:, channel].size
        mean = float(share @ values)
        deviation = float(np.sqrt(share @ (values - mean) ** 2))
        means.append(mean)
        deviations.append(deviation or 1.0)
    return np.array(means), np.array(deviations)


def standardise(pixels: PixelArray, mean: NDArray[np.float64], deviation: NDArray[np.float64]) -> Tensor:
    """`(pixels - mean) / deviation` per channel, as float32 `(N, C, H, W)`."""
    x = torch.from_numpy(pixels).to(torch.float32)
    shape = (1, -1, 1, 1)
    x.sub_(torch.from_numpy(mean).to(torch.float32).view(shape))
    return x.div_(torch.from_numpy(deviation).to(torch.float32).view(shape))
