from __future__ import annotations

import colorsys

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from flatminima.data.pictures import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Augmentation,
    Scaling,
    brightness,
    contrast,
    crop,
    grey,
    hue,
    saturation,
)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.rand(6, 3, 9, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_scaling_divides_pools_and_standardises() -> None:
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    plain = pixels.numpy() / 255
    assert np.allclose(Scaling()(pixels), plain, atol=1e-7)
    pooled = plain.reshape(2, 3, 4, 2, 4, 2).mean((3, 5))
    mean, std = (np.array(v).reshape(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    assert np.allclose(Scaling(pool=2, imagenet=True)(pixels), (pooled - mean) / std, atol=1e-6)


def test_colours_change_as_the_formulas_say(x: torch.Tensor) -> None:
    factors = torch.linspace(0.7, 1.3, 6, dtype=torch.float64).view(6, 1, 1, 1)
    luma = 0.2989 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2]
    for picture in range(6):
        f, one, grey_one = factors[picture].item(), x[picture], luma[picture]
        assert torch.allclose(brightness(x, factors)[picture], (one * f).clip(0, 1))
        assert torch.allclose(contrast(x, factors)[picture], (f * one + (1 - f) * grey_one.mean()).clip(0, 1))
        assert torch.allclose(saturation(x, factors)[picture], (f * one + (1 - f) * grey_one).clip(0, 1))
        assert torch.allclose(grey(x)[picture, 0], grey_one)


@pytest.mark.parametrize("turn", [-0.3, -0.1, 0.0, 0.21, 0.3])
def test_hue_turns_as_in_the_standard_library(x: torch.Tensor, turn: float) -> None:
    x[0, :, 0, 0] = 0.5  # a grey pixel has no hue
    x[0, :, 0, 1] = 0.0
    turned = hue(x.clone(), torch.full((6, 1, 1, 1), turn, dtype=torch.float64))
    for picture, i, j in np.ndindex(6, 9, 12):
        h, s, v = colorsys.rgb_to_hsv(*x[picture, :, i, j].tolist())
        expected = colorsys.hsv_to_rgb((h + turn) % 1.0, s, v)
        assert turned[picture, :, i, j].tolist() == pytest.approx(expected, abs=1e-12)


def test_a_crop_is_the_box_cut_out_and_resized(x: torch.Tensor) -> None:
    boxes = torch.tensor(
        [[0, 0, 9, 12], [2, 3, 5, 7], [1, 0, 8, 12], [4, 5, 5, 7], [0, 2, 3, 3], [3, 0, 6, 4]]
    ).double()
    flips = torch.tensor([False, True, False, True, False, True])
    found = crop(x, boxes, flips)
    for picture in range(6):
        top, left, h, w = boxes[picture].int().tolist()
        cut = x[picture : picture + 1, :, top : top + h, left : left + w]
        expected = F.interpolate(cut, (9, 12), mode="bilinear", align_corners=False)[0]
        expected = expected.flip(-1) if flips[picture] else expected
        assert torch.allclose(found[picture], expected, atol=1e-12)
    assert torch.allclose(found[0], x[0])


def test_the_augmentation_draws_what_it_says() -> None:
    augmentation = Augmentation()
    rows = 4000
    generator = torch.Generator().manual_seed(0)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(rows, *shape, generator=generator)

    top, left, h, w = augmentation._boxes(rows, 64, 64, uniform).unbind(1)
    area, ratio = h * w / 64**2, w / h
    assert 0.69 < area.min() < 0.72 < 0.97 < area.max() <= 1
    assert 0.70 < ratio.min() < 0.80 < 1.25 < ratio.max() < 1.43
    assert ((top >= 0) & (left >= 0) & (top + h <= 64) & (left + w <= 64)).all()
    assert {0.0, 5.0} <= set(top.tolist())
    wide = augmentation._boxes(rows, 10, 100, uniform)  # no crop of that shape lies inside: the middle
    assert wide.unique(dim=0).tolist() == [[0.0, 43.0, 10.0, 13.0]]
    pictures = torch.rand(400, 3, 4, 4, generator=generator)
    seen = augmentation(pictures, torch.Generator().manual_seed(1))
    grey_ones = ((seen[:, 0] - seen[:, 1]).abs().amax((1, 2)) < 1e-6).float().mean()
    assert 0.05 < grey_ones < 0.16
    assert torch.equal(seen, augmentation(pictures, torch.Generator().manual_seed(1)))
    state = torch.random.get_rng_state()
    augmentation(pictures, torch.Generator().manual_seed(2))
    assert torch.equal(state, torch.random.get_rng_state())
    still = Augmentation(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0, jitter=0.0, grey=0.0)
    assert torch.allclose(still(pictures, generator), pictures, atol=1e-5)
