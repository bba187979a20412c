"""The rows of the domains as batches: what trains, what validates, what is the unseen target; and scores on them."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flatminima.data import MultiDomain, load_domains
from flatminima.data.domain_splits import DomainSampler, domain_split, seed_hash
from flatminima.data.pictures import Augmentation, Scaling
from flatminima.data.splits import DataError, IntArray, LabelledImages
from flatminima.names import unknown
from flatminima.protocols.domains_algorithms import Parts
from flatminima.protocols.domains_settings import DomainSettings

_PIXELS = 2**19  # of a piece that is evaluated at once: activations that stay in a CPU's cache
_ON_ACCELERATOR = 2**23


@functools.lru_cache(maxsize=1)
def _loaded(data: str, size: int | None, data_seed: int, interpolation: str, rows: int | None) -> MultiDomain:
    return load_domains(data, size=size, data_seed=data_seed, interpolation=interpolation, rows=rows)


def domain_data(settings: DomainSettings) -> MultiDomain:
    """The data set of the settings, read once a process."""
    return _loaded(settings.data, settings.size, settings.data_seed, settings.interpolation, settings.rows)


@dataclass(frozen=True, eq=False)
class Domain:
    """One domain, divided: rows to train on (of the target: to test on), and rows held out."""

    name: str
    index: int
    images: LabelledImages
    kept: IntArray
    held_out: IntArray


def divided(data: MultiDomain, held_out: float, trial_seed: int) -> list[Domain]:
    """All domains with their split, which depends on ``trial_seed`` and on the domain's index alone."""
    domains = []
    for index, (name, images) in enumerate(data.domains.items()):
        domains.append(Domain(name, index, images, *domain_split(len(images.labels), held_out, trial_seed, index)))
    return domains


def without(domains: Sequence[Domain], target: str) -> tuple[list[Domain], Domain]:
    """Source domains and target.

    Raises:
        DataError: no such target, or no source is left.
    """
    names = [domain.name for domain in domains]
    if target not in names:
        raise DataError(unknown("target domain", target, names))
    sources = [domain for domain in domains if domain.name != target]
    if not sources:
        raise DataError(f"{target!r} is the only domain: leaving it out leaves nothing to train on")
    return sources, next(domain for domain in domains if domain.name == target)


class View:
    """Images as the network sees them.

    Args:
        settings: of pooling, augmentation and device.
        natural: see :class:`~flatminima.data.MultiDomain`.
    """

    def __init__(self, settings: DomainSettings, natural: bool) -> None:
        self.scaling = Scaling(pool=settings.pool, imagenet=natural)
        self.augmentation = Augmentation() if settings.augment and natural else None
        self.device = torch.device(settings.device)

    def __call__(self, images: LabelledImages, rows: IntArray, generator: torch.Generator | None = None) -> Tensor:
        """Inputs ``(rows, C, H, W)``; augmented if a generator is given and the settings say so."""
        return self.prepared(torch.from_numpy(images.pixels(rows)), generator)

    def prepared(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The same from uint8 pixels."""
        x = self.scaling.unit(pixels.to(self.device))
        if generator is not None and self.augmentation is not None:
            x = self.augmentation(x, generator)
        return self.scaling.standardised(x)

    def labels(self, images: LabelledImages, rows: IntArray) -> Tensor:
        """int64, on the device."""
        return torch.from_numpy(images.labels[rows]).to(self.device)


def training_batches(
    sources: Sequence[Domain], settings: DomainSettings, view: View, seed: int, stream: str = "training"
) -> Iterator[Parts]:
    """For ever: ``batch`` images of every source domain, drawn with replacement and augmented.

    Rows and augmentation depend on ``seed`` and ``stream`` alone: all algorithms see the same batches.
    """
    samplers = [
        DomainSampler(source.kept, settings.batch, seed=seed_hash(stream, seed), domain=source.index)
        for source in sources
    ]
    generator = torch.Generator().manual_seed(seed_hash("augmentation", stream, seed))
    while True:
        rows = [next(sampler) for sampler in samplers]
        pixels = np.concatenate([source.images.pixels(r) for source, r in zip(sources, rows, strict=True)])
        inputs = view.prepared(torch.from_numpy(pixels), generator).split(settings.batch)
        yield [(x, view.labels(source.images, r)) for source, x, r in zip(sources, inputs, rows, strict=True)]


@torch.no_grad()
def score(
    model: nn.Module, images: LabelledImages, rows: IntArray, view: View, generator: torch.Generator | None = None
) -> tuple[float, float]:
    """Mean cross-entropy and accuracy over rows, in eval mode; sums in double precision."""
    was_training = model.training
    model.eval()
    loss, correct, piece = 0.0, 0, 1
    start = 0
    while start < len(rows):
        taken = rows[start : start + piece]
        x = view(images, taken, generator)
        limit = _PIXELS if x.device.type == "cpu" else _ON_ACCELERATOR
        logits, y = model(x), view.labels(images, taken)
        loss += float(F.cross_entropy(logits.double(), y, reduction="sum"))
        correct += int((logits.argmax(1) == y).sum())
        start += len(taken)
        piece = max(8, limit // x[0].numel())  # known after the first image
    model.train(was_training)
    return loss / len(rows), correct / len(rows)
