"""Two small networks with GroupNorm (Wu and He, 2018, arXiv:1803.08494), which has no statistics to re-estimate."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from flatminima.models.shapes import image_shape, positive

GROUPS = 8


def mnist_cnn(input_shape: Sequence[int], classes: int, *, width: int = 64) -> nn.Sequential:
    """DomainBed's network for MNIST: four 3x3 convolutions, each followed by ReLU and then GroupNorm; global average pooling.

    Maps `(rows, C, H, W)` to `(rows, classes)`. Channels are `width` and three times `2 * width`; the second convolution has
    stride 2. Initialised as PyTorch does. `width=64` is DomainBed's, `width=16` fits one core.

    Source: Gulrajani and Lopez-Paz, "In Search of Lost Domain Generalization", ICLR 2021, appendix D.

    Example:
        >>> [sum(p.numel() for p in mnist_cnn((1, 28, 28), 10, width=width).parameters()) for width in (64, 16)]
        [371850, 23850]
    """
    inputs, _, _ = image_shape("mnist-cnn", input_shape, 2)
    _groups("mnist-cnn", width)
    layers: list[nn.Module] = []
    for outputs, stride in ((width, 1), (2 * width, 2), (2 * width, 1), (2 * width, 1)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.ReLU(), nn.GroupNorm(GROUPS, outputs)]
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


class GroupNormBlock(nn.Module):
    """`relu(F(x) + shortcut(x))`, F being two 3x3 convolutions with GroupNorm; a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(GROUPS, outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(GROUPS, outputs)
        self.relu2 = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(rows, inputs, H, W)` to `(rows, outputs, H / stride, W / stride)`, rounded up."""
        residual = self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(x)))))
        out: Tensor = self.relu2(residual + self.shortcut(x))
        return out


def resnet_gn(input_shape: Sequence[int], classes: int, *, width: int = 16, stem_stride: int = 1) -> nn.Sequential:
    """A stem and three residual blocks of `width`, 2 and 4 times `width` channels, then global average pooling.

    Maps `(rows, C, H, W)` to `(rows, classes)`. Blocks two and three halve the sides; `stem_stride=2` halves them before the
    first, at a quarter of the cost. Initialised as PyTorch does.

    Example:
        >>> sum(p.numel() for p in resnet_gn((3, 64, 64), 7).parameters())
        77655
    """
    inputs, _, _ = image_shape("resnet-gn", input_shape, 4)
    _groups("resnet-gn", width)
    positive("resnet-gn", stem_stride=stem_stride)
    stem = [
        nn.Conv2d(inputs, width, 3, stride=stem_stride, padding=1, bias=False),
        nn.GroupNorm(GROUPS, width),
        nn.ReLU(),
    ]
    blocks = [
        GroupNormBlock(width, width, 1),
        GroupNormBlock(width, 2 * width, 2),
        GroupNormBlock(2 * width, 4 * width, 2),
    ]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, classes))


def _groups(model: str, width: int) -> None:
    positive(model, width=width)
    if width % GROUPS:
        raise ValueError(
            f"option width of model {model!r} is {width}: expected a multiple of {GROUPS}, the groups of its norms"
        )
