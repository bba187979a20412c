"""The base objective as the authors' code computes it, defects included, to compare with what the formulas say.

Not for use: see :data:`~flatminima.protocols.fewshot_settings.DEFECTS`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flatminima.optim.flat_region import FlatRegion
from flatminima.optim.flat_region_parts import prototypes
from flatminima.protocols.fewshot_settings import FewShotSettings


def released_loss(region: FlatRegion, tail: nn.Module, h: Tensor, y: Tensor, settings: FewShotSettings) -> Tensor:
    """Mean over draws of (cross entropy + prototype loss) plus ``std_weight`` times their standard deviation.

    With ``constant_prototypes`` the prototype loss is a number without a gradient. With ``swap_weights`` noise is swapped into
    the parameters' data and out again before the backward pass, which differentiates the layers below at the clean weights;
    running statistics then see every pass. Without, the passes go through ``functional_call``.

    Args:
        region: whose parameters get noise.
        tail: maps the trunk's activations to embedding and outputs.
        h, y: activations and classes of a batch.
        settings: weights of the terms, draws, and which defects.
    """
    clean = prototypes(tail(h)[0], y)
    totals = []
    for eps in region.sample(settings.draws):
        if settings.swap_weights:
            own = [parameter.data for parameter in region.params]
            for parameter, noise in zip(region.params, eps, strict=True):
                parameter.data = parameter.data + noise
            z, outputs = tail(h)
            for parameter, data in zip(region.params, own, strict=True):
                parameter.data = data
        else:
            z, outputs = region.forward(tail, h, eps)
        shift = (prototypes(z, y) - clean).square().sum(1).mean()
        if settings.constant_prototypes:
            shift = shift.detach()
        totals.append(F.cross_entropy(outputs, y) + settings.prototype_weight * shift)
    losses = torch.stack(totals)
    return losses.mean() + (settings.std_weight * losses.std() if settings.std_weight else 0.0)
