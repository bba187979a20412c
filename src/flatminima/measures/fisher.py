"""The Fisher-Rao norm: how fast the predictions change when all weights grow together."""

from __future__ import annotations

from flatminima.measures.base import Measurement, NotApplicableError, Workbench, register
from flatminima.measures.hessian import quadratic_form
from flatminima.measures.invariance import CHANGES_RAY, KEEPS_RAY, NEARLY
from flatminima.measures.log_probabilities import logit_loss
from flatminima.measures.outputs import few_rows
from flatminima.objective import Objective


def _why_not(objective: Objective) -> str | None:
    try:
        if objective.process_group is None:  # products add up over processes
            few_rows(objective)
        if objective.loss_fn is not None:
            logit_loss(objective)
    except NotApplicableError as error:
        return str(error)
    return None


@register(
    "fisher_rao",
    "Fisher-Rao norm",
    "Curvature of the loss along the change of the outputs when all weights grow together; never negative.",
    invariant_under=KEEPS_RAY,
    almost_under=NEARLY,
    changes_under=CHANGES_RAY,
    applies=_why_not,
)
def fisher_rao(bench: Workbench) -> Measurement:
    r"""Fisher-Rao norm (squared) :math:`w^\top F w = \mathbb{E}_i[(J_i w)^\top H_{out,i} (J_i w)]`.

    :math:`J_i` is the Jacobian of the outputs of row *i*, :math:`H_{out,i}` the Hessian of the loss in them. For cross
    entropy and squared error that is the Fisher matrix of the predictions; for another loss it is the Gauss-Newton matrix. A
    model that returns log-probabilities for the negative log-likelihood has the number of its logits with cross entropy
    (:func:`~flatminima.measures.log_probabilities.logit_loss`). In double precision; the error is rounding. Source: Liang,
    Poggio, Rakhlin and Stokes (2019). Cost: 2 gradients and a third.
    """
    precise = bench.precise
    if precise.loss_fn is not None:
        loss_fn = logit_loss(precise)
        if loss_fn is not precise.loss_fn:
            precise = bench.adopt(precise.with_loss(loss_fn))
    return quadratic_form("fisher_rao", precise, precise.ggnvp(precise.point()))
