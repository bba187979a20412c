from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flatminima.models import build
from flatminima.models.group_norm import GroupNormBlock


def test_mnist_cnn_is_domainbeds_order_of_layers() -> None:
    model = build("mnist-cnn", (1, 28, 28), 10, seed=0, width=16).double()
    x = torch.randn(3, 1, 28, 28, dtype=torch.float64)
    convolutions = [m for m in model if isinstance(m, nn.Conv2d)]
    norms = [m for m in model if isinstance(m, nn.GroupNorm)]
    expected = x
    for convolution, norm, stride in zip(convolutions, norms, (1, 2, 1, 1), strict=True):
        expected = F.relu(F.conv2d(expected, convolution.weight, convolution.bias, stride=stride, padding=1))
        expected = F.group_norm(expected, 8, norm.weight, norm.bias)
    expected = expected.mean((2, 3)) @ model[-1].weight.T + model[-1].bias
    assert torch.allclose(model(x), expected)
    assert [c.out_channels for c in convolutions] == [16, 32, 32, 32]


def test_a_block_adds_its_shortcut() -> None:
    block = GroupNormBlock(8, 16, 2).double()
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    residual = block.norm2(block.conv2(F.relu(block.norm1(block.conv1(x)))))
    assert torch.allclose(block(x), F.relu(residual + F.conv2d(x, block.shortcut.weight, stride=2)))  # type: ignore[union-attr, arg-type]
    plain = GroupNormBlock(8, 8, 1).double()
    residual = plain.norm2(plain.conv2(F.relu(plain.norm1(plain.conv1(x)))))
    assert torch.allclose(plain(x), F.relu(residual + x))


def test_the_strided_stem_has_the_same_parameters_and_less_to_do() -> None:
    models = [build("resnet-gn", (3, 64, 64), 7, seed=0, stem_stride=stride) for stride in (1, 2)]
    assert [sum(p.numel() for p in m.parameters()) for m in models] == [77_655] * 2
    x = torch.zeros(1, 3, 64, 64)
    assert [m[:3](x).shape[-1] for m in models] == [64, 32]


@pytest.mark.parametrize("name", ["mnist-cnn", "resnet-gn"])
def test_a_width_that_the_groups_do_not_divide_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"option width of model {name!r} is 12: expected a multiple of 8"):
        build(name, (3, 16, 16), 2, width=12)
