r"""Sharpness of the function whose logits are divided by their spread: growing logits alone no longer make it flat.

With cross entropy a large margin makes every derivative small, so that sharpness follows the scale of the logits. Dividing
the logits of each row by their standard deviation over the classes removes that scale.
"""

from __future__ import annotations

from torch import Tensor

from flatminima.measures import scales
from flatminima.measures.base import Measurement, NotApplicableError, Workbench, register
from flatminima.measures.invariance import CHANGES_DISTANCES, CHANGES_RATIOS, KEEPS_DISTANCES, KEEPS_RATIOS, NEARLY
from flatminima.measures.log_probabilities import logit_loss
from flatminima.measures.outputs import class_axis, few_rows
from flatminima.measures.sharpness import Ball, average, worst
from flatminima.objective import NonFiniteLossError, Objective


def why_not_normalised(objective: Objective) -> str | None:
    """Why logits cannot be normalised, or ``None``."""
    try:
        class_axis(*few_rows(objective))
        logit_loss(objective)
    except NotApplicableError as error:
        return str(error)
    return None


def logit_normalised(objective: Objective) -> Objective:
    r"""The objective with logits :math:`f / \sqrt{\frac1K \sum_k (f_k - \bar f)^2}`, row by row (position by position).

    Log-probabilities are logits too, up to a constant that leaves their spread alone: a model that ends in a log-softmax, for
    the negative log-likelihood, has the numbers of its logits with cross entropy. Rows whose logits are all equal have no
    spread, and are refused. Source: Andriushchenko et al., "A Modern Look at the Relationship between Sharpness and
    Generalization" (2023), section 3.

    Raises:
        NotApplicableError: there are no logits, or a row without spread.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(2, 3).double()
        >>> data = torch.randn(4, 2).double(), torch.tensor([0, 1, 2, 0])
        >>> f = Objective(net, torch.nn.functional.cross_entropy, data)
        >>> g = logit_normalised(f)
        >>> abs(g.loss(f.point()) - g.loss(10 * f.point())) < 1e-5
        True
    """
    axis = class_axis(*few_rows(objective))
    loss_fn = logit_loss(objective)

    def normalised_loss(output: Tensor, target: Tensor) -> Tensor:
        spread = output.std(dim=axis, correction=0, keepdim=True)
        return loss_fn(output / spread, target)

    twin = objective.with_loss(normalised_loss)
    try:
        twin.loss()
    except NonFiniteLossError as error:
        raise NotApplicableError(
            f"the logits of a row are all equal, and have no spread to divide by ({error})"
        ) from error
    return twin


def _twin(bench: Workbench) -> Objective:
    return bench.shared("logit normalised", lambda: bench.adopt(logit_normalised(bench.objective)))


@register(
    "logit_normalised_sharpness",
    "logit-normalised SAM sharpness",
    "SAM sharpness of the function with its logits divided by their spread; a lower bound of the true maximum.",
    invariant_under=KEEPS_DISTANCES,
    changes_under=CHANGES_DISTANCES,
    applies=why_not_normalised,
    repair=("logit_normalised_adaptive_sharpness",),
)
def logit_normalised_sharpness(bench: Workbench) -> Measurement:
    r""":math:`\max_{\lVert\delta\rVert_2 \le \rho} \tilde L(w+\delta) - \tilde L(w)` with normalised logits, from below.

    Source: Andriushchenko et al. (2023), section 3. Cost: up to 2 * ascent_steps gradients.
    """
    twin = _twin(bench)
    return worst("logit_normalised_sharpness", bench, Ball(scales.plain(twin), bench.options.rho), twin)


@register(
    "logit_normalised_average_sharpness",
    "average-case logit-normalised sharpness",
    "Average-case sharpness of the function with its logits divided by their spread.",
    invariant_under=KEEPS_DISTANCES,
    changes_under=CHANGES_DISTANCES,
    applies=why_not_normalised,
    repair=("logit_normalised_adaptive_sharpness",),
)
def logit_normalised_average_sharpness(bench: Workbench) -> Measurement:
    r""":math:`\mathbb{E}_u[\tilde L(w+\gamma u)] - \tilde L(w)` with normalised logits, *u* uniform on the unit sphere.

    Source: Andriushchenko et al. (2023), section 3. Cost: 2/3 gradient a pair.
    """
    twin = _twin(bench)
    return average("logit_normalised_average_sharpness", bench, Ball(scales.plain(twin), bench.options.radius), twin)


@register(
    "logit_normalised_adaptive_sharpness",
    "logit-normalised adaptive sharpness",
    "Elementwise-adaptive sharpness of the function with its logits divided by their spread; it ignores the temperature too.",
    invariant_under=KEEPS_RATIOS | {"temperature"},
    almost_under=NEARLY,
    changes_under=CHANGES_RATIOS - {"temperature"},
    applies=why_not_normalised,
)
def logit_normalised_adaptive_sharpness(bench: Workbench) -> Measurement:
    r""":math:`\max_{\lVert\delta/|w|\rVert_2 \le \rho} \tilde L(w+\delta) - \tilde L(w)` with normalised logits, from below.

    Source: Andriushchenko et al. (2023), section 3. Cost: up to 2 * ascent_steps gradients.
    """
    twin = _twin(bench)
    ball = Ball(scales.elementwise(twin), bench.options.adaptive_rho)
    return worst("logit_normalised_adaptive_sharpness", bench, ball, twin)
