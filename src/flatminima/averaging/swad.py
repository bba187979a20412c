"""Stochastic weight averaging, densely, over the valley the validation loss shows (SWAD)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from flatminima.averaging.average import require_count, require_state
from flatminima.averaging.mean import Mean
from flatminima.averaging.parameters import BufferPolicy, ModelOrParameters, ParameterSet
from flatminima.averaging.swad_metric import Direction, Metric, NanPolicy, ToleranceMode, Variant
from flatminima.averaging.swad_paper import PaperRule
from flatminima.averaging.swad_released import ReleasedRule
from flatminima.averaging.swad_result import Rule, Segment, SWADResult, SWADStatus

# A run whose value keeps falling after "convergence" was stopped by noise; 5 % is beyond the noise of a usable metric.
_STILL_FALLING = 0.05

_RULES: dict[str, type[Rule]] = {"paper": PaperRule, "released": ReleasedRule}


class SWAD:
    """Average every iterate from the bottom of the validation loss until it clearly rises.

    With values ``L_e`` at evaluations ``e``, ``N_s = n_converge``, ``N_e = n_tolerance`` and ``r = 1 + tolerance``:

    - start: the first window of ``N_s`` evaluations whose first value is its minimum (ties included). Averaging starts
      at the step of that first value, and the threshold is ``l = r * mean(window)``;
    - end: ``N_e`` evaluations in a row above ``l``. The last averaged step is that of the last evaluation ``<= l``,
      also where training ends before the rule fires;
    - result: ``(1/n) sum_t theta_t`` over all steps ``t`` from start to end, both included, one vote per step.

    The rule assumes a constant learning rate and a value measured on the weights being trained (not on the average) on
    held-out data of the training distribution. A segment (the steps between two evaluations) whose averaged weights are
    not finite is dropped and its evaluation counts as bad; without convergence the result is the mean of the last
    usable segment, ``converged=False``.

    Args:
        model_or_params: a module, its parameters, or its ``named_parameters()``. Only trainable ones are averaged.
        n_converge: evaluations without a new minimum, itself included, that mark the start. At least 1.
        n_tolerance: bad evaluations in a row that mark the end. At least ``n_converge``, for the variant "paper".
        tolerance: how far beyond the window's mean a value may go, as a fraction of it. At least 0.
        variant: "paper" (Algorithm 1, above) or "released": what the authors' code does, to compare with published
            numbers. There segments have one vote each, up to ``N_e - N_s`` segments before the start are averaged and
            the one at the start usually counts twice; non-finite weights are not dropped.
        direction: "min" if lower values are better, "max" for accuracy and the like.
        tolerance_mode: "relative", for positive values, or "absolute": ``tolerance`` in units of the value, any sign.
        nan: a value that is NaN or infinite is "bad" (never a minimum, always beyond the threshold; default of
            "paper"), an error ("raise"), or compared as the released code does ("released", that variant's default: a
            NaN may then start a valley and keep it from ending).
        dtype, device, buffers: as in :class:`~flatminima.averaging.WeightAverage`.
        group: a ``torch.distributed`` process group. Its processes all get the value of its first one, so that they
            decide alike; without it give every process the same value.

    Raises:
        TypeError, ValueError: an argument is outside these ranges or unknown, or nothing is trainable.

    Cost: no gradient evaluation; one pass over the parameters per update; at most ``max(3, n_converge)`` float32
    copies of them, 2 after convergence while evaluations are good. "released": ``max(n_converge, n_tolerance) + 2``.

    Source: Cha et al., "SWAD: Domain Generalization by Seeking Flat Minima", NeurIPS 2021, arXiv:2102.08604,
    Algorithm 1, and its repository khanrc/swad for "released".

    Example:
        >>> import torch
        >>> model = nn.Linear(1, 1, bias=False)
        >>> swad = SWAD(model, n_converge=2, n_tolerance=2)
        >>> for weight, loss in enumerate([3.0, 1.0, 1.1, 1.2, 9.0, 9.0]):
        ...     _ = nn.init.constant_(model.weight, weight)  # stands for optimizer.step()
        ...     swad.update()
        ...     if swad.evaluate(loss).dead:
        ...         break
        >>> result = swad.finalize()
        >>> result.start_step, result.end_step, result.stopped_at, result.tensors[0].item()
        (1, 3, 5, 2.0)
        >>> swad.copy_to(model)
    """

    def __init__(
        self,
        model_or_params: ModelOrParameters,
        *,
        n_converge: int = 3,
        n_tolerance: int = 6,
        tolerance: float = 0.3,
        variant: Variant = "paper",
        direction: Direction = "min",
        tolerance_mode: ToleranceMode = "relative",
        nan: NanPolicy | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        buffers: BufferPolicy = "keep",
        group: Any = None,
    ) -> None:
        for name, value in (("n_converge", n_converge), ("n_tolerance", n_tolerance)):
            require_count(name, value, 1, "a number of evaluations")
        self._metric = Metric.checked(tolerance, variant, direction, tolerance_mode, nan)
        self.n_converge = n_converge
        self.n_tolerance = n_tolerance
        self.variant = variant
        kept = Mean(dtype=dtype, device=device)
        self._rule = _RULES[variant](n_converge, n_tolerance, self._metric.ceiling, kept)
        self._parameters = ParameterSet(model_or_params, buffers=buffers)
        self._group = group
        self._step = -1
        self._evaluated = -1
        self._value = math.inf
        self._current = kept.empty()  # iterates since the last evaluation
        self._infinite: list[int] = []
        self._dropped: list[tuple[int, int, str]] = []

    @property
    def names(self) -> tuple[str, ...] | None:
        """Names of what is averaged, or None where parameters were given without names."""
        return self._parameters.names

    @property
    def step(self) -> int:
        """Step of the latest ``update()``; -1 before the first."""
        return self._step

    @property
    def n(self) -> int:
        """How many iterates the average holds now; 0 while there is none."""
        chosen = self._rule.chosen() if self._evaluated >= 0 else None
        return 0 if chosen is None else self._count(chosen)

    def update(self) -> None:
        """Take in the current weights. Call it after every ``optimizer.step()``; the first call is step 0.

        Raises:
            RuntimeError: called inside ``swapped()`` of this or another average, or while the weights are perturbed.
            ValueError: a parameter changed its shape or device. Nothing is changed then.
        """
        self._parameters.require_not_swapped("update()")
        if self._rule.stopped is None:
            self._current.add(self._parameters.values())
        self._step += 1

    def evaluate(self, value: float | Tensor) -> SWADStatus:
        """Take in the validation value of the current weights, measured after the latest ``update()``.

        Args:
            value: one number for the weights being trained (not the average), positive if the tolerance is relative.

        Returns:
            the status; training can stop once ``dead`` is true.

        Raises:
            RuntimeError: no ``update()`` since the last evaluation, or called where ``update()`` may not be.
            TypeError: ``value`` is no number.
            ValueError: ``value`` is not one number, is ``<= 0`` with a relative tolerance or not finite with
                ``nan="raise"``, or the model's parameters were replaced. Nothing is changed then.
        """
        number = self._metric.number(self._agreed(value))
        self._parameters.require_not_swapped("evaluate()")
        if self._step == self._evaluated:
            since = "yet" if self._step < 0 else f"since the evaluation at step {self._step}"
            raise RuntimeError(
                f"There was no update() {since}. Call update() after every optimizer.step() and evaluate() after it; "
                "evaluating the same weights twice would count twice towards convergence."
            )
        self._parameters.require_unreplaced()
        if self._rule.stopped is None:
            self._rule.close(self._close(number), self._parameters.values())
        self._evaluated = self._step
        return self.status

    @property
    def status(self) -> SWADStatus:
        """The status after the latest call."""
        found = self._rule.threshold is not None
        return SWADStatus(
            converged=found,
            dead=self._rule.stopped is not None,
            start_step=self._rule.start if found else None,
            end_step=self._rule.end,
            threshold=self._threshold(),
            step=self._step,
        )

    def finalize(self) -> SWADResult:
        """The average of the valley found so far, copied; training and averaging may go on afterwards.

        Raises:
            RuntimeError: no evaluation yet, or every segment so far held non-finite weights.
            ValueError: variant "released", and an averaged segment held non-finite weights.
        """
        segment = self._chosen()
        return SWADResult(
            tensors=self._parameters.export(segment.mean),
            names=self._parameters.names,
            start_step=segment.first,
            end_step=segment.last,
            n=self._count(segment),
            converged=self._rule.threshold is not None,
            threshold=self._threshold(),
            detected_at=self._rule.detected,
            stopped_at=self._rule.stopped,
            notes=tuple(self._notes(segment)),
            votes=self._rule.votes(),
        )

    def tensors(self) -> tuple[Tensor, ...]:
        """A copy of the averaged tensors, float32 or wider, in the order of ``names``; sharded ones as DTensors.

        Raises:
            RuntimeError, ValueError: as by :meth:`finalize`.
        """
        return self._parameters.export(self._chosen().mean)

    @contextmanager
    def swapped(self, model: nn.Module | None = None) -> Iterator[None]:
        """Hold the average in the model inside the block and restore its own weights afterwards, bit for bit.

        Buffers (BatchNorm statistics) are restored as well, so they can be re-estimated inside; they are known only
        if SWAD was made from a module or ``model`` is given. Costs one more copy of the parameters.

        Args:
            model: another model of the same shape to hold the average, instead of the one being trained.

        Raises:
            RuntimeError: there is no average yet.
            ValueError: ``model`` does not fit the average.
        """
        with self._parameters.swapped(self._chosen().mean, model):
            yield

    def copy_to(self, model: nn.Module) -> None:
        """Write the average into ``model`` for good, in place. Frozen parameters and buffers stay as they are.

        Follow it with :func:`~flatminima.averaging.reestimate_batchnorm` if the model has BatchNorm.

        Raises:
            RuntimeError: there is no average yet, or called inside ``swapped()``.
            ValueError: ``model`` does not fit the average.
        """
        self._parameters.copy(self._chosen().mean, model)

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything needed to resume at any step, readable by ``torch.load(weights_only=True)``."""
        return {
            **self._parameters.state_dict(),
            "config": self._config(),
            "step": self._step,
            "evaluated": self._evaluated,
            "value": self._value,
            "current": self._current.state_dict(),
            "rule": self._rule.state_dict(),
            "infinite": list(self._infinite),
            "dropped": [list(entry) for entry in self._dropped],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state``, to the bit as if there had been no interruption.

        Raises:
            ValueError: the state has other settings or other parameters, or is not a SWAD state. Nothing is changed.
        """
        self._parameters.require_not_swapped("load_state_dict()")
        require_state("SWAD", state, self.state_dict(), self._config())
        self._parameters.require_state(state)
        like = self._parameters.values()
        current = self._rule.kept.restored(state["current"], like)
        self._rule.load_state_dict(state["rule"], like)
        self._step, self._evaluated, self._value = state["step"], state["evaluated"], state["value"]
        self._current = current
        self._infinite = list(state["infinite"])
        self._dropped = [(first, last, label) for first, last, label in state["dropped"]]

    def _count(self, segment: Segment) -> int:
        """How many iterates have a vote in what was chosen."""
        votes = self._rule.votes()
        return segment.mean.n if votes is None else sum(last - first + 1 for first, last, _ in votes)

    def _agreed(self, value: float | Tensor) -> float | Tensor:
        """The value of the group's first process, for all of them."""
        if self._group is None:
            return value
        box = [value]
        first = torch.distributed.get_global_rank(self._group, 0)
        torch.distributed.broadcast_object_list(box, src=first, group=self._group)
        return box[0]

    def _threshold(self) -> float | None:
        threshold = self._rule.threshold
        return None if threshold is None else self._metric.shown(threshold)

    def _close(self, value: float) -> Segment:
        """End the current segment; with the policy "bad", what is not finite becomes empty with value +inf."""
        segment = Segment(self._current, value, self._evaluated + 1, self._step)
        self._current = self._current.empty()
        if not math.isfinite(value):
            self._infinite.append(self._step)
            segment.value = value if self._metric.nan == "released" else math.inf
        bad = self._parameters.first_nonfinite(segment.mean) if self.variant == "paper" else None
        if bad is not None:
            self._dropped.append((segment.first, segment.last, self._parameters.label(bad)))
            segment.mean, segment.value = segment.mean.empty(), math.inf
        self._value = segment.value
        return segment

    def _chosen(self) -> Segment:
        """What the result is made of."""
        if self._evaluated < 0:
            raise RuntimeError(
                "There is no average yet: evaluate() has not been called. Call update() after every optimizer step and "
                "evaluate(validation_loss) now and then."
            )
        chosen = self._rule.chosen()
        if chosen is None:
            first, last, label = self._dropped[0]
            raise RuntimeError(
                f"There is no average: parameter {label} was already NaN or infinite between steps {first} and {last}, "
                "and no segment since has been finite. Training diverged; lower the learning rate."
            )
        if self.variant == "released":
            self._parameters.require_finite(chosen.mean)
        return chosen

    def _notes(self, segment: Segment) -> Iterator[str]:
        rule, shown = self._rule, self._metric.shown
        if rule.threshold is None:
            yield (
                f"Not converged: no window of {self.n_converge} evaluations began with its best value. The average is "
                f"over the last usable segment, steps {segment.first} to {segment.last}. Train longer or evaluate more "
                "often."
            )
        elif rule.stopped is None:
            if segment.last < self._evaluated:
                side = "above" if self._metric.direction == "min" else "below"
                yield (
                    f"Steps {segment.last + 1} to {self._evaluated} are left out: their evaluations were {side} the "
                    f"threshold {shown(rule.threshold):.6g}."
                )
            if rule.best - self._value > _STILL_FALLING * abs(rule.best):
                yield (
                    f"The value was still improving: {shown(self._value):.6g} at the last evaluation, "
                    f"{shown(rule.best):.6g} at the start step. Convergence was declared too early; raise n_converge "
                    "or evaluate less often."
                )
        if rule.stopped is None and self._step > self._evaluated:
            yield f"Steps {self._evaluated + 1} to {self._step} are left out: no evaluation followed them."
        if self._infinite:
            steps = ", ".join(map(str, self._infinite[:3])) + (", ..." if len(self._infinite) > 3 else "")
            how = "counted as bad" if self._metric.nan == "bad" else "were compared as the released code does"
            yield f"{len(self._infinite)} evaluation(s) were NaN or infinite (steps {steps}) and {how}."
        if self._dropped:
            first, last, label = self._dropped[0]
            yield (
                f"{len(self._dropped)} segment(s) held non-finite weights, were dropped and counted as bad "
                f"evaluations; the first is steps {first} to {last}, in parameter {label}."
            )

    def _config(self) -> dict[str, Any]:
        rule = {"n_converge": self.n_converge, "n_tolerance": self.n_tolerance, "variant": self.variant}
        return {**rule, **asdict(self._metric), "buffers": self._parameters.buffers}
