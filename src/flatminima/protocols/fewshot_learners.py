"""What the methods do in a session: nothing, move inside (or outside) the box, or fine-tune a softmax classifier.

A learner is given the shots of its session and keeps what it is allowed to keep. It never sees test images, and of the base
images nothing but their prototypes (methods with exemplars or with all images are in files of their own).
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flatminima.data.splits import IntArray, LabelledImages
from flatminima.optim.flat_region import FlatRegion
from flatminima.protocols.fewshot_base import Diverged, all_finite
from flatminima.protocols.fewshot_network import EmbeddingNetwork
from flatminima.protocols.fewshot_prototypes import class_means, on_grid, session_loss
from flatminima.protocols.fewshot_settings import FewShotSettings
from flatminima.protocols.fewshot_views import Shots, View, stream_seed


class Learner(ABC):
    """A method in its sessions.

    Args:
        settings: of the arm.
        network: of the base training; a copy is changed.
        prototypes: raw, of the base classes.
        view: how images are seen.
        seed: of augmentation and new weights.

    Attributes:
        network: as it is now.
        prototypes: raw, of all classes seen, ``(classes, dimensions)``.
        trunk_moved: whether anything below the region has changed.
        head: a linear or cosine classifier over all classes seen, for methods that train one.
    """

    trunk_moved = False
    head: nn.Module | None = None

    def __init__(
        self, settings: FewShotSettings, network: EmbeddingNetwork, prototypes: Tensor, view: View, seed: int
    ) -> None:
        self.settings = settings
        self.network = copy.deepcopy(network).eval()
        self.prototypes = prototypes.clone()
        self.base_classes = len(prototypes)
        self.view = view
        self.generator = torch.Generator().manual_seed(stream_seed("session", seed))
        self._rows: list[IntArray] = []
        self._classes: list[IntArray] = []

    @abstractmethod
    def learn(self, shots: Shots) -> None:
        """Take in one session.

        Raises:
            Diverged: a loss became NaN or infinite.
        """

    def facts(self) -> dict[str, Any]:
        """What the last session did, for the record."""
        return {}

    def remember(self, shots: Shots) -> tuple[IntArray, Tensor]:
        """Store the shots, and return all shots so far with their classes."""
        self._rows.append(shots.rows)
        self._classes.append(shots.classes)
        return np.concatenate(self._rows), torch.from_numpy(np.concatenate(self._classes)).to(self.view.device)

    @torch.no_grad()
    def embed(self, images: LabelledImages, rows: IntArray) -> Tensor:
        """Embeddings of clean images by the network as it is now."""
        return self.network.eval().embed(self.view.clean(images, rows))

    def renew(self, images: LabelledImages, rows: IntArray, classes: Tensor, first: int) -> None:
        """Recompute the prototypes from class ``first`` on from stored images; the others are never touched."""
        z = self.embed(images, rows)
        own = class_means(z, classes - first, int(classes.max()) + 1 - first)
        self.prototypes = torch.cat([self.prototypes[:first], own])


class Frozen(Learner):
    """The Baseline: the network stays, a new class is the mean of its shots."""

    def learn(self, shots: Shots) -> None:
        """Add the prototypes of the new classes."""
        classes = torch.from_numpy(shots.classes).to(self.view.device)
        self.renew(shots.images, shots.rows, classes, len(self.prototypes))


class Metric(Learner):
    """F2M's sessions: a few full-batch steps on the metric loss, only the region moving, clamped to the box after every step.

    The centre of the box is where base training ended, in all sessions. BatchNorm is in eval mode and base prototypes stay;
    those of all new classes are recomputed from the stored shots (``replay="none"``: those of the session from its own).

    Args:
        clamp: whether there is a box.
        exemplars: rows and output numbers of base images, for ``replay="all"``.
    """

    def __init__(
        self,
        settings: FewShotSettings,
        network: EmbeddingNetwork,
        prototypes: Tensor,
        view: View,
        seed: int,
        *,
        clamp: bool,
        exemplars: tuple[IntArray, IntArray] | None = None,
    ) -> None:
        super().__init__(settings, network, prototypes, view, seed)
        for parameter in self.network.parameters():
            parameter.requires_grad_(False)
        for parameter in self.network.region:
            parameter.requires_grad_(True)
        bound = settings.bound if settings.clamp_bound is None else settings.clamp_bound
        self.region = FlatRegion(self.network.region, bound, relative=settings.relative)
        self._quanta = [float(half) / 2 for half in self.region.half_widths()]  # of the centre, as the box is
        self._clamp = clamp
        self._exemplars = exemplars
        self._last: dict[str, Any] = {}

    def learn(self, shots: Shots) -> None:
        """See the class."""
        settings, rows, classes = self.settings, shots.rows, torch.from_numpy(shots.classes).to(self.view.device)
        first = len(self.prototypes)
        if settings.replay != "none":
            rows, classes = self.remember(shots)
            first = self.base_classes
        stored = self.prototypes[:first]
        own, own_classes = rows, classes
        if self._exemplars is not None:
            rows = np.concatenate([self._exemplars[0], rows])
            classes = torch.cat([torch.from_numpy(self._exemplars[1]).to(classes.device), classes])
        optimizer = torch.optim.SGD(
            self.network.region, lr=settings.session_lr, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
        losses = []
        before = self.region.clamped
        for step in range(settings.session_steps):
            if settings.session_augment:
                x = self.view.augmented(shots.images, rows, self.generator)
            else:
                x = self.view.clean(shots.images, rows)
            with torch.no_grad():
                h = self.network.trunk(x)
            loss = session_loss(
                self.network.tail.layers(h),
                classes,
                stored,
                distance=settings.distance,
                temperature=settings.temperature,
            )
            losses.append(float(loss.detach()))
            if not np.isfinite(losses[-1]):
                raise Diverged(step, f"the loss of a session became {losses[-1]}")
            optimizer.zero_grad()
            loss.backward()
            if settings.grid_step:
                for parameter, quantum in zip(self.network.region, self._quanta, strict=True):
                    assert parameter.grad is not None
                    parameter.grad = on_grid(parameter.grad, settings.session_lr, quantum)
            if not all_finite(p.grad for p in self.network.region if p.grad is not None):
                raise Diverged(step, "a gradient of a session is NaN or infinite")
            optimizer.step()
            if self._clamp:
                self.region.project_()
        self.renew(shots.images, own, own_classes, first)
        hits = self.region.clamped
        count = settings.session_steps * sum(p.numel() for p in self.network.region)
        saturation = self.region.saturation()
        self._last = {
            "losses": losses, "clamp_hits": (hits.low + hits.high - before.low - before.high) / count if self._clamp else None,
            "at_bound": [share for share, _ in saturation], "largest_move": [move for _, move in saturation],
        }  # fmt: skip

    def facts(self) -> dict[str, Any]:
        """Losses of the steps; the share of coordinates that a step left outside the box; at the end of the session the share
        at its faces and the largest move in half widths, per parameter."""
        return self._last


class FineTune(Learner):
    """FT: all parameters are fine-tuned by softmax cross entropy on the shots seen so far, nothing holds the old classes.

    As many steps as F2M's sessions, at the same learning rate and on the same images; BatchNorm is in eval mode.
    """

    trunk_moved = True

    def __init__(
        self, settings: FewShotSettings, network: EmbeddingNetwork, prototypes: Tensor, view: View, seed: int
    ) -> None:
        super().__init__(settings, network, prototypes, view, seed)
        self.head = self.network.tail.head
        self._stream = torch.Generator().manual_seed(stream_seed("classifier", seed))

    def learn(self, shots: Shots) -> None:
        """See the class."""
        settings = self.settings
        rows, classes = self.remember(shots)
        self.head = self.network.tail.head = classifier(self.network.tail.head, int(classes.max()) + 1, self._stream)
        optimizer = torch.optim.SGD(
            self.network.parameters(),
            lr=settings.session_lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
        )
        for step in range(settings.session_steps):
            if settings.session_augment:
                x = self.view.augmented(shots.images, rows, self.generator)
            else:
                x = self.view.clean(shots.images, rows)
            loss = F.cross_entropy(self.network(x)[1], classes)
            if not torch.isfinite(loss):
                raise Diverged(step, f"the loss of a session became {float(loss.detach())}")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self.renew(shots.images, rows, classes, self.base_classes)


@torch.no_grad()
def classifier(like: nn.Linear, classes: int, generator: torch.Generator, *, keep: bool = True) -> nn.Linear:
    """A linear layer with more outputs, drawn as PyTorch draws a new layer's; those of ``like`` are kept, if so asked."""
    new = nn.Linear(like.in_features, classes, device=like.weight.device, dtype=like.weight.dtype)
    limit = like.in_features**-0.5
    for name in ("weight", "bias"):
        to, old = getattr(new, name), getattr(like, name)
        to.copy_((2 * torch.rand(to.shape, generator=generator) - 1) * limit)
        if keep:
            to[: len(old)] = old
    return new
