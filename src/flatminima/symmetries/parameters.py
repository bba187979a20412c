"""Which elements of which parameters an operation used, and what labels that gives them.

Elements are numbers (`Tape.elements`), equal where memory is shared. Operations that move elements about are run on these
numbers, so that the rows of a fused projection, a transposed kernel or a stack of weights are known for what they are.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

import torch
from torch import Tensor

from .classes import Classes, compact
from .tape import Tape

NONE = -1
"""The label of an element that is not meant."""


@dataclass(frozen=True, eq=False)
class Entry:
    """Labels of the elements of one parameter in one role; they broadcast to its shape, `NONE` for elements not used.

    Attributes:
        name: of the parameter.
        out: the unit that the element writes.
        into: the unit that it reads; `FIXED` where it reads an input or nothing, `NONE` where it reads zeros.
        separate: whether different units read different inputs with elements in the same place (grouped convolutions), so
            that units cannot be mixed.
    """

    name: str
    out: Tensor
    into: Tensor
    separate: bool = False


class Parameters:
    """The elements of all parameters of a run, in blocks of shared memory."""

    def __init__(self, tape: Tape) -> None:
        self.values: dict[int, str] = {}
        for name, value in tape.parameters.items():
            self.values.setdefault(id(value), name)  # of several names of one parameter the first counts
        self.numbers = {name: tape.elements[name] for name in self.values.values()}
        spans = sorted((int(n.min()), int(n.max()) + 1, name) for name, n in self.numbers.items() if n.numel())
        self._starts: list[int] = []
        self._stops: list[int] = []
        self._names: list[list[str]] = []
        for start, stop, name in spans:
            if self._stops and start < self._stops[-1]:
                self._stops[-1] = max(self._stops[-1], stop)
                self._names[-1].append(name)
            else:
                self._starts.append(start)
                self._stops.append(stop)
                self._names.append([name])
        self._labels: dict[int, tuple[Tensor, Tensor]] = {}  # block -> (label of each element, whether it is used)

    def layer(self, name: str) -> str:
        """The layer that a parameter belongs to: its module, or the parameter itself where the module has several."""
        module, _, leaf = name.rpartition(".")
        return module if module and leaf in ("weight", "bias") else name

    def blocks(self, numbers: Tensor) -> list[int]:
        """The blocks that these elements are in."""
        low, high = int(numbers.min()), int(numbers.max())
        first, last = bisect.bisect_right(self._starts, low) - 1, bisect.bisect_right(self._starts, high) - 1
        return list(range(first, last + 1))

    def locate(self, number: int) -> tuple[str, int]:
        """The first parameter that holds an element, and its row-major position there."""
        name = self._names[self.blocks(torch.tensor([number]))[0]][0]
        return name, int((self.numbers[name].reshape(-1) == number).nonzero()[0, 0])

    def names(self, numbers: Tensor) -> list[str]:
        """The parameters that these elements belong to."""
        return [name for block in self.blocks(numbers) for name in self._names[block]] if numbers.numel() else []

    def entries(self, numbers: Tensor, out: Tensor, into: Tensor, *, separate: bool = False) -> list[Entry]:
        """Labels given in the shape of the operation, in the shape of each parameter."""
        numbers, out, into = torch.broadcast_tensors(numbers, out, into)
        found = []
        for block in self.blocks(numbers):
            for name in self._names[block]:
                axes = _axes(numbers, self.numbers[name])
                pair = (
                    (_arranged(labels, axes, self.numbers[name]) for labels in (out, into))
                    if axes is not None
                    else (self._looked_up(block, name, numbers, labels) for labels in (out, into))
                )
                of_out, of_into = (condensed(labels) for labels in pair)
                if bool((of_out != NONE).any()) or bool((of_into != NONE).any()):
                    found.append(Entry(name, of_out, of_into, separate))
        return found

    def _looked_up(self, block: int, name: str, numbers: Tensor, labels: Tensor) -> Tensor:
        """Labels of a parameter's elements, found by their numbers."""
        start, size = self._starts[block], self._stops[block] - self._starts[block]
        inside = (numbers >= start) & (numbers < start + size)
        table = torch.full((size,), NONE)
        table[numbers[inside] - start] = labels[inside]
        return table[self.numbers[name] - start]

    def as_data(self, numbers: Tensor, classes: Classes) -> Tensor:
        """Labels of elements that are used as numbers of their own (gains, biases, positions): one for each."""
        labels = torch.zeros_like(numbers)
        for block in self.blocks(numbers) if numbers.numel() else ():
            start, stop = self._starts[block], self._stops[block]
            if block not in self._labels:
                self._labels[block] = (classes.new(stop - start), torch.zeros(stop - start, dtype=torch.bool))
            of, used = self._labels[block]
            small = compact(numbers)[0]
            inside = (small >= start) & (small < stop)
            used[small[inside] - start] = True
            labels = torch.where(
                (numbers >= start) & (numbers < stop), of[(numbers - start).clamp(0, stop - start - 1)], labels
            )
        return labels

    def data_entries(self, classes: Classes) -> list[Entry]:
        """Every parameter that is used as numbers of their own; where only a part was used, the labels are filled in."""
        found = []
        for block, (labels, used) in self._labels.items():
            for name in self._names[block]:
                mine = self.numbers[name] - self._starts[block]
                seen = used[mine]
                if bool(seen.any()):
                    of = torch.where(seen, labels[mine], NONE)
                    found.append(Entry(name, condensed(_filled(of, classes)), torch.zeros(1, dtype=torch.int64)))
        return found


