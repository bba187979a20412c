"""Rescaled copies of trained networks, and everything that is measured on each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flatminima.curvature.piecewise_linear import exact_diagonal
from flatminima.measures import MEASURES, MeasureOptions, measure
from flatminima.measures.weakness import features, pair_proxy, patterns
from flatminima.objective import Objective
from flatminima.protocols.small_data import SmallData, train_small
from flatminima.symmetries import Member, Rescaling, find_symmetries

BETAS = (1.0, 2.0, 5.0, 10.0, 20.0)
GAMMAS = (1.0, 5.0, 20.0)
CURVE = tuple(float(f"{0.5 * 60.0 ** (i / 40):.4g}") for i in range(41))  # of beta, from 0.5 to 30
HIDDEN = (256, 128)
NARROW = (64, 8)  # whose eight features leave the pair proxy something to say

#: Measures looked at on every copy, where this version registers them.
MEASURED = (
    "parameter_norm", "w_hessian_w", "adaptive_sharpness", "adaptive_trace", "fisher_rao", "orbit_minimal_trace",
)  # fmt: skip
LAYER_RESCALING, UNIT_RESCALING, PERMUTATION = "relu-layer-rescaling", "relu-unit-rescaling", "unit-permutation"

_EXAMPLES = 8  # rows on which symmetries are found and proved
_ASCENT_STEPS = 10


@dataclass(frozen=True)
class Regime:
    """One network of the source's experiment: a seed and how it was trained."""

    name: str
    seed: int
    batch_size: int
    lr: float


#: The four networks whose trace the source re-estimates, at n = 500: two of small batches, two of one batch.
REGIMES = (
    Regime("small batch, seed 0", 0, 64, 0.05),
    Regime("small batch, seed 5", 5, 64, 0.05),
    Regime("large batch, seed 100", 100, 500, 0.5),
    Regime("large batch, seed 105", 105, 500, 0.5),
)


def layer_sites(model: nn.Module, x: Tensor) -> tuple[Rescaling, ...]:
    """The hidden layers that can be rescaled, first to last, as found in the model and proved."""
    found = find_symmetries(model, x[:_EXAMPLES], kinds=[LAYER_RESCALING]).found
    return tuple(place for symmetry in found for place in symmetry.places if isinstance(place, Rescaling))


def layer_rescalings(sites: Sequence[Rescaling], scales: Sequence[float]) -> Member:
    """The map that multiplies hidden layer *l* (weights and bias) by ``scales[l]`` and divides what reads it."""
    actions = [
        action
        for site, scale in zip(sites, scales, strict=True)
        for action in site.actions(torch.full((site.units,), scale, dtype=torch.float64))
    ]
    return Member(LAYER_RESCALING, f"hidden layers times {', '.join(f'{s:g}' for s in scales)}", tuple(actions))


def random_members(model: nn.Module, x: Tensor, seed: int) -> Iterator[tuple[str, Member]]:
    """One random rescaling of single units in [1/20, 20], and one permutation of units."""
    for symmetry in find_symmetries(model, x[:_EXAMPLES], kinds=[UNIT_RESCALING, PERMUTATION]).found:
        yield symmetry.kind, symmetry.member(torch.Generator().manual_seed(seed))


def rescaled(
    regime: Regime, data: SmallData, probes: int, progress: Callable[[float], None] | None = None
) -> dict[str, Any]:
    """Train one network and measure all of its copies over beta and gamma.

    Args:
        regime: of the training.
        data: training rows, and unseen rows for predictions and patterns.
        probes: unseen rows for the pair proxy, which on 128 features is measured on one copy, at the largest scales.
        progress: called with the fraction that is done.
    """
    trained = train_small(data, HIDDEN, seed=regime.seed, batch_size=regime.batch_size, lr=regime.lr)
    model, x, unseen = trained.model.double(), data.x.double(), data.probes.double()
    blocks, sites = _trace_by_tensor(model, x, data.y), layer_sites(model, x)
    base = _function(model, unseen)
    record: dict[str, Any] = {
        **asdict(regime), "epochs": trained.epochs, "accuracy": trained.accuracy, "trace": sum(blocks.values()),
        "test_accuracy": float((base.argmax(1) == data.probe_labels).double().mean()), "blocks": blocks, "copies": [],
    }  # fmt: skip
    first = _decisions(model, data, probes)
    for i, (beta, gamma) in enumerate((b, g) for b in BETAS for g in GAMMAS):
        copy = layer_rescalings(sites, (beta, gamma)).apply(model)
        entry = {"beta": beta, "gamma": gamma, **_measured(copy, x, data.y)}
        entry |= _compared(base, _function(copy, unseen))
        entry |= {"patterns": _patterns(copy, unseen), "predicted": predicted_trace(blocks, beta, gamma)}
        entry["pairs"] = None
        if (beta, gamma) == (BETAS[-1], GAMMAS[-1]):
            entry["pairs"] = _pairs(first, _decisions(copy, data, probes))
        record["copies"].append(entry)
        if progress is not None:
            progress((i + 1) / (len(BETAS) * len(GAMMAS)))
    record["curve"] = {
        "beta": list(CURVE), "gamma": {f"{g:g}": [predicted_trace(blocks, b, g) for b in CURVE] for g in GAMMAS}
    }  # fmt: skip
    record["least"] = _least(model, x, data.y, blocks, sites)
    return record


