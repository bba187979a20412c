r"""Models that return log-probabilities, for a loss that is linear in them, instead of logits for cross entropy.

A model that ends in a log-softmax with the negative log-likelihood is the same function of the weights as its logits with cross
entropy. Its loss has no curvature in its outputs, though: all of it lies in the log-softmax, which counts as part of the model.
Log-probabilities are logits as well, for :math:`\mathrm{softmax}(\log p) = p`, so that putting the log-softmax once more before
the loss changes no value and gives back :math:`H_{out} = \mathrm{diag}(p) - pp^\top`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flatminima.batches import Piece
from flatminima.measures.base import NotApplicableError
from flatminima.objective import LossFn, Objective

_TOTAL = 1e-4  # log of the sum of probabilities, in single precision inside the model


def logit_loss(objective: Objective) -> LossFn:
    """The loss as a function of logits: with a log-softmax before it where the outputs are log-probabilities it is linear in.

    The value at the model's outputs stays the same. Any other loss is returned as it is.

    Raises:
        NotApplicableError: the loss is linear in outputs that are no log-probabilities, and has no curvature in them.

    Cost: one forward pass of the first piece.

    Example:
        >>> data = torch.randn(4, 2), torch.tensor([0, 1, 1, 0])
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LogSoftmax(-1))
        >>> f = Objective(net, torch.nn.functional.nll_loss, data)
        >>> logits = torch.randn(4, 2)
        >>> torch.equal(logit_loss(f)(logits, data[1]), torch.nn.functional.cross_entropy(logits, data[1]))
        True
    """
    index, piece, _ = next(iter(objective._shares()))
    with torch.no_grad():
        outputs = objective._forward.logits(index, piece, objective._values(None))
    loss_fn = objective.loss_fn
    assert loss_fn is not None  # there would be no logits
    if not _linear(objective, index, piece, outputs):
        return loss_fn
    axis = _normalised_axis(outputs)
    if axis is None:
        raise NotApplicableError(
            "the loss is linear in the outputs, so that it has no curvature in them, and they are no log-probabilities; return "
            "logits for cross_entropy, or end the model in log_softmax for nll_loss"
        )
    return lambda output, target: loss_fn(output.log_softmax(axis), target)


def _linear(objective: Objective, index: int, piece: Piece, outputs: Tensor) -> bool:
    """Whether the loss has the same slope at two outputs drawn at random, so that it is linear up to a constant."""
    generator = torch.Generator().manual_seed(0)
    slopes = []
    for _ in range(2):
        at = torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(outputs).requires_grad_()
        with torch.enable_grad(), objective._forward.evaluating(index):
            value = objective._forward.loss_of(at, piece)
        if not value.requires_grad:
            return False
        (slope,) = torch.autograd.grad(value, at, allow_unused=True)
        if slope is None:
            return False
        slopes.append(slope)
    return torch.equal(*slopes) and bool(slopes[0].any())


def _normalised_axis(outputs: Tensor) -> int | None:
    """The axis along which the outputs are log-probabilities: 1, as ``nll_loss`` takes them, or the last."""
    for axis in (1, outputs.dim() - 1):
        several = axis >= 1 and outputs.dim() > axis and outputs.shape[axis] > 1
        if several and bool((outputs.double().logsumexp(axis).abs() <= _TOTAL).all()):
            return axis
    return None
