r"""Diagonal and trace of the Hessian without probes, where the output is affine in every single weight.

In a network of linear maps and maps that are linear on pieces (ReLU, max-pooling), with every weight used once on the way
from input to output, the output is affine in each weight taken alone. Its second derivative in that weight is zero, and only
the Gauss-Newton part of the Hessian is left on the diagonal. With :math:`H_i = \sum_k s_{ik} r_{ik} r_{ik}^\top` the Hessian of
the loss in the outputs of row *i*,

.. math:: \mathrm{diag}(H)_j = \sum_i \sum_k s_{ik} \bigl(J_i^\top r_{ik}\bigr)_j^2 .

That is one backward pass for each of the at most *K* factors, and no sampling error.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from flatminima.batches import ObjectiveError, Piece, cast
from flatminima.curvature.affine_in_weights import why_not_affine
from flatminima.curvature.diagonal import DiagonalResult
from flatminima.curvature.output_curvature import CoupledRowsError
from flatminima.curvature.per_sample import RowLayoutError
from flatminima.curvature.row_squares import Sums, sums
from flatminima.curvature.trace import TraceResult
from flatminima.objective import LossFn, Objective

_PROOF_ROWS = 8
_PROOF_COORDINATES = 24
_FEW_OUTPUTS = 100  # a row; beyond, probes are cheaper


class NotAffineError(ObjectiveError):
    """Diagonal and trace of this Hessian are not those of the Gauss-Newton matrix; the message names the cause."""


def why_not(objective: Objective) -> str | None:
    """Why :func:`exact_diagonal` and :func:`exact_trace` do not apply, in words; ``None`` if they do.

    The torch.fx graph of the model is compared with a list of layers and operations, of which only those count that depend on a
    selected parameter: a frozen trunk may be anything. Refused are smooth activations, normalisation by the layer's own values,
    attention, products of two results that depend on the weights, weights that are used twice, parameters outside the layers of
    torch.nn, and whatever torch.fx cannot follow. Cost: none.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.GELU(), torch.nn.Linear(3, 1))
        >>> data = torch.randn(4, 2), torch.randn(4, 1)
        >>> why_not(Objective(net, torch.nn.functional.mse_loss, data))
        "smooth activation: nn.GELU at '1'"
        >>> why_not(Objective(net, torch.nn.functional.mse_loss, data).restricted(["2.weight"])) is None
        True
    """
    if objective.loss_fn is None:
        return "the model computes its own loss (loss_fn=None)"
    if objective.device.type == "mps":
        return "the device has no double precision"
    parameters = objective.split(objective.point())
    names = {name: p for name, p in objective.model.named_parameters() if name in parameters}
    return why_not_affine(objective.model, names, objective._pieces.first().inputs, objective.mode == "train")


def exact_diagonal(objective: Objective, *, prove: bool = True) -> DiagonalResult:
    r"""Diagonal of the Hessian, exact to rounding, of a network whose output is affine in each weight.

    .. math:: \mathrm{diag}(H)_j = \sum_i \sum_k s_{ik} \bigl(J_i^\top r_{ik}\bigr)_j^2, \qquad
        \nabla^2_{\mathrm{out}} \ell_i = \sum_k s_{ik}\, r_{ik} r_{ik}^\top

    Args:
        objective: ``why_not(objective)`` must be ``None``; any twice differentiable loss that is a mean over rows.
        prove: compare a few entries with Hessian products, in double precision on a few rows.

    Returns:
        The diagonal ``(n,)`` in float64, its errors those of rounding.

    Raises:
        NotAffineError: it does not apply, or the proof failed.

    Cost: one forward pass, and one backward pass for each factor of the loss's curvature: classes - 1 for cross entropy,
    otherwise at most the number of outputs. Memory: the graph of one piece, and 64 MiB in single precision.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False)).double()
        >>> data = torch.tensor([[3.0, 0.0], [0.0, 1.0]]).double(), torch.zeros(2, 1).double()
        >>> exact_diagonal(Objective(net, torch.nn.functional.mse_loss, data)).values.tolist()   # H = x'x = diag(9, 1)
        [9.0, 1.0]
    """
    found = exact_sums(objective, prove=prove)
    rounding = _rounding(objective)
    return DiagonalResult(
        values=found.diagonal.cpu(),
        errors=(rounding * found.diagonal.abs()).cpu(),
        **_common(objective, found),
    )


def exact_trace(objective: Objective, *, prove: bool = True) -> TraceResult:
    r"""Trace of the Hessian, exact to rounding, of a network whose output is affine in each weight.

    As :func:`exact_diagonal`, but the squares are summed before they are formed where that is cheaper: for a dense layer
    :math:`\|g_i a_i^\top\|^2 = \|g_i\|^2 \|a_i\|^2`. In a ReLU network with cross entropy this is
    :math:`\sum_l \mathrm{mean}_i (\|a_{l-1,i}\|^2 + 1) \bigl[\sum_c p_c \|B_{l,c}\|^2 - \|\sum_c p_c B_{l,c}\|^2\bigr]` with
    :math:`B_l` the derivatives of the logits in the pre-activations.

    Arguments, errors and cost as there.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False)).double()
        >>> data = torch.tensor([[3.0, 0.0], [0.0, 1.0]]).double(), torch.zeros(2, 1).double()
        >>> found = exact_trace(Objective(net, torch.nn.functional.mse_loss, data))
        >>> found.value, found.method
        (10.0, 'exact')
    """
    found = exact_sums(objective, diagonal=False, prove=prove)
    error = _rounding(objective) * sum(abs(value) for value in found.traces.values())
    return TraceResult(
        value=found.trace,
        error=error,
        interval=(found.trace - 2 * error, found.trace + 2 * error),
        method="exact",
        probes=0,
        deflated=0,
        rtol=0.0,
        **_common(objective, found),
    )


def trace_if_exact(objective: Objective) -> TraceResult | None:
    """:func:`exact_trace` where it applies and is cheap, else ``None``; its proof finds out what the graph cannot show.

    Not cheap: many outputs a row, each of which costs a backward pass. Not decided by one of several processes alone.
    """
    if objective.process_group is not None or objective.second_order == "finite-difference":
        return None
    if why_not(objective) is not None or _outputs(objective) > _FEW_OUTPUTS:
        return None
    try:
        objective.verify()
        return exact_trace(objective)
    except ObjectiveError:
        return None


def _outputs(objective: Objective) -> int:
    """Numbers that the model returns a row."""
    piece = objective._few(objective._pieces.first())
    with torch.no_grad():
        output = objective._forward.logits(0, piece, objective._values(None))
    return output[0].numel() if output.dim() else 1


def _rounding(objective: Objective) -> float:
    # Activations and slopes carry the error of a product through the layers; their squares twice that. What products lose near
    # a loss of zero is not lost here: the curvature of the softmax is in closed form.
    return max(8 * float(torch.finfo(objective.dtype).eps), 2 * objective.pass_rounding)


def _common(objective: Objective, found: Sums) -> dict[str, Any]:
    return {
        "converged": True,
        "products": 0,
        "gradient_equivalents": found.gradient_equivalents,
        "seed": objective.seed,
        "notes": (*objective.notes, "exact: the output is affine in each weight"),
    }


def exact_sums(objective: Objective, *, diagonal: bool = True, prove: bool = True) -> Sums:
    """What :func:`exact_diagonal` and :func:`exact_trace` are made of.

    Raises:
        NotAffineError: :func:`why_not` has a reason, or the rows cannot be told apart, or the proof failed.
    """
    reason = why_not(objective)
    if reason is not None:
        raise NotAffineError(
            f"the exact diagonal does not apply: {reason}; estimate it with diagonal(...) or trace(...)"
        )
    try:
        found = sums(objective, diagonal=diagonal)
    except (CoupledRowsError, RowLayoutError) as error:
        raise NotAffineError(
            f"the exact diagonal does not apply: {error}; estimate it with diagonal(...) or trace(...)"
        ) from error
    objective.evaluations.passes += found.gradient_equivalents
    if prove:
        _prove(objective)
    return found


# ----- the proof ------------------------------------------------------------------------------------------------------


def _prove(objective: Objective) -> None:
    """Compare a few diagonal entries with Hessian products, in double precision on a few rows.

    Large outputs are divided by their size: near a loss of zero the products are nothing but rounding, and whether the outputs
    are affine in each weight has nothing to do with how the loss curves there.

    Raises:
        NotAffineError: they differ.
    """
    index, piece, _ = next(iter(objective._shares()))
    few = piece.cut(0, min(_PROOF_ROWS, piece.rows))
    chosen = set(objective.parameter_names)
    for dtype in (torch.float64, objective.dtype):
        twin = objective.to_dtype(dtype)
        loss_fn = _tempered(twin, index, few)
        small = Objective(
            twin.model,
            loss_fn,
            [(cast(few.inputs, dtype), cast(few.targets, dtype))],
            parameters=lambda name, _: name in chosen,
            mode=objective.mode,
            micro_batch=few.rows,
            second_order="graph",
            weight="rows",
            seed=objective.seed + index,
            check=False,
        )
        try:
            expected = sums(small).diagonal
            where = _coordinates(small, expected)
            units = torch.zeros(small.n, len(where), dtype=dtype, device=small.device)
            units[where, range(len(where))] = 1.0
            found = small.hvp(units)[where, range(len(where))].double()
            break
        except RuntimeError:
            if dtype == objective.dtype:
                raise
    tolerance = 1e6 * torch.finfo(dtype).eps * float(expected.abs().max())
    gaps = (found - expected[where]).abs()
    if bool((gaps > tolerance).any()):
        worst = int(gaps.argmax())
        raise NotAffineError(
            f"the proof failed: on {few.rows} rows, the diagonal entry {where[worst]} of the Hessian is "
            f"{float(found[worst]):.6g}, that of the Gauss-Newton matrix {float(expected[where[worst]]):.6g}; estimate it with "
            "diagonal(...) or trace(...)"
        )


def _tempered(objective: Objective, index: int, piece: Piece) -> LossFn | None:
    """The loss of the outputs divided by their largest size, where that is above 1."""
    loss_fn, cut = objective.loss_fn, objective._in_dtype(piece, objective.dtype)
    with torch.no_grad():
        largest = float(objective._forward.logits(index, cut, objective._values(None)).abs().max())
    if loss_fn is None or not 1 < largest < math.inf:
        return loss_fn
    return lambda output, target: loss_fn(output / largest, target)


def _coordinates(objective: Objective, diagonal: torch.Tensor) -> list[int]:
    """The largest entries of a few parameters, and random ones among those that are not zero."""
    generator = torch.Generator().manual_seed(objective.seed)
    offsets = torch.tensor([0, *objective._sizes]).cumsum(0)[:-1].tolist()
    largest = [
        offset + int(part.abs().argmax())
        for offset, part in zip(offsets, diagonal.split(objective._sizes), strict=True)
        if part.numel()
    ]
    half = _PROOF_COORDINATES // 2
    picked = [largest[i] for i in torch.randperm(len(largest), generator=generator)[:half].tolist()]
    live = diagonal.nonzero()[:, 0]
    picked += live[torch.randint(max(1, len(live)), (half,), generator=generator)].tolist() if len(live) else []
    return sorted(set(picked))
