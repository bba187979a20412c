"""Local flatness: how the loss rises, on average, at a fixed distance in a random direction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from flatminima.objective import NonFiniteLossError, Objective


@dataclass(frozen=True)
class LocalFlatness:
    """The rise of the loss at each distance, and what is needed to read it.

    Attributes:
        radii: distances, in units of the Euclidean norm of all parameters.
        rise: mean rise of the loss at each; infinite where a displaced loss was not finite.
        error: standard error of each mean, over pairs of directions; ``None`` where there is none.
        loss: at the centre.
        norm: Euclidean norm of the parameters. The rise is not invariant under rescaling: compare networks of like norms.
        pairs: pairs of opposite directions.
        cost: in gradient evaluations.
    """

    radii: tuple[float, ...]
    rise: tuple[float, ...]
    error: tuple[float | None, ...]
    loss: float
    norm: float
    pairs: int
    cost: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON; an infinite rise becomes ``None``."""
        return asdict(self) | {"rise": [value if math.isfinite(value) else None for value in self.rise]}


def local_flatness(objective: Objective, radii: Sequence[float], *, pairs: int = 50, seed: int = 0) -> LocalFlatness:
    r"""Local flatness at several distances.

    .. math:: F_\gamma(\theta) = \mathbb{E}_u\, L(\theta + \gamma u) - L(\theta), \qquad u \sim \mathrm{Uniform}(S^{n-1})

    with *u* on the unit sphere of the whole parameter vector. Directions come in pairs *u*, *-u*, which cancels the odd orders
    of the loss without bias, and are the same for every radius, and for every network of one size and seed: differences
    between networks are then known better than the values. To second order
    :math:`F_\gamma = \gamma^2 \operatorname{tr} H / 2n`.

    Args:
        objective: the loss; its data decide whether it is the source's or the target's flatness.
        radii: distances, positive and finite.
        pairs: of directions, at least 2.
        seed: of the directions.

    Raises:
        ValueError: a radius or number outside its range.

    Cost: 2/3 gradient per radius and pair, and one loss.

    Source: Cha et al., "SWAD: Domain Generalization by Seeking Flat Minima", NeurIPS 2021, section 4.3 (a displacement of
    length gamma, as its code has it).

    Example:
        >>> w = torch.nn.Linear(3, 1, bias=False).double()
        >>> f = Objective(w, torch.nn.functional.mse_loss, (torch.eye(3).double() * 3**0.5, w.weight.detach().T * 3**0.5))
        >>> [round(rise, 6) for rise in local_flatness(f, [0.1, 1.0], pairs=2).rise]  # L(w) = |w - w*|^2
        [0.01, 1.0]
    """
    if not radii or not all(math.isfinite(radius) and radius > 0 for radius in radii):
        raise ValueError(f"radii are {list(radii)}: expected at least one, all positive and finite")
    if pairs < 2:
        raise ValueError(f"pairs is {pairs}: expected at least 2, so that there is a standard error")
    before = objective.evaluations.gradient_equivalents
    centre, start = objective.point(), objective.loss()
    generator = torch.Generator().manual_seed(seed)
    rises = torch.empty(len(radii), pairs, dtype=torch.float64)
    for pair in range(pairs):
        direction = torch.randn(objective.n, dtype=torch.float64, generator=generator)
        direction = (direction / direction.norm()).to(centre.device)
        for row, radius in enumerate(radii):
            step = (radius * direction).to(centre.dtype)
            try:
                rises[row, pair] = (objective.loss(centre + step) + objective.loss(centre - step)) / 2 - start
            except NonFiniteLossError:
                rises[row, pair] = math.inf
    means = rises.mean(1).tolist()
    errors = (rises.std(1) / math.sqrt(pairs)).tolist()
    return LocalFlatness(
        radii=tuple(map(float, radii)),
        rise=tuple(means),
        error=tuple(error if math.isfinite(error) else None for error in errors),
        loss=start,
        norm=float(centre.double().norm()),
        pairs=pairs,
        cost=objective.evaluations.gradient_equivalents - before,
    )
