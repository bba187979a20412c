"""Margins: by how much the logit of the right class beats the best of the others."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flatminima.measures.base import Measurement, NotApplicableError, Workbench, register
from flatminima.measures.invariance import FUNCTION_PRESERVING, NEARLY
from flatminima.measures.norms import CHANGES_SPECTRUM, KEEPS_SPECTRUM, spectral_product_of, why_no_matrices
from flatminima.measures.outputs import class_axis, few_rows, forward, forward_rounding
from flatminima.objective import Objective

_KEEPS = FUNCTION_PRESERVING - NEARLY
_CHANGES = frozenset({"temperature"})


def why_no_margins(objective: Objective) -> str | None:
    """Why the rows have no margins, or ``None``. Cost: one forward pass of one row."""
    try:
        _rows(objective, *few_rows(objective))
    except NotApplicableError as error:
        return str(error)
    return None


def margins(objective: Objective) -> Tensor:
    r"""Margins :math:`f_y(x_i) - \max_{c \ne y} f_c(x_i)` of all targets, float64 on the CPU, in the order of the data.

    Outputs are ``(rows, classes)``, ``(rows, classes, ...)`` as cross entropy takes them, or ``(rows, ..., classes)``;
    targets equal to the loss's ``ignore_index`` (-100) are left out. A single output under binary cross entropy with
    logits has the margin :math:`(2y - 1) f`, the same as two classes with logits :math:`(0, f)`.

    Raises:
        NotApplicableError: the targets are not classes, or there is only one class.

    Cost: 1/3 gradient.

    Example:
        >>> net = torch.nn.Linear(2, 2, bias=False)
        >>> _ = net.weight.data.copy_(torch.eye(2))
        >>> data = torch.tensor([[3.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 0])
        >>> f = Objective(net, torch.nn.functional.cross_entropy, data)
        >>> margins(f).tolist()
        [2.0, -1.0]
    """
    _rows(objective, *few_rows(objective))
    ignored = getattr(objective.loss_fn, "ignore_index", -100)
    found = []
    for seen in forward(objective):
        outputs, targets = _rows(objective, seen.outputs, seen.targets)
        keep = targets != ignored
        outputs, targets = outputs[keep].double(), targets[keep]
        right = outputs.gather(1, targets[:, None])[:, 0]
        others = outputs.scatter(1, targets[:, None], -torch.inf).amax(1)
        found.append((right - others).cpu())
    return torch.cat(found)


def _rows(objective: Objective, outputs: Tensor, targets: Any) -> tuple[Tensor, Tensor]:
    """Logits ``(targets, classes)`` and classes ``(targets,)``."""
    if isinstance(targets, Tensor):
        targets = targets.to(outputs.device)
    loss_fn = objective.loss_fn
    if loss_fn is F.binary_cross_entropy_with_logits or isinstance(loss_fn, nn.BCEWithLogitsLoss):
        if outputs.shape[1:].numel() != 1 or not bool(((targets == 0) | (targets == 1)).all()):
            raise NotApplicableError("binary cross entropy of several outputs, or of soft targets, has no margin")
        flat = outputs.reshape(-1, 1)
        return torch.cat([torch.zeros_like(flat), flat], 1), targets.reshape(-1).long()
    if isinstance(targets, Tensor) and (targets.is_floating_point() or targets.is_complex()):
        raise NotApplicableError(f"the targets are not classes: {targets.dtype}")
    outputs = outputs.movedim(class_axis(outputs, targets), -1)
    return outputs.reshape(-1, outputs.shape[-1]), targets.reshape(-1).long()


def _measured(name: str, bench: Workbench, quantile: float) -> Measurement:
    found = bench.shared("margins", lambda: margins(bench.objective))
    if not len(found):
        raise NotApplicableError("every target is ignored")
    value = float(np.quantile(found.numpy(), quantile))
    error = forward_rounding(bench.objective) * float(found.abs().max())
    share = float((found > 0).double().mean())
    return Measurement(
        name, value, error, "rounding", True, note=f"of {len(found)} targets, {100 * share:.4g} % predicted rightly"
    )


@register(
    "minimum_margin",
    "smallest margin",
    "By how much the right logit beats the best other one on the worst row; negative where a row is predicted wrongly.",
    flatter_when=None,
    invariant_under=_KEEPS,
    almost_under=NEARLY,
    changes_under=_CHANGES,
    cost_class="cheap",
    applies=why_no_margins,
)
def minimum_margin(bench: Workbench) -> Measurement:
    r""":math:`\min_i f_y(x_i) - \max_{c \ne y} f_c(x_i)`. Cost: 1/3 gradient, shared by all margins."""
    return _measured("minimum_margin", bench, 0.0)


@register(
    "margin_quantile",
    "10 % quantile of the margins",
    "A tenth of the rows have a smaller margin; less at the mercy of one row than the smallest.",
    flatter_when=None,
    invariant_under=_KEEPS,
    almost_under=NEARLY,
    changes_under=_CHANGES,
    cost_class="cheap",
    applies=why_no_margins,
)
def margin_quantile(bench: Workbench) -> Measurement:
    """The ``margin_quantile`` of the margins, interpolated linearly between order statistics. Cost: 1/3 gradient, shared."""
    return _measured("margin_quantile", bench, bench.options.margin_quantile)


@register(
    "median_margin",
    "median margin",
    "By how much the right logit beats the best other one on a typical row.",
    flatter_when=None,
    invariant_under=_KEEPS,
    almost_under=NEARLY,
    changes_under=_CHANGES,
    cost_class="cheap",
    applies=why_no_margins,
)
def median_margin(bench: Workbench) -> Measurement:
    """The median of the margins. Cost: 1/3 gradient, shared."""
    return _measured("median_margin", bench, 0.5)


@register(
    "normalised_margin",
    "spectrally normalised margin",
    "The 10 % quantile of the margins over the product of the layers' spectral norms.",
    flatter_when=None,
    invariant_under=KEEPS_SPECTRUM | {"temperature"},
    changes_under=CHANGES_SPECTRUM - {"temperature"},
    cost_class="cheap",
    applies=lambda objective: why_no_margins(objective) or why_no_matrices(objective),
)
def normalised_margin(bench: Workbench) -> Measurement:
    r"""Margin quantile :math:`/ \prod_l \lVert W_l \rVert_2`.

    Source: Bartlett, Foster and Telgarsky (2017), without the factor of the (2,1)-norms; Jiang et al. (2019) for the
        quantile.
    Cost: 1/3 gradient, shared, and one singular value decomposition a layer.
    """
    margin = _measured("normalised_margin", bench, bench.options.margin_quantile)
    product = spectral_product_of(bench.objective)
    if product.value == 0:
        raise NotApplicableError("the spectral product is zero: a layer vanishes")
    value = margin.value / product.value
    error = (margin.error or 0.0) / product.value + abs(value) * product.relative_error
    return Measurement("normalised_margin", value, error, "rounding", True, note=margin.note)
