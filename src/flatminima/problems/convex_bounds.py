r"""Upper bounds that stability still gives: for gradient descent, SAM, SA-GD and every method that looks within a radius.

All are for the mean :math:`\hat w` of :math:`w_1, \ldots, w_T` with
:math:`w_{t+1} = w_t - \eta\,\nabla F_S(w_t + v_t)`, :math:`\lVert v_t\rVert \le r`, full batch and without projection. The
losses must be convex, :math:`\beta`-smooth and non-negative, with one :math:`\rho`-flat :math:`w^*` common to all of them,
hence :math:`F^* = 0`, and :math:`\eta \le 1/(4\beta)`. :math:`D = \lVert w_1 - w^*\rVert`. Gradient descent is
:math:`r = 0`.

All functions take these arguments, by name:

- ``smoothness``: :math:`\beta`; ``lr``: :math:`\eta`; ``radius``: :math:`r`; ``flatness_radius``: :math:`\rho`;
- ``steps``: :math:`T`, iterates, :math:`w_1` included; ``n``: examples; ``distance``: :math:`D`;
- ``kind``: ``"paper"``, its constants; or ``"tight"``, ours, of the same proof with sharper inequalities;
- ``optimum``: :math:`F^*`, by default 0. Anything else is refused.

and raise ``ValueError`` outside of what the theorems assume.

Schliserman, Vansover-Hager and Koren (arXiv:2511.03548): Lemmas 1, 4 and 5, Theorems 2, 4, 5 and 8. The factor :math:`D^2`
in the second term of :func:`stability_bound` is missing in print (v2), and without it the bound is violated.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias, get_args

from flatminima.names import unknown
from flatminima.problems.convex_base import check_count, positive

BoundKind: TypeAlias = Literal["paper", "tight"]


def optimization_bound(
    *,
    smoothness: float,
    lr: float,
    radius: float,
    flatness_radius: float,
    steps: int,
    distance: float,
    optimum: float = 0.0,
) -> float:
    r""":math:`D^2/(\eta T) + 4\beta(r-\rho)_+^2`, for every sample (Lemma 1, Theorems 2 and 5).

    It bounds the mean of :math:`F_S(w_t + v_t)`, and :math:`F_S(\hat w)`; for SA-GD with exact maximisers also
    :math:`\max_{\lVert v\rVert\le r} F_S(\hat w + v)`.

    Example:
        >>> optimization_bound(smoothness=1, lr=0.25, radius=0.6, flatness_radius=0.1, steps=64, distance=0)
        1.0
    """
    smoothness, lr, radius, flatness_radius, distance = _checked(
        smoothness, lr, radius, flatness_radius, steps, distance, optimum
    )
    return distance**2 / (lr * int(steps)) + 4 * smoothness * max(0.0, radius - flatness_radius) ** 2


def stability_bound(
    *,
    smoothness: float,
    lr: float,
    radius: float,
    flatness_radius: float,
    steps: int,
    n: int,
    distance: float,
    kind: BoundKind = "paper",
    optimum: float = 0.0,
) -> float:
    r"""The mean squared change of :math:`\hat w` when one example is left out, for every sample (Lemma 5).

    Leaving out means that the loss of the example is zero and the sum is still divided by ``n``. ``"paper"``:

    .. math:: 24\,\eta\beta r^2 T + \frac{96\,\beta\eta T D^2 + 768\,\beta^2\eta^2T^2 (r-\rho)_+^2}{n^2}

    ``"tight"`` (ours):

    .. math:: 4e\,\eta\beta r^2 T
              + \frac{2e\,\beta\eta^2(T+2)}{n^2}\Bigl(\frac{D^2}{\eta} + 4\beta T (r-\rho)_+^2\Bigr)

    Example:
        >>> arguments = dict(smoothness=1, lr=0.25, radius=0, flatness_radius=0, steps=100, n=100, distance=1)
        >>> stability_bound(**arguments), round(stability_bound(**arguments, kind="tight"), 7)
        (0.24, 0.0138632)
    """
    beta, lr, radius, flatness_radius, distance = _checked(
        smoothness, lr, radius, flatness_radius, steps, distance, optimum, n, kind
    )
    steps, n, square, excess = int(steps), int(n), distance**2, max(0.0, radius - flatness_radius) ** 2
    if kind == "paper":
        removed = 96 * beta * lr * steps * square + 768 * (beta * lr * steps) ** 2 * excess
        return 24 * lr * beta * radius**2 * steps + removed / n**2
    removed = 2 * math.e * beta * lr**2 * (steps + 2) * (square / lr + 4 * beta * steps * excess)
    return 4 * math.e * lr * beta * radius**2 * steps + removed / n**2


def risk_bound(
    *,
    smoothness: float,
    lr: float,
    radius: float,
    flatness_radius: float,
    steps: int,
    n: int,
    distance: float,
    kind: BoundKind = "paper",
    optimum: float = 0.0,
) -> float:
    r"""The expected population risk of :math:`\hat w`: ``4 * optimization_bound + 3 * smoothness * stability_bound``.

    Theorems 4 and 8 with all constants (by Lemma 4). Compare it with the ``largest_loss`` of the problem: a larger bound is
    vacuous.

    Example:
        >>> risk_bound(smoothness=1, lr=0.25, radius=0, flatness_radius=0, steps=100, n=100, distance=1)
        0.88
    """
    return _combined(4, smoothness, lr, radius, flatness_radius, steps, n, distance, kind, optimum)


def gap_bound(
    *,
    smoothness: float,
    lr: float,
    radius: float,
    flatness_radius: float,
    steps: int,
    n: int,
    distance: float,
    kind: BoundKind = "paper",
    optimum: float = 0.0,
) -> float:
    r"""The expected gap :math:`F(\hat w) - F_S(\hat w)`: ``3 * optimization_bound + 3 * smoothness * stability_bound``.

    Ours, from the same lemma.

    Example:
        >>> gap_bound(smoothness=1, lr=0.25, radius=0, flatness_radius=0, steps=100, n=100, distance=1)
        0.84
    """
    return _combined(3, smoothness, lr, radius, flatness_radius, steps, n, distance, kind, optimum)


def _combined(
    weight: int,
    smoothness: float,
    lr: float,
    radius: float,
    flatness_radius: float,
    steps: int,
    n: int,
    distance: float,
    kind: BoundKind,
    optimum: float,
) -> float:
    optimization = optimization_bound(
        smoothness=smoothness, lr=lr, radius=radius, flatness_radius=flatness_radius, steps=steps, distance=distance,
        optimum=optimum,
    )  # fmt: skip
    stability = stability_bound(
        smoothness=smoothness, lr=lr, radius=radius, flatness_radius=flatness_radius, steps=steps, n=n,
        distance=distance, kind=kind, optimum=optimum,
    )  # fmt: skip
    return weight * optimization + 3 * float(smoothness) * stability


def _checked(
    smoothness: float,
    lr: float,
    radius: float,
    flatness_radius: float,
    steps: int,
    distance: float,
    optimum: float,
    n: int = 1,
    kind: str = "paper",
) -> tuple[float, float, float, float, float]:
    """Smoothness, step size, radius, flatness radius and distance in double precision, if the theorems assume them."""
    smoothness, lr = positive("smoothness", smoothness), positive("lr", lr)
    radius, flatness_radius, distance = (
        positive(name, value, zero=True)
        for name, value in (("radius", radius), ("flatness_radius", flatness_radius), ("distance", distance))
    )
    check_count("steps", steps)
    check_count("n", n)
    if kind not in get_args(BoundKind):
        raise ValueError(unknown("kind of bound", kind, get_args(BoundKind)))
    if optimum != 0.0:
        raise ValueError(f"optimum = {optimum}: the bounds need a common minimiser at which every loss is zero, F* = 0")
    if lr > (1 + 1e-12) / (4 * smoothness):
        raise ValueError(
            f"lr = {lr:g} is above 1 / (4 smoothness) = {1 / (4 * smoothness):g}: no bound is proved there"
        )
    return smoothness, lr, radius, flatness_radius, distance
