"""The zoo by name: each variant is a direction, a schedule and a way to combine two gradients."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from flatminima.names import unknown
from flatminima.optim.combine import Perturbed, Reuse, SurrogateGap, Weighted
from flatminima.optim.directions import Adaptive, Friendly, Gradient, Momentum, Noise
from flatminima.optim.schedules import Always, Every, LargeGradient, Sometimes
from flatminima.sharding import is_sharded, reshard

Direction = Gradient | Adaptive | Friendly | Momentum | Noise


@dataclass(frozen=True)
class Recipe:
    """What makes a variant.

    Attributes:
        direction: where to look.
        when: at which steps.
        combine: what to step along.
        per_batch: each closure of a step, and each rank, is perturbed by its own gradient.
        draws: perturbations per step, for directions that need no gradient.
        ascent: projected ascent steps towards the maximum of the ball; 0 for the usual one without looking back.
        normalisation_only: only the parameters of normalisation layers are moved.
    """

    direction: Direction = field(default_factory=Gradient)
    when: Always = field(default_factory=Always)
    combine: Perturbed = field(default_factory=Perturbed)
    per_batch: bool = False
    draws: int = 1
    ascent: int = 0
    normalisation_only: bool = False

    def __post_init__(self) -> None:
        """Refuse what is no part, and parts that do not fit together."""
        for name, part, fits, example in (
            (
                "direction",
                self.direction,
                callable(self.direction) and hasattr(self.direction, "needs_gradient"),
                "Adaptive()",
            ),
            ("when", self.when, isinstance(self.when, Always), "Every(2)"),
            ("combine", self.combine, isinstance(self.combine, Perturbed), "SurrogateGap()"),
        ):
            if not fits or isinstance(part, type):
                raise TypeError(
                    f"{name} must be a policy such as {example}, got {part!r}; for variants by name give variant="
                )
        if self.ascent and (type(self.direction) is not Gradient or type(self.when) is not Always):
            raise ValueError(
                f"projected ascent follows the gradient, at every step: it cannot use {type(self.direction).__name__} and "
                f"{type(self.when).__name__}. Leave them out, or use variant sam"
            )
        blind = not self.direction.needs_gradient
        if blind and (self.combine.needs_clean or self.when.planned(0) is None or self.ascent or self.per_batch):
            raise ValueError(
                f"{type(self.direction).__name__} looks without a gradient at the weights; {type(self.combine).__name__}, "
                f"{type(self.when).__name__}, projected ascent and perturbations per batch are made from that gradient"
            )
        if (self.per_batch or self.ascent) and (self.combine.needs_clean or self.when.planned(0) is None):
            raise ValueError(
                f"{type(self.combine).__name__} with {type(self.when).__name__} needs the one gradient at the weights, which "
                "perturbations per batch and projected ascent do not have: use variant sam, or drop the combination"
            )
        if not (isinstance(self.draws, int) and self.draws >= 1):
            raise ValueError(f"draws counts perturbations per step and must be an integer >= 1, got {self.draws!r}")
        if not (isinstance(self.ascent, int) and self.ascent >= 0):
            raise ValueError(
                f"ascent counts steps of projected ascent and must be an integer >= 1, got {self.ascent!r}"
            )

    @property
    def remembers(self) -> bool:
        """Whether a resumed run needs more than the base optimiser's state."""
        return self.direction.remembers or self.when.remembers or self.combine.remembers

    @property
    def keeps(self) -> tuple[str, ...]:
        """Names of the vectors it keeps between steps."""
        return (*getattr(self.direction, "keeps", ()), *self.combine.keeps)

    @property
    def parts(self) -> list[str]:
        """What it is made of: memory of one recipe means nothing to another."""
        return [type(part).__name__ for part in (self.direction, self.when, self.combine)]


def _sam() -> Recipe:
    return Recipe()


def _asam(eta: float = 0.01, bias: str = "identity") -> Recipe:
    return Recipe(direction=Adaptive(eta, bias))


def _gsam(alpha: float = 0.4) -> Recipe:
    return Recipe(combine=SurrogateGap(alpha))


def _wsam(gamma: float = 0.9, decouple: bool = True) -> Recipe:
    return Recipe(combine=Weighted(gamma, decouple))


def _friendly(sigma: float = 1.0, decay: float = 0.9) -> Recipe:
    return Recipe(direction=Friendly(sigma, decay))


def _looksam(k: int = 5, alpha: float = 0.7) -> Recipe:
    return Recipe(when=Every(k), combine=Reuse(alpha))


def _ae_sam(threshold: float | tuple[float, float] = 0.0, total_steps: int | None = None, decay: float = 0.9) -> Recipe:
    return Recipe(when=LargeGradient(threshold, total_steps, decay))


def _every(k: int = 2) -> Recipe:
    return Recipe(when=Every(k))


def _sometimes(p: float = 0.5, seed: int = 0) -> Recipe:
    return Recipe(when=Sometimes(p, seed))


