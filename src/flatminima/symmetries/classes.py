"""Labels of tensor elements, and which of them must move together.

An analysis gives every element of every tensor of a run a label: which unit it belongs to. Label `FIXED` is for elements that
no map may change (inputs, constants), label `ZERO` for zeros, which go with everything. Operations make labels equal, or tie
the logarithm of one scale to a multiple of another (``relu(x)^2`` scales twice as fast as x).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

FIXED, ZERO = 0, -1


class Classes:
    """A union-find of labels with ratios: ``log s[label] = ratio * log s[root]``; a fixed class never scales."""

    def __init__(self) -> None:
        self._parent, self._ratio = [0], [1.0]
        self._reason: dict[int, str] = {FIXED: "it is an input or a constant"}
        self._table: tuple[Tensor, Tensor] | None = None  # of all labels, while nothing changes

    def copy(self) -> Classes:
        """An independent copy of the present state."""
        twin = Classes()
        twin._parent, twin._ratio, twin._reason = self._parent[:], self._ratio[:], dict(self._reason)
        return twin

    def new(self, count: int) -> Tensor:
        """So many fresh labels, (count,)."""
        start, self._table = len(self._parent), None
        self._parent.extend(range(start, start + count))
        self._ratio.extend([1.0] * count)
        return torch.arange(start, start + count)

    def root(self, label: int) -> tuple[int, float]:
        """The representative of a label's class, and the ratio to it."""
        path, ratio = [], 1.0
        while self._parent[label] != label:
            path.append(label)
            label = self._parent[label]
        for node in reversed(path):
            ratio *= self._ratio[node]
            self._parent[node], self._ratio[node] = label, ratio
        return label, ratio

    def roots(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Representatives and ratios, elementwise; `FIXED` for members of fixed classes, `ZERO` stays."""
        found, ratios = self._table or self._rooted(unique(labels).tolist())
        return found[labels + 1], ratios[labels + 1]

    def freeze(self) -> None:
        """Look all labels up once, so that `roots` need not, until something changes."""
        self._table = self._rooted(list(range(len(self._parent))))

    def _rooted(self, labels: list[int]) -> tuple[Tensor, Tensor]:
        found, ratios = [ZERO] * (max(labels, default=0) + 2), [1.0] * (max(labels, default=0) + 2)
        for label in labels:
            root, ratio = self.root(label) if label > FIXED else (label, 1.0)
            found[label + 1] = FIXED if root in self._reason else root
            ratios[label + 1] = ratio
        return torch.tensor(found), torch.tensor(ratios, dtype=torch.float64)

    def reason(self, label: int) -> str | None:
        """Why the label's class is fixed, or None if it is free."""
        return self._reason.get(self.root(label)[0])

    def fix(self, labels: Tensor, reason: str) -> None:
        """No map may change these."""
        self._table = None
        for label in unique(labels).tolist():
            if label > FIXED:
                self._reason.setdefault(self.root(label)[0], reason)

    def tie(self, first: Tensor, second: Tensor, reason: str, ratio: float = 1.0, *, direct: bool = False) -> None:
        """``log s[first] = ratio * log s[second]``, elementwise after broadcasting; zeros go with everything.

        Where that leaves only the scale 1, the class is fixed, with `reason`; with that of the other class where this is fixed
        already, unless the tie is the `direct` cause.
        """
        self._table = None
        for a, b in pairs(first, second):
            if ZERO in (a, b):
                continue
            (root_a, ratio_a), (root_b, ratio_b) = self.root(a), self.root(b)
            if root_a == root_b:
                if ratio_a != ratio * ratio_b:
                    self._reason.setdefault(root_a, reason)
                continue
            known_a, known_b = self._reason.get(root_a), self._reason.get(root_b)
            if (known_a is None) != (known_b is None):
                free, known = (root_b, root_a) if known_b is None else (root_a, root_b)
                self._reason[free] = reason if known == FIXED or direct else str(self._reason[known])
                if known == FIXED:
                    continue  # a constant has no scale to follow
            if root_b == FIXED or root_a == FIXED:
                continue
            self._parent[root_a] = root_b
            self._ratio[root_a] = ratio * ratio_b / ratio_a
            if known_a is not None:
                self._reason.setdefault(root_b, known_a)

    def multiple(self, labels: Tensor, degree: float, reason: str) -> Tensor:
        """Fresh labels whose scale is the given power of theirs."""
        if degree == 1:
            return labels
        distinct = unique(labels)
        free = distinct[distinct > FIXED]
        table = torch.arange(-1, int(distinct[-1]) + 1)
        table[free + 1] = self.new(len(free))
        self.tie(table[free + 1], free, reason, degree)
        return table[labels + 1]


def compact(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, broadcast against each other, without the axes along which all of them repeat one element."""
    expanded = torch.broadcast_tensors(*tensors)
    for axis in range(expanded[0].ndim):
        if all(t.stride(axis) == 0 or t.shape[axis] == 1 for t in expanded) and expanded[0].shape[axis] > 1:
            expanded = tuple(t.narrow(axis, 0, 1) for t in expanded)
    return tuple(expanded)


def pairs(first: Tensor, second: Tensor) -> Iterable[tuple[int, int]]:
    """The distinct pairs of elements of two label tensors, after broadcasting."""
    a, b = (t.reshape(-1) for t in compact(first, second))
    if not a.numel():
        return ()
    span = int(b.max()) + 2
    keys = torch.unique((a + 1) * span + (b + 1))
    return zip((keys // span - 1).tolist(), (keys % span - 1).tolist(), strict=True)


def unique(labels: Tensor) -> Tensor:
    """The distinct labels, sorted."""
    small = compact(labels)[0].reshape(-1)
    if not small.numel():
        return small
    seen = torch.zeros(int(small.max()) + 2, dtype=torch.bool)  # marking is faster than sorting: labels are dense
    seen[small + 1] = True
    return seen.nonzero().reshape(-1) - 1


def position_among(labels: Tensor, roots: Tensor) -> Tensor:
    """Where each label stands among the sorted roots, -1 where it is none of them."""
    position = torch.searchsorted(roots, labels).clamp(max=len(roots) - 1)
    return torch.where(roots[position] == labels, position, -1)
