"""Small convolutional network."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from flatminima.models.shapes import image_shape, positive


def convnet(
    input_shape: Sequence[int],
    classes: int,
    *,
    channels: Sequence[int] = (16, 32),
    hidden: int = 64,
    norm: str = "none",
) -> nn.Sequential:
    """Stages of 3x3 convolution, ReLU and 2x2 max pooling, then one hidden layer and the logits.

    Maps `(rows, C, H, W)` to `(rows, classes)`; sides must be at least 2 to the number of stages. After the stages,
    average pooling brings larger pictures down to 4 to 7 pixels a side, so the head stays small up to 64x64 and more.
    `norm="batch"` puts BatchNorm between convolution and ReLU, in place of the convolution's bias. Initialised as
    PyTorch does.

    Example:
        >>> sum(p.numel() for p in convnet((1, 28, 28), 10).parameters())
        105866
    """
    inputs, height, width = image_shape("convnet", input_shape, 2 ** len(channels))
    if norm not in ("none", "batch"):
        raise ValueError(f"option norm of model 'convnet' is {norm!r}: expected 'none' or 'batch'")
    positive("convnet", hidden=hidden)
    layers: list[nn.Module] = []
    for outputs in channels:
        positive("convnet", channels=outputs)
        layers.append(nn.Conv2d(inputs, outputs, 3, padding=1, bias=norm == "none"))
        if norm == "batch":
            layers.append(nn.BatchNorm2d(outputs))
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
        inputs, height, width = outputs, height // 2, width // 2
    pool = (max(height // 4, 1), max(width // 4, 1))
    if pool != (1, 1):
        layers.append(nn.AvgPool2d(pool))
        height, width = height // pool[0], width // pool[1]
    head = [nn.Flatten(), nn.Linear(inputs * height * width, hidden), nn.ReLU(), nn.Linear(hidden, classes)]
    return nn.Sequential(*layers, *head)
