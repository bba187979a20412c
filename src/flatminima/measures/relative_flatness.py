r"""Relative flatness of a linear layer: its block of the Hessian, weighed by the inner products of its weight's rows.

.. math:: \kappa_l = \sum_{s,s'} \langle w_s, w_{s'} \rangle\, \mathrm{tr} H_{(s),(s')}

with :math:`w_s` the rows of the weight and :math:`H_{(s),(s')}` the block of the Hessian in rows *s* and *s'*. Petzka, Kamp,
Adilova, Sminchisescu and Boley, "Relative Flatness and Generalization" (2021).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flatminima.curvature.dense import dense
from flatminima.curvature.output_curvature import CoupledRowsError, output_curvature
from flatminima.curvature.per_sample import RowLayoutError
from flatminima.curvature.row_squares import Pass, check_rows_apart, each_pass
from flatminima.curvature.trace import trace
from flatminima.measures.base import Measurement, NotApplicableError, Workbench, register
from flatminima.measures.invariance import CONDITIONAL, NEARLY, SHIFTS, SIGNED_PERMUTATIONS
from flatminima.measures.outputs import last_layer, tied, why_no_last_layer
from flatminima.names import unknown
from flatminima.objective import Objective
from flatminima.operators import OfObjective


@dataclass(frozen=True)
class RelativeFlatness:
    """Relative flatness of one layer.

    Attributes:
        value, error: and what the error is: rounding, or the standard error of random probes.
        layer: its name.
        method: ``"closed form"``, ``"row products"``, ``"weight products"`` or ``"probes"``.
        converged: whether ``rtol`` was reached.
    """

    value: float
    error: float
    layer: str
    method: str
    converged: bool = True


def relative_flatness_of(
    objective: Objective,
    layer: str | None = None,
    *,
    rtol: float = 0.01,
    max_products: int = 1000,
    dense_limit: int = 2000,
    seed: int = 0,
) -> RelativeFlatness:
    r"""Relative flatness of a linear or convolutional layer, exactly wherever that is cheap.

    The last layer has the closed form :math:`\sum_i \lVert\varphi_i\rVert^2 \mathrm{tr}(W^\top H_{out,i} W)`, which for
    cross entropy is :math:`\mathrm{mean}_i \sum_{ss'} (\mathrm{diag}\,p - pp^\top)_{ss'} \langle w_s, w_{s'} \rangle
    \lVert\varphi_i\rVert^2`. A dense layer that is used once a row has the same form with the Hessian :math:`M_i` of the
    loss in its outputs, and as many products with that as the weight has rank. Any other layer (convolutions, sequences,
    tied weights) is a trace of :math:`(W^\top \otimes I) H (W \otimes I)`: one Hessian product for each of its rank *
    columns unit vectors, or, above ``dense_limit`` of them, as many random probes as ``rtol`` needs.

    Args:
        objective: with a loss of the model's output.
        layer: name of the layer; the last one by default.
        rtol, max_products, seed: of random probes.
        dense_limit: most unit vectors.

    Returns:
        The value, in units of the loss.

    Raises:
        ValueError: no layer of that name with a selected weight; the valid ones are listed.
        NotApplicableError: no layer was named, and the model does not end in a linear one that is its own.

    Cost: one gradient for the last layer; one product (2 gradients) for each rank of the weight, or each unit vector.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 1, bias=False)).double()
        >>> _ = net[0].weight.data.copy_(torch.tensor([[2.0, 1.0]]))
        >>> data = torch.tensor([[3.0, 0.0], [0.0, 1.0]]).double(), torch.zeros(2, 1).double()
        >>> relative_flatness_of(Objective(net, nn.functional.mse_loss, data)).value    # |w|^2 tr H, H = diag(9, 1)
        50.0
    """
    if layer is None and (reason := _why_not(objective)) is not None:
        raise NotApplicableError(reason)
    end = None if why_no_last_layer(objective) else last_layer(objective)
    name = layer if layer is not None else end.name if end else ""
    _check_name(objective, name)
    module = objective.model.get_submodule(name)
    weight = objective.split(objective.point())[_parameter(name)].double().flatten(1)
    with contextlib.suppress(RowLayoutError, CoupledRowsError):  # the products in the weight need no rows
        if end is not None and end.bare and name == end.name and tied(objective, _parameter(name)) is None:
            return _exact(objective, name, "closed form", _closed_form(objective, name, weight))
        if isinstance(module, nn.Linear) and tied(objective, _parameter(name)) is None and _once(objective, name):
            return _exact(objective, name, "row products", _row_products(objective, name, weight))
    operator = _RowMixed(objective, name, weight)
    if operator.n <= dense_limit:
        return _exact(objective, name, "weight products", float(dense(operator, max_n=dense_limit).trace()))
    found = trace(operator, rtol=rtol, max_products=max_products, seed=seed)
    return RelativeFlatness(found.value, found.error, name, "probes", found.converged)


def _why_not(objective: Objective) -> str | None:
    """Why the last layer has no relative flatness, or ``None``."""
    try:
        name = last_layer(objective).name
    except NotApplicableError as error:
        return str(error)
    if (reason := tied(objective, _parameter(name))) is not None:
        return reason
    if _parameter(name) not in objective.parameter_names:
        return f"the weight of the last layer {name!r} is not among the selected parameters"
    return None


def _exact(objective: Objective, name: str, method: str, value: float) -> RelativeFlatness:
    rounding = 64 * max(torch.finfo(torch.float64).eps, objective.rounding)
    return RelativeFlatness(value, rounding * abs(value), name, method)


def _parameter(layer: str) -> str:
    return f"{layer}.weight".lstrip(".")


def _check_name(objective: Objective, name: str) -> None:
    names = [
        n
        for n, module in objective.model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
        and _parameter(n) in objective.parameter_names
    ]
    if name not in names:
        raise ValueError(unknown("linear layer", name, names))


def _once(objective: Objective, name: str) -> bool:
    """Whether the layer is called once, with one vector a row."""
    shapes = []
    handle = objective.model.get_submodule(name).register_forward_hook(
        lambda m, args, out: shapes.append(args[0].shape)
    )
    index, piece, _ = next(iter(objective._shares()))
    try:
        with torch.no_grad():
            objective._forward.logits(index, piece.cut(0, 1), objective._values(None))
    finally:
        handle.remove()
    return len(shapes) == 1 and len(shapes[0]) == 2 and shapes[0][0] == 1


def _watch(objective: Objective, name: str, one: Pass, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Inputs of a layer and outputs of the model; ``shift``, if given, is added to the layer's outputs."""
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        seen.append(args[0].detach().double())
        return None if shift is None else output + shift

    handle = objective.model.get_submodule(name).register_forward_hook(hook)
    try:
        outputs = one.outputs(slice(0, one.rows))
    finally:
        handle.remove()
    return seen[0], outputs


