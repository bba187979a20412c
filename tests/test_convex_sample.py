"""Samples of fair bits: the canonical one, drawn ones, and those that hold only some columns."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from convex_fixture import VECTORS
from flatminima.problems.convex import FlatSharpERM, Sample, event_probability

pytestmark = pytest.mark.usefixtures("one_thread")


def test_event_probabilities_as_recorded() -> None:
    case = VECTORS["event_probabilities"]
    for row in case["rows"]:
        assert event_probability(row["n"]) == pytest.approx(row["at_least_one"], rel=case["tol_rel"])
        assert event_probability(row["n"], "one") == pytest.approx(row["exactly_one"], rel=case["tol_rel"])


@pytest.mark.parametrize("n", [1, 2])
def test_event_probabilities_by_enumeration(n: int) -> None:
    """All samples of n rows of 2^n bits."""
    count = n * 2**n
    bits = torch.stack([torch.arange(2**count) >> k & 1 for k in range(count)], 1).view(-1, n, 2**n)
    zeros, ones = (bits == 0).all(1).sum(1), (bits == 1).all(1).sum(1)
    assert event_probability(n) == pytest.approx(float((zeros > 0).double().mean()), rel=1e-12)
    assert event_probability(n, "one") == pytest.approx(float((zeros == 1).double().mean()), rel=1e-12)
    assert event_probability(n, "either") == pytest.approx(float((zeros + ones > 0).double().mean()), rel=1e-12)


def test_event_probabilities_have_their_limits() -> None:
    assert event_probability(5000) == pytest.approx(-math.expm1(-1), rel=1e-15)
    assert event_probability(5000, "one") == pytest.approx(math.exp(-1), rel=1e-15)
    assert event_probability(5000, "either") == pytest.approx(-math.expm1(-2), rel=1e-15)


def test_samples_hold_their_event_as_often_as_they_should() -> None:
    found = [Sample.draw(6, seed) for seed in range(1500)]
    for event, holds in (("some", lambda k: k >= 1), ("one", lambda k: k == 1)):
        p = event_probability(6, event)  # type: ignore[arg-type]
        share = sum(holds(len(s.zeros)) for s in found) / len(found)
        assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / len(found))


def test_the_number_of_lazy_unanimous_columns_is_binomial() -> None:
    """The mean and variance of Binomial(N, 1/N); lazily and with all columns drawn."""
    lazily = torch.tensor([float(len(Sample.lazy(6, seed, columns=1).zeros)) for seed in range(3000)])
    assert abs(float(lazily.mean()) - 1.0) < 4 / math.sqrt(3000)
    assert float(lazily.var()) == pytest.approx(1 - 2**-6, rel=0.15)


def test_a_lazy_sample_without_other_columns_is_not_redrawn() -> None:
    """Nor conditioned on anything: it may have no column at all, and the problems take it."""
    found = [(Sample.lazy(400, seed, columns=0), Sample.lazy(400, seed, columns=1)) for seed in range(40)]
    for none, one in found:
        assert (none.zeros, none.ones, none.attempts) == (one.zeros, one.ones, 1)
    f = FlatSharpERM(400, 0.25, sample=next(none for none, _ in found if not len(none)))
    assert f.d == 1
    w = 0.5 * f.auxiliary_unit()
    assert f.empirical_risk(w) == f.population_risk(w).value == 0.5 * 0.25**2
    assert f.sharpness(0.5, w).lower == pytest.approx(0.5 * (0.75**2 - 0.25**2))


def test_counts_of_numpy_are_counts() -> None:
    assert Sample.canonical(np.int64(3)).n == 3
    assert type(Sample.spurious(np.int64(400)).n) is int  # 2 ** n of a 64-bit integer would overflow
    assert Sample.spurious(np.int64(400)).columns == Sample.spurious(400).columns
    assert event_probability(np.int64(100)) == event_probability(100)


def test_only_canonical_columns_have_places_in_the_canonical_sample() -> None:
    for sample in (Sample.lazy(5, 0, columns=4), Sample.spurious(5, zeros=2), Sample.draw(5, 0)):
        with pytest.raises(
            ValueError, match=f"columns of this {sample.kind} sample are not those of the canonical one"
        ):
            sample.members()
    assert Sample.spurious(3, zeros=0).members().tolist() == [*[-1] * 7, 0]
    assert Sample.canonical(3).members().tolist() == list(range(8))


def test_canonical_samples_have_every_pattern_once() -> None:
    sample = Sample.canonical(4)
    assert len({tuple(column) for column in sample.share.T.tolist()}) == 16
    assert (sample.zeros, sample.ones) == ((0,), (15,))
    classes = Sample.canonical(4, "classes")
    assert classes.sizes == (1, 4, 6, 4, 1)
    assert (classes.zeros, classes.ones) == ((0,), (4,))
    ones = sample.share.sum(0).long()
    assert classes.members().tolist() == ones.tolist()
    assert Sample.canonical(4, "spurious").members().tolist() == [0, *[-1] * 14, 1]


def test_draws_are_conditioned_and_repeatable() -> None:
    for event in ("some", "one", "either"):
        sample = Sample.draw(5, 3, event, bit=1)
        unanimous = len(sample.ones) + (len(sample.zeros) if event == "either" else 0)
        assert unanimous == 1 if event == "one" else unanimous >= 1
        assert torch.equal(sample.share, Sample.draw(5, 3, event, bit=1).share)
    assert max(Sample.draw(5, seed, "one").attempts for seed in range(20)) > 1


def test_lazy_columns_do_not_depend_on_how_many_there_are() -> None:
    few, many = Sample.lazy(200, 5, columns=3, event="some"), Sample.lazy(200, 5, columns=8, event="some")
    assert few.zeros == many.zeros
    assert torch.equal(few.share, many.share[:, : few.share.shape[1]])
    mixed = many.share[:, len(many.zeros) + len(many.ones) :].mean(0)
    assert mixed.shape == (8,)
    assert float((mixed - 0.5).abs().max()) < 0.2


def test_leaving_out_keeps_dividing_by_n() -> None:
    sample = Sample.canonical(3).without(1)
    assert sample.weights.tolist() == pytest.approx([1 / 3, 0.0, 1 / 3])
    with pytest.raises(ValueError, match="does not tell its 3 examples apart"):
        Sample.canonical(3, "classes").without(0)
    with pytest.raises(ValueError, match=r"one of 0 \.\.\. 2, got 3"):
        Sample.canonical(3).without(3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Sample.canonical(17), r"n = 17 examples have 2\^17 columns.*classes"),
        (lambda: Sample.draw(30, 0), "at most n = 16"),
        (lambda: Sample.canonical(1001, "classes"), "at most n = 1000"),
        (lambda: Sample.canonical(4, "lazy"), "unknown representation"),
        (lambda: Sample.canonical(0), "integer >= 1, got 0"),
        (lambda: Sample.canonical(True), "got True"),
        (lambda: Sample.canonical(2.0), "got 2.0"),  # type: ignore[arg-type]
        (lambda: Sample.from_bits(torch.zeros(2, 3)), r"expected a matrix \(n, 2\*\*n\).*\(2, 3\)"),
        (lambda: Sample.from_bits(torch.full((1, 2), 2)), "must be 0 or 1"),
        (lambda: Sample.draw(3, 0, "sometimes"), "unknown event 'sometimes'"),  # type: ignore[arg-type]
        (lambda: Sample.draw(3, 0, "some", bit=2), "0 or 1, got 2"),
        (lambda: Sample.spurious(3, 0, 0), "needs a unanimous column"),
        (lambda: Sample.spurious(2, 5, 5), r"5 columns of zeros and 5 of ones are more than the 2\^2 there are"),
        (lambda: Sample.spurious(3, 1.5, 0), "zeros must be an integer >= 0, got 1.5"),  # type: ignore[arg-type]
        (lambda: Sample.from_bits([[0, 1]]), "bits must be a tensor, got a list: convert it with torch.as_tensor"),  # type: ignore[arg-type]
        (lambda: Sample.lazy(3, 0, columns=-1), "columns must be an integer >= 0, got -1"),
        (lambda: Sample.lazy(3, 0, columns=9), r"more than the 2\^3 there are"),
        (lambda: event_probability(3, "never"), "unknown event 'never'"),  # type: ignore[arg-type]
    ],
)
def test_bad_input(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
