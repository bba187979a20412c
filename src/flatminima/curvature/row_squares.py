"""Signed squares of per-row gradients, summed over an objective: the diagonal of its Gauss-Newton matrix and its trace.

Nothing but the inputs of the layers and the derivatives in their outputs is needed, and hooks collect them.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from flatminima.batches import Piece, cast, moved
from flatminima.curvature.output_curvature import OutputCurvature, output_curvature
from flatminima.curvature.per_sample import RowLayoutError, Squares, squares
from flatminima.objective import Objective

# Numbers that a chunk of rows may hold beside the graph of its forward pass: 64 MiB in single precision.
_CHUNK = 2**24


@dataclass(frozen=True)
class Sums:
    """Exact sums over the data.

    Attributes:
        diagonal: ``diag(H)`` ``(n,)``, float64; empty if only the trace was asked for.
        traces: for each parameter, the trace of its block.
        backward_passes: made over the data, on the average.
        gradient_equivalents: their nominal cost.
    """

    diagonal: Tensor
    traces: dict[str, float]
    backward_passes: float

    @property
    def trace(self) -> float:
        """Sum of all traces."""
        return sum(self.traces.values())

    @property
    def gradient_equivalents(self) -> float:
        """A forward pass is one third of a gradient, a backward pass with weight gradients two thirds."""
        return 1 / 3 + 2 / 3 * self.backward_passes


def sums(objective: Objective, *, diagonal: bool = True) -> Sums:
    """Sum the squares over the data, whether or not they are the diagonal of the Hessian.

    Raises:
        RowLayoutError: rows of the data cannot be told apart within the model.
        CoupledRowsError: the loss is no mean over rows.
        ObjectiveError: the model returns no tensor.
    """
    layers = _layers(objective)
    total: dict[str, Tensor] = {}
    backward = 0.0
    checked = False
    for one in each_pass(objective):
        if not checked and one.rows > 1:
            check_rows_apart(objective, one, layers)
            checked = True
        chunk = _rows_at_once(objective, one, layers, diagonal)
        curvature: OutputCurvature | None = None
        if chunk < one.rows:
            # The loss is a mean over all rows of the pass; its curvature cannot be had from some of them.
            with torch.no_grad():
                parts = [one.outputs(slice(s, min(s + chunk, one.rows))) for s in range(0, one.rows, chunk)]
            curvature = output_curvature(one.loss, torch.cat(parts))
        for start in range(0, one.rows, chunk):
            cut = slice(start, min(start + chunk, one.rows))
            found, passes = _chunk_sums(objective, one, cut, layers, curvature, diagonal)
            backward += passes * (cut.stop - cut.start) / objective.rows
            for name, value in found.items():
                value = value * one.share
                total[name] = total[name] + value if name in total else value
    shapes = {name: part.shape for name, part in objective.split(objective.point()).items()}
    zero = torch.zeros((), dtype=torch.float64, device=objective.device)
    parts = [total.get(name, zero).expand(shape if diagonal else ()).reshape(-1) for name, shape in shapes.items()]
    flat = objective._summed(torch.cat(parts))
    blocks = flat.split([part.numel() for part in parts])
    traces = {name: float(block.sum()) for name, block in zip(shapes, blocks, strict=True)}
    return Sums(flat if diagonal else flat.new_zeros(0), traces, backward)


def _rows_at_once(objective: Objective, one: Pass, layers: Mapping[str, list[str]], diagonal: bool) -> int:
    """How many rows of a pass fit a chunk, from what the layers hold for the first one."""
    with torch.no_grad(), _watching(objective, layers, 1, diagonal=diagonal) as calls:
        outputs = one.outputs(slice(0, 1))
    if outputs.shape[:1] != (1,):
        raise RowLayoutError(f"the model returns {tuple(outputs.shape)} for 1 row of data; rows must come first")
    numbers = sum(call.squares.numbers_a_row for call in calls) + outputs.numel() ** 2
    return max(1, min(one.rows, _CHUNK // max(1, numbers)))


def _chunk_sums(
    objective: Objective,
    one: Pass,
    cut: slice,
    layers: Mapping[str, list[str]],
    curvature: OutputCurvature | None,
    diagonal: bool,
) -> tuple[dict[str, Tensor], int]:
    passes = 0
    with torch.enable_grad(), _watching(objective, layers, cut.stop - cut.start, diagonal=diagonal) as calls:
        outputs = one.outputs(cut)
    if curvature is None:
        curvature = output_curvature(one.loss, outputs.detach())
    live = [call for call in calls if call.edge is not None]
    edges: list[Any] = [call.edge for call in live]
    if live and outputs.requires_grad:
        for vector, signs in curvature.factors(cut):
            slopes = torch.autograd.grad(
                outputs, edges, vector.to(outputs).reshape(outputs.shape), retain_graph=True, allow_unused=True
            )
            passes += 1
            for call, slope in zip(live, slopes, strict=True):
                if slope is not None:
                    call.squares.add(slope, signs)
    return {f"{call.name}.{k}".lstrip("."): v for call in live for k, v in call.squares.finish().items()}, passes


# ----- what the layers see --------------------------------------------------------------------------------------------


@dataclass
class _Call:
    name: str
    squares: Squares
    edge: GradientEdge | None


def _layers(objective: Objective) -> dict[str, list[str]]:
    """The selected parameters by the layer that owns them."""
    owners: dict[str, list[str]] = {}
    for name in objective.parameter_names:
        owner, _, local = name.rpartition(".")
        owners.setdefault(owner, []).append(local)
    return owners


@contextlib.contextmanager
def _hooked(
    objective: Objective, layers: Mapping[str, list[str]], see: Callable[[str, Tensor, Tensor], None]
) -> Iterator[None]:
    def hook(name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            see(name, args[0] if args else next(iter(kwargs.values())), output)

        return record

    handles = []
    try:
        for name in layers:
            module = objective.model.get_submodule(name)
            handles.append(module.register_forward_hook(hook(name), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _watching(
    objective: Objective, layers: Mapping[str, list[str]], rows: int, *, diagonal: bool
) -> Iterator[list[_Call]]:
    calls: list[_Call] = []

    def see(name: str, inputs: Tensor, output: Tensor) -> None:
        with torch.no_grad():
            layer = objective.model.get_submodule(name)
            found = squares(layer, inputs, rows, layers[name], diagonal=diagonal)
        # The place in the graph, not the tensor: an activation that works in place makes the tensor stand for its own result.
        calls.append(_Call(name, found, get_gradient_edge(output) if output.requires_grad else None))

    with _hooked(objective, layers, see):
        yield calls


def _recorder(found: dict[str, list[Tensor]]) -> Callable[[str, Tensor, Tensor], None]:
    def see(name: str, inputs: Tensor, output: Tensor) -> None:
        found[name] = [inputs.clone(), output.clone()]

    return see


def check_rows_apart(objective: Objective, one: Pass, layers: Mapping[str, list[str]]) -> None:
    """Two rows together and each alone must give every layer the same, the first one first.

    Raises:
        RowLayoutError: they do not; the layer is named.
    """
    seen: list[dict[str, list[Tensor]]] = []
    with torch.no_grad():
        for cut in (slice(0, 2), slice(0, 1), slice(1, 2)):
            found: dict[str, list[Tensor]] = {}
            with _hooked(objective, layers, _recorder(found)):
                found["the output"] = [one.outputs(cut)]
            seen.append(found)
    both, first, second = seen
    for name, tensors in both.items():
        for tensor, a, b in zip(tensors, first[name], second[name], strict=True):
            expected = torch.cat([a, b]) if a.dim() else a
            tolerance = 1e4 * torch.finfo(tensor.dtype).eps * float(tensor.abs().max())
            if expected.shape != tensor.shape or bool((expected - tensor).abs().max() > tolerance):
                raise RowLayoutError(
                    f"what {name!r} computes for one row depends on the other rows, or rows do not come first"
                )


# ----- the objective, seen from here ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pass:
    """Rows whose mean loss is one evaluation of ``loss``.

    Attributes:
        rows: how many.
        share: of that mean in the objective.
        outputs: what the model returns for some of the rows, as a function of the selected parameters.
        loss: the loss of all outputs together.
    """

    rows: int
    share: float
    outputs: Callable[[slice], Tensor]
    loss: Callable[[Tensor], Tensor]


def each_pass(objective: Objective) -> Iterator[Pass]:
    """The passes over the data, one for each piece; nothing is evaluated before it is asked for."""
    forward = objective._forward
    leaves = objective._leaves(None)

    def outputs_of(index: int, piece: Piece) -> Callable[[slice], Tensor]:
        def outputs(cut: slice) -> Tensor:
            return forward.logits(index, piece.cut(cut.start, cut.stop), leaves)

        return outputs

    def loss_of(index: int, piece: Piece) -> Callable[[Tensor], Tensor]:
        # In double precision where the loss can do that: the curvature at confident outputs is a small difference.
        loss_fn: Any = objective.loss_fn
        if isinstance(loss_fn, nn.Module):
            loss_fn = copy.deepcopy(loss_fn).double()
        targets = moved(cast(piece.targets, torch.float64), objective.device)

        def loss(outputs: Tensor) -> Tensor:
            with forward.evaluating(index):
                try:
                    value: Tensor = loss_fn(outputs.double(), targets)
                except RuntimeError:
                    value = forward.loss_of(outputs, piece)
            objective._finite(value, piece)
            return value

        return loss

    for index, piece, share in objective._shares():
        yield Pass(piece.rows, share, outputs_of(index, piece), loss_of(index, piece))
