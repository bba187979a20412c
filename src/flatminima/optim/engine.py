"""The parts every sharpness-aware step is made of: displace the weights, bring them back, step along what was found.

In which order is said in :mod:`flatminima.optim.steps`; which direction, when, and what to step along, by the recipe.
"""

from __future__ import annotations

import contextlib
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flatminima.optim.ascent import Ascent
from flatminima.optim.closures import outside_inference_mode
from flatminima.optim.combine import Perturbed
from flatminima.optim.directions import Point, Scaled
from flatminima.optim.scaling import Scaling, unit_of
from flatminima.optim.variants import Recipe
from flatminima.optim.weights import Held, Weights, part_of, whole
from flatminima.optim.wrapper import Own, check_rho
from flatminima.perturbation import Perturbation
from flatminima.vectors import finite, norm

_MASTER = "master"
_INSIDE = ("flatminima.", "torch.", "contextlib")


class Engine:
    """One optimiser's means to look elsewhere and come back.

    Args:
        base: the optimiser that makes the update.
        recipe: what makes the variant.
        weights: what is moved and updated.
        only: the parameters that are moved; all when None.
        decay_in_ascent: the direction follows the penalised loss.
        settle: called when weights were moved.

    Attributes:
        steps: how many were made.
        skipped, skip_reason: how many of them changed nothing, and why the last of these did not.
    """

    def __init__(
        self,
        base: torch.optim.Optimizer,
        recipe: Recipe,
        weights: Weights,
        only: frozenset[Tensor] | None,
        decay_in_ascent: bool,
        settle: Callable[[], None],
    ) -> None:
        self.base, self.recipe, self.weights, self.only = base, recipe, weights, only
        self.perturbation = Perturbation()
        self.steps = 0
        self.skipped = 0
        self.skip_reason: str | None = None
        self._decay_in_ascent, self._settle = decay_in_ascent, settle
        self._memory: dict[str, dict[Tensor, Tensor]] = {}
        self._displaced: list[Tensor] = []
        self._info: Ascent | None = None
        self._warned = False

    # ----- away and back ----------------------------------------------------------------------------------------------

    def displace(self, unit: float = 1.0, draw: int = 0) -> Ascent:
        """Move the weights as the recipe says, from the gradients that lie in ``.grad``; not at all where it says so.

        Args:
            unit: what those gradients have to be multiplied by to be the loss's.
            draw: which of several perturbations of this step.
        """
        members, groups = self._members()
        self.weights.follow()
        with torch.no_grad():
            verdict = self._decide(unit)
            if verdict is not None:
                return verdict
            if not members and self.steps == 0 and self.only is None:
                warn(
                    "none of the optimiser's parameters has a gradient in its first step: the loss does not depend on them"
                )
            held = self.weights.hold(members, gradients=self.recipe.direction.needs_gradient)
            at = self.point(members, held, unit, groups, draw)
            vectors, scales, length = self.direction(at)
            if not scales:
                return Ascent(length, None if math.isfinite(length) else self.weights.why(length))
            self.move(members, at.values, vectors, scales)
            self._info = Ascent(abs(length), measure=lambda: self._realised(at, vectors, scales))
            self._warn_when_rounded_away(self._info, at)
            return self._info

    def direction(self, at: Point) -> tuple[Sequence[Tensor], list[float], float]:
        """Vectors, the factor of each, and the length they were divided by; no factors where the weights have to stay."""
        if self._decay_in_ascent and at.gradients:
            found = zip(at.values, at.gradients, at.decay, strict=True)
            at.gradients = [g.add(w, alpha=decay / at.unit) for w, g, decay in found]
        vectors, length = self.recipe.direction(at)
        stay = length == 0 or not math.isfinite(length)
        return vectors, [] if stay else [r / length for r in at.rho], length

    def move(
        self,
        parameters: list[Tensor],
        values: list[Tensor],
        vectors: Sequence[Tensor],
        scales: float | list[float] = 1.0,
    ) -> None:
        """Displace the weights along given vectors."""
        self._displaced = parameters
        self.perturbation.move(values, vectors, scales)
        self.weights.moved(parameters)
        self._settle()

    def restore(self) -> None:
        """Bring the weights back, if they are displaced."""
        if self.perturbation.active:
            self.perturbation.restore()
            self.weights.moved(self._displaced)
            self._settle()
        if self._info is not None:
            self._info.close()
            self._info = None

    def clean_gradients(self) -> dict[Tensor, Tensor]:
        """The gradients at the weights, kept for after the second pass."""
        found = self.weights.with_gradients()
        pairs = zip(found, self.weights.hold(found).gradients, strict=True)
        # Data-parallel training may let gradients live in its buckets, which the second pass overwrites.
        return {p: g.clone() if p.grad is not None and p.grad._is_view() else g for p, g in pairs}

    def point(
        self, parameters: list[Tensor], held: Held, unit: float, groups: Sequence[dict[str, Any]] = (), draw: int = 0
    ) -> Point:
        """What the policies are shown."""
        return Point(
            parameters,
            held.values,
            held.gradients,
            [float(group["rho"]) for group in groups],
            [float(group.get("weight_decay", 0.0)) for group in groups] if self._decay_in_ascent else [],
            unit,
            self.steps,
            draw,
            self._memory,
            self.base.state,
            held.kind,
        )

    def _members(self) -> tuple[list[Tensor], list[dict[str, Any]]]:
        """The parameters that this perturbation moves, and the group of each."""
        members: list[Tensor] = []
        groups: list[dict[str, Any]] = []
        for group in self.base.param_groups:
            check_rho(group["rho"])
            if self.recipe.direction.needs_gradient:
                chosen = [p for p in group["params"] if p.grad is not None]
            else:
                chosen = [p for p in group["params"] if p.requires_grad]
            if self.only is not None:
                chosen = [p for p in chosen if p in self.only]
            members += chosen
            groups += [group] * len(chosen)
        return members, groups

    def _decide(self, unit: float) -> Ascent | None:
        """Whether to stay, as the schedule has it."""
        planned = self.recipe.when.planned(self.steps)
        if planned is None:
            everything = self.weights.with_gradients()
            held = self.weights.hold(everything)
            length = norm(held.gradients, everything, held.kind) * unit
            if math.isfinite(length) and not self.recipe.when.decide(self.steps, length**2):
                return Ascent(length)
        return Ascent(math.nan) if planned is False else None

    def _realised(self, at: Point, vectors: Sequence[Tensor], scales: list[float]) -> tuple[float, float]:
        if isinstance(vectors, Scaled):
            vectors = vectors.over(self.perturbation.clean)
        return self.perturbation.realised(vectors, scales, at.parameters)

    def _warn_when_rounded_away(self, info: Ascent, at: Point) -> None:
        if self._warned or self.steps % 100 or all(v.dtype.itemsize >= 4 for v in at.values):
            return
        if info.cosine < 0.9:
            self._warned = True
            warn(
                f"the perturbation is mostly rounded away in {at.values[0].dtype}: realised radius {info.radius:.3g}, cosine "
                f"with the intended direction {info.cosine:.2f}. Give master=True, keep float32 weights and use autocast, or "
                "raise rho."
            )

    # ----- the update -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def scale_again(self, scaler: Scaling | None) -> None:
        """Gradients that the caller has unscaled get the scale of the next pass's, so that both can be combined."""
        if scaler is not None and scaler.unscaled():
            for p in self.weights.with_gradients():
                assert p.grad is not None
                p.grad.mul_(1 / scaler.unit)
            scaler.forget()

    @torch.no_grad()
    def update(
        self, perturbed: bool, clean: dict[Tensor, Tensor], scaler: Scaling | None, failed: str | None = None
    ) -> None:
        """The base's step along the combination of gradients; nothing when one of them is not finite.

        Args:
            perturbed: the gradients in ``.grad`` were found at displaced weights.
            clean: those at the weights, where the combination needs them, as the loss of their pass was scaled.
            scaler: of the losses.
            failed: why a first pass of this rank's alone made these gradients NaN.
        """
        combine = self.recipe.combine
        changes = combine.needs_clean or type(combine) is not Perturbed
        found = self.weights.with_gradients()
        self.weights.follow()
        held = self.weights.hold(found, keep=changes)
        at = self.point(found, held, unit_of(scaler)) if changes else None
        if not (finite(held.gradients, found, held.kind) if at is None else math.isfinite(at.length)):
            self.skip("first" if failed else "last", failed or self.weights.why(math.nan), scaler)
            return
        if at is not None:
            if perturbed:
                pairs = zip(found, held.gradients, strict=True)
                before = [clean[p] if p in clean else torch.zeros_like(g) for p, g in pairs]
                if scaler is not None and scaler.unscaled():
                    before = list(torch._foreach_mul(before, scaler.unit))
                combine.combine(before, held.gradients, at)
            else:
                combine.without(at)
        with self._base_on(found, held.gradients) as base:
            if scaler is None:
                base.step()
            else:
                scaler.unscaled()  # moves what was noted for the wrapper to the base
                scaler.step(base)
        if changes:
            rates = {
                p: float(group["lr"]) for group in self.base.param_groups for p in group["params"] if "lr" in group
            }
            combine.after(held.values, [rates.get(p, 1.0) for p in found])
        self.weights.moved(found)

    def skip(self, which: str, reason: str, scaler: Scaling | None) -> None:
        """Count a step that changes nothing."""
        self.skipped += 1
        self.skip_reason = f"{which} pass of step {self.steps}: {reason}"
        if scaler is not None:
            self.tell(scaler)

    def tell(self, scaler: Scaling) -> None:
        """Let the scaler look at the gradients, so that it knows to lower its scale; the base takes no step."""
        found = self.weights.with_gradients()
        with self._base_on(found, self.weights.hold(found).gradients) as base:
            scaler.look(base)

    def _base_on(
        self, parameters: list[Tensor], gradients: list[Tensor]
    ) -> contextlib.AbstractContextManager[torch.optim.Optimizer]:
        """The base, working on the parameters or on their masters."""
        masters = self.weights.masters
        return contextlib.nullcontext(self.base) if masters is None else masters.in_base(parameters, gradients)

    def finish(self) -> None:
        """The step is over, however it went."""
        self.restore()
        self.steps += 1
        torch.clear_autocast_cache()  # the base changed the weights
        if self.weights.masters is not None:
            self.weights.masters.followed = False

    # ----- what a resumed run needs -----------------------------------------------------------------------------------

    def state_dict(self) -> Own:
        """What has to be saved besides the state of the base; empty for most."""
        parameters, masters = self.weights.all(), self.weights.masters
        vectors: dict[int, dict[str, Tensor]] = {}
        for name in dict.fromkeys((*self.recipe.keeps, *self._memory)):
            kept = self._memory.get(name, {})
            for i, p in enumerate(parameters):
                if p in kept or p.requires_grad:
                    # Always the same keys: a loader that fills a fresh optimiser's state in place asks for no others.
                    vectors.setdefault(i, {})[name] = whole(kept[p].clone(), p) if p in kept else self._nothing(p)
        if masters is not None:
            for i, master in masters.state_dict({p: i for i, p in enumerate(parameters)}).items():
                vectors.setdefault(i, {})[_MASTER] = master
        when = self.recipe.when.state_dict()
        plain = {"parts": self.recipe.parts, "steps": self.steps, "when": when} if self.recipe.remembers else {}
        return Own(plain, vectors)

    def check_state(self, own: Own) -> None:
        """Refuse what :meth:`state_dict` of another recipe, or of other parameters, gave."""
        saved, here = own.plain.get("parts"), self.recipe.parts
        if saved is not None and saved != here:
            raise ValueError(
                f"the checkpoint holds what {', '.join(saved)} remembered; this optimiser is made of {', '.join(here)}. Build "
                "the variant that was saved, or load into .base to keep the base's state alone"
            )
        for i, p in enumerate(self.weights.all()):
            for name, v in own.vectors.get(i, {}).items():
                if v.shape != p.shape:
                    raise ValueError(
                        f"the checkpoint's {name} of parameter {i} has shape {tuple(v.shape)}, the parameter {tuple(p.shape)}: "
                        "load it into the optimiser of the same model"
                    )

    def load_state_dict(self, own: Own) -> None:
        """Continue from what :meth:`state_dict` gave, or afresh where something is missing."""
        self._memory = {}
        self.steps = int(own.plain.get("steps", 0))
        if self.recipe.remembers and own.plain:
            self.recipe.when.load_state_dict(own.plain.get("when", {}))
        masters: dict[int, Tensor] = {}
        for i, p in enumerate(self.weights.all()):
            for name, vector in own.vectors.get(i, {}).items():
                mine = part_of(vector, p)
                if name == _MASTER:
                    masters[i] = mine
                elif self.recipe.remembers and not bool(mine.isnan().all()):
                    self._memory.setdefault(name, {})[p] = mine
        if self.weights.masters is not None:
            self.weights.masters.load_state_dict(masters, self.weights.all())

    def initialise(self) -> None:
        """Let the base make its state, from gradients that are zero and at learning rates that are."""
        with outside_inference_mode():
            self.update(False, {}, None)
        if self.weights.masters is not None:
            self.weights.masters.followed = False

    def _nothing(self, p: Tensor) -> Tensor:
        """Stands in a checkpoint for a vector that is not there yet."""
        dtype = torch.promote_types(p.dtype, torch.float32) if self.weights.masters is not None else p.dtype
        return torch.full_like(p.detach(), math.nan, dtype=dtype)


def warn(message: str) -> None:
    """Warn, pointing at the line of the user's that called the optimiser."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
