"""The gradient of a stack of multilayer perceptrons, written out: without what ``vmap`` and autograd take between products.

The operations and their order are those of autograd on one network, so that the bits are too; the ensemble tries that out
before it relies on it, as with any stack.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flatminima.study.together import Stack


def dense_layers(model: nn.Module) -> tuple[str, ...] | None:
    """Names of the linear layers of a perceptron (``Flatten``, ``Linear`` and ``ReLU`` in turn, ``Linear``); else ``None``.

    Example:
        >>> dense_layers(nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
        ('1', '3')
        >>> dense_layers(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))) is None
        True
    """
    if type(model) is not nn.Sequential:
        return None
    parts = [(name, module) for name, module in model.named_children() if type(module) is not nn.Flatten]
    flat = len(model) - len(parts)
    if flat > 1 or (flat == 1 and type(model[0]) is not nn.Flatten) or not len(parts) % 2:
        return None
    for number, (_, module) in enumerate(parts):
        if type(module) is not (nn.ReLU if number % 2 else nn.Linear) or module._forward_hooks:
            return None
        if isinstance(module, nn.Linear) and module.bias is None:
            return None
    return tuple(name for name, module in parts if isinstance(module, nn.Linear))


def dense_outputs(layers: Sequence[str], stack: Stack, x: Tensor) -> Tensor:
    """Outputs ``(members, rows, classes)`` at rows ``(members, rows, ...)``."""
    return _forward(layers, stack, x)[-1]


def dense_gradients(layers: Sequence[str], stack: Stack, x: Tensor, y: Tensor) -> Stack:
    """Gradients of the mean cross entropy of every member at its rows ``(members, rows, ...)``.

    Args:
        layers: of :func:`dense_layers`.
        stack: parameters by name, members first.
        x, y: rows and classes of every member.
    """
    seen = _forward(layers, stack, x)
    rows = x.shape[1]
    logp = torch.log_softmax(seen[-1], 2)
    down = torch.zeros_like(logp).scatter_(2, y.unsqueeze(2), -1.0 / rows)
    down = torch.ops.aten._log_softmax_backward_data(down, logp, 2, logp.dtype)
    found: Stack = {}
    for number in range(len(layers) - 1, -1, -1):
        name = layers[number]
        found[f"{name}.weight"] = torch.bmm(down.transpose(1, 2), seen[number])
        found[f"{name}.bias"] = down.sum(1)
        if number:
            down = torch.ops.aten.threshold_backward(torch.bmm(down, stack[f"{name}.weight"]), seen[number], 0)
    return found


def _forward(layers: Sequence[str], stack: Stack, x: Tensor) -> list[Tensor]:
    """The input of every layer, and the outputs."""
    seen = [x.flatten(2)]
    for number, name in enumerate(layers):
        weight, bias = stack[f"{name}.weight"], stack[f"{name}.bias"]
        out = torch.baddbmm(bias.unsqueeze(1), seen[-1], weight.transpose(1, 2))
        seen.append(out.relu_() if number < len(layers) - 1 else out)
    return seen
