"""What an analysis of a run writes down on its way."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .parameters import Entry
from .rewrite import Norm
from .tape import Call, Value


@dataclass(frozen=True, eq=False)
class Event:
    """Something that units met.

    Attributes:
        category: ``write`` and ``read`` (a weight), ``homogeneous``, ``odd``, ``sigmoid``, ``suspect`` and ``elementwise``
            (activations), ``scaled`` (times numbers that no map changes), ``averaged`` (times a matrix of such), ``gain``,
            ``product``, ``contracted`` (times other units, element by element or summed), ``norm``, ``batch-norm``, ``mixed``
            (a symmetric function of several), ``output``.
        call: where; None for the output.
        labels: of the units, sorted.
    """

    category: str
    call: Call | None
    labels: Tensor


@dataclass(frozen=True, eq=False)
class Use:
    """A weight at work in a linear operation.

    Attributes:
        call: the operation.
        entries: of each parameter in it, the units its elements write and read.
    """

    call: Call
    entries: tuple[Entry, ...]


@dataclass(frozen=True, eq=False)
class Product:
    """Two free tensors multiplied element by element: the distinct pairs of labels, and the label of each pair's product."""

    call: Call
    first: Tensor
    second: Tensor
    out: Tensor


@dataclass(frozen=True, eq=False)
class Contraction:
    """Two free tensors (n, i, k) and (n, k, j) multiplied as matrices: the labels (n, k) that are summed over."""

    call: Call
    first: Tensor
    second: Tensor


@dataclass(frozen=True, eq=False)
class Average:
    """A free tensor times a matrix that no map changes: the matrix, and the labels (n, units) of the axis that stays."""

    call: Call
    matrix: Value
    labels: Tensor


@dataclass(frozen=True, eq=False)
class NormUse:
    """A normalisation: the labels before and after it, in the shape of its argument."""

    call: Call
    norm: Norm
    before: Tensor
    after: Tensor

    def together(self) -> tuple[Tensor, ...]:
        """The labels before it, in sets that share one scale."""
        if self.norm.style == "layer":
            return (self.before.reshape(-1),)
        if self.norm.style == "group":
            return tuple(self.before.reshape(self.norm.groups, -1))
        return ()
