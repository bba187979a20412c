"""FSLL: only the tensors with small weights are trained, under a penalty on how far they move, which has its gradient here.

After Mazumder, Singh and Rai, "Few-Shot Lifelong Learning", AAAI 2021, as F2M's authors run it: a whole tensor is chosen if its
largest weight is at most a threshold.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flatminima.protocols.fewshot_base import Diverged
from flatminima.protocols.fewshot_learners import Learner
from flatminima.protocols.fewshot_network import EmbeddingNetwork
from flatminima.protocols.fewshot_prototypes import session_loss
from flatminima.protocols.fewshot_settings import FewShotSettings
from flatminima.protocols.fewshot_views import Shots, View
from flatminima.study.settings import SettingsError

_TEMPERATURE = 16.0  # of cosines


class Fsll(Learner):
    r"""Triplet loss, cross entropy of cosines to prototypes, and an L1 penalty on the change since base training.

    .. math:: \frac{1}{|T|} \sum_{(a,p,n) \in T} [\lVert f_a - f_p \rVert^2 - \lVert f_a - f_n \rVert^2]_+ + \mathrm{CE}
        + \lambda \sum_j \operatorname{mean} |w_j - w_j^*|

    over all triplets of the shots so far and all tensors that are trained. (Means: with a sum, a weight would move only where
    its gradient exceeds :math:`\lambda = 5`, which is nowhere, and subgradient steps would chatter.) Prototypes are renewed as
    F2M's are.

    Raises:
        SettingsError: no tensor is below the threshold.
    """

    trunk_moved = True

    def __init__(
        self, settings: FewShotSettings, network: EmbeddingNetwork, prototypes: Tensor, view: View, seed: int
    ) -> None:
        super().__init__(settings, network, prototypes, view, seed)
        features = [p for p in self.network.features if p.numel()]
        self._chosen = [p for p in features if float(p.detach().abs().max()) <= settings.fsll_threshold]
        if not self._chosen:
            smallest = min(float(p.detach().abs().max()) for p in features)
            raise SettingsError(
                f"--fsll-threshold {settings.fsll_threshold:g}: every tensor has larger weights; the smallest of their largest "
                f"is {smallest:.3g}"
            )
        for parameter in self.network.parameters():
            parameter.requires_grad_(False)
        for parameter in self._chosen:
            parameter.requires_grad_(True)
        self._start = [p.detach().clone() for p in self._chosen]
        self._last: dict[str, Any] = {}

    def penalty(self) -> Tensor:
        """Mean absolute change since base training, summed over the tensors."""
        return torch.stack([(p - s).abs().mean() for p, s in zip(self._chosen, self._start, strict=True)]).sum()

    def learn(self, shots: Shots) -> None:
        """See the class."""
        settings = self.settings
        rows, classes = self.remember(shots)
        stored = self.prototypes[: self.base_classes]
        optimizer = torch.optim.SGD(self._chosen, lr=settings.fsll_lr, momentum=settings.momentum)
        for epoch in range(settings.fsll_epochs):
            if settings.session_augment:
                x = self.view.augmented(shots.images, rows, self.generator)
            else:
                x = self.view.clean(shots.images, rows)
            z = self.network.embed(x)
            loss = triplet_loss(z, classes) + session_loss(
                z, classes, stored, distance="cosine", temperature=_TEMPERATURE
            )
            loss = loss + settings.fsll_penalty * self.penalty()
            if not torch.isfinite(loss):
                raise Diverged(epoch, f"the loss of a session became {float(loss.detach())}")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self._last = {"trained": sum(p.numel() for p in self._chosen), "moved": float(self.penalty().detach())}
        self.renew(shots.images, rows, classes, self.base_classes)

    def facts(self) -> dict[str, Any]:
        """How many weights are trained, and how far they have moved: the penalty."""
        return self._last


def triplet_loss(z: Tensor, classes: Tensor) -> Tensor:
    """Mean over all triplets (anchor, other of its class, one of another class) of how much nearer the wrong one is.

    Distances are squared and there is no margin. 0 without triplets.

    Example:
        >>> triplet_loss(torch.tensor([[0.0], [3.0], [1.0]]), torch.tensor([0, 0, 1])).item()
        6.5
    """
    distance = (z.unsqueeze(1) - z.unsqueeze(0)).square().sum(2)
    same = classes.unsqueeze(1) == classes.unsqueeze(0)
    positive = same & ~torch.eye(len(z), dtype=torch.bool, device=z.device)
    triplets = positive.unsqueeze(2) & ~same.unsqueeze(1)
    if not bool(triplets.any()):
        return z.sum() * 0
    return (distance.unsqueeze(2) - distance.unsqueeze(1)).clamp_min(0)[triplets].mean()
