"""Rows of studies: the nested permutation, everything unseen, halves for selection and report."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from flatminima.data import DataError
from flatminima.study.run_spec import DataSpec
from flatminima.study.subsets import load_subset

DIGITS = DataSpec("digits", 250, probes=20)


def test_training_rows_are_the_first_of_one_permutation_and_nested():
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(42))[:250].numpy()
    data = load_subset(DIGITS)
    assert np.array_equal(data.x.numpy(), (pixels[order] / 16).astype(np.float32))
    assert np.array_equal(data.y.numpy(), labels[order])
    more = load_subset(dataclasses.replace(DIGITS, rows=400))
    assert torch.equal(more.x[:250], data.x)


def test_everything_else_is_unseen_in_the_order_of_the_file():
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(42))[:250].numpy()
    rest = np.array([i for i in range(1797) if i not in set(order.tolist())])
    data = load_subset(DIGITS)
    pieces = list(data.unseen(rows=100))
    assert [len(y) for _, y in pieces] == [100] * 15 + [47]
    assert np.array_equal(torch.cat([x for x, _ in pieces]).numpy(), (pixels[rest] / 16).astype(np.float32))
    assert np.array_equal(torch.cat([y for _, y in pieces]).numpy(), labels[rest])
    assert data.unseen_rows == 1547
    drawn = torch.randperm(1547, generator=torch.Generator().manual_seed(99))[:20].numpy()
    assert np.array_equal(data.probe_labels.numpy(), labels[rest[drawn]])
    assert torch.equal(data.test, torch.cat([x for x, _ in pieces])), "digits have no test rows of their own"


def test_halves_are_disjoint_and_decided_by_their_seed():
    data, again, other = (load_subset(dataclasses.replace(DIGITS, split_seed=seed)) for seed in (0, 0, 1))
    assert int(data.half.sum()) == 1547 // 2
    assert torch.equal(data.half, again.half)
    assert not torch.equal(data.half, other.half)


def test_rules_of_the_draw():
    legacy = load_subset(dataclasses.replace(DIGITS, subset_rule="choice"))
    chosen = np.random.RandomState(42).choice(1797, 250, replace=False)
    assert np.array_equal(legacy.y.numpy(), load_digits().target[chosen])
    shares = np.bincount(load_subset(dataclasses.replace(DIGITS, subset_rule="stratified")).y.numpy())
    assert np.abs(shares - 250 * np.bincount(load_digits().target) / 1797).max() < 1


def test_standardised_rows_use_the_training_subset_alone():
    raw, data = load_subset(DIGITS), load_subset(dataclasses.replace(DIGITS, scale="standardised"))
    assert float(data.x.double().mean()) == pytest.approx(0, abs=1e-6)
    assert float(data.x.double().std()) == pytest.approx(1, rel=1e-6)
    scale = float(raw.x.double().std())
    assert torch.allclose(data.test, (raw.test - raw.x.double().mean().float()) / scale, atol=1e-5)


@pytest.mark.parametrize(("name", "labels"), [("mnist", [5, 1, 1]), ("fashion-mnist", [3, 8, 9])])
def test_probes_of_the_source(name, labels):
    """The first labels that the source's draw gives."""
    try:
        data = load_subset(DataSpec(name, 250))
    except DataError as error:
        pytest.skip(f"{name} is not there: {str(error).splitlines()[0]}")
    assert data.probe_labels[:3].tolist() == labels
    assert len(data.test) == 10_000
    assert data.unseen_rows == 69_750
    assert torch.equal(torch.cat([x for x, _ in data.unseen()])[-10_000:], data.test), "test rows come last"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "digit"}, "unknown data set 'digit': expected one of digits"),
        ({"rows": 1797}, "rows is 1797: expected 1 to 1796 of digits"),
        ({"rows": 0}, "rows is 0"),
        ({"probes": 1548}, "probes is 1548: expected 0 to 1547 of digits"),
        ({"subset_rule": "best"}, "unknown subset_rule 'best'"),
    ],
)
def test_rows_that_are_not_there_are_refused(change, message):
    with pytest.raises(DataError) as caught:
        load_subset(dataclasses.replace(DIGITS, **change))
    assert message in str(caught.value)
