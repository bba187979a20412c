"""What is minimised: the losses of ERM, SAM, CORAL and Mixup on one batch of every source domain."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flatminima.protocols.domains_settings import DomainSettings
from flatminima.study.settings import SettingsError

Parts = Sequence[tuple[Tensor, Tensor]]  # inputs and labels of each source domain
Loss = Callable[[], Tensor]

ALGORITHMS: Mapping[str, str] = MappingProxyType(
    {
        "erm": "empirical risk minimisation: mean cross-entropy over all source domains",
        "sam": "the same by sharpness-aware minimisation (two gradients a step)",
        "coral": "ERM and a penalty on differences of feature means and covariances between domains",
        "mixup": "ERM on convex combinations of images of two domains",
    }
)


def batch_loss(
    algorithm: str, settings: DomainSettings, model: nn.Module, parts: Parts, rng: np.random.Generator
) -> Loss:
    """The loss of a batch as a function of the present weights; random choices are made now, not when it is called."""
    if algorithm == "coral":
        return lambda: coral_loss(model, parts, settings.coral)
    if algorithm == "mixup":
        return mixup_loss(model, parts, settings.mixup, rng)
    x, y = _joined(parts)
    return lambda: F.cross_entropy(model(x), y)


def coral_loss(model: nn.Module, parts: Parts, weight: float) -> Tensor:
    r"""Mean cross-entropy plus ``weight`` times the mean over pairs of domains of

    .. math:: \operatorname{mean}_k (\mu^a_k - \mu^b_k)^2 + \operatorname{mean}_{kl} (C^a_{kl} - C^b_{kl})^2

    with the means and covariances (divided by n - 1) of the features. Source: Sun and Saenko, "Deep CORAL", ECCV 2016
    workshops; the form is DomainBed's.
    """
    features, classifier = split_model(model)
    x, y = _joined(parts)
    found = features(x)
    loss = F.cross_entropy(classifier(found), y)
    moments = []
    for z in found.split([len(labels) for _, labels in parts]):
        centred = z - z.mean(0, keepdim=True)
        moments.append((z.mean(0), centred.T @ centred / (len(z) - 1)))
    pairs = list(combinations(moments, 2))
    penalty = sum(
        (
            (mean_a - mean_b).square().mean() + (cov_a - cov_b).square().mean()
            for (mean_a, cov_a), (mean_b, cov_b) in pairs
        ),
        start=torch.zeros((), dtype=loss.dtype, device=loss.device),
    )
    return loss + weight * penalty / max(len(pairs), 1)


def mixup_loss(model: nn.Module, parts: Parts, alpha: float, rng: np.random.Generator) -> Loss:
    r"""Cross-entropy on :math:`\lambda x_a + (1 - \lambda) x_b`, weighted alike between both labels.

    Domains are paired in a random cycle, each pair with its own :math:`\lambda \sim \mathrm{Beta}(\alpha, \alpha)`. Source:
    Yan et al., "Improve Unsupervised Domain Adaptation with Mixup Training", 2020; the form is DomainBed's.
    """
    order = rng.permutation(len(parts))
    shares = rng.beta(alpha, alpha, len(parts))
    mixed, first, second, weights = [], [], [], []
    for place, share in enumerate(shares.tolist()):
        (x_a, y_a), (x_b, y_b) = parts[order[place]], parts[order[(place + 1) % len(parts)]]
        rows = min(len(y_a), len(y_b))
        mixed.append(share * x_a[:rows] + (1 - share) * x_b[:rows])
        first.append(y_a[:rows])
        second.append(y_b[:rows])
        weights.append(torch.full((rows,), share, dtype=x_a.dtype, device=x_a.device))
    x, y_a, y_b, share_of = torch.cat(mixed), torch.cat(first), torch.cat(second), torch.cat(weights)

    def loss() -> Tensor:
        logits = model(x)
        a, b = (F.cross_entropy(logits, y, reduction="none") for y in (y_a, y_b))
        return (share_of * a + (1 - share_of) * b).mean()

    return loss


def split_model(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Features and classifier of a sequence that ends in a linear layer.

    Raises:
        SettingsError: any other model.
    """
    if isinstance(model, nn.Sequential) and len(model) > 1 and isinstance(model[-1], nn.Linear):
        return model[:-1], model[-1]
    raise SettingsError(
        f"coral needs the features before the classifier: a model that is a sequence ending in a linear layer, "
        f"not {type(model).__name__}"
    )


def _joined(parts: Parts) -> tuple[Tensor, Tensor]:
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])
