"""Losses of fair bits in columns: what the two traps and the flat and the sharp minimum have in common."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from flatminima.problems.convex_base import ConvexProblem, LossModel, check_count, check_dtype
from flatminima.problems.convex_risk import fair_counts
from flatminima.problems.convex_sample import Kind, Sample

_Same = TypeVar("_Same", bound="ColumnProblem")


class ColumnProblem(ConvexProblem):
    r"""Losses of bits in columns: a point is one block of ``slots`` numbers a class of columns, and an auxiliary number.

    The block of class ``c`` is ``w[c * slots : (c + 1) * slots]``, the auxiliary number is ``w[-1]``; see
    :class:`~flatminima.problems.convex_sample.Sample` for what a class is.
    """

    sample: Sample
    slots: int
    _arguments: dict[str, Any]

    def __init__(self, n: int, slots: int, sample: Sample | Kind, dtype: torch.dtype) -> None:
        n, slots = check_count("n", n), check_count("steps", slots)
        dtype = check_dtype(dtype)
        self.sample = sample if isinstance(sample, Sample) else Sample.canonical(n, sample)
        if self.sample.n != n:
            raise ValueError(f"the sample has {self.sample.n} examples and the problem n = {n}")
        self.n, self.slots, self.d = n, slots, len(self.sample) * slots + 1
        self.dtype = dtype
        root = torch.tensor([math.sqrt(size) for size in self.sample.sizes], dtype=torch.float64)
        self._root = root.to(dtype)
        if not bool(self._root.isfinite().all()):
            raise ValueError(f"the columns of n = {n} examples are too many for {dtype}: use float64")
        self._share, self._weights = self.sample.share.to(dtype), self.sample.weights.to(dtype)
        self.start = torch.zeros(self.d, dtype=dtype)

    # ----- points ----------------------------------------------------------------------------------------------------

    def split(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Blocks ``(..., classes, slots)`` and auxiliary numbers ``(...)`` of points ``(..., d)``."""
        return w[..., :-1].unflatten(-1, (len(self.sample), self.slots)), w[..., -1]

    @staticmethod
    def join(blocks: Tensor, auxiliary: Tensor) -> Tensor:
        """The inverse of :meth:`split`."""
        return torch.cat([blocks.flatten(-2), auxiliary[..., None]], -1)

    def unit(self, column: int, slot: int = 1) -> Tensor:
        """The unit vector of a class, by its position, and a slot, counted from 1."""
        if not 0 <= column < len(self.sample) or not 1 <= slot <= self.slots:
            raise ValueError(
                f"there is no slot {slot} of class {column}: {len(self.sample)} classes of {self.slots} slots"
            )
        found = torch.zeros(self.d, dtype=self.dtype)
        found[column * self.slots + slot - 1] = 1.0
        return found

    def auxiliary_unit(self) -> Tensor:
        """The unit vector of the auxiliary number."""
        found = torch.zeros(self.d, dtype=self.dtype)
        found[-1] = 1.0
        return found

    def expand(self, w: Tensor) -> Tensor:
        """Points ``(..., d)`` in the coordinates of the dense canonical sample, ``(..., 2**n * slots + 1)``.

        Raises:
            ValueError: more than 16 examples, or a sample whose columns are not those of the canonical one.
        """
        blocks, auxiliary = self.split(w)
        member = self.sample.members()
        full = (blocks / self._root[:, None])[..., member.clamp(min=0), :]
        return self.join(torch.where((member >= 0)[:, None], full, torch.zeros_like(full)), auxiliary)

    def on(self: _Same, sample: Sample | Kind) -> _Same:
        """The same losses, constant for constant, with another sample of ``n`` examples."""
        return type(self)(self.n, sample=sample, dtype=self.dtype, **self._arguments)

    # ----- the loss --------------------------------------------------------------------------------------------------

    @abstractmethod
    def _loss(self) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
        """``loss(blocks, auxiliary, share, **constants) -> (..., rows)`` for autograd, and its constants."""

    def losses(self, w: Tensor) -> Tensor:
        """The loss of every example of the sample, ``(..., d)`` to ``(..., rows)``."""
        loss, constants = self._loss()
        return loss(*self.split(w), self._share, **constants)

    def model(self, w: Tensor | None = None) -> nn.Module:
        """A module with the parameters ``columns`` ``(classes, slots)`` and ``auxiliary`` ``(1,)``, at ``w``."""
        blocks, auxiliary = self.split(self._point(w))
        loss, constants = self._loss()
        return LossModel(partial(_of_parts, loss), {"columns": blocks, "auxiliary": auxiliary.reshape(1)}, constants)

    def data(self) -> tuple[Tensor, Tensor]:
        """The shares of ones ``(rows, classes)`` and empty targets.

        Raises:
            ValueError: an example was left out; its loss is not a mean over rows then.
        """
        if self.sample.counted < 1.0:
            raise ValueError("an example was left out, and the rows no longer count equally: use value_and_gradient")
        return self._share.clone(), torch.zeros(len(self._share), dtype=self.dtype)

    def fresh(self, rows: int, seed: int) -> tuple[Tensor, Tensor]:
        """The shares of ones ``(rows, classes)`` of new examples, and empty targets."""
        check_count("rows", rows)
        generator = np.random.default_rng(seed)
        share = fair_counts(self.sample.sizes, rows, generator) / torch.tensor(
            [float(size) for size in self.sample.sizes], dtype=torch.float64
        )
        return share.to(self.dtype), torch.zeros(rows, dtype=self.dtype)


def _of_parts(
    loss: Callable[..., Tensor], blocks: Tensor, auxiliary: Tensor, share: Tensor, **constants: Tensor
) -> Tensor:
    return loss(blocks, auxiliary[0], share, **constants)
