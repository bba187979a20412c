"""Joint training on all images of all classes seen, and cRT: its classifier trained anew on class-balanced batches.

Both see what no incremental method may: all base images, in every session. cRT (Kang et al., "Decoupling Representation and
Classifier for Long-Tailed Recognition", ICLR 2020) is the paper's approximate upper bound.
"""

from __future__ import annotations

from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flatminima.data.incremental import ClassData
from flatminima.data.splits import IntArray
from flatminima.protocols.fewshot_base import Diverged, embeddings, reestimated
from flatminima.protocols.fewshot_learners import Learner, classifier
from flatminima.protocols.fewshot_network import EmbeddingNetwork, build
from flatminima.protocols.fewshot_prototypes import class_means
from flatminima.protocols.fewshot_settings import FewShotSettings
from flatminima.protocols.fewshot_split import FewShotSplit
from flatminima.protocols.fewshot_views import Shots, View, balanced_batches, rows_by_class, stream_seed

_BATCHNORM_BATCHES = 100
_MILESTONES = (0.5, 0.75, 0.875)  # of cRT's epochs, after which its rate is halved


class Joint(Learner):
    """Trained on all base images and all shots, uniformly over images: 500 of a base class, 5 of a new one.

    ``joint="scratch"`` begins with new weights in every session, as the paper does; ``"base"`` goes on from the network of the
    session before, for ``joint_iterations`` steps at the last learning rate of the base training.
    """

    trunk_moved = True

    def __init__(
        self, settings: FewShotSettings, network: EmbeddingNetwork, prototypes: Tensor, view: View, seed: int,
        data: ClassData, split: FewShotSplit,
    ) -> None:  # fmt: skip
        super().__init__(settings, network, prototypes, view, seed)
        self.head = self.network.tail.head
        self._data, self._split, self._seed = data, split, seed
        self._stream = torch.Generator().manual_seed(stream_seed("classifier", seed))
        self._rng = np.random.default_rng(stream_seed("joint", seed))
        self._known = prototypes[:0]

    def learn(self, shots: Shots) -> None:
        """See the class."""
        rows, classes = self._all(shots)
        self._train(shots, rows, classes)
        self._prototypes(rows, classes)

    def _all(self, shots: Shots) -> tuple[IntArray, Tensor]:
        new, classes = self.remember(shots)
        place = {label: index for index, label in enumerate(self._split.order)}
        base = [place[label] for label in self._data.train.labels[self._split.train].tolist()]
        return np.concatenate([self._split.train, new]), torch.cat([torch.tensor(base, device=classes.device), classes])

    def _train(self, shots: Shots, rows: IntArray, classes: Tensor) -> None:
        settings, count = self.settings, int(classes.max()) + 1
        if settings.joint == "scratch":
            shape = self.view.clean(shots.images, rows[:1]).shape[1:]
            self.network = build(settings, shape, count, stream_seed("joint", self._seed, count))
        else:
            self.network.tail.head = classifier(self.network.tail.head, count, self._stream)
        self.head = self.network.tail.head
        if not settings.joint_iterations:
            return
        scratch = settings.joint == "scratch"
        marks = [part * settings.joint_iterations for part in settings.milestones]
        optimizer = torch.optim.SGD(
            self.network.parameters(), lr=settings.lr if scratch else settings.lr * settings.gamma ** len(marks),
            momentum=settings.momentum, weight_decay=settings.weight_decay,
        )  # fmt: skip
        size = settings.batch_classes * settings.batch_images
        self.network.train()
        for step in range(settings.joint_iterations):
            if scratch and any(mark <= step < mark + 1 for mark in marks):
                for group in optimizer.param_groups:
                    group["lr"] *= settings.gamma
            chosen = self._rng.choice(len(rows), size=min(size, len(rows)), replace=False)
            x = self.view.augmented(shots.images, rows[chosen], self.generator)
            loss = F.cross_entropy(self.network(x)[1], classes[torch.from_numpy(chosen).to(classes.device)])
            if not torch.isfinite(loss):
                raise Diverged(step, f"the loss of joint training became {float(loss.detach())}")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if scratch:
            picks = (self._rng.choice(len(rows), size=size) for _ in range(_BATCHNORM_BATCHES))
            batches = (self.view.augmented(shots.images, rows[chosen], self.generator) for chosen in picks)
            reestimated(self.network, islice(batches, min(_BATCHNORM_BATCHES, settings.joint_iterations)))
        self.network.eval()

    def _prototypes(self, rows: IntArray, classes: Tensor) -> Tensor:
        z = embeddings(self.network, self.view, self._data.train, rows)
        self.prototypes = class_means(z.double(), classes, int(classes.max()) + 1).to(z.dtype)
        return z


class Retrained(Joint):
    """cRT: the joint network's features, and a new linear classifier trained on batches with as many images of every class.

    The features are those of clean images, computed once: with augmentation every epoch would need a pass through the network.
    ``joint="base"`` with ``joint_iterations=0`` leaves the base network's features.
    """

    def learn(self, shots: Shots) -> None:
        """See the class."""
        rows, classes = self._all(shots)
        if self.settings.joint == "scratch" or self.settings.joint_iterations or len(self._rows) == 1:
            self._train(shots, rows, classes)
            self._known = self._prototypes(rows, classes)
        else:  # the features stay; only those of the new shots are missing
            z = embeddings(self.network, self.view, self._data.train, shots.rows)
            self._known = torch.cat([self._known, z])
            self.prototypes = class_means(self._known.double(), classes, int(classes.max()) + 1).to(z.dtype)
        self.head = self._classifier(self._known, classes)

    def _classifier(self, z: Tensor, classes: Tensor) -> nn.Linear:
        settings, count = self.settings, int(classes.max()) + 1
        head = classifier(self.network.tail.head, count, self._stream, keep=False)
        optimizer = torch.optim.SGD(
            head.parameters(), lr=settings.rebalance_lr, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
        labels = classes.cpu().numpy()
        positions = rows_by_class(labels, np.arange(len(labels)), range(count))
        batches = balanced_batches(
            positions, count, settings.rebalance_images, seed=int(self._rng.integers(2**31))
        )  # every class, in every batch
        steps = max(1, len(labels) // (count * settings.rebalance_images))
        for epoch in range(settings.rebalance_epochs):
            passed = sum(epoch >= part * settings.rebalance_epochs for part in _MILESTONES)
            for group in optimizer.param_groups:
                group["lr"] = settings.rebalance_lr * 0.5**passed
            for chosen, y in islice(batches, steps):
                loss = F.cross_entropy(head(z[torch.from_numpy(chosen).to(z.device)]), torch.from_numpy(y).to(z.device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return head
