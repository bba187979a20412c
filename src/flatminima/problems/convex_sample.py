r"""Samples of fair coins with :math:`2^n` columns, held in as few numbers as a problem can do with.

An example of the convex problems is a row of :math:`2^n` fair bits; what a sample of *n* rows hides is that some *column*
may be unanimous. The losses are homogeneous sums over columns, so columns that share a value can share a coordinate: with
:math:`m_c` columns in class *c* and :math:`y_c = \sqrt{m_c}\,x_c`, lengths, gradients and steps are exactly those of the
full problem.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor

from flatminima.names import unknown
from flatminima.problems.convex_base import check_count, real_tensor

Kind: TypeAlias = Literal["dense", "spurious", "classes", "lazy"]
#: "some": a unanimous column of the wanted bit; "one": exactly one; "either": a unanimous column of any bit.
Event: TypeAlias = Literal["some", "one", "either"]

_DENSE = 16  # 2^16 columns of 16 rows are 8 MB
_LARGEST = 1000  # beyond, binomial coefficients leave the range of a double


def event_probability(n: int, event: Event = "some") -> float:
    r"""The probability that a sample of ``n`` rows of :math:`N = 2^n` fair bits has a unanimous column.

    Args:
        n: rows, at least 1.
        event: ``"some"``: at least one column of zeros (equally: of ones), :math:`1 - (1 - 1/N)^N`; ``"one"``: exactly one,
            :math:`(1 - 1/N)^{N-1}`; ``"either"``: at least one of zeros or of ones, :math:`1 - (1 - 2/N)^N`.

    Example:
        >>> [round(event_probability(n, event), 9) for n, event in ((2, "some"), (2, "one"), (10_000, "some"))]
        [0.68359375, 0.421875, 0.632120559]
    """
    n = _rows(n, None)
    if event not in get_args(Event):
        raise ValueError(unknown("event", event, get_args(Event)))
    columns = 2.0 ** min(n, _LARGEST)  # the limit in n is reached to the last bit long before
    if event == "one":
        return math.exp((columns - 1.0) * math.log1p(-1.0 / columns))
    share = (2.0 if event == "either" else 1.0) / columns
    return 1.0 if share == 1.0 else -math.expm1(columns * math.log1p(-share))


@dataclass(frozen=True)
class Sample:
    r"""``n`` examples, as shares of ones per class of columns.

    Make one with :meth:`draw`, :meth:`canonical`, :meth:`lazy`, :meth:`spurious` or :meth:`from_bits`.

    Attributes:
        n: examples.
        kind: ``"dense"``: every column is a class. ``"classes"``: the canonical sample, columns with equally many ones share
            a class; for full-batch methods that treat coordinates alike up to rotation (gradient descent, momentum, SAM), not
            for Adam or mini-batches. ``"spurious"``: the unanimous columns alone, for points supported there. ``"lazy"``: the
            unanimous columns and some others, for points supported there.
        share: ``(rows, classes)``, float64: which part of the class's columns has a one. One row where all examples agree.
        sizes: columns per class.
        weights: ``(rows,)``: of the rows in the empirical risk. They sum to 1; to less where an example was left out.
        columns: of all :math:`2^n`, the number of each class's first one.
        attempts: samples drawn until the event held.
    """

    n: int
    kind: Kind
    share: Tensor
    sizes: tuple[int, ...]
    weights: Tensor
    columns: tuple[int, ...]
    attempts: int = 1

    @property
    def zeros(self) -> tuple[int, ...]:
        """Positions of the classes whose columns are zero in every example."""
        return tuple((self.share == 0.0).all(0).nonzero()[:, 0].tolist())

    @property
    def ones(self) -> tuple[int, ...]:
        """Positions of the classes whose columns are one in every example."""
        return tuple((self.share == 1.0).all(0).nonzero()[:, 0].tolist())

    @property
    def counted(self) -> float:
        """Which part of the examples counts: 1, less where some were left out."""
        return int((self.weights > 0.0).sum()) / len(self.weights)

    def __len__(self) -> int:
        """How many classes of columns there are."""
        return len(self.sizes)

    @classmethod
    def from_bits(cls, bits: Tensor, *, attempts: int = 1) -> Sample:
        """The sample with these bits ``(n, 2**n)``, every column its own class."""
        if real_tensor("bits", bits).dim() != 2 or bits.shape[0] < 1 or bits.shape[1] != 2 ** bits.shape[0]:
            raise ValueError(f"bits: expected a matrix (n, 2**n), got a tensor of shape {tuple(bits.shape)}")
        if not bool(((bits == 0) | (bits == 1)).all()):
            raise ValueError("bits must be 0 or 1; for the problem with signs, 1 stands for +1 and 0 for -1")
        n, count = bits.shape
        share = bits.detach().to(device="cpu", dtype=torch.float64, copy=True)
        return cls(n, "dense", share, (1,) * count, _equal(n), tuple(range(count)), attempts)

    @classmethod
    def canonical(cls, n: int, kind: Kind = "dense") -> Sample:
        """The sample in which every column pattern occurs once: bit ``k`` of column ``i`` is ``(i >> k) & 1``.

        It is one of those that the theorems speak of (one column of zeros, one of ones) and needs no random numbers.

        Args:
            n: examples. ``"dense"`` is refused beyond 16.
            kind: ``"dense"``, ``"classes"`` or ``"spurious"``.

        Example:
            >>> Sample.canonical(2).share.tolist(), Sample.canonical(400, "classes").share.shape
            ([[0.0, 1.0, 0.0, 1.0], [0.0, 0.0, 1.0, 1.0]], torch.Size([1, 401]))
        """
        if kind == "dense":
            n = _rows(n, _DENSE)
            column = torch.arange(2**n)
            return cls.from_bits(torch.stack([(column >> k) & 1 for k in range(n)]))
        if kind == "spurious":
            return cls.spurious(n)
        if kind != "classes":
            raise ValueError(unknown("representation of the canonical sample", kind, ("dense", "classes", "spurious")))
        n = _rows(n, _LARGEST)
        share = torch.arange(n + 1, dtype=torch.float64)[None] / n
        sizes = tuple(math.comb(n, m) for m in range(n + 1))
        return cls(n, "classes", share, sizes, _equal(1), tuple(2**m - 1 for m in range(n + 1)))

    @classmethod
    def spurious(cls, n: int, zeros: int = 1, ones: int = 1) -> Sample:
        """Nothing but the unanimous columns of a sample that has so many of them.

        Example:
            >>> Sample.spurious(1000).share.tolist()
            [[0.0, 1.0]]
        """
        n, zeros, ones = _rows(n, None), check_count("zeros", zeros, 0), check_count("ones", ones, 0)
        if zeros + ones == 0:
            raise ValueError(f"a spurious span needs a unanimous column, got {zeros} of zeros and {ones} of ones")
        if zeros + ones > 2**n:
            raise ValueError(f"{zeros} columns of zeros and {ones} of ones are more than the 2^{n} there are")
        share = torch.cat([torch.zeros(1, zeros, dtype=torch.float64), torch.ones(1, ones, dtype=torch.float64)], 1)
        columns = (*range(zeros), *(2**n - 1 - i for i in range(ones)))
        return cls(n, "spurious", share, (1,) * (zeros + ones), _equal(1), columns)

    @classmethod
    def draw(cls, n: int, seed: int, event: Event | None = None, bit: int = 0) -> Sample:
        """An i.i.d. sample, redrawn until ``event`` holds for the columns of ``bit`` s.

        Args:
            n: examples, at most 16: all :math:`2^n` columns are kept.
            seed: of the bits.
            event: see :func:`event_probability`; ``None`` takes the first sample.
            bit: 0 or 1, the value of the wanted unanimous columns.

        Example:
            >>> sample = Sample.draw(6, seed=0, event="some")
            >>> len(sample.zeros) >= 1, len(sample)
            (True, 64)
        """
        n = _rows(n, _DENSE)
        generator = torch.Generator().manual_seed(seed)
        attempt = 0
        while True:  # every event has a probability of at least 1/e
            attempt, bits = attempt + 1, torch.randint(2, (n, 2**n), generator=generator)
            if _holds(event, bit, int((bits == 0).all(0).sum()), int((bits == 1).all(0).sum())):
                return cls.from_bits(bits, attempts=attempt)

    @classmethod
    def lazy(cls, n: int, seed: int, columns: int = 64, event: Event | None = None, bit: int = 0) -> Sample:
        """The unanimous columns of an i.i.d. sample and ``columns`` others, without the rest of all :math:`2^n`.

        Columns are exchangeable, so the number of unanimous ones is drawn first and they are put first; each other one
        is uniform among the patterns that are not unanimous. Column *c* depends on ``(seed, c)`` alone. For points supported on
        these columns it is the whole sample as far as :class:`FlatSharpERM` and :class:`SAGDTrap` can tell: an untouched column
        has no gradient there. Without an event and with ``columns=0`` there may be no class at all, only the auxiliary number.

        Args:
            n: examples, any number.
            seed: of the bits.
            columns: drawn besides the unanimous ones.
            event, bit: as in :meth:`draw`.

        Example:
            >>> sample = Sample.lazy(400, seed=1, columns=10, event="some")
            >>> sample.share.shape[0], len(sample) - len(sample.zeros) - len(sample.ones)
            (400, 10)
        """
        n, columns = _rows(n, None), check_count("columns", columns, 0)
        generator = np.random.default_rng((seed, 0))
        attempt, zeros, ones = 1, *_unanimous(n, generator)
        while not _holds(event, bit, zeros, ones):
            attempt, zeros, ones = attempt + 1, *_unanimous(n, generator)
        if zeros + ones + columns > 2**n:
            raise ValueError(f"columns = {columns} and {zeros + ones} unanimous ones are more than the 2^{n} there are")
        parts = [np.zeros((n, zeros)), np.ones((n, ones))]
        parts += [_mixed(n, seed, column)[:, None] for column in range(columns)]
        share = torch.from_numpy(np.concatenate(parts, axis=1))
        count = share.shape[1]
        return cls(n, "lazy", share, (1,) * count, _equal(n), tuple(range(count)), attempt)

    def without(self, example: int) -> Sample:
        """The sample in which one example's loss is zero, still divided by ``n``: what leave-one-out stability compares with.

        Raises:
            ValueError: no such example, or a representation that does not tell the examples apart.
        """
        if len(self.weights) != self.n:
            raise ValueError(
                f"the {self.kind} representation does not tell its {self.n} examples apart: use a dense one"
            )
        if not 0 <= example < self.n:
            raise ValueError(f"example must be one of 0 ... {self.n - 1}, got {example}")
        weights = self.weights.clone()
        weights[example] = 0.0
        return replace(self, weights=weights)

    def members(self) -> Tensor:
        """For each of all :math:`2^n` columns of the canonical sample the position of its class, ``(2**n,)``; -1: none.

        Raises:
            ValueError: more than 16 examples, or columns with other bits than the canonical sample has there.
        """
        bits = Sample.canonical(self.n).share
        if self.kind == "classes":
            return bits.sum(0).long()
        if not bool((self.share == bits[:, list(self.columns)]).all()):
            raise ValueError(
                f"the columns of this {self.kind} sample are not those of the canonical one and have no place in it: put the "
                "point together column by column"
            )
        found = torch.full((2**self.n,), -1)
        found[torch.tensor(self.columns)] = torch.arange(len(self))
        return found


def _equal(rows: int) -> Tensor:
    return torch.full((rows,), 1.0 / rows, dtype=torch.float64)


def _rows(n: int, most: int | None) -> int:
    """``n`` as Python's integer, refused where it counts no examples or more than ``most``."""
    n = check_count("n", n)
    if most is not None and n > most:
        classes = 'Sample.canonical(n, "classes") for full-batch methods, ' if most < _LARGEST else ""
        raise ValueError(
            f"n = {n} examples have 2^{n} columns, and this representation holds at most n = {most}: use {classes}"
            "Sample.lazy or Sample.spurious for points supported on few columns"
        )
    return n


