from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flatminima.data import DataError, TensorSplit, validate
from flatminima.data.splits import channel_statistics, standardise, stratified_choice

STRATA = st.lists(st.integers(-2, 4), min_size=1, max_size=60).map(lambda rows: np.array(rows, dtype=np.int64))


@given(STRATA, st.data())
def test_stratified_choice_is_a_partition_in_proportion(strata: np.ndarray, data: st.DataObject) -> None:
    rows = len(strata)
    size = data.draw(st.integers(0, rows))
    chosen, rest = stratified_choice(strata, size, np.random.default_rng(data.draw(st.integers(0, 10))))
    assert len(chosen) == size
    assert sorted([*chosen, *rest]) == list(range(rows))
    for stratum in np.unique(strata):
        share = size * (strata == stratum).sum() / rows
        assert abs((strata[chosen] == stratum).sum() - share) < 1


def test_stratified_choice_follows_the_seed_and_mixes_the_classes() -> None:
    strata = np.repeat(np.arange(5), 40)
    first, second, other = (stratified_choice(strata, 100, np.random.default_rng(seed))[0] for seed in (0, 0, 1))
    assert np.array_equal(first, second)
    assert not np.array_equal(np.sort(first), np.sort(other))
    assert len(np.unique(strata[first[:20]])) == 5


def test_every_row_of_a_stratum_is_equally_likely() -> None:
    strata = np.array([0] * 6 + [1] * 4)
    rng = np.random.default_rng(0)
    times = np.zeros(10)
    for _ in range(4000):
        times[stratified_choice(strata, 5, rng)[0]] += 1
    # Binomial(4000, 1/2): standard deviation 31.6.
    assert np.abs(times - 2000).max() < 5 * 31.7


def test_choosing_more_than_there_is_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot choose 3 of 2 rows"):
        stratified_choice(np.zeros(2, dtype=np.int64), 3, np.random.default_rng(0))


@given(st.integers(1, 5), st.integers(1, 3), st.integers(0, 1000))
def test_statistics_are_those_of_numpy_in_float64(rows: int, channels: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (rows, channels, 4, 3), dtype=np.uint8)
    mean, deviation = channel_statistics(pixels)
    np.testing.assert_allclose(mean, pixels.astype(np.float64).mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(deviation, pixels.astype(np.float64).std((0, 2, 3)), rtol=1e-12)
    expected = (pixels.astype(np.float64) - mean[:, None, None]) / deviation[:, None, None]
    x = standardise(pixels, mean, deviation)
    assert x.dtype == torch.float32
    np.testing.assert_allclose(x.numpy(), expected, rtol=1e-5, atol=1e-5)


def test_a_constant_channel_becomes_zero_not_nan() -> None:
    pixels = np.full((3, 1, 2, 2), 7, dtype=np.uint8)
    assert torch.equal(standardise(pixels, *channel_statistics(pixels)), torch.zeros(3, 1, 2, 2))


def test_good_data_passes_with_a_count_or_with_names() -> None:
    x, y = torch.randn(3, 2), torch.tensor([0, 1, 2])
    validate(x, y, 3)
    validate(x.double(), y, ("a", "b", "c"))


ROWS = torch.zeros(4, 2)
LABELS = torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize(
    ("x", "y", "classes", "message"),
    [
        (ROWS, torch.tensor([0, 1, 3, -1]), 3, r"label out of range in split 'val', row 2: got 3, expected 0\.\.2"),
        (ROWS, torch.tensor([0, -1, 3, 0]), 3, r"label out of range in split 'val', row 1: got -1"),
        (ROWS, LABELS, ("a", "b"), r"row 2: got 2, expected 0\.\.1 \(2 classes\)"),
        (ROWS[:0], LABELS[:0], 3, "empty data set: split 'val'"),
        (torch.zeros(4, 0), LABELS, 3, "empty data set: split 'val'"),
        (ROWS[:3], LABELS, 3, "split 'val' has 3 inputs but 4 labels"),
        (ROWS.long(), LABELS, 3, "inputs of split 'val' are torch.int64"),
        (torch.zeros(4), LABELS, 3, r"shape \(4,\)"),
        (ROWS, LABELS.float(), 3, "labels of split 'val' are torch.float32"),
        (ROWS, LABELS[:, None], 3, r"labels of split 'val' are torch.int64 of shape \(4, 1\)"),
        (ROWS, LABELS, 0, "0 classes"),
    ],
)
def test_bad_data_is_named(x: torch.Tensor, y: torch.Tensor, classes: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        validate(x, y, classes, split="val")


@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "NaN"), (float("inf"), "infinity"), (-float("inf"), "inf")])
def test_non_finite_inputs_are_named_by_split_and_row(value: float, kind: str) -> None:
    x = torch.zeros(5, 1, 2, 2)
    x[3, 0, 1, 0] = x[4, 0, 0, 0] = value
    with pytest.raises(DataError, match=rf"{kind}.* split 'train', row 3 \(2 of 5 rows"):
        validate(x, torch.zeros(5, dtype=torch.int64), 2, split="train")


def test_a_split_has_rows_and_cannot_be_changed() -> None:
    split = TensorSplit(ROWS, LABELS)
    assert len(split) == 4
    with pytest.raises(dataclasses.FrozenInstanceError):
        split.x = LABELS
