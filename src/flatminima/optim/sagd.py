r"""SA-GD: step along the gradient where the loss in the ball is largest, as far as projected ascent finds it.

.. math:: v_{i+1} = \Pi_{\lVert v \rVert \le \rho}\bigl(v_i + \rho\, \nabla L(w + v_i) / \lVert \nabla L(w + v_i) \rVert\bigr),
          \quad v_0 = 0, \qquad w \leftarrow \mathrm{base}\bigl(w, \nabla L(w + v_{i^*})\bigr), \quad
          i^* = \arg\max_i L(w + v_i)

The maximum over the ball is what the theory of sharpness-aware gradient descent speaks of; one step of ascent is SAM where
the loss there is not lower. For convex losses each step of ascent raises the loss. The largest one found is in
``opt.maximum``: a lower bound of the true maximum. With groups of different radii the ball is the ellipsoid
:math:`\sum_i \lVert v_i \rVert^2 / \rho_i^2 \le 1` and steps are measured in its norm.
Cost: ``steps`` + 1 gradients. Memory: the perturbation, the best gradient, the clean weights, and two copies in passing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flatminima.optim.closures import Work
from flatminima.optim.engine import Engine
from flatminima.optim.passes import Passes
from flatminima.optim.wrapper import check_rho
from flatminima.vectors import norm


def _ordinal(n: int) -> str:
    return f"{n}{'th' if n // 10 % 10 == 1 else {1: 'st', 2: 'nd', 3: 'rd'}.get(n % 10, 'th')}"


def projected_ascent(engine: Engine, passes: Passes, work: Work) -> tuple[Tensor, float | None]:
    """One step of SA-GD; the loss at the weights and the largest one found, or None where a gradient was not finite."""
    parameters = engine.weights.all()
    rho: dict[Tensor, float] = {}
    for group in engine.base.param_groups:
        check_rho(group["rho"])
        rho.update(dict.fromkeys(group["params"], float(group["rho"])))
    engine.weights.follow()
    moving = [p for p in parameters if p.requires_grad and (engine.only is None or p in engine.only)]
    radii, values = [rho[p] for p in moving], engine.weights.hold(moving, gradients=False).values
    with torch.no_grad():
        offset = [torch.zeros_like(x) for x in values]
    best: tuple[float, list[Tensor | None]] = (-math.inf, [])
    passes.remember(parameters)
    for i in range(engine.recipe.ascent + 1):
        if i == 0:
            first = loss = passes.run(work, parameters)
        else:
            engine.move(moving, values, offset)
            passes.replay()
            with passes.statistics_kept():
                loss = passes.run(work, parameters)
            engine.restore()
        found = engine.weights.with_gradients()
        gradients = engine.weights.hold(found).gradients
        length, value = norm(gradients, found), passes.ranks.mean(loss, parameters)
        if not math.isfinite(length) or not math.isfinite(value):
            reason = engine.weights.why(length) if not math.isfinite(length) else f"the loss is {value}"
            engine.skip(_ordinal(i + 1), reason, work.scaler)
            return first, None
        if value > best[0]:
            best = (value, [g.clone() if g is not None and g._is_view() else g for g in (p.grad for p in parameters)])
        if i == engine.recipe.ascent or length == 0:
            break
        with torch.no_grad():
            slopes = dict(zip(found, gradients, strict=True))
            step = [slopes.get(p, torch.zeros_like(x)) * r for p, x, r in zip(moving, offset, radii, strict=True)]
            size = norm(step, moving)
            if size == 0:
                break
            # In units of the radii the ellipsoid is a ball, and the steepest direction is rho g.
            torch._foreach_add_(offset, [x * (r / size) for x, r in zip(step, radii, strict=True)])
            inside = norm([x / r if r > 0 else x for x, r in zip(offset, radii, strict=True)], moving)
            if inside > 1:
                torch._foreach_div_(offset, inside)
    for p, g in zip(parameters, best[1], strict=True):
        p.grad = g
    engine.update(True, {}, work.scaler)
    return first, best[0]
