r"""Sharpness-aware minimisation.

Foret, Kleiner, Mobahi and Neyshabur, "Sharpness-Aware Minimization for Efficiently Improving Generalization" (2021).
One step evaluates the gradient twice: at the weights, and at the first-order maximiser of the loss in a ball around them,

.. math:: \hat\epsilon = \rho\, g / \lVert g \rVert_2, \qquad g = \nabla L(w), \qquad
          w \leftarrow \mathrm{base}\bigl(w, \nabla L(w + \hat\epsilon)\bigr).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flatminima.optim.ascent import Ascent
from flatminima.optim.closures import Work, only_initialises, outside_inference_mode
from flatminima.optim.combine import Perturbed
from flatminima.optim.engine import Engine, warn
from flatminima.optim.passes import Passes
from flatminima.optim.sagd import projected_ascent
from flatminima.optim.scaling import Scaling, unit_of
from flatminima.optim.schedules import Always
from flatminima.optim.steps import blind, per_batch, together
from flatminima.optim.variants import Direction, check_fit, normalisation_parameters, recipe
from flatminima.optim.weights import Weights
from flatminima.optim.wrapper import Own, Wrapper
from flatminima.perturbation import mark, marked

Closures = Callable[[], Tensor] | Sequence[Callable[[], Tensor]]


_DISPLACED = "the weights are displaced: call descend() or restore() after ascend(), or leave the perturbed() block"


class SAM(Wrapper):
    """Any optimiser, made sharpness-aware.

    It *is* an optimiser that shares its base's parameter groups, state, defaults and state-dict hooks: learning-rate schedulers
    work on it, and its checkpoint is the base's checkpoint. ``rho`` lives in each parameter group, where a schedule may change
    it; the norm is global.

    Args:
        base_optimizer: an optimiser *instance*; it makes the update from the gradient at the perturbed weights.
        rho: radius of the ball, in units of the Euclidean norm of all parameters.
        variant: ``sam``, ``asam``, ``gsam``, ``wsam``, ``friendly-sam``, ``looksam``, ``ae-sam``, ``every-k``, ``probability``,
            ``msam``, ``sam-on``, ``m-sam``, ``random`` or ``sa-gd``; see :mod:`flatminima.optim.variants`.
        model: when given, the running statistics of its normalisation layers come from the first pass only, and on several
            ranks (as the ``DistributedDataParallel`` module, or the root that ``fully_shard`` was applied to) the gradients of
            several closures are averaged once. ``sam-on`` and, on several ranks, ``m-sam`` need it.
        replay_rng: both passes draw the same random numbers, hence the same dropout masks, from torch's global generators. A
            closure that draws from ``random``, NumPy or a ``torch.Generator`` of its own sees other numbers in the second pass.
        decay_in_ascent: the perturbation follows the gradient of the loss plus each group's ``weight_decay``, as where the
            penalty is part of the loss.
        master: half-precision parameters are perturbed and updated in float32 copies, and are these copies rounded; see
            :mod:`flatminima.optim.masters` for the memory. The base makes its state in float32.
        direction, when, combine: policies of your own in place of the variant's.
        options: of the variant, such as ``k`` of ``looksam``.

    Attributes:
        variant: its name.
        maximum: of ``sa-gd``, the largest loss found in the ball at the last step.

    Raises:
        TypeError: ``base_optimizer`` is not an optimiser instance or evaluates the loss itself (LBFGS); an unknown option.
        ValueError: a radius that is negative or not finite, a base with a hyperparameter of that name or one that maximises, an
            unknown variant, parts that do not fit together or do not fit the base.

    A zero gradient leaves the weights where they are for the second pass. A NaN or infinite gradient, in
    either pass, skips the update, is counted in :attr:`skipped` and named in :attr:`skip_reason`. The weights are restored
    by copy into their own storage, also when an exception passes through.
    Cost: 2 gradients a step. Memory: one copy of the parameters.

    Example:
        >>> model = nn.Linear(4, 1)
        >>> opt = SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.05)
        >>> x, y = torch.ones(8, 4), torch.zeros(8, 1)
        >>> loss = opt.step(lambda: nn.functional.mse_loss(model(x), y))
        >>> loss.shape
        torch.Size([])
    """

    def __init__(
        self,
        base_optimizer: torch.optim.Optimizer,
        rho: float = 0.05,
        *,
        variant: str = "sam",
        model: nn.Module | None = None,
        replay_rng: bool = True,
        decay_in_ascent: bool = False,
        master: bool = False,
        direction: Direction | None = None,
        when: Always | None = None,
        combine: Perturbed | None = None,
        **options: Any,
    ) -> None:
        parts = {"direction": direction, "when": when, "combine": combine}
        given: dict[str, Any] = {name: part for name, part in parts.items() if part is not None}
        chosen = dataclasses.replace(recipe(variant, options), **given)
        check_fit(base_optimizer, chosen, model, decay_in_ascent)
        only = frozenset(normalisation_parameters(model)) if chosen.normalisation_only and model is not None else None
        super().__init__(base_optimizer, rho)
        self.variant = variant
        self.maximum: float | None = None
        self._passes = Passes(model, replay_rng)
        weights = Weights(base_optimizer, master)
        self._engine = Engine(base_optimizer, chosen, weights, only, decay_in_ascent, self._passes.ranks.settle)
        self._open: tuple[Ascent, dict[Tensor, Tensor]] | None = None
        self._inside = False  # a step or a perturbed() block
        self._warned = False

    @property
    def skipped(self) -> int:
        """How many steps changed nothing, because a gradient was not finite."""
        return self._engine.skipped

    @property
    def skip_reason(self) -> str | None:
        """Why the last of them did not: pass, step and parameter."""
        return self._engine.skip_reason

    def master_parameters(self) -> list[Tensor]:
        """What the base optimiser updates, in the order of the groups: average these, not their half-precision shadows."""
        weights = self._engine.weights
        return list(weights.all()) if weights.masters is None else weights.masters.of(weights.all())

    def step(  # type: ignore[override]
        self, closure: Closures | None = None, *, scaler: Any = None, weights: Sequence[float] | None = None
    ) -> Tensor:
        """One sharpness-aware step.

        Args:
            closure: computes and returns the loss. An ordinary closure (``zero_grad``, loss, ``backward``, return) and one
                that only returns the loss both work; gradients are cleared before each pass. A list of closures is a list of
                micro-batches, whose gradients are averaged (``m-sam`` perturbs each by its own).
            scaler: a ``GradScaler``; an ordinary closure scales its loss itself. Call ``scaler.update()`` afterwards, as usual.
            weights: of the closures, instead of equal ones.

        Returns:
            The loss at the clean weights, averaged over the closures; for ``msam`` and ``random``, which do not evaluate there,
            at the perturbed weights.

        Raises:
            ValueError: no closure, or a closure that neither returns a loss nor computes gradients.
            RuntimeError: after :meth:`ascend` without :meth:`descend`, or inside of :meth:`perturbed`, of another step, or of
                ``swapped()`` of an average.
        """
        if only_initialises(closure, self.param_groups):
            self._require_at_home("step() was called")
            self._engine.initialise()
            return torch.zeros(())
        scaling = Scaling.of(scaler, self)
        work = Work.checked(closure, weights, scaling)
        self._require_at_home("step() was called")
        engine, passes = self._engine, self._passes
        if scaling is not None:
            scaling.forget()
        self._inside = True
        try:
            with outside_inference_mode():
                if engine.recipe.ascent:
                    loss, self.maximum = projected_ascent(engine, passes, work)
                    return loss
                planned = engine.recipe.when.planned(engine.steps)
                if planned is not False and not engine.recipe.direction.needs_gradient:
                    return blind(engine, passes, work)
                if planned is not False and engine.recipe.per_batch:
                    return per_batch(engine, passes, work)
                return together(engine, passes, work)
        finally:
            self._inside = False
            passes.forget()
            engine.finish()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As of any optimiser. In a loop of your own it also says that the first pass begins here, see :meth:`ascend`."""
        super().zero_grad(set_to_none)
        if self._open is None and not self._inside:
            self._passes.remember(self._engine.weights.all())

    @contextlib.contextmanager
    def perturbed(self) -> Iterator[Ascent]:
        """Within the block the weights are perturbed, from the gradients that lie in ``.grad``.

        Yields:
            An :class:`~flatminima.optim.ascent.Ascent`: the norm, and inside of the block the realised radius and cosine.

        Nothing moves when the norm is zero or not finite. Leaving the block restores every weight bit for bit. Statistics and
        random numbers are treated as by :meth:`ascend`.

        Raises:
            ValueError: the variant looks more than once, or at what a rank found alone.
            RuntimeError: as by :meth:`step`.
        """
        self._require_halves()
        self._require_at_home("perturbed() was called")
        self._inside = True
        try:
            info = self._engine.displace()
            self._second_begins(check=not self._passes.remembers)
            yield info
        finally:
            self._inside = False
            self._come_back()

    def ascend(self, zero_grad: bool = False, *, scaler: Any = None) -> Ascent:
        """First half of a step in a loop of your own: move the weights, from the gradients that lie in ``.grad``.

        Args:
            zero_grad: clear the gradients afterwards.
            scaler: the ``GradScaler`` that scaled the loss; to clip gradients, call ``scaler.unscale_`` before either half.

        Compute the gradients once more, then call :meth:`descend`; :meth:`restore` gives up instead. Running statistics of
        ``model=`` stay those of the first pass. The second pass draws the random numbers of the first, and what follows goes on
        as if it had drawn none, if :meth:`zero_grad` was called right before the first pass, after the batch was drawn; where
        that was not so, a warning says once that they differ.

        Raises:
            ValueError, RuntimeError: as by :meth:`perturbed`.
        """
        self._require_halves()
        self._require_at_home("ascend() was called")
        engine, scaling = self._engine, Scaling.of(scaler, self)
        with outside_inference_mode():
            info = engine.displace(unit_of(scaling))
            if scaling is not None and info.skipped:
                engine.tell(scaling)
                scaling.forget()
            elif scaling is not None:
                engine.scale_again(scaling)
            clean = engine.clean_gradients() if info.moved and engine.recipe.combine.needs_clean else {}
        self._open = (info, clean)
        self._second_begins(check=True)
        if zero_grad:
            self.zero_grad(set_to_none=True)
        else:
            # The second pass writes into .grad, perhaps in place (a captured graph does).
            self._open = (info, {p: g.clone() if g is p.grad else g for p, g in clean.items()})
        return info

    def descend(self, zero_grad: bool = False, *, scaler: Any = None) -> None:
        """Second half: restore the weights and step along the gradients that lie in ``.grad`` now.

        Args: as of :meth:`ascend`.
        """
        if self._open is None:
            raise RuntimeError("descend() ends what ascend() began: call ascend() first")
        info, clean = self._open
        self._come_back()
        self._passes.forget()
        try:
            with outside_inference_mode():
                if info.skipped:
                    self._engine.skip("first", info.skipped, None)
                else:
                    self._engine.update(info.moved, clean, Scaling.of(scaler, self))
        finally:
            self._engine.finish()
            self._opt_called = True  # what schedulers look for before they warn
        if zero_grad:
            self.zero_grad(set_to_none=True)

    first_step, second_step = ascend, descend

    def restore(self) -> None:
        """Bring the weights back, if they are displaced."""
        self._come_back(give_up=True)

    def _come_back(self, give_up: bool = False) -> None:
        alike = True
        if self._passes.in_second:
            if any(marked(p) != _DISPLACED for p in self._sentinels()):
                raise RuntimeError(
                    "the weights cannot be restored inside swapped(), where the model holds an average: leave that block first"
                )
            mark(self._sentinels(), None)
            alike = self._passes.end_second(self._engine.weights.all(), give_up)
        self._engine.restore()
        self._open = None
        if not alike:
            self._warned = True
            warn(
                "the second pass drew other random numbers than the first, such as other dropout masks: call zero_grad() of "
                "this optimiser right before the first pass and after its batch was drawn, or give replay_rng=False"
            )

    def _second_begins(self, check: bool) -> None:
        """The weights are elsewhere, and a pass of the caller's follows."""
        mark(self._sentinels(), _DISPLACED)
        check = (
            check
            and not self._warned
            and self._engine.steps % 100 == 0
            and self._engine.recipe.direction.needs_gradient
        )
        self._passes.begin_second(self._engine.weights.all(), check)

    def _sentinels(self) -> list[Tensor]:
        """The first parameter of each group: a mark on every one would cost as much as moving small ones."""
        found = [group["params"][0] for group in self.param_groups if group["params"]]
        masters = self._engine.weights.masters
        return found if masters is None else [*found, *masters.of(found)]

    def _require_halves(self) -> None:
        """Refuse to do half of a step that has no halves."""
        chosen, reason = self._engine.recipe, ""
        if chosen.ascent:
            reason = f"{self.variant} looks {chosen.ascent} times, by projected ascent"
        elif chosen.draws > 1:
            reason = f"{self.variant} averages over {chosen.draws} perturbations"
        elif chosen.per_batch and self._passes.ranks.cuts_gradients:
            reason = "m-sam perturbs each rank by its own gradient; those in .grad of a sharded model are averaged and cut up"
        if reason:
            raise ValueError(f"{reason}: call step(closure), which evaluates as often as that takes")

    def _require_at_home(self, what: str) -> None:
        if self._open is not None or self._engine.perturbation.active:
            raise RuntimeError(
                f"{what} while the weights are displaced: call descend() or restore() after ascend(), leave the "
                "perturbed() block, and let step() end first"
            )
        why = next(filter(None, map(marked, self._sentinels())), None)
        if why is not None:
            raise RuntimeError(f"{what} while {why}")

    def __getstate__(self) -> dict[str, Any]:
        """What a copy is made of; not of weights that are displaced, which the copy could not bring back."""
        self._require_at_home("copying or pickling the optimiser")
        return super().__getstate__()

    def _own_state(self) -> Own:
        return self._engine.state_dict()

    def _check_own_state(self, own: Own) -> None:
        self._engine.check_state(own)

    def _load_own_state(self, own: Own) -> None:
        self._engine.load_state_dict(own)

    def _loading(self) -> contextlib.AbstractContextManager[Any]:
        masters = self._engine.weights.masters
        return contextlib.nullcontext() if masters is None else masters.in_base()
