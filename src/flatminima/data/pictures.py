"""From stored pixels to what a network sees: scaling, pooling, standardisation, and DomainBed's augmentation in batches.

The augmentation draws its own random numbers for every picture from a generator that is given, and works on a whole batch at
once; torchvision's transforms take one picture at a time and draw from the global state.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_GREY = (0.2989, 0.587, 0.114)
_ATTEMPTS = 10  # at a crop that lies inside, before the fallback


@dataclass(frozen=True)
class Scaling:
    """Pixels to inputs: divide by 255, average blocks of ``pool`` x ``pool`` pixels, standardise.

    Args:
        pool: 1 leaves the size; 2 halves it.
        imagenet: subtract ImageNet's channel means and divide by its deviations (three channels).

    Example:
        >>> Scaling(pool=2)(torch.tensor([[[[0, 255], [255, 0]]]], dtype=torch.uint8)).tolist()
        [[[[0.5]]]]
    """

    pool: int = 1
    imagenet: bool = False

    def unit(self, pixels: Tensor) -> Tensor:
        """uint8 ``(n, C, H, W)`` to float32 in [0, 1], pooled."""
        x = pixels.float().div_(255.0)
        return F.avg_pool2d(x, self.pool) if self.pool > 1 else x

    def standardised(self, x: Tensor) -> Tensor:
        """What :meth:`unit` or the augmentation gave, standardised."""
        if not self.imagenet:
            return x
        mean, std = (
            torch.tensor(v, dtype=x.dtype, device=x.device).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD)
        )
        return (x - mean) / std

    def __call__(self, pixels: Tensor) -> Tensor:
        """Both."""
        return self.standardised(self.unit(pixels))


@dataclass(frozen=True)
class Augmentation:
    """DomainBed's: random resized crop, horizontal flip, colour jitter, now and then grey.

    Pictures are float ``(n, 3, H, W)`` in [0, 1] and keep their size, unless ``out`` names another. Each draws its own crop
    (area 70 to 100 % of the picture, side ratio 3:4 to 4:3, bilinear), flip (one in two), jitter (brightness, contrast,
    saturation by a factor within 1 +- 0.3, hue by a turn within +- 0.3, in random order) and loss of colour (one in ten).

    Source: Gulrajani and Lopez-Paz, "In Search of Lost Domain Generalization", ICLR 2021, appendix B; the sampling of the
    crop is torchvision's.

    Example:
        >>> x = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> a, b = (Augmentation()(x, torch.Generator().manual_seed(1)) for _ in range(2))
        >>> a.shape == x.shape, torch.equal(a, b), 0 <= float(a.min()) and float(a.max()) <= 1
        (True, True, True)
    """

    scale: tuple[float, float] = (0.7, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter: float = 0.3
    grey: float = 0.1
    out: int | None = None

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """A new batch; ``generator`` is on the CPU, whatever the device of ``x``."""
        n, _, height, width = x.shape

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return low + (high - low) * torch.rand(n, *shape, generator=generator)

        boxes = self._boxes(n, height, width, uniform)
        flips = torch.rand(n, generator=generator) < self.flip
        factors = [uniform(1 - self.jitter, 1 + self.jitter) for _ in range(3)] + [uniform(-self.jitter, self.jitter)]
        order = torch.rand(n, 4, generator=generator).argsort(1)
        greys = torch.rand(n, generator=generator) < self.grey
        x = crop(x, boxes, flips, self.out)
        for place in range(4) if self.jitter else ():
            for kind, adjust in enumerate((brightness, contrast, saturation, hue)):
                chosen = (order[:, place] == kind).nonzero()[:, 0].to(x.device)
                if len(chosen):
                    x[chosen] = adjust(x[chosen], factors[kind].to(x.device)[chosen].view(-1, 1, 1, 1))
        chosen = greys.nonzero()[:, 0].to(x.device)
        x[chosen] = grey(x[chosen]).expand(-1, 3, -1, -1)
        return x

    def _boxes(self, n: int, height: int, width: int, uniform: Callable[..., Tensor]) -> Tensor:
        """Crops as ``(n, 4)``: top, left, height, width in pixels; the first of ten attempts that lies inside."""
        area = height * width * uniform(*self.scale, _ATTEMPTS)
        ratio = uniform(*map(math.log, self.ratio), _ATTEMPTS).exp()
        w, h = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
        inside = (w > 0) & (w <= width) & (h > 0) & (h <= height)
        first = inside.float().argmax(1, keepdim=True)
        none = ~inside.any(1)
        w, h = w.gather(1, first)[:, 0], h.gather(1, first)[:, 0]
        # The fallback of torchvision: the largest crop in the middle whose sides keep within the ratio.
        low, high = self.ratio
        whole = width / height
        w[none] = float(width if whole <= high else round(height * high))
        h[none] = float(height if whole >= low else round(width / low))
        top = torch.where(none, ((height - h) / 2).floor(), (uniform(0.0, 1.0) * (height - h + 1)).floor())
        left = torch.where(none, ((width - w) / 2).floor(), (uniform(0.0, 1.0) * (width - w + 1)).floor())
        return torch.stack([top, left, h, w], 1)


@dataclass(frozen=True)
class ShiftAndFlip:
    """The usual augmentation of CIFAR: pad with zeros, cut out a window of the old size, mirror one picture in two.

    Args:
        pad: pixels on every side.

    Example:
        >>> x = torch.arange(1.0, 5.0).view(1, 1, 2, 2)
        >>> ShiftAndFlip(pad=0)(x, torch.Generator().manual_seed(0)).shape == x.shape
        True
    """

    pad: int = 4

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """A new batch; ``generator`` is on the CPU, whatever the device of ``x``."""
        n, _, height, width = x.shape
        shift = torch.randint(2 * self.pad + 1, (n, 2), generator=generator)
        flip = torch.rand(n, generator=generator) < 0.5
        rows = shift[:, :1] + torch.arange(height)
        columns = shift[:, 1:] + torch.arange(width)
        columns = torch.where(flip[:, None], columns.flip(1), columns)
        padded = F.pad(x, [self.pad] * 4)
        at = torch.arange(n)[:, None, None]
        found: Tensor = padded.permute(0, 2, 3, 1)[at, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        return found.contiguous()


def centre(x: Tensor, size: int) -> Tensor:
    """The middle ``size`` x ``size`` pixels of every picture."""
    top, left = (x.shape[2] - size) // 2, (x.shape[3] - size) // 2
    return x[:, :, top : top + size, left : left + size]


def crop(x: Tensor, boxes: Tensor, flips: Tensor, out: int | None = None) -> Tensor:
    """The boxes ``(n, 4)`` (top, left, height, width in pixels) of each picture, mirrored where told.

    Resized to the picture's own size, or to ``out`` x ``out`` pixels.
    """
    n, channels, height, width = x.shape
    top, left, h, w = boxes.to(x).unbind(1)
    sign = 1.0 - 2.0 * flips.to(x)
    theta = torch.zeros(n, 2, 3, dtype=x.dtype, device=x.device)
    theta[:, 0, 0], theta[:, 1, 1] = sign * w / width, h / height
    theta[:, 0, 2], theta[:, 1, 2] = (2 * left + w) / width - 1, (2 * top + h) / height - 1
    grid = F.affine_grid(theta, [n, channels, out or height, out or width], align_corners=False)
    # Nothing from beyond the box, as if it had been cut out first.
    low = torch.stack([(2 * left + 1) / width - 1, (2 * top + 1) / height - 1], 1).view(n, 1, 1, 2)
    high = torch.stack([(2 * (left + w) - 1) / width - 1, (2 * (top + h) - 1) / height - 1], 1).view(n, 1, 1, 2)
    return F.grid_sample(x, grid.clamp(low, high), padding_mode="border", align_corners=False)


def grey(x: Tensor) -> Tensor:
    """Luma ``(n, 1, H, W)`` of RGB."""
    r, g, b = _GREY
    return r * x[:, :1] + g * x[:, 1:2] + b * x[:, 2:]


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Towards black (0) and beyond the picture (> 1)."""
    return (x * factor).clamp_(0, 1)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Towards the mean luma of the picture (0) and away from it (> 1)."""
    return torch.lerp(grey(x).mean((1, 2, 3), keepdim=True).expand_as(x), x, factor).clamp_(0, 1)


def saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Towards the grey picture (0) and away from it (> 1)."""
    return torch.lerp(grey(x).expand_as(x), x, factor).clamp_(0, 1)


def hue(x: Tensor, turn: Tensor) -> Tensor:
    """The colour circle turned by ``turn`` of a full turn; value and saturation stay (the HSV model)."""
    value, at = x.max(1, keepdim=True)
    spread = value - x.min(1, keepdim=True).values
    chroma = spread.clamp_min(torch.finfo(x.dtype).tiny)
    r, g, b = x[:, :1], x[:, 1:2], x[:, 2:]
    sixth = torch.where(at == 0, (g - b) / chroma, torch.where(at == 1, 2 + (b - r) / chroma, 4 + (r - g) / chroma))
    # Of channels that lie 5, 3 and 1 sixths ahead: value minus a tent of height spread.
    ahead = torch.tensor([5.0, 3.0, 1.0], dtype=x.dtype, device=x.device).view(1, 3, 1, 1)
    place = (ahead + sixth + 6 * turn).remainder(6)
    return value - spread * torch.minimum(place, 4 - place).clamp(0, 1)
