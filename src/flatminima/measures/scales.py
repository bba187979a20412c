r"""Units of the weights: the diagonal :math:`T` in which a displacement :math:`\delta = T s` is measured.

Each is a flat vector ``(n,)`` in double precision, made from the present parameters of an objective.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flatminima.objective import Objective

ASAM_ETA = 0.01


def plain(objective: Objective) -> Tensor:
    """:math:`T = I`: absolute displacements."""
    return torch.ones(objective.n, dtype=torch.float64, device=objective.device)


def elementwise(objective: Objective) -> Tensor:
    r""":math:`T = |w|` for every parameter, biases included, with nothing added: relative displacements.

    Source: Kwon et al. (2021), section 3 with eta = 0.
    """
    return objective.point().double().abs()


def filterwise(objective: Objective) -> Tensor:
    r""":math:`T_{sj} = \lVert w_s \rVert_2` for row (filter) *s* of a tensor of two or more dimensions, :math:`|w|` otherwise.

    Source: Kwon et al. (2021), section 3, the filter-wise operator; Li et al. (2018) for the idea.
    """
    parts = objective.split(objective.point().double())
    return torch.cat([_rows(part).reshape(-1) for part in parts.values()])


def asam(objective: Objective, eta: float = ASAM_ETA) -> Tensor:
    r""":math:`T = |w| + \eta` for tensors of two or more dimensions, 1 for biases: what code of ASAM commonly does.

    The constant and the ones are not invariant under any rescaling. Source: the released code of Kwon et al. (2021); see
    :class:`flatminima.optim.directions.Adaptive`.
    """
    parts = objective.split(objective.point().double())
    return torch.cat(
        [(part.abs() + eta if part.dim() >= 2 else torch.ones_like(part)).reshape(-1) for part in parts.values()]
    )


def _rows(part: Tensor) -> Tensor:
    if part.dim() < 2:
        return part.abs()
    lengths: Tensor = torch.linalg.vector_norm(part.flatten(1), dim=1)
    return lengths.reshape(-1, *[1] * (part.dim() - 1)).expand_as(part)
