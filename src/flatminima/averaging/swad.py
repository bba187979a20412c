"""Stochastic weight averaging, densely, over the valley the validation loss shows (SWAD).

The paper keeps a queue of models to decide afterwards where the valley ended. Since the end is "n_tolerance bad
evaluations in a row", everything up to the latest good evaluation can be committed at once. With
``n_converge <= n_tolerance`` and a threshold not below the valley's floor this is the paper's rule exactly, in at most
``max(3, n_converge)`` copies of the parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from flatminima.averaging.average import Mean, ModelOrParameters, ParameterSet

# A run whose value keeps falling after "convergence" was stopped by noise; 5 % is beyond the noise of a usable metric.
_STILL_FALLING = 0.95


@dataclass(frozen=True)
class SWADStatus:
    """Where the search for the valley stands after an evaluation.

    Attributes:
        converged: the start of the valley has been found.
        dead: its end has been found too; further updates change nothing and training can stop.
        start_step: first averaged step, or None before convergence.
        end_step: last averaged step so far, or None before convergence.
        threshold: the value above which an evaluation is bad, or None before convergence.
        step: the step this status describes; the first ``update()`` is step 0.
    """

    converged: bool
    dead: bool
    start_step: int | None
    end_step: int | None
    threshold: float | None
    step: int


@dataclass(frozen=True)
class SWADResult:
    """The average and how it came about.

    Attributes:
        tensors: the averaged parameters, float32 or wider.
        names: their names, or None where the parameters were given without names.
        start_step: first averaged step.
        end_step: last averaged step, itself included.
        n: number of averaged iterates: ``end_step - start_step + 1``, less those dropped as not finite.
        converged: False if no valley was found; the average is then over the last evaluated segment only.
        threshold: ``(1 + tolerance) * mean`` of the values that ended the search for the start, or None.
        detected_at: step of the evaluation that found the start, or None.
        stopped_at: step of the evaluation that found the end, or None.
        notes: what a careful reader of the result should know, in sentences.
    """

    tensors: tuple[Tensor, ...]
    names: tuple[str, ...] | None
    start_step: int
    end_step: int
    n: int
    converged: bool
    threshold: float | None
    detected_at: int | None
    stopped_at: int | None
    notes: tuple[str, ...]


@dataclass
class _Segment:
    """The iterates between two evaluations, both steps included, and the value at the later one."""

    mean: Mean
    value: float
    first: int
    last: int

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean.state_dict(), "value": self.value, "first": self.first, "last": self.last}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], like: list[Tensor]) -> _Segment:
        mean = Mean.from_state_dict(state["mean"], like)
        return cls(mean, float(state["value"]), int(state["first"]), int(state["last"]))


class SWAD:
    """Average every iterate from the bottom of the validation loss until it clearly rises.

    With values ``L_e`` at evaluations ``e``, ``N_s = n_converge``, ``N_e = n_tolerance`` and ``r = 1 + tolerance``:

    - start: the first window of ``N_s`` evaluations whose first value is its minimum (ties included). Averaging starts
      at the step of that first value, and the threshold is ``l = r * mean(window)``;
    - end: ``N_e`` evaluations in a row above ``l``. The last averaged step is that of the last evaluation ``<= l``,
      also where training ends before the rule fires;
    - result: ``(1/n) sum_t theta_t`` over all steps ``t`` from start to end, both included, one vote per step.

    The rule assumes a constant learning rate and a value that is positive and better when lower, measured on the
    weights being trained (not on the average) on held-out data of the training distribution. Where the paper is silent:
    a value that is NaN or infinite counts as ``+inf``; a segment (the steps between two evaluations) whose averaged
    weights are not finite is dropped and its evaluation counts as bad; without convergence the result is the mean of
    the last usable segment, ``converged=False``. In a distributed job give every process the same value.

    Args:
        model_or_params: a module, its parameters, or its ``named_parameters()``. Only trainable ones are averaged.
        n_converge: evaluations without a new minimum, itself included, that mark the start. At least 1.
        n_tolerance: bad evaluations in a row that mark the end. At least ``n_converge``.
        tolerance: how far above the window's mean a value may rise, as a fraction of it. At least 0.

    Raises:
        TypeError, ValueError: an argument is outside these ranges, or nothing is trainable.

    Cost: no gradient evaluation; one pass over the parameters per update; at most ``max(3, n_converge)`` float32
    copies of them, 2 after convergence while evaluations are good.

    Source: Cha et al., "SWAD: Domain Generalization by Seeking Flat Minima", NeurIPS 2021, arXiv:2102.08604,
    Algorithm 1. The released code differs (it gives segments, not iterates, one vote and counts some of them twice).

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
    ) -> None:
        _require_count("n_converge", n_converge)
        _require_count("n_tolerance", n_tolerance)
        if n_converge > n_tolerance:
            raise ValueError(
                f"n_converge={n_converge} is larger than n_tolerance={n_tolerance}. The end of the valley can only be "
                "judged over at least as many evaluations as its start: use n_converge <= n_tolerance."
            )
        if not (math.isfinite(tolerance) and tolerance >= 0):
            raise ValueError(f"tolerance={tolerance} must be a finite fraction >= 0, such as 0.3 for 30 %.")
        self.n_converge = n_converge
        self.n_tolerance = n_tolerance
        self.tolerance = float(tolerance)
        self._parameters = ParameterSet(model_or_params)
        self._step = -1
        self._evaluated = -1
        self._value = math.inf
        self._best = math.inf
        self._start: int | None = None
        self._end: int | None = None
        self._threshold: float | None = None
        self._detected: int | None = None
        self._stopped: int | None = None
        self._streak = 0
        self._current = Mean()  # iterates since the last evaluation
        self._valley = Mean()  # the lowest iterate; after convergence everything committed
        self._pending = Mean()  # after convergence: since the last good evaluation
        self._closed: list[_Segment] = []  # before convergence: segments after the lowest value
        self._previous: _Segment | None = None  # before convergence: what to fall back on while _closed holds nothing
        self._infinite: list[int] = []
        self._dropped: list[tuple[int, int, str]] = []

    def update(self) -> None:
        """Take in the current weights. Call it after every ``optimizer.step()``; the first call is step 0.

        Raises:
            RuntimeError: called inside ``swapped()``.
            ValueError: a parameter changed its shape or device.
        """
        self._parameters.require_not_swapped("update()")
        if self._stopped is None:
            self._current.add(self._parameters.tensors)
        self._step += 1

    def evaluate(self, value: float | Tensor) -> SWADStatus:
        """Take in the validation loss of the current weights, measured after the latest ``update()``.

        Args:
            value: positive, lower is better, for the weights being trained (not the average). NaN and infinities are
                allowed and count as ``+inf``.

        Returns:
            the status; training can stop once ``dead`` is true.

        Raises:
            RuntimeError: no ``update()`` since the last evaluation, or called inside ``swapped()``.
            ValueError: ``value`` is not one number or is ``<= 0``, or the model's parameters were replaced.
        """
        number = _number(value)
        self._parameters.require_not_swapped("evaluate()")
        if self._step == self._evaluated:
            since = "yet" if self._step < 0 else f"since the evaluation at step {self._step}"
            raise RuntimeError(
                f"There was no update() {since}. Call update() after every optimizer.step() and evaluate() after it; "
                "evaluating the same weights twice would count twice towards convergence."
            )
        self._parameters.require_unreplaced()
        if self._stopped is None:
            segment = self._close(number)
            if self._threshold is None:
                self._search(segment)
            else:
                self._extend(segment)
        self._evaluated = self._step
        return self.status

    @property
    def status(self) -> SWADStatus:
        """The status after the latest call."""
        found = self._threshold is not None
        return SWADStatus(
            converged=found,
            dead=self._stopped is not None,
            start_step=self._start if found else None,
            end_step=self._end,
            threshold=self._threshold,
            step=self._step,
        )

    def finalize(self) -> SWADResult:
        """The average of the valley found so far, copied; training and averaging may go on afterwards.

        Raises:
            RuntimeError: no evaluation yet, or every segment so far held non-finite weights.
        """
        segment = self._chosen()
        return SWADResult(
            tensors=tuple(tensor.clone() for tensor in segment.mean.tensors),
            names=self._parameters.names,
            start_step=segment.first,
            end_step=segment.last,
            n=segment.mean.n,
            converged=self._threshold is not None,
            threshold=self._threshold,
            detected_at=self._detected,
            stopped_at=self._stopped,
            notes=tuple(self._notes(segment)),
        )

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
            "best": self._best,
            "start": self._start,
            "end": self._end,
            "threshold": self._threshold,
            "detected": self._detected,
            "stopped": self._stopped,
            "streak": self._streak,
            "current": self._current.state_dict(),
            "valley": self._valley.state_dict(),
            "pending": self._pending.state_dict(),
            "closed": [segment.state_dict() for segment in self._closed],
            "previous": None if self._previous is None else self._previous.state_dict(),
            "infinite": list(self._infinite),
            "dropped": [list(entry) for entry in self._dropped],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state``, to the bit as if there had been no interruption.

        Raises:
            ValueError: the state has other settings or other parameters, or is not a SWAD state. Nothing is changed.
        """
        self._parameters.require_not_swapped("load_state_dict()")
        missing = sorted(self.state_dict().keys() - state.keys())
        if missing:
            raise ValueError(f"This is not a state saved by SWAD: it has no {', '.join(map(repr, missing))}.")
        if state["config"] != self._config():
            raise ValueError(
                f"The state was saved with {_settings(state['config'])}; this SWAD has {_settings(self._config())}. "
                "A rule cannot change halfway: construct SWAD with the saved settings."
            )
        self._parameters.require_state(state)
        like = self._parameters.tensors
        means = {name: Mean.from_state_dict(state[name], like) for name in ("current", "valley", "pending")}
        closed = [_Segment.from_state_dict(segment, like) for segment in state["closed"]]
        previous = None if state["previous"] is None else _Segment.from_state_dict(state["previous"], like)
        self._step, self._evaluated, self._streak = state["step"], state["evaluated"], state["streak"]
        self._value, self._best, self._threshold = state["value"], state["best"], state["threshold"]
        self._start, self._end = state["start"], state["end"]
        self._detected, self._stopped = state["detected"], state["stopped"]
        self._current, self._valley, self._pending = means["current"], means["valley"], means["pending"]
        self._closed, self._previous = closed, previous
        self._infinite = list(state["infinite"])
        self._dropped = [(first, last, label) for first, last, label in state["dropped"]]

    def _close(self, value: float) -> _Segment:
        """End the current segment; what is not finite becomes an empty segment with value +inf."""
        segment = _Segment(self._current, value, self._evaluated + 1, self._step)
        self._current = Mean()
        if not math.isfinite(value):
            self._infinite.append(self._step)
            segment.value = math.inf
        bad = segment.mean.first_nonfinite()
        if bad is not None:
            self._dropped.append((segment.first, segment.last, self._parameters.label(bad)))
            segment.mean, segment.value = Mean(), math.inf
        self._value = segment.value
        return segment

    def _search(self, segment: _Segment) -> None:
        """Before convergence: wait until the lowest value has stood for ``n_converge`` evaluations."""
        if segment.value < self._best:
            self._best, self._start = segment.value, segment.last
            self._closed, self._previous = [], segment
            self._valley.reset()
            self._valley.add(self._parameters.tensors)
        elif self._start is not None:
            self._closed.append(segment)
            if segment.mean.n:
                self._previous = None
        elif segment.mean.n:
            self._previous = segment
        if self._start is None or len(self._closed) < self.n_converge - 1:
            return
        window = [self._best, *(closed.value for closed in self._closed if math.isfinite(closed.value))]
        # The mean is never below the minimum; its rounding may be, and would make the valley's own floor "bad".
        self._threshold = max(self._best, (1.0 + self.tolerance) * math.fsum(window) / len(window))
        self._detected, self._end = segment.last, self._start
        closed, self._closed, self._previous = self._closed, [], None
        for later in closed:
            self._extend(later)

    def _extend(self, segment: _Segment) -> None:
        """After convergence: commit everything up to a good evaluation, keep it pending over a bad one."""
        assert self._threshold is not None
        if segment.value <= self._threshold:
            self._valley.merge(self._pending)
            self._valley.merge(segment.mean)
            self._pending = Mean()
            self._end, self._streak = segment.last, 0
            return
        self._streak += 1
        if self._streak == self.n_tolerance:
            self._pending, self._stopped = Mean(), segment.last
        elif self._pending.n:
            self._pending.merge(segment.mean)
        else:
            self._pending = segment.mean

    def _chosen(self) -> _Segment:
        """What the result is made of: the valley, or without convergence the last usable segment."""
        if self._evaluated < 0:
            raise RuntimeError(
                "There is no average yet: evaluate() has not been called. Call update() after every optimizer step and "
                "evaluate(validation_loss) now and then."
            )
        if self._threshold is not None and self._start is not None and self._end is not None:
            return _Segment(self._valley, self._best, self._start, self._end)
        usable = [segment for segment in (self._previous, *self._closed) if segment is not None and segment.mean.n]
        if not usable:
            first, last, label = self._dropped[0]
            raise RuntimeError(
                f"There is no average: parameter {label} was already NaN or infinite between steps {first} and {last}, "
                "and no segment since has been finite. Training diverged; lower the learning rate."
            )
        return usable[-1]

    def _notes(self, segment: _Segment) -> Iterator[str]:
        value = f"{self._value:.6g}"
        if self._threshold is None:
            yield (
                f"Not converged: no window of {self.n_converge} evaluations began with its minimum. The average is "
                f"over the last usable segment, steps {segment.first} to {segment.last}. Train longer or evaluate more "
                "often."
            )
        elif self._stopped is None:
            if segment.last < self._evaluated:
                yield (
                    f"Steps {segment.last + 1} to {self._evaluated} are left out: their evaluations were above the "
                    f"threshold {self._threshold:.6g}."
                )
            if self._value < _STILL_FALLING * self._best:
                yield (
                    f"The value was still falling: {value} at the last evaluation, {self._best:.6g} at the start "
                    "step. Convergence was declared too early; raise n_converge or evaluate less often."
                )
        if self._stopped is None and self._step > self._evaluated:
            yield f"Steps {self._evaluated + 1} to {self._step} are left out: no evaluation followed them."
        if self._infinite:
            steps = ", ".join(map(str, self._infinite[:3])) + (", ..." if len(self._infinite) > 3 else "")
            yield f"{len(self._infinite)} evaluation(s) were NaN or infinite (steps {steps}) and counted as +inf."
        if self._dropped:
            first, last, label = self._dropped[0]
            yield (
                f"{len(self._dropped)} segment(s) held non-finite weights, were dropped and counted as bad "
                f"evaluations; the first is steps {first} to {last}, in parameter {label}."
            )

    def _config(self) -> dict[str, Any]:
        return {"n_converge": self.n_converge, "n_tolerance": self.n_tolerance, "tolerance": self.tolerance}


def _require_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, a number of evaluations; got {value!r}.")
    if value < 1:
        raise ValueError(f"{name}={value} must be at least 1 evaluation.")


def _number(value: float | Tensor) -> float:
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"evaluate() takes one number, got a tensor of shape {tuple(value.shape)}. Reduce it first.")
    number = float(value)
    if math.isfinite(number) and number <= 0:
        raise ValueError(
            f"evaluate() got {number}, but the threshold (1 + tolerance) * mean means something only for values > 0 "
            "where lower is better. Pass a loss such as cross-entropy, or the error rate instead of the accuracy."
        )
    return number


def _settings(config: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in config.items())
