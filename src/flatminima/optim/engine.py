"""The parts every sharpness-aware step is made of: displace the weights, bring them back, step along what was found.

In which order is said in :mod:`flatminima.optim.steps`; which direction, when, and what to step along, by the recipe.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flatminima.optim.ascent import Ascent
from flatminima.optim.combine import Perturbed
from flatminima.optim.directions import Point, Scaled
from flatminima.optim.masters import Masters
from flatminima.optim.variants import Recipe
from flatminima.optim.wrapper import check_rho, named
from flatminima.perturbation import Perturbation
from flatminima.vectors import dense, finite, local, norm, plain, real


class Engine:
    """One optimiser's means to look elsewhere and come back.

    Args:
        base: the optimiser that makes the update.
        recipe: what makes the variant.
        only: the parameters that are moved; all when None.
        decay_in_ascent: the direction follows the penalised loss.
        master: keep half-precision parameters in single precision.
        settle: called when weights were moved.

    Attributes:
        steps: how many were made.
        skipped, skip_reason: how many of them changed nothing, and why the last of these did not.
    """

    def __init__(
        self,
        base: torch.optim.Optimizer,
        recipe: Recipe,
        only: frozenset[Tensor] | None,
        decay_in_ascent: bool,
        master: bool,
        settle: Callable[[], None],
    ) -> None:
        self.base, self.recipe, self.only, self.decay_in_ascent = base, recipe, only, decay_in_ascent
        self._settle = settle
        self.masters = Masters(base) if master else None
        self.perturbation = Perturbation()
        self.steps = 0
        self.skipped = 0
        self.skip_reason: str | None = None
        self._memory: dict[str, dict[Tensor, Tensor]] = {}
        self._displaced: list[Tensor] = []
        self._info: Ascent | None = None
        self._warned = False

    def parameters(self) -> list[Tensor]:
        """All parameters of the base, in its order."""
        groups = self.base.param_groups
        return groups[0]["params"] if len(groups) == 1 else [p for group in groups for p in group["params"]]

    def values(self, parameters: list[Tensor]) -> list[Tensor]:
        """What this rank holds of the weights that are moved and updated: of the parameters, or of their masters."""
        held = parameters if self.masters is None else self.masters.of(parameters)
        return held if _ordinary(held) else [real(local(p)) for p in held]

    def gradients(self, parameters: list[Tensor], keep: bool = False) -> list[Tensor]:
        """What this rank holds of their gradients, in the dense layout and the precision of :meth:`values`.

        Args:
            parameters: each has a gradient.
            keep: the list will be changed in place, and the base has to see that.
        """
        found = [p.grad for p in parameters]
        if not _ordinary(found):
            for i, p in enumerate(parameters):
                assert p.grad is not None
                whole = dense(p.grad)
                if keep and whole is not p.grad:
                    p.grad = whole
                found[i] = real(local(whole))
        if self.masters is not None:
            return [g.float() if g.dtype.itemsize < 4 else g for g in found if g is not None]
        return found  # type: ignore[return-value]

    def follow(self) -> None:
        """Take over what was done to half-precision parameters since the last step."""
        if self.masters is not None:
            self.masters.follow(self.parameters())

    # ----- away and back ----------------------------------------------------------------------------------------------

    def displace(self, unit: float = 1.0, draw: int = 0) -> Ascent:
        """Move the weights as the recipe says, from the gradients that lie in ``.grad``; not at all where it says so.

        Args:
            unit: what those gradients have to be multiplied by to be the loss's.
            draw: which of several perturbations of this step.
        """
        members, groups = self._members()
        self.follow()
        with torch.no_grad():
            verdict = self._decide(unit)
            if verdict is not None:
                return verdict
            gradients = self.gradients(members) if self.recipe.direction.needs_gradient else []
            at = self.point(members, self.values(members), gradients, unit, groups, draw)
            vectors, scales, length = self.direction(at)
            if not scales:
                return Ascent(length, None if math.isfinite(length) else self.why(length))
            self.move(members, at.values, vectors, scales)
            self._info = Ascent(abs(length), measure=lambda: self._realised(at, vectors, scales))
            self._warn_when_rounded_away(self._info, at)
            return self._info

    def direction(self, at: Point) -> tuple[Sequence[Tensor], list[float], float]:
        """Vectors, the factor of each, and the length they were divided by; no factors where the weights have to stay."""
        if self.decay_in_ascent and at.gradients:
            decays = (g.add(w, alpha=d / at.unit) for w, g, d in zip(at.values, at.gradients, at.decay, strict=True))
            at.gradients = list(decays)
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
        self._moved(parameters)

    def _moved(self, parameters: list[Tensor]) -> None:
        if self.masters is not None:
            self.masters.publish(parameters)
        self._settle()

    def restore(self) -> None:
        """Bring the weights back, if they are displaced."""
        if self.perturbation.active:
            self.perturbation.restore()
            self._moved(self._displaced)
        if self._info is not None:
            self._info.close()
            self._info = None

    def clean_gradients(self) -> dict[Tensor, Tensor]:
        """The gradients at the weights, kept for after the second pass."""
        found = [p for p in self.parameters() if p.grad is not None]
        # Data-parallel training may let gradients live in its buckets, which the second pass overwrites.
        pairs = zip(found, self.gradients(found), strict=True)
        return {p: g.clone() if p.grad is not None and p.grad._is_view() else g for p, g in pairs}

    def point(
        self,
        parameters: list[Tensor],
        values: list[Tensor],
        gradients: list[Tensor],
        unit: float,
        groups: Sequence[dict[str, Any]] = (),
        draw: int = 0,
    ) -> Point:
        """What the policies are shown."""
        rho = [group["rho"] for group in groups]
        decay = [float(group.get("weight_decay", 0.0)) for group in groups] if self.decay_in_ascent else []
        return Point(parameters, values, gradients, rho, decay, unit, self.steps, draw, self._memory, self.base.state)

    def _members(self) -> tuple[list[Tensor], list[dict[str, Any]]]:
        """The parameters that this perturbation moves, and the group of each."""
        members: list[Tensor] = []
        groups: list[dict[str, Any]] = []
        for group in self.base.param_groups:
            check_rho(group["rho"])
            chosen = (
                [p for p in group["params"] if p.grad is not None]
                if self.recipe.direction.needs_gradient
                else [p for p in group["params"] if p.requires_grad]
            )
            if self.only is not None:
                chosen = [p for p in chosen if p in self.only]
            members += chosen
            groups += [group] * len(chosen)
        return members, groups

    def _decide(self, unit: float) -> Ascent | None:
        """Whether to stay, as the schedule has it."""
        planned = self.recipe.when.planned(self.steps)
        if planned is None:
            everything = [p for p in self.parameters() if p.grad is not None]
            length = norm(self.gradients(everything), everything) * unit
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
            warnings.warn(
                f"the perturbation is mostly rounded away in {at.values[0].dtype}: realised radius {info.radius:.3g}, cosine "
                f"with the intended direction {info.cosine:.2f}. Give master=True, keep float32 weights and use autocast, or "
                "raise rho.",
                stacklevel=6,
            )

    # ----- the update -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def update(self, perturbed: bool, clean: dict[Tensor, Tensor], scaler: Any) -> None:
        """The base's step along the combination of gradients; nothing when one of them is not finite.

        Args:
            perturbed: the gradients in ``.grad`` were found at displaced weights.
            clean: those at the weights, where the combination needs them.
            scaler: the ``GradScaler`` in use.
        """
        combine = self.recipe.combine
        changes = combine.needs_clean or type(combine) is not Perturbed
        found = [p for p in self.parameters() if p.grad is not None]
        self.follow()
        gradients = self.gradients(found, keep=changes)
        if not finite(gradients, found):
            self.skip("last", self.why(math.nan), scaler)
            return
        values = self.values(found) if changes else found
        if changes:
            at = self.point(found, values, gradients, unit_of(scaler))
            if perturbed:
                pairs = zip(found, gradients, strict=True)
                combine.combine([clean[p] if p in clean else torch.zeros_like(g) for p, g in pairs], gradients, at)
            else:
                combine.without(at)
        self._step_base(found, gradients, scaler)
        if changes:
            rates = {
                p: float(group["lr"]) for group in self.base.param_groups for p in group["params"] if "lr" in group
            }
            combine.after(values, [rates.get(p, 1.0) for p in found])
            if self.masters is not None:
                self.masters.publish(found)

    def _step_base(self, parameters: list[Tensor], gradients: list[Tensor], scaler: Any) -> None:
        if self.masters is None:
            self.base.step() if scaler is None else scaler.step(self.base)
            return
        with self.masters.in_base(parameters, gradients):
            self.base.step() if scaler is None else scaler.step(self.base)
        self.masters.publish(parameters)

    def skip(self, which: str, reason: str, scaler: Any) -> None:
        """Count a step that changes nothing."""
        self.skipped += 1
        self.skip_reason = f"{which} pass of step {self.steps}: {reason}"
        if scaler is not None:
            self.tell(scaler)

    def tell(self, scaler: Any) -> None:
        """Let the scaler look at the gradients, so that it knows to lower its scale; the base takes no step."""
        if self.masters is None:
            scaler.unscale_(self.base)
            return
        found = [p for p in self.parameters() if p.grad is not None]
        with self.masters.in_base(found, self.gradients(found)):
            scaler.unscale_(self.base)

    def why(self, length: float) -> str:
        """Which gradient it is that is not finite."""
        for name, p in named(self.base.param_groups):
            if p.grad is not None and not bool(torch.isfinite(local(dense(p.grad))).all()):
                kind = "NaN" if bool(torch.isnan(local(dense(p.grad))).any()) else "infinite"
                return f"the gradient of {name} is {kind}"
        return f"the norm of the gradients is {length}"

    def finish(self) -> None:
        """The step is over, however it went."""
        self.restore()
        self.steps += 1
        if self.masters is not None:
            self.masters.followed = False

    # ----- what a resumed run needs -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What has to be saved besides the state of the base; empty for most."""
        saved: dict[str, Any] = {}
        index = {p: i for i, p in enumerate(self.parameters())}
        if self.recipe.remembers:
            memory = {name: {index[p]: v for p, v in kept.items()} for name, kept in self._memory.items()}
            saved |= {"steps": self.steps, "when": self.recipe.when.state_dict(), "memory": memory}
        if self.masters is not None:
            saved["master"] = self.masters.state_dict(index)
        return saved

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` gave, or afresh where a key is missing."""
        self._memory = {}
        self.steps = int(state.get("steps", 0))
        parameters = self.parameters()
        if self.recipe.remembers and "memory" in state:
            self.recipe.when.load_state_dict(state["when"])
            self._memory = {
                name: {parameters[int(i)]: v.to(parameters[int(i)].device, copy=True) for i, v in kept.items()}
                for name, kept in state["memory"].items()
            }
        if self.masters is not None:
            self.masters.load_state_dict(state.get("master", {}), parameters)


def unit_of(scaler: Any) -> float:
    """What a gradient has to be multiplied by to be the loss's."""
    return 1.0 if scaler is None or not scaler.is_enabled() else 1.0 / float(scaler.get_scale())


def _ordinary(tensors: Sequence[Any]) -> bool:
    """Whether all are dense, real and whole."""
    return plain(tensors) and all([t.layout is torch.strided and not t.is_complex() for t in tensors])
