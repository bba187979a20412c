"""RotatedMNIST and ColoredMNIST: the environments of DomainBed, from a generator of their own.

DomainBed draws permutation, label noise and colours from torch's global state, which depends on the algorithm and on the target
by then; methods are compared on different environments. Here they depend on ``data_seed`` alone.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flatminima.data import sources
from flatminima.data.formats import in_memory
from flatminima.data.splits import DataError, LabelledImages, PixelArray
from flatminima.names import unknown

ANGLES = (0, 15, 30, 45, 60, 75)  # degrees, counter-clockwise
COLOUR_NOISE = {"+90%": 0.1, "+80%": 0.2, "-90%": 0.9}  # probability that the colour contradicts the label
LABEL_NOISE = 0.25
INTERPOLATIONS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}

Base = tuple[PixelArray, Tensor]  # pixels (n, 28, 28) and digits (n,)


def rotated_mnist(data_seed: int = 0, interpolation: str = "bilinear") -> dict[str, LabelledImages]:
    """Six environments that share no image: the digits turned by 0, 15, ..., 75 degrees, one channel.

    Of all 70,000 images in one random order, environment *i* takes those at positions *i*, *i* + 6, ...: four environments of
    11,667 and two of 11,666. Corners are filled with black.

    Args:
        data_seed: of the order.
        interpolation: "bilinear" (DomainBed today) or "bicubic" (the checkout that SWAD used).
    """
    if interpolation not in INTERPOLATIONS:
        raise DataError(unknown("interpolation", interpolation, INTERPOLATIONS))
    environments = {}
    for angle, (pixels, digits) in zip(ANGLES, _dealt(len(ANGLES), data_seed), strict=True):
        turned = np.stack([rotated(picture, angle, interpolation) for picture in pixels])
        environments[str(angle)] = in_memory(turned[:, None], digits.numpy())
    return environments


def rotated(picture: PixelArray, angle: float, interpolation: str = "bilinear") -> PixelArray:
    """One picture ``(H, W)`` turned counter-clockwise about its centre, same size, black where nothing was."""
    image = Image.fromarray(picture).rotate(angle, resample=INTERPOLATIONS[interpolation], fillcolor=0)
    return np.asarray(image)


def colored_mnist(data_seed: int = 0) -> dict[str, LabelledImages]:
    r"""Three environments of a two-class task whose easiest feature, colour, turns against the label in the third.

    .. math:: y = 1[\mathrm{digit} < 5] \oplus \mathrm{Bernoulli}(0.25), \qquad c = y \oplus \mathrm{Bernoulli}(e)

    with *e* = 0.1, 0.2, 0.9. The picture has two channels, of which channel *c* holds the digit and the other is black. Shape
    alone predicts 75 %, colour alone 90, 80 and 10 %.

    Args:
        data_seed: of order, label noise and colours.
    """
    generator = torch.Generator().manual_seed(data_seed)
    environments = {}

    def flipped(labels: Tensor, probability: float) -> Tensor:
        return labels ^ (torch.rand(len(labels), generator=generator) < probability)

    for (name, noise), (pixels, digits) in zip(
        COLOUR_NOISE.items(), _dealt(len(COLOUR_NOISE), data_seed, generator), strict=True
    ):
        labels = flipped(digits < 5, LABEL_NOISE)
        colours = flipped(labels, noise).long().numpy()
        coloured = np.zeros((len(pixels), 2, *pixels.shape[1:]), dtype=np.uint8)
        coloured[np.arange(len(pixels)), colours] = pixels
        environments[name] = in_memory(coloured, labels.long().numpy())
    return environments


def _dealt(count: int, data_seed: int, generator: torch.Generator | None = None) -> list[Base]:
    """All of MNIST, train then test, shuffled and dealt out like cards."""
    generator = generator or torch.Generator().manual_seed(data_seed)
    source = sources.mnist()
    parts = [part for part in (source.train, source.test) if part is not None]
    every: Callable[[LabelledImages], PixelArray] = lambda part: part.pixels(np.arange(len(part.labels)))[:, 0]  # noqa: E731
    pixels = np.concatenate([every(part) for part in parts])
    digits = torch.from_numpy(np.concatenate([part.labels for part in parts]))
    order = torch.randperm(len(digits), generator=generator)
    return [(pixels[order[i::count].numpy()], digits[order[i::count]]) for i in range(count)]
