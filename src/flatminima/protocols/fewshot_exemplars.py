"""iCaRL and Rebalance (LUCIR): all parameters are trained on the shots and on exemplars, which base classes have as well.

Both go on from the plain base network that every other method of the tables uses. Exemplars of a base class are chosen by
herding; of a new class all shots are kept, as all methods keep them. BatchNorm is in eval mode: a session has a few images of
a class.
"""

from __future__ import annotations

import copy
from abc import abstractmethod

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flatminima.data.incremental import ClassData
from flatminima.data.splits import IntArray
from flatminima.protocols.fewshot_base import Diverged, base_classes, embeddings
from flatminima.protocols.fewshot_learners import Learner, classifier
from flatminima.protocols.fewshot_network import EmbeddingNetwork
from flatminima.protocols.fewshot_settings import FewShotSettings
from flatminima.protocols.fewshot_split import FewShotSplit
from flatminima.protocols.fewshot_views import Shots, View, stream_seed

_BATCH = 128
_MILESTONES = (50 / 90, 70 / 90)  # of the epochs, after which the rate falls to a tenth


def herding(z: Tensor, count: int) -> list[int]:
    r"""Rows whose running mean stays closest to the mean of all, in the order of choice (iCaRL, algorithm 4).

    .. math:: i_k = \arg\min_i \Big\lVert \mu - \tfrac{1}{k} \big(z_i + \sum_{j<k} z_{i_j}\big) \Big\rVert

    on embeddings of length one, each row once.

    Example:
        >>> herding(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.7, 0.7]]), 2)
        [2, 0]
    """
    z = F.normalize(z.double(), dim=1)
    mean, total, chosen = z.mean(0), torch.zeros_like(z[0]), list[int]()
    for k in range(1, min(count, len(z)) + 1):
        distance = (mean - (total + z) / k).norm(dim=1)
        distance[chosen] = float("inf")
        chosen.append(int(distance.argmin()))
        total = total + z[chosen[-1]]
    return chosen


def base_exemplars(
    settings: FewShotSettings, network: EmbeddingNetwork, view: View, data: ClassData, split: FewShotSplit
) -> tuple[IntArray, IntArray]:
    """Rows and output numbers of ``exemplars`` train images of every base class, chosen by herding."""
    z = embeddings(network, view, data.train, split.train)
    classes = base_classes(data.train, split, split.train)
    chosen: list[IntArray] = []
    for c in range(len(split.base)):
        mine = (classes == c).nonzero()[:, 0]
        chosen.append(split.train[mine[herding(z[mine.to(z.device)], settings.exemplars)].numpy()])
    numbers = [np.full(len(rows), c, dtype=np.int64) for c, rows in enumerate(chosen)]
    return np.concatenate(chosen), np.concatenate(numbers)


class Rehearsal(Learner):
    """What the two share: exemplars, batches, the learning rate; ``loss`` is their own."""

    trunk_moved = True

    def __init__(
        self, settings: FewShotSettings, network: EmbeddingNetwork, prototypes: Tensor, view: View, seed: int,
        data: ClassData, split: FewShotSplit,
    ) -> None:  # fmt: skip
        super().__init__(settings, network, prototypes, view, seed)
        self._stream = torch.Generator().manual_seed(stream_seed("classifier", seed))
        self._rng = np.random.default_rng(stream_seed("rehearsal", seed))
        rows, numbers = base_exemplars(settings, network, view, data, split)
        self._rows, self._classes = [rows], [numbers]
        self._old: EmbeddingNetwork = self.network

    @abstractmethod
    def begin(self, shots: Shots, count: int) -> list[nn.Parameter]:
        """Make room for ``count`` classes in all, and return what is trained besides the features."""

    @abstractmethod
    def loss(self, x: Tensor, y: Tensor, old: int, count: int) -> Tensor:
        """Of a batch; the first ``old`` of ``count`` classes are not new."""

    def learn(self, shots: Shots) -> None:
        """See the class."""
        settings, old = self.settings, len(self.prototypes)
        self._old = copy.deepcopy(self.network).eval()
        rows, classes = self.remember(shots)
        count = int(classes.max()) + 1
        more = self.begin(shots, count)
        optimizer = torch.optim.SGD(
            [*self.network.features, *more], lr=settings.exemplar_lr, momentum=settings.momentum,
            weight_decay=settings.weight_decay,
        )  # fmt: skip
        for epoch in range(settings.exemplar_epochs):
            passed = sum(epoch >= part * settings.exemplar_epochs for part in _MILESTONES)
            for group in optimizer.param_groups:
                group["lr"] = settings.exemplar_lr * 0.1**passed
            order = self._rng.permutation(len(rows))
            for start in range(0, len(order), _BATCH):
                taken = order[start : start + _BATCH]
                x = self.view.augmented(shots.images, rows[taken], self.generator)
                loss = self.loss(x, classes[torch.from_numpy(taken).to(classes.device)], old, count)
                if not torch.isfinite(loss):
                    raise Diverged(epoch, f"the loss of a session became {float(loss.detach())}")
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        self.renew(shots.images, rows, classes, 0)


