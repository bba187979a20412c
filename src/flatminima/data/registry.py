"""Data sets by name, cut into train, validation and test."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
import torch

from flatminima.data import sources
from flatminima.data.splits import (
    DataError,
    IntArray,
    LabelledImages,
    Splits,
    TensorSplit,
    channel_statistics,
    standardise,
    stratified_choice,
    validate,
)
from flatminima.names import unknown

_SOURCES: dict[str, tuple[Callable[[], sources.Source], str]] = {
    "digits": (sources.digits, "1,797 handwritten digits, 8x8 gray, 10 classes; embedded in scikit-learn"),
    "mnist": (sources.mnist, "70,000 handwritten digits, 28x28 gray, 10 classes"),
    "fashion-mnist": (sources.fashion_mnist, "70,000 pictures of clothing, 28x28 gray, 10 classes"),
    "cifar10": (sources.cifar10, "60,000 photographs, 32x32 RGB, 10 classes"),
    "cifar100": (sources.cifar100, "60,000 photographs, 32x32 RGB, 100 classes"),
    "pacs": (sources.pacs, "9,991 pictures of 4 domains pooled, 64x64 RGB, 7 classes; from FLATMINIMA_DATA only"),
}

DATASETS: Mapping[str, str] = MappingProxyType({name: text for name, (_, text) in _SOURCES.items()})
"""Names that `load` takes, with one line on each."""

TEST_FRACTION = 0.2  # of all rows, where there is no official test set


def load(name: str, *, train_size: int | None = None, validation_fraction: float = 0.2, seed: int = 0) -> Splits:
    """Read a data set, cut it by seed and standardise it by its train split.

    With an official test set, `validation_fraction` of the official training rows become the validation split. Without
    one (digits, pacs), 20 % of all rows become the test split and `validation_fraction` of all rows the validation
    split. Cuts are stratified by class (PACS: by class within domain) and do not depend on `train_size`. The rows of
    every cut are in random order; an official test set keeps its own. Standardisation is `(pixel - mean) / deviation`
    per channel, with both taken over the train split that is returned. Only the pixels that are returned are decoded.

    Args:
        name: one of `DATASETS`.
        train_size: rows to keep of the train split, stratified by seed; None keeps all.
        validation_fraction: between 0 and 1, both excluded (digits, pacs: less than 0.8).
        seed: non-negative; the same seed gives the same rows in the same order.

    Raises:
        DataError: unknown name; missing, corrupt or truncated file; a size or fraction that leaves a split empty.

    Example:
        >>> splits = load("digits")
        >>> len(splits.train), len(splits.validation), len(splits.test), splits.input_shape
        (1079, 359, 359, (1, 8, 8))
    """
    if name not in _SOURCES:
        raise DataError(unknown("data set", name, DATASETS))
    _check(train_size, validation_fraction, seed)
    return _cut(_SOURCES[name][0](), train_size, validation_fraction, seed)


def load_pacs_domain(
    domain: str, *, train_size: int | None = None, validation_fraction: float = 0.2, seed: int = 0
) -> Splits:
    """One domain of PACS (art_painting, cartoon, photo or sketch), cut 60/20/20 as by `load`, same arguments.

    Example:
        >>> load_pacs_domain("skech")
        Traceback (most recent call last):
        flatminima.data.splits.DataError: unknown PACS domain 'skech': expected one of sketch, ... (nearest first)
    """
    if domain not in sources.PACS_DOMAINS:
        raise DataError(unknown("PACS domain", domain, sources.PACS_DOMAINS))
    _check(train_size, validation_fraction, seed)
    return _cut(sources.pacs([domain]), train_size, validation_fraction, seed)


def _check(train_size: int | None, validation_fraction: float, seed: int) -> None:
    if train_size is not None and train_size < 1:
        raise DataError(f"train_size is {train_size}: expected at least 1, or None for all rows")
    if not 0 < validation_fraction < 1:
        raise DataError(
            f"validation_fraction is {validation_fraction}: expected a number between 0 and 1, both excluded"
        )
    if seed < 0:
        raise DataError(f"seed is {seed}: expected a non-negative integer")


def _cut(source: sources.Source, train_size: int | None, validation_fraction: float, seed: int) -> Splits:
    # One stream per cut, so that changing the size of one leaves the others alone.
    test_rng, validation_rng, train_rng = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(3))
    total = len(source.strata)
    if total == 0:
        raise DataError(f"empty data set: {source.name!r} has no rows to train on")
    rest = np.arange(total)
    if source.test is None:
        held_out, rest = stratified_choice(source.strata, round(TEST_FRACTION * total), test_rng)
        test, test_rows = source.train, held_out
    else:
        test, test_rows = source.test, np.arange(len(source.test.labels))
    size = round(validation_fraction * total)
    if size >= len(rest):
        raise DataError(
            f"validation_fraction is {validation_fraction}: that is {size} of {total} rows of {source.name!r}, "
            f"and only {len(rest)} are left to cut it from; expected fewer, so that train keeps at least one row"
        )
    chosen, kept = stratified_choice(source.strata[rest], size, validation_rng)
    validation_rows, train_rows = rest[chosen], rest[kept]
    if train_size is not None:
        if train_size > len(train_rows):
            raise DataError(
                f"train_size is {train_size}: expected at most {len(train_rows)}, the train split of {source.name!r} "
                f"with validation_fraction={validation_fraction}"
            )
        train_rows = train_rows[stratified_choice(source.strata[train_rows], train_size, train_rng)[0]]

    for part, rows in (("train", train_rows), ("validation", validation_rows), ("test", test_rows)):
        if len(rows) == 0:
            raise DataError(f"empty data set: none of the {total} rows of {source.name!r} is left for split {part!r}")
    train_pixels = source.train.pixels(train_rows)
    mean, deviation = channel_statistics(train_pixels)

    def split(part: str, images: LabelledImages, rows: IntArray, pixels: np.ndarray | None = None) -> TensorSplit:
        x = standardise(images.pixels(rows) if pixels is None else pixels, mean, deviation)
        y = torch.from_numpy(images.labels[rows])
        validate(x, y, source.classes, split=part)
        return TensorSplit(x, y)

    train = split("train", source.train, train_rows, train_pixels)
    return Splits(
        name=source.name,
        train=train,
        validation=split("validation", source.train, validation_rows),
        test=split("test", test, test_rows),
        classes=source.classes,
        input_shape=tuple(train.x.shape[1:]),
        note=f"{source.note} Split by seed {seed}, stratified; standardised by the train split.",
    )
