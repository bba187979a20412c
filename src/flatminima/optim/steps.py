"""The order of things in a step: together, each batch by itself, or without looking first. Projected ascent: ``sagd``."""

from __future__ import annotations

import contextlib
import math

from torch import Tensor

from flatminima.optim.closures import Work
from flatminima.optim.engine import Engine
from flatminima.optim.passes import Passes, weighted
from flatminima.optim.ranks import Accumulation
from flatminima.optim.scaling import unit_of


def together(engine: Engine, passes: Passes, work: Work) -> Tensor:
    """Gradient of all closures, one perturbation, gradient of all closures there."""
    parameters = engine.weights.all()
    passes.remember(parameters)
    loss = passes.run(work, parameters)
    info = engine.displace(unit_of(work.scaler))
    if info.skipped:
        engine.skip("first", info.skipped, work.scaler)
        return loss
    if info.moved:
        engine.scale_again(work.scaler)
    clean = engine.clean_gradients() if info.moved and engine.recipe.combine.needs_clean else {}
    if info.moved:
        info.close()  # or the first gradient would still be there during the second pass
        passes.replay()
        with passes.statistics_kept():
            passes.run(work, parameters)
        engine.restore()
    engine.update(info.moved, clean, work.scaler)
    return loss


def per_batch(engine: Engine, passes: Passes, work: Work) -> Tensor:
    """Each closure, and each rank, is perturbed by its own gradient; what they find there is averaged."""
    parameters = engine.weights.all()
    accumulation, losses = Accumulation(passes.ranks, parameters), []
    reason: str | None = None
    for i, (closure, weight) in enumerate(zip(work.closures, work.weights, strict=True)):
        passes.remember(parameters)
        loss, displaced, skipped = passes.ranks.look(engine, closure, parameters, work.scaler)
        losses.append(loss)
        if work.scaler is not None:
            work.scaler.forget()
        if skipped:
            # This rank still takes part in the second pass, or the others would wait for it; they learn of it by the average.
            reason, weight = reason or skipped, math.nan
        passes.replay()
        with displaced, passes.statistics_kept():
            accumulation.evaluate(closure, weight, work.scaler, last=i == len(work.closures) - 1)
    engine.update(True, {}, work.scaler, failed=reason)
    return weighted(losses, work.weights) if len(losses) > 1 else losses[0]


def blind(engine: Engine, passes: Passes, work: Work) -> Tensor:
    """Perturbations that need no gradient at the weights: one evaluation for each draw."""
    parameters, draws = engine.weights.all(), engine.recipe.draws
    if draws == 1:
        engine.displace(unit_of(work.scaler)).close()
        loss = passes.run(work, parameters)
        engine.restore()
        engine.update(True, {}, work.scaler)
        return loss
    passes.remember(parameters)
    weights = [weight / draws for weight in work.weights]
    accumulation, losses = Accumulation(passes.ranks, parameters), []
    for draw in range(draws):
        engine.displace(unit_of(work.scaler), draw).close()
        if draw > 0:
            passes.replay()
        with passes.statistics_kept() if draw > 0 else contextlib.nullcontext():
            for i, (closure, weight) in enumerate(zip(work.closures, weights, strict=True)):
                last = draw == draws - 1 and i == len(work.closures) - 1
                losses.append(accumulation.evaluate(closure, weight, work.scaler, last))
        engine.restore()
    engine.update(True, {}, work.scaler)
    return weighted(losses, weights * draws)