class Icarl(Rehearsal):
    r"""iCaRL: binary cross entropy against the new labels, and for old classes against the outputs of the network before.

    Classified by the nearest mean of exemplars, recomputed with the network as it is. Source: Rebuffi et al., "iCaRL:
    Incremental Classifier and Representation Learning", CVPR 2017.
    """

    def begin(self, shots: Shots, count: int) -> list[nn.Parameter]:
        """See the base class."""
        self.network.tail.head = classifier(self.network.tail.head, count, self._stream)
        return list(self.network.tail.head.parameters())

    def loss(self, x: Tensor, y: Tensor, old: int, count: int) -> Tensor:
        """See the class."""
        target = F.one_hot(y, count).to(x.dtype)
        with torch.no_grad():
            target[:, :old] = self._old(x)[1].sigmoid()
        return F.binary_cross_entropy_with_logits(self.network(x)[1], target, reduction="sum") / len(y)


class CosineHead(nn.Module):
    """Outputs ``scale * cos(weight_c, z)``."""

    def __init__(self, weight: Tensor, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())
        self.scale = nn.Parameter(torch.tensor(scale, device=weight.device))

    def forward(self, z: Tensor) -> Tensor:
        """``(rows, classes)``."""
        found: Tensor = self.scale * self.cosines(z)
        return found

    def cosines(self, z: Tensor) -> Tensor:
        """``(rows, classes)``, between -1 and 1."""
        found: Tensor = F.normalize(z, dim=1) @ F.normalize(self.weight, dim=1).T
        return found


class Rebalance(Rehearsal):
    r"""LUCIR: a cosine classifier, a penalty on turning embeddings, and a margin between an exemplar's class and new ones.

    .. math:: \mathrm{CE} + \lambda \sqrt{C_{old}/C_{new}}\,(1 - \cos(f^{old}, f))
        + \frac{1}{|X_{old}|} \sum_{x \in X_{old}} \sum_{k \in \text{top } K} [m - \cos(w_y, f) + \cos(w_k, f)]_+

    The base classifier's weights are the normalised base prototypes and new ones are imprinted from the shots, as the paper
    does for new classes; the scale begins at 10 and is learned. Source: Hou et al., "Learning a Unified Classifier
    Incrementally via Rebalancing", CVPR 2019.
    """

    def __init__(
        self, settings: FewShotSettings, network: EmbeddingNetwork, prototypes: Tensor, view: View, seed: int,
        data: ClassData, split: FewShotSplit,
    ) -> None:  # fmt: skip
        super().__init__(settings, network, prototypes, view, seed, data, split)
        self._cosine = CosineHead(F.normalize(prototypes, dim=1), 10.0)
        self.head = self._cosine

    def begin(self, shots: Shots, count: int) -> list[nn.Parameter]:
        """See the base class."""
        z = F.normalize(self.embed(shots.images, shots.rows), dim=1).view(
            -1, self.settings.shot, self.prototypes.shape[1]
        )
        old = self._cosine.weight.detach()
        new = F.normalize(z.mean(1), dim=1) * old.norm(dim=1).mean()
        self._cosine = CosineHead(torch.cat([old, new]), float(self._cosine.scale.detach()))
        self.head = self._cosine
        return list(self._cosine.parameters())

    def loss(self, x: Tensor, y: Tensor, old: int, count: int) -> Tensor:
        """See the class."""
        settings = self.settings
        z = self.network.embed(x)
        with torch.no_grad():
            before = self._old.embed(x)
        cosines = self._cosine.cosines(z)
        weight = settings.less_forget * (old / (count - old)) ** 0.5
        loss: Tensor = (
            F.cross_entropy(self._cosine.scale * cosines, y) + weight * (1 - F.cosine_similarity(z, before)).mean()
        )
        mine = y < old
        if bool(mine.any()):
            rivals = cosines[mine, old:].topk(min(settings.margin_classes, count - old), dim=1).values
            own = cosines[mine].gather(1, y[mine, None])
            loss = loss + (settings.margin - own + rivals).clamp_min(0).sum() / mine.sum()
        return loss
