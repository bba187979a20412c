"""Small reference networks, each an ordinary `nn.Module` that `torch.fx` can trace and that is twice differentiable."""

from flatminima.models.registry import MODELS, build, options_of
from flatminima.models.resnet50 import resnet50

__all__ = ["MODELS", "build", "options_of", "resnet50"]
