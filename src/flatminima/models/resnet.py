"""Residual networks: of 18 layers, and of 6n + 2 layers for small pictures (He et al., 2016, arXiv:1512.03385)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from flatminima.models.shapes import image_shape, positive


class ResidualBlock(nn.Module):
    """`relu(F(x) + shortcut(x))`, F being two 3x3 convolutions with BatchNorm (the "basic block", figure 2).

    The shortcut is the identity, or a 1x1 convolution with BatchNorm where the shape changes.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """`(rows, inputs, H, W)` to `(rows, outputs, H / stride, W / stride)`, rounded up."""
        residual = self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(x)))))
        out: Tensor = self.relu2(residual + self.shortcut(x))
        return out


def resnet18(input_shape: Sequence[int], classes: int, *, width: int = 64, stem: str = "small") -> nn.Sequential:
    """Four stages of two residual blocks with `width`, 2, 4 and 8 times `width` channels, then global average pooling.

    Maps `(rows, C, H, W)` to `(rows, classes)`. `stem="small"` is the one for 32x32 inputs: a 3x3 convolution of stride 1
    and no max pooling, so the stages work on 32, 16, 8 and 4 pixels a side. `stem="imagenet"` is that of the paper, for 84
    pixels and more: a 7x7 convolution of stride 2 and max pooling. Convolutions are initialised as in
    He et al. (2015, arXiv:1502.01852), fan out. `width=64` has 11.2 million parameters, `width=16` 0.7 million.

    Example:
        >>> sum(p.numel() for p in resnet18((3, 32, 32), 10).parameters())
        11173962
    """
    if stem not in ("small", "imagenet"):
        raise ValueError(f"option stem of model 'resnet18' is {stem!r}: expected 'small' or 'imagenet'")
    inputs, _, _ = image_shape("resnet18", input_shape, 8 if stem == "small" else 32)
    positive("resnet18", width=width)
    if stem == "small":
        first: list[nn.Module] = [nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    else:
        first = [
            nn.Conv2d(inputs, width, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.MaxPool2d(3, 2, padding=1),
        ]  # fmt: skip
    return _staged(first, width, classes, stages=4, blocks=2)


def resnet20(input_shape: Sequence[int], classes: int, *, width: int = 16, blocks: int = 3) -> nn.Sequential:
    """Three stages of `blocks` residual blocks with `width`, 2 and 4 times `width` channels, for 32x32 pictures.

    Maps `(rows, C, H, W)` to `(rows, classes)`, with `6 * blocks + 2` layers: `blocks=1` is ResNet-8. The embedding before
    the classifier has `4 * width` dimensions, none of them negative. Where the width changes, the shortcut is a 1x1
    convolution. `width=16, blocks=3` has 0.27 million parameters.

    Example:
        >>> sum(p.numel() for p in resnet20((3, 32, 32), 100).parameters())
        278324
    """
    inputs, _, _ = image_shape("resnet20", input_shape, 4)
    positive("resnet20", width=width, blocks=blocks)
    first = [nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return _staged(first, width, classes, stages=3, blocks=blocks)


def _staged(first: list[nn.Module], width: int, classes: int, *, stages: int, blocks: int) -> nn.Sequential:
    """The stem, stages that double the width and halve the side, global average pooling, and the classifier."""
    layers = list(first)
    inputs = width
    for stage in range(stages):
        outputs = width * 2**stage
        for block in range(blocks):
            layers.append(ResidualBlock(inputs, outputs, stride=2 if stage > 0 and block == 0 else 1))
            inputs = outputs
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model
