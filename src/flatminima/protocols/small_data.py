"""Networks trained on a few hundred rows, as studies of weakness do: raw pixels, plain SGD, until every row is right.

After the notebooks of M. T. Bennett, "Are Flat Minima an Illusion?" (arXiv:2605.05209): the subset is the first n of
one permutation of the official training rows, nested over n; probes are drawn from everything else. There the order of
batches came from a GPU's generator, so accuracies are reproduced closely, not to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flatminima.data import sources
from flatminima.data.splits import DataError, IntArray
from flatminima.models import build
from flatminima.names import unknown

_SOURCES: Mapping[str, Callable[[], sources.Source]] = MappingProxyType(
    {"mnist": sources.mnist, "fashion-mnist": sources.fashion_mnist, "digits": sources.digits}
)
SUBSET_SEED = 42  # of the permutation whose first n rows are the training set
PROBE_SEED = 99
_CHECK_EVERY = 10  # epochs between looks at the training accuracy


@dataclass(frozen=True, eq=False)
class SmallData:
    """A training subset and probes.

    Attributes:
        x, y: training rows, pixels in [0, 1], float32 ``(n, pixels)``, and labels.
        probes, probe_labels: unseen rows.
        shape: of one picture.
        classes: number of classes.
    """

    x: Tensor
    y: Tensor
    probes: Tensor
    probe_labels: Tensor
    shape: tuple[int, ...]
    classes: int


def small_data(name: str, rows: int = 250, probes: int = 100) -> SmallData:
    """The first rows of the permutation, and probes from the other training rows followed by the test rows.

    Args:
        name: ``mnist``, ``fashion-mnist``, or ``digits`` (embedded; it has no test rows of its own).
        rows: of the training set.
        probes: drawn without replacement.

    Raises:
        DataError: unknown name, files that are not there, or more rows than there are.

    Example:
        >>> data = small_data("digits", rows=250, probes=20)
        >>> data.x.shape, len(data.probes), data.classes
        (torch.Size([250, 64]), 20, 10)
    """
    if name not in _SOURCES:
        raise DataError(unknown("data set", name, _SOURCES))
    source = _SOURCES[name]()
    total = len(source.train.labels)
    if not 0 < rows < total:
        raise DataError(f"rows is {rows}: expected 1 to {total - 1} of {name}")
    chosen = torch.randperm(total, generator=torch.Generator().manual_seed(SUBSET_SEED))[:rows].numpy()
    rest = np.setdiff1d(np.arange(total), chosen)  # in the order of the file
    tests = 0 if source.test is None else len(source.test.labels)
    if not 0 < probes <= len(rest) + tests:
        raise DataError(f"probes is {probes}: expected 1 to {len(rest) + tests} of {name}")
    drawn = torch.randperm(len(rest) + tests, generator=torch.Generator().manual_seed(PROBE_SEED))[:probes].numpy()
    x, y, shape = _rows(source, chosen, np.empty(0, dtype=np.int64))
    inside = drawn < len(rest)
    px, py, _ = _rows(source, rest[drawn[inside]], drawn[~inside] - len(rest))
    order = torch.from_numpy(np.argsort(np.concatenate([np.flatnonzero(inside), np.flatnonzero(~inside)])))
    return SmallData(x, y, px[order], py[order], shape, len(source.classes))


def _rows(source: sources.Source, train: IntArray, test: IntArray) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    pixels, labels = source.train.pixels(train), source.train.labels[train]
    if len(test) and source.test is not None:
        pixels = np.concatenate([pixels, source.test.pixels(test)])
        labels = np.concatenate([labels, source.test.labels[test]])
    depth = 16.0 if source.name == "digits" else 255.0
    x = torch.from_numpy(pixels).to(torch.float32).flatten(1) / depth
    return x, torch.from_numpy(labels), tuple(pixels.shape[1:])


@dataclass(frozen=True, eq=False)
class Trained:
    """A network and how its training ended."""

    model: nn.Module
    epochs: int
    accuracy: float


def train_small(
    data: SmallData,
    hidden: Sequence[int] = (64, 8),
    *,
    seed: int = 0,
    batch_size: int = 64,
    lr: float = 0.1,
    most_epochs: int = 500,
) -> Trained:
    """A ReLU network trained by plain SGD on the mean cross entropy, until every training row is right.

    No momentum, no weight decay; the accuracy is looked at every ten epochs. Weights and the order of batches depend on
    the seed alone, and the global random state is left as it was.

    Args:
        data: of :func:`small_data`.
        hidden: widths.
        seed: of the initial weights and of the order.
        batch_size: rows a step.
        lr: step size.
        most_epochs: give up after so many.

    Example:
        >>> found = train_small(small_data("digits", rows=100, probes=1), hidden=(16,), seed=1)
        >>> found.accuracy
        1.0
    """
    model = build("mlp", data.x.shape[1:], data.classes, seed=seed, hidden=tuple(hidden))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    order = torch.Generator().manual_seed(seed)
    accuracy, epoch = 0.0, 0
    while epoch < most_epochs and accuracy < 1.0:
        epoch += 1
        for batch in torch.randperm(len(data.x), generator=order).split(batch_size):
            optimizer.zero_grad()
            F.cross_entropy(model(data.x[batch]), data.y[batch]).backward()
            optimizer.step()
        if epoch % _CHECK_EVERY == 0 or epoch == most_epochs:
            with torch.no_grad():
                accuracy = float((model(data.x).argmax(1) == data.y).double().mean())
    return Trained(model, epoch, accuracy)
