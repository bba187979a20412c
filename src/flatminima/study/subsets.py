"""The rows that a network of a study is trained, probed and tested on.

After the notebooks of M. T. Bennett, "Are Flat Minima an Illusion?" (arXiv:2605.05209): the training subset is the first n
rows of one permutation of the official training rows, nested over n, and everything else (the other training rows in the order
of the file, then the test rows) is unseen; probes are drawn from it. Accuracy is that on the official test rows, or on all
unseen rows where there is no official test set. Halves a and b of these rows are for selection and for the report.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from flatminima.data import sources
from flatminima.data.splits import DataError, IntArray, stratified_choice
from flatminima.names import unknown
from flatminima.study.run_spec import DataSpec

_SOURCES: Mapping[str, Callable[[], sources.Source]] = MappingProxyType(
    {"mnist": sources.mnist, "fashion-mnist": sources.fashion_mnist, "digits": sources.digits}
)
_CHUNK = 8192


@dataclass(frozen=True, eq=False)
class Subset:
    """Inputs are float32 and flattened, ``(rows, pixels)``, or :meth:`pictures`; labels are classes.

    Attributes:
        x, y: training rows.
        probes, probe_labels: unseen rows that the pair proxy asks about.
        test, test_labels: rows that accuracies are taken on.
        half: which of these are in half a, ``(rows,)``; the others are in half b.
        shape: of one picture.
        classes: number of classes.
    """

    x: Tensor
    y: Tensor
    probes: Tensor
    probe_labels: Tensor
    test: Tensor
    test_labels: Tensor
    half: Tensor
    shape: tuple[int, ...]
    classes: int
    _pool: _Pool
    _rest: IntArray

    def unseen(self, rows: int = _CHUNK) -> Iterator[tuple[Tensor, Tensor]]:
        """Everything but the training rows, in pieces of so many rows, with labels: training rows first, then the test's."""
        for start in range(0, len(self._rest), rows):
            x, y = self._pool.rows(self._rest[start : start + rows])
            yield x.view(-1, *self.x.shape[1:]), y

    def pictures(self) -> Subset:
        """The same with inputs ``(rows, channels, height, width)``."""
        x, probes, test = (rows.view(-1, *self.shape) for rows in (self.x, self.probes, self.test))
        return replace(self, x=x, probes=probes, test=test)

    @property
    def unseen_rows(self) -> int:
        """How many these are."""
        return len(self._rest)


@dataclass(frozen=True, eq=False)
class _Pool:
    """All rows of a data set, training rows before test rows; pixels as they are in the files."""

    pixels: np.ndarray
    labels: IntArray
    train: int
    classes: int
    depth: float
    mean: float = 0.0
    deviation: float = 1.0

    def rows(self, chosen: IntArray) -> tuple[Tensor, Tensor]:
        x = torch.from_numpy(self.pixels[chosen]).to(torch.float32).flatten(1) / self.depth
        if (self.mean, self.deviation) != (0.0, 1.0):
            x = (x - self.mean) / self.deviation
        return x, torch.from_numpy(self.labels[chosen])


@functools.lru_cache(maxsize=2)
def _pool(name: str) -> _Pool:
    source = _SOURCES[name]()
    parts = [source.train] if source.test is None else [source.train, source.test]
    pixels = np.concatenate([part.pixels(np.arange(len(part.labels))) for part in parts])
    labels = np.concatenate([part.labels for part in parts])
    depth = 16.0 if name == "digits" else 255.0
    return _Pool(pixels, labels, len(source.train.labels), len(source.classes), depth)


@functools.lru_cache(maxsize=8)
def load_subset(spec: DataSpec) -> Subset:
    """Read the rows of a specification; the last few are remembered.

    Raises:
        DataError: an unknown name, files that are not there, or more rows or probes than there are.

    Example:
        >>> data = load_subset(DataSpec("digits", 250, probes=20))
        >>> data.x.shape, len(data.probes), len(data.test), data.unseen_rows
        (torch.Size([250, 64]), 20, 1547, 1547)
    """
    if spec.name not in _SOURCES:
        raise DataError(unknown("data set", spec.name, _SOURCES))
    pool = _pool(spec.name)
    if not 0 < spec.rows <= pool.train or spec.rows == len(pool.labels):
        most = pool.train - (pool.train == len(pool.labels))
        raise DataError(f"rows is {spec.rows}: expected 1 to {most} of {spec.name}")
    chosen = _chosen(spec, pool)
    rest = np.setdiff1d(np.arange(len(pool.labels)), chosen)
    if not 0 <= spec.probes <= len(rest):
        raise DataError(f"probes is {spec.probes}: expected 0 to {len(rest)} of {spec.name}")
    if spec.scale == "standardised":
        raw, _ = pool.rows(chosen)
        mean, deviation = float(raw.double().mean()), float(raw.double().std())
        pool = _Pool(pool.pixels, pool.labels, pool.train, pool.classes, pool.depth, mean, deviation)
    drawn = torch.randperm(len(rest), generator=torch.Generator().manual_seed(spec.probe_seed))[: spec.probes].numpy()
    tests = rest if pool.train == len(pool.labels) else np.arange(pool.train, len(pool.labels))
    half = torch.zeros(len(tests), dtype=torch.bool)
    mixed = torch.randperm(len(tests), generator=torch.Generator().manual_seed(spec.split_seed))
    half[mixed[: len(tests) // 2]] = True
    x, y = pool.rows(chosen)
    return Subset(
        x, y, *pool.rows(rest[drawn]), *pool.rows(tests), half, tuple(pool.pixels.shape[1:]), pool.classes, pool, rest
    )


def _chosen(spec: DataSpec, pool: _Pool) -> IntArray:
    if spec.subset_rule == "permutation":
        order = torch.randperm(pool.train, generator=torch.Generator().manual_seed(spec.subset_seed))
        return order[: spec.rows].numpy()
    if spec.subset_rule == "choice":
        state = np.random.RandomState(spec.subset_seed)  # the legacy generator is what the source seeds
        return np.asarray(state.choice(pool.train, spec.rows, replace=False))
    if spec.subset_rule == "stratified":
        rng = np.random.default_rng(spec.subset_seed)
        return stratified_choice(pool.labels[: pool.train], spec.rows, rng)[0]
    raise DataError(unknown("subset_rule", spec.subset_rule, ("permutation", "choice", "stratified")))
