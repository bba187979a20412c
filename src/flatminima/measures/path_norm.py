r"""Path norms of piecewise linear networks, exactly, by one forward pass of the network with other numbers in it.

A network of linear maps and ReLUs is a sum over paths from inputs (or biases) to outputs; the weight of a path is the product
of the numbers along it. With every number replaced by its absolute value and all inputs 1, the outputs sum the absolute
weights of all paths; with squares, they sum their squares.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from flatminima.measures.base import Measurement, NotApplicableError, Workbench, register
from flatminima.measures.invariance import NEARLY
from flatminima.objective import Objective

_KEEPS = frozenset(
    {"unit-permutation", "relu-layer-rescaling", "relu-unit-rescaling", "norm-gain-rescaling", "dead-unit"}
)
_CHANGES = frozenset({"layernorm-shift", "residual-stream", "softmax-shift", "duplicate-unit", "temperature"})

_CONVOLUTIONS = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}
_CONVOLUTION_FUNCTIONS = (F.linear, F.conv1d, F.conv2d, F.conv3d)
# Activations that are zero at zero and no steeper than 1: a path goes through them as it is.
_ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.ReLU6, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_ACTIVATION_FUNCTIONS = (
    F.relu, F.relu_, torch.relu, torch.relu_, F.leaky_relu, F.relu6, F.dropout, F.dropout1d, F.dropout2d, F.dropout3d,
)  # fmt: skip
_SHAPES = (nn.Flatten, nn.Unflatten)
_SHAPE_FUNCTIONS = (
    torch.flatten,
    torch.reshape,
    torch.squeeze,
    torch.unsqueeze,
    torch.cat,
    torch.permute,
    torch.transpose,
)
_METHODS = (
    "relu", "relu_", "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "permute", "transpose", "contiguous",
    "clone", "size", "dim",
)  # fmt: skip
_MAX_POOLS = {nn.MaxPool1d: F.avg_pool1d, nn.MaxPool2d: F.avg_pool2d, nn.MaxPool3d: F.avg_pool3d}
_AVERAGE_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_GLOBAL_POOLS = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)


class _Paths(fx.Interpreter):
    """Runs a graph with ``|.|**power`` of every number."""

    def __init__(self, module: fx.GraphModule, power: int) -> None:
        super().__init__(module)
        self.power = power
        self.extra_traceback = False  # a refusal is a sentence

    def _of(self, number: Any) -> Any:
        return None if number is None else number.detach().double().abs() ** self.power

    def run_node(self, n: fx.Node) -> Any:
        # Values are never looked at by the graph: sums of paths take the place of activations.
        with torch.no_grad():
            return super().run_node(n)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return self._of(value) if isinstance(value, Tensor) else value

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)
        (x,) = args
        kind = type(module)
        if kind is nn.Linear:
            return F.linear(x, self._of(module.weight), self._of(module.bias))
        if kind in _CONVOLUTIONS:
            return self._convolution(module, x)
        if isinstance(module, _BatchNorm):
            return self._batch_norm(module, x)
        if kind in _ACTIVATIONS or (kind is nn.PReLU and bool((module.weight.abs() <= 1).all())):
            return x
        if kind in _SHAPES:
            return module(x)
        if kind in _MAX_POOLS:
            return self._max_pool(module, x)
        if kind in _AVERAGE_POOLS and not (module.ceil_mode or any(_tuple(module.padding, 1))):
            return module(x) / _count(module.kernel_size, x.dim() - 2) ** (self.power - 1)
        if kind in _GLOBAL_POOLS and math.prod(_tuple(module.output_size, 1)) == 1:
            return module(x) / math.prod(x.shape[2:]) ** (self.power - 1)
        raise NotApplicableError(f"{kind.__name__} at {target!r} is not known to the path norm")

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        name = getattr(target, "__name__", str(target))
        if target in _ACTIVATION_FUNCTIONS:
            return args[0]
        if target in _CONVOLUTION_FUNCTIONS or target in _SHAPE_FUNCTIONS or name in ("getattr", "getitem"):
            return target(*args, **kwargs)
        if name in ("add", "iadd", "sub", "isub") and not kwargs:
            return self._number(args[0]) + self._number(args[1])
        if name in ("mul", "imul") and any(isinstance(a, int | float) for a in args):
            return self._number(args[0]) * self._number(args[1])
        if name in ("truediv", "itruediv") and isinstance(args[1], int | float):
            return args[0] / self._number(args[1])
        if target is torch.mean:
            return self._mean(args[0], target(*args, **kwargs))
        if target is torch.sum:
            return target(*args, **kwargs)
        raise NotApplicableError(f"{name} is not known to the path norm")

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in ("relu", "relu_"):
            return args[0]
        if target in _METHODS or target == "sum":
            return super().call_method(target, args, kwargs)
        if target == "mean":
            return self._mean(args[0], super().call_method(target, args, kwargs))
        raise NotApplicableError(f".{target} is not known to the path norm")

    def _number(self, value: Any) -> Any:
        return abs(value) ** self.power if isinstance(value, int | float) else value

    def _mean(self, before: Tensor, after: Tensor) -> Tensor:
        return after / (before.numel() / after.numel()) ** (self.power - 1)

    def _convolution(self, module: Any, x: Tensor) -> Tensor:
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        padded = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
        found: Tensor = _CONVOLUTIONS[type(module)](
            padded, self._of(module.weight), self._of(module.bias), module.stride, 0, module.dilation, module.groups
        )
        return found

    def _batch_norm(self, module: _BatchNorm, x: Tensor) -> Tensor:
        if module.running_mean is None or module.running_var is None:
            raise NotApplicableError("batch norm with the statistics of the batch is no fixed linear map")
        gain = 1 / (module.running_var.double() + module.eps).sqrt()
        shift = -module.running_mean.double() * gain
        if module.affine:
            gain, shift = gain * module.weight.double(), shift * module.weight.double() + module.bias.double()
        shape = (1, -1, *[1] * (x.dim() - 2))
        return x * (gain.abs() ** self.power).reshape(shape) + (shift.abs() ** self.power).reshape(shape)

    def _max_pool(self, module: Any, x: Tensor) -> Tensor:
        """Every entry of a window is on a path: the sum takes the place of the maximum."""
        dims = x.dim() - 2
        if module.ceil_mode or any(d != 1 for d in _tuple(module.dilation, dims)):
            raise NotApplicableError(
                f"{type(module).__name__} with ceil_mode or dilation is not known to the path norm"
            )
        average: Callable[..., Tensor] = _MAX_POOLS[type(module)]
        pooled = average(x, module.kernel_size, module.stride, module.padding, count_include_pad=True)
        return pooled * _count(module.kernel_size, dims)


def _tuple(value: Any, dims: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,) * dims


def _count(kernel: Any, dims: int) -> int:
    return math.prod(_tuple(kernel, dims))


def path_norm_of(objective: Objective, power: int = 2) -> float:
    r"""Path norm :math:`\bigl(\sum_p \prod_{e \in p} |w_e|^q \bigr)^{1/q}`, *p* all paths from inputs (or biases) to outputs.

    .. math:: \sum_p \prod_{e \in p} |w_e|^q = \mathbf{1}^\top f_{|w|^q}(\mathbf{1})

    Batch norm in evaluation mode is the affine map that it is; a pooling window has a path for each of its entries, of
    weight 1 (maximum) or one over their number (average); biases are inputs of their own. Source: Neyshabur, Tomioka and
    Srebro (2015); Gonon, Brisebarre, Riccietti and Gribonval (2024) for biases, pooling and skip connections.

    Args:
        objective: of a piecewise linear model.
        power: the *q*: 1 or 2.

    Raises:
        NotApplicableError: the model does something else, which is named.

    Cost: one forward pass of one row.

    Example:
        >>> net = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1, bias=False))
        >>> for layer, w in ((net[0], [[2.0], [-1.0]]), (net[2], [[3.0, 4.0]])):
        ...     _ = layer.weight.data.copy_(torch.tensor(w))
        >>> _ = net[0].bias.data.copy_(torch.tensor([0.0, 5.0]))
        >>> f = Objective(net, F.mse_loss, (torch.ones(1, 1), torch.ones(1, 1)))
        >>> path_norm_of(f, 1)                                    # |2 * 3| + |-1 * 4| + |5 * 4|
        30.0
    """
    if power not in (1, 2):
        raise ValueError(f"power must be 1 or 2, got {power}")
    if objective.mode != "eval":
        raise NotApplicableError("in train mode the network is no fixed piecewise linear map; use mode='eval'")
    inputs = objective._pieces.first().inputs
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        raise NotApplicableError("the inputs are not one tensor of numbers")
    try:
        graph = fx.symbolic_trace(copy.deepcopy(objective.model).eval())
    except Exception as error:
        raise NotApplicableError(f"torch.fx cannot trace {type(objective.model).__name__}: {error}") from error
    ones = torch.ones_like(inputs[:1], dtype=torch.float64, device=objective.device)
    output = _Paths(graph, power).run(ones)
    if not isinstance(output, Tensor):
        raise NotApplicableError(f"the model returns a {type(output).__name__}, not one tensor")
    total = float(output.sum())
    return math.sqrt(total) if power == 2 else total


def why_no_paths(objective: Objective) -> str | None:
    """The reason of :func:`path_norm_of`, or ``None``. Cost: one forward pass of one row."""
    try:
        path_norm_of(objective, 1)
    except NotApplicableError as error:
        return str(error)
    return None


def _measured(name: str, bench: Workbench, power: int) -> Measurement:
    value = path_norm_of(bench.objective, power)
    layers = sum(1 for p in bench.objective.split(bench.objective.point()).values() if p.dim() >= 2)
    error = 64 * torch.finfo(torch.float64).eps * (1 + layers) * value
    return Measurement(name, value, error, "rounding", True, note="exact")


@register(
    "path_norm",
    "path norm",
    "Root of the summed squares of all products of weights along paths from input to output.",
    flatter_when=None,
    invariant_under=_KEEPS,
    almost_under=NEARLY,
    changes_under=_CHANGES,
    cost_class="cheap",
    applies=why_no_paths,
)
def path_norm(bench: Workbench) -> Measurement:
    """The path norm with q = 2; see :func:`path_norm_of`. Cost: one forward pass of one row."""
    return _measured("path_norm", bench, 2)


@register(
    "path_norm_l1",
    "path L1 norm",
    "Sum of the sizes of all products of weights along paths from input to output.",
    flatter_when=None,
    invariant_under=_KEEPS,
    almost_under=NEARLY,
    changes_under=_CHANGES,
    cost_class="cheap",
    applies=why_no_paths,
)
def path_norm_l1(bench: Workbench) -> Measurement:
    """The path norm with q = 1; see :func:`path_norm_of`. Cost: one forward pass of one row."""
    return _measured("path_norm_l1", bench, 1)
