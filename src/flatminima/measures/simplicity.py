"""How much of the network is in use: live units, and the effective dimension of its features."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from flatminima.measures.base import Measurement, NotApplicableError, Workbench, register
from flatminima.measures.invariance import ALL, DIAGONAL, LINEAR, NEARLY, SHIFTS
from flatminima.measures.outputs import forward, forward_rounding, last_layer, why_no_last_layer
from flatminima.objective import Objective

_ACTIVATIONS = frozenset(
    function
    for place in (F, torch, Tensor)
    for name in (
        "relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "prelu", "rrelu", "elu", "elu_", "selu", "celu", "gelu", "silu",
        "mish", "tanh", "tanh_", "sigmoid", "sigmoid_", "softplus", "softsign", "hardtanh", "hardtanh_", "hardswish",
        "hardsigmoid",
    )
    if (function := getattr(place, name, None)) is not None
)  # fmt: skip
_CHANNELS_FIRST = frozenset((F.conv1d, F.conv2d, F.conv3d, F.batch_norm, torch.batch_norm, F.max_pool1d, F.avg_pool1d))


@dataclass
class UnitRange:
    """Smallest and largest activation of each unit of one activation function, over everything it has seen.

    Attributes:
        function: its name.
        low, high: ``(units,)``.
    """

    function: str
    low: Tensor
    high: Tensor

    @property
    def live(self) -> int:
        """Units whose activation is not the same everywhere."""
        return int((self.high > self.low).sum())


def activation_ranges(objective: Objective) -> list[UnitRange]:
    """The ranges of all hidden units over the data, one entry for each activation function in the order they are called.

    Every call of an activation function of PyTorch counts, in whatever module or function it is made. A unit is an entry
    of the last axis, or of axis 1 where the activation follows a convolution or has four or more axes (a channel).

    Raises:
        NotApplicableError: the number of calls depends on the data.

    Cost: 1/3 gradient.
    """
    found: list[UnitRange] = []
    objective.evaluations.loss += 1
    for number, (index, piece, _) in enumerate(objective._shares()):
        spy = _ActivationSpy()
        # The loss has no hidden units; only the model is watched.
        with torch.no_grad(), objective._forward.evaluating(index), spy:
            objective._forward.output(piece, objective._values(None))
        if number and [(r.function, len(r.low)) for r in found] != [(r.function, len(r.low)) for r in spy.seen]:
            raise NotApplicableError("the activation functions that are called depend on the data")
        if not number:
            found = spy.seen
        for mine, new in zip(found, spy.seen, strict=True):
            mine.low, mine.high = torch.minimum(mine.low, new.low), torch.maximum(mine.high, new.high)
    return found


@dataclass
class _ActivationSpy(TorchFunctionMode):
    seen: list[UnitRange] = field(default_factory=list)
    _first: set[int] = field(default_factory=set)
    _alive: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # What the function calls in turn is not seen: F.relu and the torch.relu in it are one activation.
        result = func(*args, **(kwargs or {}))
        activation = func in _ACTIVATIONS and args and isinstance(args[0], Tensor)
        channels_first = activation and (id(args[0]) in self._first or args[0].dim() >= 4)
        if isinstance(result, Tensor):
            follows = func in _CHANNELS_FIRST and (func not in (F.batch_norm, torch.batch_norm) or args[0].dim() > 2)
            if activation or follows:
                self._alive.append(result)  # so that its id is not given to another tensor
            if follows or channels_first:
                self._first.add(id(result))
            if activation:
                axis = 1 if channels_first else result.dim() - 1
                units = result.detach().movedim(axis, 0).flatten(1)
                name = str(getattr(func, "__name__", func)).rstrip("_")
                self.seen.append(UnitRange(name, units.amin(1), units.amax(1)))
        return result


def _why_no_units(objective: Objective) -> str | None:
    if objective.process_group is not None:
        return "the data are spread over several processes"
    return None


@register(
    "live_units",
    "live units",
    "Hidden units whose activation is not the same for all data.",
    flatter_when=None,
    invariant_under=ALL - NEARLY - {"dead-unit"},
    almost_under=NEARLY,
    changes_under=frozenset({"dead-unit"}),
    cost_class="cheap",
    applies=_why_no_units,
)
def live_units(bench: Workbench) -> Measurement:
    """Number of hidden units (channels, for convolutions) that are not constant over the data, all layers together.

    For ReLU these are the units that are positive somewhere and not constant; the note has the count of every layer. Exact.
    Cost: 1/3 gradient.
    """
    layers = activation_ranges(bench.objective)
    if not layers:
        raise NotApplicableError("the model calls no activation function of PyTorch")
    note = "; ".join(f"{i}. {r.function}: {r.live} of {len(r.low)}" for i, r in enumerate(layers, start=1))
    return Measurement("live_units", float(sum(r.live for r in layers)), 0.0, "exact", True, note=note)


@register(
    "participation_ratio",
    "feature participation ratio",
    "Effective dimension of the features that the last layer reads: 1 if one direction has all the variance.",
    flatter_when=None,
    invariant_under=(LINEAR - DIAGONAL - {"residual-stream", "value-output"})
    | SHIFTS
    | {"relu-layer-rescaling", "query-key-diagonal", "duplicate-unit", "temperature"},
    almost_under=NEARLY,
    changes_under=frozenset({"relu-unit-rescaling", "norm-gain-rescaling", "residual-stream", "dead-unit"}),
    cost_class="cheap",
    applies=why_no_last_layer,
)
def participation_ratio(bench: Workbench) -> Measurement:
    r""":math:`(\mathrm{tr}\, C)^2 / \mathrm{tr}(C^2)`, *C* the covariance of the inputs of the last linear layer over the data.

    Between 1 and the number of features; in double precision, the error is rounding. Source: Gao and Ganguli (2015);
    Litwin-Kumar et al. (2017). Cost: 1/3 gradient. Features that do not vary have no ratio.
    """
    objective = bench.objective
    name = last_layer(objective).name
    count, size = 0, 0.0
    mean = scatter = torch.zeros((), dtype=torch.float64, device=objective.device)
    for seen in forward(objective, name):
        assert seen.inputs is not None
        x = seen.inputs.double().flatten(0, -2)
        size += float(x.square().sum())
        own = x.mean(0)
        # Means and scatters of two sets merge exactly (Chan, Golub and LeVeque 1983).
        share = count * len(x) / (count + len(x))
        scatter = scatter + (x - own).T @ (x - own) + share * torch.outer(own - mean, own - mean)
        count += len(x)
        mean = mean + (own - mean) * (len(x) / count)
    total, squares = float(scatter.trace()), float(scatter.square().sum())
    if (
        total <= (10 * torch.finfo(objective.dtype).eps) ** 2 * size
    ):  # constant features leave the rounding of their mean
        raise NotApplicableError("the features are the same for all rows")
    value = total**2 / squares
    return Measurement(
        "participation_ratio", value, 2 * forward_rounding(objective) * value, "rounding", True,
        note=f"of {scatter.shape[0]} features of layer {name!r}",
    )  # fmt: skip
