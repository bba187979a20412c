"""The loss over the plane through three points of parameter space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from flatminima.objective import NonFiniteLossError, Objective


@dataclass(frozen=True)
class LossPlane:
    """A grid of losses, with where the points lie on it. Coordinates are Euclidean distances in parameter space.

    Attributes:
        x, y: grid lines.
        loss: ``loss[i][j]`` at ``(x[j], y[i])``; ``None`` where it is not finite.
        points: name -> coordinates of the points, the three that span the plane first.
        distance: name -> how far each point lies off the plane; zero, up to rounding, for those three.
        cost: in gradient evaluations.
    """

    x: list[float]
    y: list[float]
    loss: list[list[float | None]]
    points: dict[str, tuple[float, float]]
    distance: dict[str, float]
    cost: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def plane_basis(points: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    r"""Orthonormal basis of the plane through three points, by Gram and Schmidt, in float64.

    .. math:: u = \theta_2 - \theta_1, \qquad
        v = (\theta_3 - \theta_1) - \frac{\langle \theta_3 - \theta_1, u\rangle}{\lVert u\rVert^2}\, u,

    both then divided by their norms.

    Raises:
        ValueError: not three vectors of one length, or on one line.

    Example:
        >>> u, v = plane_basis([torch.zeros(3), torch.tensor([2.0, 0, 0]), torch.tensor([1.0, 0, 3])])
        >>> u.tolist(), v.tolist()
        ([1.0, 0.0, 0.0], [0.0, 0.0, 1.0])
    """
    if len(points) != 3 or len({tuple(point.shape) for point in points}) != 1 or points[0].ndim != 1:
        raise ValueError(
            f"a plane needs three flat vectors of one length; got shapes {[tuple(p.shape) for p in points]}"
        )
    first, second, third = (point.double() for point in points)
    u, v = second - first, third - first
    length = u.norm()
    if length == 0:
        raise ValueError("the first two points are the same: they span no plane")
    u = u / length
    across = v - (v @ u) * u
    across = across - (across @ u) * u  # once more: what rounding left along u
    if across.norm() <= 1e-10 * v.norm() or v.norm() == 0:
        raise ValueError("the three points lie on one line: they span no plane")
    return u, across / across.norm()


def loss_plane(
    objective: Objective,
    points: Mapping[str, Tensor],
    *,
    others: Mapping[str, Tensor] | None = None,
    resolution: int = 21,
    margin: float = 0.25,
) -> LossPlane:
    """The loss on a grid of the plane through three points, such as three iterates of one training.

    Args:
        objective: the loss; two objectives, of the source's and the target's data, give two pictures of one plane.
        points: name -> parameter vector ``(n,)``, three of them, not on one line.
        others: more points, projected on the plane; how far off it they lie is told, since what the picture shows below them is
            not their loss.
        resolution: grid lines a side, at least 2.
        margin: around all points, as a part of their extent.

    Raises:
        ValueError: not three points, points on one line or of another length than the objective's.

    Cost: ``resolution**2 / 3`` gradients.

    Source: Garipov et al., "Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs", NeurIPS 2018, appendix; Cha et al.,
    "SWAD", NeurIPS 2021, figure 3.

    Example:
        >>> w = torch.nn.Linear(2, 1, bias=False).double()
        >>> f = Objective(w, torch.nn.functional.mse_loss, (2**0.5 * torch.eye(2).double(), torch.zeros(2, 1).double()))
        >>> corners = {"a": torch.zeros(2), "b": torch.tensor([1.0, 0]), "c": torch.tensor([0, 1.0])}
        >>> plane = loss_plane(f, corners, resolution=3, margin=0.0)
        >>> plane.x, [[round(value, 9) for value in row] for row in plane.loss]  # L(w) = |w|^2
        ([0.0, 0.5, 1.0], [[0.0, 0.25, 1.0], [0.25, 0.5, 1.25], [1.0, 1.25, 2.0]])
    """
    if resolution < 2 or margin < 0:
        raise ValueError(f"resolution {resolution} and margin {margin}: expected at least 2 and at least 0")
    named = {**points, **(others or {})}
    for name, point in named.items():
        if point.shape != (objective.n,):
            raise ValueError(
                f"point {name!r} has shape {tuple(point.shape)}: the objective has {objective.n} parameters"
            )
    u, v = plane_basis(list(points.values()))
    origin = next(iter(points.values())).double()
    coordinates, distance = {}, {}
    for name, point in named.items():
        offset = point.double() - origin
        a, b = float(offset @ u), float(offset @ v)
        coordinates[name], distance[name] = (a, b), float((offset - a * u - b * v).norm())
    x, y = (_lines([at[axis] for at in coordinates.values()], resolution, margin) for axis in (0, 1))
    before, dtype = objective.evaluations.gradient_equivalents, objective.point().dtype

    def at(a: float, b: float) -> float | None:
        try:
            return objective.loss((origin + a * u + b * v).to(dtype))
        except NonFiniteLossError:
            return None

    loss = [[at(a, b) for a in x] for b in y]
    spent = objective.evaluations.gradient_equivalents - before
    return LossPlane(x, y, loss, coordinates, distance, spent)


def _lines(values: Sequence[float], count: int, margin: float) -> list[float]:
    low, high = min(values), max(values)
    pad = margin * (high - low)
    lines: list[float] = torch.linspace(low - pad, high + pad, count, dtype=torch.float64).tolist()
    return lines
