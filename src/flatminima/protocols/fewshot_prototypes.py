"""Classification by prototypes, the metric loss of the sessions, and the numbers a session is summed up in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def metric_logits(
    embeddings: Tensor, prototypes: Tensor, *, distance: str = "euclidean", temperature: float = 1.0
) -> Tensor:
    r"""Minus the distance to every prototype, times ``temperature``: ``(rows, classes)``.

    .. math:: -\omega \lVert z_i - p_c \rVert^2 \quad\text{or}\quad -\omega \Big(1 - \frac{z_i \cdot p_c}{|z_i| |p_c|}\Big)

    Args:
        embeddings: ``(rows, dimensions)``.
        prototypes: ``(classes, dimensions)``.
        distance: ``"euclidean"`` (squared) or ``"cosine"``.
        temperature: omega. For cosines 10 to 16; at 1 the loss is nearly flat.

    Example:
        >>> z, p = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 2.0], [3.0, 0.0]])
        >>> metric_logits(z, p).tolist(), [round(v, 3) for v in metric_logits(z, p, distance="cosine")[0].tolist()]
        ([[-4.0, -4.0]], [-0.553, 0.0])
    """
    if distance == "cosine":
        return temperature * (F.normalize(embeddings, dim=1) @ F.normalize(prototypes, dim=1).T - 1)
    return -temperature * (embeddings.unsqueeze(1) - prototypes.unsqueeze(0)).square().sum(2)


def predict(embeddings: Tensor, prototypes: Tensor, classifier: str) -> Tensor:
    """The class of every embedding ``(rows,)``: ``"cosine"`` or ``"euclidean"``, by its nearest prototype.

    Cosines rank as squared distances to prototypes of length one do: F2M's prototype normalisation is this.

    Example:
        >>> z, p = torch.tensor([[1.0, 1.5, 0.5]]), torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.5, 0.5], [9.0, 0.0, 0.0]])
        >>> predict(z, p, "cosine").item(), predict(z, p, "euclidean").item()
        (1, 1)
    """
    if classifier == "cosine":
        found: Tensor = (embeddings @ F.normalize(prototypes, dim=1).T).argmax(1)
        return found
    # |z - p|^2 without a (rows, classes, dimensions) tensor; |z|^2 is the same for all classes.
    nearest: Tensor = (2 * embeddings @ prototypes.T - prototypes.square().sum(1)).argmax(1)
    return nearest


def class_means(embeddings: Tensor, classes: Tensor, count: int) -> Tensor:
    """Mean embedding of the classes 0 to ``count - 1``, all of which must occur: ``(count, dimensions)``; differentiable."""
    sums = embeddings.new_zeros(count, embeddings.shape[1]).index_add(0, classes, embeddings)
    means: Tensor = sums / torch.bincount(classes, minlength=count).to(embeddings.dtype).unsqueeze(1)
    return means


def session_loss(
    embeddings: Tensor,
    classes: Tensor,
    stored: Tensor,
    *,
    distance: str = "euclidean",
    temperature: float = 1.0,
) -> Tensor:
    r"""The loss of a session: cross entropy of the metric logits, with the batch's own class means among the prototypes.

    Support and query are the same images and the gradient flows through both; ``stored`` prototypes are constants.

    Args:
        embeddings: ``(rows, dimensions)`` of the shots.
        classes: ``(rows,)``; those of the batch follow those stored: ``len(stored), len(stored) + 1, ...``, and all occur.
            Rows of stored classes, exemplars, are compared with the stored prototypes.
        stored: raw prototypes of the classes 0 to ``len(stored) - 1``.
        distance, temperature: see :func:`metric_logits`.

    Example:
        >>> z = torch.tensor([[1.0, 0.0], [0.6, 0.2], [0.0, 1.0], [0.2, 1.2]])
        >>> round(session_loss(z, torch.tensor([2, 2, 3, 3]), torch.tensor([[2.0, 2.0], [-1.0, 0.5]])).item(), 5)
        0.31781
    """
    mine = classes >= len(stored)
    own = class_means(embeddings[mine], classes[mine] - len(stored), int(classes.max()) + 1 - len(stored))
    logits = metric_logits(embeddings, torch.cat([stored, own]), distance=distance, temperature=temperature)
    return F.cross_entropy(logits, classes)


def on_grid(gradient: Tensor, lr: float, quantum: float) -> Tensor:
    """The gradient whose step at ``lr`` is a multiple of ``quantum``: a defect of the released code, for comparison.

    Example:
        >>> on_grid(torch.tensor([0.3, -0.05, 0.13]), 0.01, 0.0025).tolist()
        [0.25, -0.0, 0.25]
    """
    return torch.round(lr * gradient / quantum) * quantum / lr


def harmonic(first: float, second: float) -> float:
    """Harmonic mean; 0 where either is.

    Example:
        >>> round(harmonic(65.35, 23.99), 4)
        35.0962
    """
    return 2 * first * second / (first + second) if first > 0 and second > 0 else 0.0


def session_numbers(correct: Sequence[Sequence[int]], counts: Sequence[int]) -> dict[str, list[float]]:
    """Accuracies in percent after every session, from correct predictions per group of classes.

    Args:
        correct: after session t, for the groups 0 to t (group 0: the base classes).
        counts: test images of each group.

    Returns:
        ``accuracy`` over all classes so far, ``base`` and ``novel`` classes within that problem, and their ``harmonic`` mean;
        ``novel`` and ``harmonic`` begin with the second session.

    Example:
        >>> session_numbers([[80], [70, 5]], [100, 10])["accuracy"], session_numbers([[80], [70, 5]], [100, 10])["novel"]
        ([80.0, 68.18181818181819], [50.0])
    """
    accuracy, base, novel = [], [], []
    for t, row in enumerate(correct):
        accuracy.append(100 * sum(row) / sum(counts[: t + 1]))
        base.append(100 * row[0] / counts[0])
        if t:
            novel.append(100 * sum(row[1:]) / sum(counts[1 : t + 1]))
    return {
        "accuracy": accuracy, "base": base, "novel": novel,
        "harmonic": [harmonic(b, n) for b, n in zip(base[1:], novel, strict=True)],
    }  # fmt: skip
