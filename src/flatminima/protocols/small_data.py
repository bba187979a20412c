"""Networks trained on a few hundred rows, as studies of weakness do: raw pixels, plain SGD, until every row is right.

After the notebooks of M. T. Bennett, "Are Flat Minima an Illusion?" (arXiv:2605.05209): the subset is the first n of
one permutation of the official training rows, nested over n; probes are drawn from everything else. There the order of
batches came from a GPU's generator, so accuracies are reproduced closely, not to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from flatminima.models import build
from flatminima.study.course import Training
from flatminima.study.ensemble import train_alone
from flatminima.study.run_spec import DataSpec, OptimiserSpec, StopSpec
from flatminima.study.subsets import load_subset

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
    data = load_subset(DataSpec(name, rows, probes=probes))
    return SmallData(data.x, data.y, data.probes, data.probe_labels, data.shape, data.classes)


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
    optimiser = OptimiserSpec(lr=lr, batch_size=batch_size)
    stop = StopSpec("accuracy", 1.0, check_every=_CHECK_EVERY, max_epochs=most_epochs)
    found = train_alone(Training(model, data.x, data.y, optimiser, stop, seed)).stopped
    model.load_state_dict(found.weights)
    return Trained(model, found.epochs, found.accuracy)