def _msam() -> Recipe:
    return Recipe(direction=Momentum())


def _sam_on(eta: float | None = None) -> Recipe:
    return Recipe(direction=Gradient() if eta is None else Adaptive(eta, "adaptive"), normalisation_only=True)


def _m_sam() -> Recipe:
    return Recipe(per_batch=True)


def _random(noise: str = "sphere", draws: int = 1, seed: int = 0) -> Recipe:
    return Recipe(direction=Noise(noise, seed), draws=draws)


def _sa_gd(steps: int = 5) -> Recipe:
    if not (isinstance(steps, int) and steps >= 1):
        raise ValueError(f"steps counts steps of projected ascent and must be an integer >= 1, got {steps!r}")
    return Recipe(ascent=steps)


VARIANTS: dict[str, Callable[..., Recipe]] = {
    "sam": _sam,
    "asam": _asam,
    "gsam": _gsam,
    "wsam": _wsam,
    "friendly-sam": _friendly,
    "looksam": _looksam,
    "ae-sam": _ae_sam,
    "every-k": _every,
    "probability": _sometimes,
    "msam": _msam,
    "sam-on": _sam_on,
    "m-sam": _m_sam,
    "random": _random,
    "sa-gd": _sa_gd,
}


def recipe(variant: str, options: dict[str, Any]) -> Recipe:
    """The parts of a variant.

    Raises:
        ValueError: an unknown variant or value; bSAM, which brings its own update, is :class:`flatminima.optim.BSAM`.
        TypeError: an option that the variant does not have.

    Example:
        >>> recipe("looksam", {"k": 4}).when.k
        4
        >>> recipe("gsma", {})
        Traceback (most recent call last):
        ValueError: unknown variant 'gsma': expected one of gsam, ...
    """
    name = variant.lower().replace("_", "-")
    if name == "bsam":
        raise ValueError(
            "bSAM makes its own update and wraps no optimiser: build flatminima.optim.BSAM(parameters, ...)"
        )
    if name not in VARIANTS:
        raise ValueError(unknown("variant", variant, VARIANTS))
    make = VARIANTS[name]
    valid = list(inspect.signature(make).parameters)
    for option in options:
        if option not in valid:
            raise TypeError(
                unknown(f"option of {name}", option, valid) if valid else f"variant {name} has no options, got {option}"
            )
    return make(**options)


def normalisation_parameters(model: nn.Module) -> Iterator[Tensor]:
    """Gains and shifts of the normalisation layers: torch's own, and classes whose name says Norm (many write RMSNorm)."""
    reshard(model)
    kinds = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
    for module in model.modules():
        if isinstance(module, kinds) or "Norm" in type(module).__name__:
            yield from module.parameters(recurse=False)


def check_fit(base: Any, chosen: Recipe, model: nn.Module | None, decay_in_ascent: bool) -> None:
    """Refuse a base, or a model, that cannot do what the variant needs of it.

    Raises:
        ValueError: weight decay in an ascent that follows no single gradient; no momentum where the variant looks along it;
            only sparse gradients where it makes dense ones; no model, or one without normalisation layers, where it has to
            know them.
    """
    kind, groups = type(base).__name__, getattr(base, "param_groups", [])
    parameters = [p for group in groups for p in group["params"]]
    if decay_in_ascent and (chosen.ascent or not chosen.direction.needs_gradient):
        kind_of = "projected ascent" if chosen.ascent else type(chosen.direction).__name__
        raise ValueError(
            f"decay_in_ascent turns the gradient that the perturbation follows, and {kind_of} does not use it: leave it out"
        )
    if chosen.direction.remembers_in_base and not all(group.get("momentum") or "betas" in group for group in groups):
        raise ValueError(f"msam follows the momentum of the base optimiser and {kind} has none: set momentum=0.9, say")
    if isinstance(base, torch.optim.SparseAdam) and type(chosen.combine) is not Perturbed:
        raise ValueError(
            f"{kind} takes sparse gradients only, and {type(chosen.combine).__name__} combines two into dense ones: "
            "wrap SGD or Adagrad, or use a variant that steps along one gradient"
        )
    if chosen.per_batch and any(map(is_sharded, parameters)):
        if model is None:
            raise ValueError(
                "m-sam catches each rank's own gradient where a sharded model gathers its weights: give model="
            )
        if chosen.direction.remembers:
            raise ValueError(
                f"{type(chosen.direction).__name__} keeps something of every gradient, and those that m-sam catches of a "
                "sharded model are whole: no rank can keep that. Use another direction, or variant friendly-sam"
            )
    if chosen.normalisation_only:
        if model is None:
            raise ValueError("sam-on moves the normalisation layers alone and has to know them: give model=")
        if not set(normalisation_parameters(model)).intersection(parameters):
            raise ValueError(
                f"sam-on moves the normalisation layers alone, and of those in the given {type(model).__name__} the optimiser "
                "has no parameter: use another variant, or give the model whose parameters it has"
            )
