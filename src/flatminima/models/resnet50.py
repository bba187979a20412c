"""ResNet-50 for pictures of 224x224, with weights from those who train it on ImageNet.

Its parameters have torchvision's names, so a weights file of torchvision (or of timm, which keeps the names) fits without
either package; weights can also come from the packages torchvision and transformers, where they are installed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from flatminima.models.shapes import positive

FEATURES = 2048
_STAGES = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))  # bottleneck width, blocks, stride
_EXPANSION = 4


class Bottleneck(nn.Module):
    """1x1, 3x3 (which carries the stride) and 1x1 convolution, each with BatchNorm, added to a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = _EXPANSION * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """`(rows, inputs, H, W)` to `(rows, 4 * width, H / stride, W / stride)`, rounded up."""
        out: Tensor = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.relu(self.bn3(self.conv3(out)) + self.downsample(x))
        return out


class ResNet50Features(nn.Module):
    """ResNet-50 without its classifier: `(rows, 3, H, W)` to `(rows, 2048)`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        inputs = 64
        for number, (width, blocks, stride) in enumerate(_STAGES, 1):
            stage = [
                Bottleneck(inputs if block == 0 else _EXPANSION * width, width, stride if block == 0 else 1)
                for block in range(blocks)
            ]
            setattr(self, f"layer{number}", nn.Sequential(*stage))
            inputs = _EXPANSION * width
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Features after global average pooling."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for number in range(1, len(_STAGES) + 1):
            x = getattr(self, f"layer{number}")(x)
        out: Tensor = self.avgpool(x).flatten(1)
        return out


class FrozenStatistics(nn.Sequential):
    """A sequence whose BatchNorm layers stay in eval mode: statistics are used and kept, scale and shift are trained."""

    def train(self, mode: bool = True) -> FrozenStatistics:
        """As of any module, except for the BatchNorm layers."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self


def resnet50(
    classes: int, *, weights: str | Path | None = None, dropout: float = 0.0, freeze_batchnorm: bool = True
) -> nn.Sequential:
    """ResNet-50 with a new linear classifier, for fine-tuning.

    Args:
        classes: logits.
        weights: a file (safetensors, or a `state_dict` of `torch.save`) with torchvision's parameter names, its classifier
            is not used; `"torchvision:IMAGENET1K_V1"` or another of that package's names; `"transformers:microsoft/resnet-50"`,
            or the folder of such a model; None: random.
        dropout: before the classifier.
        freeze_batchnorm: keep BatchNorm's running statistics as they came, in train mode too.

    Returns:
        A sequence of the features, dropout if any, and the classifier, in train mode.

    Raises:
        ValueError: weights that are not those of a ResNet-50, or a package that is missing.

    Example:
        >>> model = resnet50(7)
        >>> sum(p.numel() for p in model.parameters()), model.training, model[0].bn1.training
        (23522375, True, False)
    """
    positive("resnet50", classes=classes)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout of model 'resnet50' is {dropout}: expected at least 0 and less than 1")
    features = ResNet50Features()
    if weights is not None:
        _load(features, str(weights))
    parts: list[nn.Module] = [features, *([nn.Dropout(dropout)] if dropout else []), nn.Linear(FEATURES, classes)]
    model = FrozenStatistics(*parts) if freeze_batchnorm else nn.Sequential(*parts)
    return model.train()


def _load(features: ResNet50Features, weights: str) -> None:
    package, _, name = weights.partition(":")
    if package == "torchvision" and name:
        found = _from_torchvision(name)
    elif package == "transformers" and name:
        found = _from_transformers(name)
    else:
        found = _from_file(Path(weights))
    found = {key: value for key, value in found.items() if not key.startswith("fc.")}
    expected = features.state_dict()
    lacking = [key for key in expected if key not in found and not key.endswith("num_batches_tracked")]
    foreign = [key for key in found if key not in expected]
    wrong = [key for key in expected if key in found and found[key].shape != expected[key].shape]
    if lacking or foreign or wrong:
        first = (
            f"there is no {lacking[0]}" if lacking
            else f"{foreign[0]} is not part of one" if foreign
            else f"{wrong[0]} has shape {tuple(found[wrong[0]].shape)}, expected {tuple(expected[wrong[0]].shape)}"
        )  # fmt: skip
        raise ValueError(f"{weights} does not hold the weights of a ResNet-50: {first}")
    features.load_state_dict(found, strict=False)


def _from_file(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"weights {str(path)!r}: no such file, and neither torchvision:NAME nor transformers:NAME")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no state_dict: expected names with tensors")
    return content


def _from_torchvision(name: str) -> Mapping[str, Tensor]:
    try:
        from torchvision.models import ResNet50_Weights
    except (ImportError, RuntimeError) as error:  # RuntimeError: a build for another torch
        raise ValueError(f"weights torchvision:{name} need a torchvision that fits this torch: {error}") from error
    known = {weights.name: weights for weights in ResNet50_Weights}
    if name not in known:
        raise ValueError(f"torchvision has no ResNet-50 weights {name!r}: expected one of {', '.join(known)}")
    state: Mapping[str, Tensor] = known[name].get_state_dict(progress=False, check_hash=True)
    return state


_STEM = "embedder.embedder"
_TRANSFORMERS = (  # transformers' name -> torchvision's
    (rf"^{_STEM}\.convolution\.", "conv1."),
    (rf"^{_STEM}\.normalization\.", "bn1."),
    (r"^encoder\.stages\.(\d+)\.layers\.(\d+)\.shortcut\.convolution\.", r"layer{0}.\2.downsample.0."),
    (r"^encoder\.stages\.(\d+)\.layers\.(\d+)\.shortcut\.normalization\.", r"layer{0}.\2.downsample.1."),
    (r"^encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.(\d+)\.convolution\.", r"layer{0}.\2.conv{1}."),
    (r"^encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.(\d+)\.normalization\.", r"layer{0}.\2.bn{1}."),
)


def _from_transformers(name: str) -> Mapping[str, Tensor]:
    try:
        from transformers import ResNetModel
    except ImportError as error:
        raise ValueError(f"weights transformers:{name} need the package transformers: {error}") from error
    try:
        model = ResNetModel.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"weights transformers:{name} cannot be had: {str(error).splitlines()[0]}") from error
    return {torchvision_name(key): value for key, value in model.state_dict().items()}


def torchvision_name(key: str) -> str:
    """The name that torchvision gives to a parameter of transformers' ResNet; stages and layers count from one there.

    Example:
        >>> torchvision_name("encoder.stages.0.layers.2.layer.1.convolution.weight")
        'layer1.2.conv2.weight'
    """
    for pattern, target in _TRANSFORMERS:
        match = re.match(pattern, key)
        if match:
            numbers = [str(int(group) + 1) for group in match.groups()]
            stage, layer = (numbers[0], numbers[-1]) if numbers else ("", "")
            return match.expand(target.replace("{0}", stage).replace("{1}", layer)) + key[match.end() :]
    return key
