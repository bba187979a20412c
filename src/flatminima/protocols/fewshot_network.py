"""A network as F2M sees it: a trunk that stays, a tail whose convolutions get noise and later move, and a linear classifier.

Everything below the first convolution of the region is the same for all noise of a batch and for all sessions. Computed once,
it makes F2M's M + 1 passes cost little more than one when the region is the last few layers.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flatminima import models
from flatminima.protocols.fewshot_settings import FewShotSettings
from flatminima.study.settings import SettingsError


class Tail(nn.Module):
    """From the trunk's activations to the embedding and the base classifier's outputs."""

    def __init__(self, layers: nn.Sequential, head: nn.Linear) -> None:
        super().__init__()
        self.layers = layers
        self.head = head

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Embedding ``(rows, dimensions)`` and outputs ``(rows, classes)``."""
        z = self.layers(h)
        return z, self.head(z)


class EmbeddingNetwork(nn.Module):
    """A sequence that ends in a linear layer, cut into trunk and tail.

    Args:
        model: the sequence; its modules are used, not copied.
        layers: so many of its last convolutions with kernels larger than one pixel form the region.
        patterns: of names of parameters that form the region instead, as a shell matches file names.

    Attributes:
        names: of the region's parameters, in the model.
        region: these parameters.

    Raises:
        SettingsError: another kind of model, too few convolutions, a pattern that matches nothing.

    Example:
        >>> network = EmbeddingNetwork(models.build("resnet20", (3, 32, 32), 60, blocks=1), 2)
        >>> network.names, [tuple(p.shape) for p in network.region]
        (['5.conv1.weight', '5.conv2.weight'], [(64, 32, 3, 3), (64, 64, 3, 3)])
    """

    def __init__(self, model: nn.Module, layers: int, patterns: Sequence[str] = ()) -> None:
        super().__init__()
        if not isinstance(model, nn.Sequential) or len(model) < 2 or not isinstance(model[-1], nn.Linear):
            raise SettingsError(
                f"the model must be a sequence that ends in a linear layer, to have an embedding; got {type(model).__name__}"
            )
        self.names = region_names(model, layers, patterns)
        named = dict(model.named_parameters())
        self.region = [named[name] for name in self.names]
        start = min(int(name.split(".")[0]) for name in self.names)
        modules = list(model)
        self.trunk = nn.Sequential(*modules[:start])
        self.tail = Tail(nn.Sequential(*modules[start:-1]), model[-1])

    @property
    def head(self) -> nn.Linear:
        """The base classifier."""
        return self.tail.head

    @property
    def features(self) -> list[nn.Parameter]:
        """All parameters but the classifier's."""
        head = {id(p) for p in self.tail.head.parameters()}
        return [p for p in self.parameters() if id(p) not in head]

    def embed(self, x: Tensor) -> Tensor:
        """Embeddings ``(rows, dimensions)``."""
        z: Tensor = self.tail.layers(self.trunk(x))
        return z

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Embedding and outputs of the base classifier."""
        found: tuple[Tensor, Tensor] = self.tail(self.trunk(x))
        return found


def region_names(model: nn.Sequential, layers: int, patterns: Sequence[str] = ()) -> list[str]:
    """Names of the parameters that form the region; see :class:`EmbeddingNetwork`.

    Convolutions are told by their type and their kernel: by name, BatchNorm scales and 1x1 shortcuts would be caught too.
    """
    last = len(model) - 1
    if patterns:
        names = [name for name, _ in model.named_parameters() if not name.startswith(f"{last}.")]
        for pattern in patterns:
            if not fnmatch.filter(names, pattern):
                raise SettingsError(
                    f"--layer-names {pattern!r} matches no parameter below the classifier; there are "
                    f"{', '.join(names[:4])} ... {names[-1]}"
                )
        return [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
    convolutions = [
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1
    ]
    if len(convolutions) < layers:
        raise SettingsError(f"--layers {layers}: the model has {len(convolutions)} convolutions larger than one pixel")
    return convolutions[-layers:]


def build(settings: FewShotSettings, shape: Sequence[int], classes: int, seed: int) -> EmbeddingNetwork:
    """A new network in channels-last order, which CPUs and GPUs convolve fastest.

    Raises:
        SettingsError: the model cannot be built on these pictures, or has no such region.
    """
    try:
        model = models.build(settings.model, shape, classes, seed=seed, **settings.model_options)
    except (ValueError, TypeError) as error:
        raise SettingsError(str(error)) from error
    network = EmbeddingNetwork(model, settings.layers, settings.layer_names)
    return network.to(settings.device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]