def _closed_form(objective: Objective, name: str, weight: Tensor) -> float:
    total = 0.0
    for one in each_pass(objective):
        with torch.no_grad():
            features, outputs = _watch(objective, name, one)
        if features.shape[0] != one.rows or features.dim() != 2:
            raise RowLayoutError(f"the last layer {name!r} reads {tuple(features.shape)} for {one.rows} rows of data")
        curvature = output_curvature(one.loss, outputs)
        for vector, signs in curvature.factors(slice(0, one.rows)):
            rows = (vector.double().reshape(one.rows, -1) @ weight).square().sum(1) * features.square().sum(1)
            total += one.share * float(rows.sum() if signs is None else (rows * signs.to(rows)).sum())
    objective.evaluations.passes += 1.0
    return total


def _row_products(objective: Objective, name: str, weight: Tensor) -> float:
    r"""``sum_i |a_i|^2 tr(M_i W W')`` by products of :math:`M` with the same column for all rows at once."""
    columns = _root(weight)
    total = 0.0
    for number, one in enumerate(each_pass(objective)):
        if number == 0 and one.rows > 1:
            check_rows_apart(objective, one, {name: ["weight"]})
        shape = (one.rows, weight.shape[0])
        shift = torch.zeros(shape, dtype=objective.dtype, device=objective.device, requires_grad=True)
        with torch.enable_grad():
            inputs, outputs = _watch(objective, name, one, shift)
            (slope,) = torch.autograd.grad(one.loss(outputs), shift, create_graph=True)
        squares = inputs.square().sum(1)
        for column in columns.T if slope.requires_grad else ():
            direction = column.to(slope).expand_as(slope)
            (image,) = torch.autograd.grad(slope, shift, direction, retain_graph=True)
            total += one.share * float((squares * (image.double() @ column)).sum())
    objective.evaluations.passes += 1 + 2 * columns.shape[1]
    return total


class _RowMixed(OfObjective):
    r""":math:`(C^\top \otimes I) H (C \otimes I)` with :math:`C C^\top = W W^\top`, the Hessian in the layer's weight alone."""

    def __init__(self, objective: Objective, name: str, weight: Tensor) -> None:
        super().__init__(objective.restricted([_parameter(name)]))
        self._columns, self._width, self._counted = _root(weight), weight.shape[1], objective
        self.n, self.dtype = self._columns.shape[1] * self._width, torch.float64

    def _multiply(self, block: Tensor) -> Tensor:
        mixed = torch.einsum("sr,rjk->sjk", self._columns, block.reshape(-1, self._width, block.shape[1]))
        image = self.objective.hvp(mixed.reshape(self.objective.n, -1)).double()
        self._counted.evaluations.hvp += block.shape[1]
        back = torch.einsum("sr,sjk->rjk", self._columns, image.reshape(len(self._columns), self._width, -1))
        return back.reshape(self.n, -1)


def _root(weight: Tensor) -> Tensor:
    """``C`` with ``C C' = W W'``, as few columns as the weight has rank."""
    left, sizes, _ = torch.linalg.svd(weight, full_matrices=False)
    columns: Tensor = left * sizes
    return columns[:, sizes > sizes.amax() * torch.finfo(torch.float64).eps]


@register(
    "relative_flatness",
    "relative flatness",
    "Curvature in the last layer's weights, weighed by their inner products; a layer's own scale cancels.",
    invariant_under=SIGNED_PERMUTATIONS | SHIFTS | {"relu-layer-rescaling", "query-key", "query-key-diagonal"},
    almost_under=NEARLY,
    changes_under=CONDITIONAL
    | {"relu-unit-rescaling", "norm-gain-rescaling", "sigmoid-flip", "residual-stream", "temperature"},
    applies=_why_not,
    repair=("adaptive_trace",),
)
def relative_flatness(bench: Workbench) -> Measurement:
    r"""Relative flatness of the last linear layer, or of ``relative_flatness_layer``; see :func:`relative_flatness_of`.

    The layer is invariant to mixing its rows, not to scaling its columns: rescaling single units of the layer before it
    changes the number. Cost: one gradient for the last layer.
    """
    options = bench.options
    found = relative_flatness_of(
        bench.precise, options.relative_flatness_layer, rtol=options.rtol, max_products=options.max_probes,
        dense_limit=options.dense_limit, seed=bench.seed,
    )  # fmt: skip
    kind = "standard error" if found.method == "probes" else "rounding"
    note = f"layer {found.layer}, {found.method}"
    return Measurement("relative_flatness", found.value, found.error, kind, found.converged, note=note)