def _holds(event: Event | None, bit: int, zeros: int, ones: int) -> bool:
    if bit not in (0, 1):
        raise ValueError(f"bit is the value of the wanted columns, 0 or 1, got {bit!r}")
    wanted = ones if bit else zeros
    if event is None:
        return True
    if event not in get_args(Event):
        raise ValueError(unknown("event", event, get_args(Event)))
    return {"some": wanted >= 1, "one": wanted == 1, "either": zeros + ones >= 1}[event]


def _unanimous(n: int, generator: np.random.Generator) -> tuple[int, int]:
    """How many columns of zeros and of ones: binomial, and within ``2**-60`` of it Poisson."""
    if n > 60:
        return int(generator.poisson(1.0)), int(generator.poisson(1.0))
    zeros = int(generator.binomial(2**n, 2.0**-n))
    return zeros, int(generator.binomial(2**n - zeros, 1.0 / (2**n - 1)))


def _mixed(n: int, seed: int, column: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    if n == 1:
        raise ValueError("with one example every column is unanimous: columns must be 0")

    def patterns() -> Iterator[np.ndarray[tuple[int], np.dtype[np.float64]]]:
        generator = np.random.default_rng((seed, 1, column))
        while True:
            yield generator.integers(0, 2, n).astype(np.float64)

    return next(p for p in patterns() if 0 < p.sum() < n)