def _axes(numbers: Tensor, whole: Tensor) -> list[int] | None:
    """For each axis of a parameter, the axis of the same elements seen in another order of axes; None if they are not."""
    if numbers.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr() or numbers.numel() != whole.numel():
        return None
    strides = {stride: axis for axis, stride in enumerate(numbers.stride()) if numbers.shape[axis] > 1}
    axes = [strides.get(stride, -1) for stride, size in zip(whole.stride(), whole.shape, strict=True) if size > 1]
    sizes = [size for size in whole.shape if size > 1]
    fits = len(set(axes)) == len(axes) == len(strides) and all(
        axis >= 0 and numbers.shape[axis] == size for axis, size in zip(axes, sizes, strict=True)
    )
    return axes if fits else None


def _arranged(labels: Tensor, axes: list[int], whole: Tensor) -> Tensor:
    """Labels in the shape of an operation, brought into that of the whole parameter."""
    others = [axis for axis in range(labels.ndim) if axis not in axes]
    return compact(labels.permute(*others, *axes)[(0,) * len(others)].reshape(whole.shape))[0]


def condensed(labels: Tensor) -> Tensor:
    """The same labels with size 1 along every axis on which they do not change."""
    for axis in range(labels.ndim):
        first = labels.narrow(axis, 0, 1)
        if labels.shape[axis] > 1 and bool((labels == first).all()):
            labels = first
    return labels.clone()


def _filled(labels: Tensor, classes: Classes) -> Tensor:
    """Unused elements (positions beyond the length of the example) take the label that their axis has elsewhere."""
    missing = labels == NONE
    if not bool(missing.any()) or bool(missing.all()):
        return labels
    roots = classes.roots(labels)[0]
    for axis in range(labels.ndim):
        rows = labels.movedim(axis, 0).reshape(labels.shape[axis], -1)
        root_rows = roots.movedim(axis, 0).reshape(labels.shape[axis], -1)
        known = rows != NONE
        top = torch.where(known, root_rows, torch.full_like(rows, NONE)).max(1).values
        same = torch.where(known, root_rows == top[:, None], torch.ones_like(known)).all()
        if bool(same) and bool(known.any(1).all()):
            some = torch.where(known, rows, torch.full_like(rows, NONE)).max(1).values
            filled = torch.where(known, rows, some[:, None])
            moved = labels.movedim(axis, 0)
            return filled.reshape(moved.shape).movedim(0, axis)
    return labels