def narrow(seed: int, data: SmallData, progress: Callable[[float], None] | None = None) -> dict[str, Any]:
    """The pair proxy of a network with eight features, over the same grid, single units and permutations."""
    trained = train_small(data, NARROW, seed=seed)
    model, x = trained.model.double(), data.x.double()
    sites = layer_sites(model, x)
    first = _decisions(model, data, len(data.probes))
    maps = [
        (f"β = {b:g}, γ = {g:g}", layer_rescalings(sites, (b, g)))
        for b in BETAS
        for g in GAMMAS
        if (b, g) != (1.0, 1.0)
    ]
    maps += list(random_members(model, x, seed))
    copies = []
    for i, (name, member) in enumerate(maps):
        copies.append({"name": name, **_pairs(first, _decisions(member.apply(model), data, len(data.probes)))})
        if progress is not None:
            progress((i + 1) / len(maps))
    return {
        "seed": seed,
        "epochs": trained.epochs,
        "accuracy": trained.accuracy,
        "value": int(first.sum()),
        "copies": copies,
    }


def predicted_trace(blocks: dict[str, float], beta: float, gamma: float) -> float:
    """The trace after both maps: each tensor's share times the inverse square of what it was multiplied by."""
    w1, b1, w2, b2, w3, b3 = blocks.values()
    return (w1 + b1) / beta**2 + w2 * beta**2 / gamma**2 + b2 / gamma**2 + w3 * gamma**2 + b3


def _least(
    model: nn.Module, x: Tensor, y: Tensor, blocks: dict[str, float], sites: Sequence[Rescaling]
) -> dict[str, float]:
    """The beta of the smallest trace, that trace by formula, and measured there."""
    w1, b1, w2, b2, w3, b3 = blocks.values()
    a, b, c = w1 + b1, w2, b2 + w3 + b3
    beta = (a / b) ** 0.25
    copy = layer_rescalings(sites, (beta, 1.0)).apply(model)
    return {"beta": beta, "predicted": c + 2.0 * (a * b) ** 0.5, "trace": sum(_trace_by_tensor(copy, x, y).values())}


def _trace_by_tensor(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    objective = Objective(model, F.cross_entropy, (x, y))
    return {name: float(part.sum()) for name, part in objective.split(exact_diagonal(objective).values).items()}


def _measured(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Any]:
    objective = Objective(model, F.cross_entropy, (x, y))
    names = ["trace", *(name for name in MEASURED if name in MEASURES)]
    found = measure(objective, names, options=MeasureOptions(ascent_steps=_ASCENT_STEPS))
    return {"measures": {name: {"value": m.value, "error": m.error} for name, m in found.items()}}


def _function(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(x)
    return out


def _compared(base: Tensor, logits: Tensor) -> dict[str, Any]:
    return {
        "largest_change": float((logits - base).abs().max() / base.abs().max()),
        "predictions_changed": int((logits.argmax(1) != base.argmax(1)).sum()),
    }


def _patterns(model: nn.Module, x: Tensor) -> list[int]:
    """Distinct activation patterns of both hidden layers."""
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.ReLU)]
    return [len(patterns(features(model, x, layer=name))) for name in layers]


def _decisions(model: nn.Module, data: SmallData, probes: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    found = pair_proxy(features(model, data.x), data.y, features(model, data.probes[:probes]), classes=data.classes)
    return found.feasible


def _pairs(first: np.ndarray[Any, Any], now: np.ndarray[Any, Any]) -> dict[str, int]:
    return {
        "pair_proxy": int((now == 1).sum()),
        "changed": int((now != first).sum()),
        "undecided": int((now < 0).sum()),
    }
