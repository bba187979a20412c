"""Closures: what ``step`` was given, and one evaluation of it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flatminima.optim.scaling import Scaling
from flatminima.sharding import local

Closure = Callable[[], Tensor]


@dataclass(frozen=True)
class Work:
    """What the caller of ``step`` wants evaluated.

    Attributes:
        closures: one per micro-batch.
        weights: of their losses and gradients.
        scaler: an enabled ``GradScaler`` and whom it scales for, or None.
    """

    closures: list[Closure]
    weights: list[float]
    scaler: Scaling | None = None

    @classmethod
    def checked(cls, closure: object, weights: Sequence[float] | None, scaler: Scaling | None = None) -> Work:
        """From the arguments of ``step``; equal weights unless given.

        Raises:
            TypeError, ValueError: no closure, something else, or weights that do not fit.
        """
        if closure is None:
            raise ValueError(
                "the loss is evaluated more than once: call step(closure) with a closure that returns the loss"
            )
        closures: list[Any] = list(closure) if isinstance(closure, list | tuple) else [closure]
        for each in closures:
            if not callable(each):
                raise TypeError(
                    f"a closure is a function without arguments that returns the loss, got {type(each).__name__}"
                )
        if not closures:
            raise ValueError("got an empty list of closures: give one closure per micro-batch")
        if weights is None:
            shares = [1 / len(closures)] * len(closures)
        elif len(weights) != len(closures):
            raise ValueError(
                f"got {len(closures)} closures and {len(weights)} weights; expected one weight per closure"
            )
        else:
            shares = [float(w) for w in weights]
            if not all(math.isfinite(w) and w >= 0 for w in shares) or sum(shares) == 0:
                raise ValueError(f"weights of closures must be finite, >= 0 and not all zero, got {list(weights)}")
        return cls(closures, shares, scaler)


def only_initialises(closure: object, groups: Sequence[dict[str, Any]]) -> bool:
    """Whether a step without a closure can change nothing but make the optimiser's state.

    So ``torch.distributed.checkpoint`` calls it: with every learning rate and every gradient zero.
    """
    return (
        closure is None
        and all(float(group.get("lr", 0.0)) == 0 for group in groups)
        and all(p.grad is not None and not local(p.grad).any() for g in groups for p in g["params"] if p.requires_grad)
    )


def outside_inference_mode() -> contextlib.AbstractContextManager[Any]:
    """Where a step has to happen: what is made in inference mode, such as momentum, can be written to nowhere else."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext()


def evaluate(
    closure: Closure,
    parameters: Sequence[Tensor],
    scaler: Scaling | None = None,
    backward_seen: Callable[[], bool] | None = None,
) -> Tensor:
    """Loss and gradients of one closure; gradients are None before.

    An ordinary closure calls ``backward`` itself. One that leaves no gradient and returns a loss with a graph is the short
    form, and ``backward`` is called here. Anything else is refused.

    Args:
        closure: see above.
        parameters: whose gradients are wanted.
        scaler: scales the loss of the short form.
        backward_seen: tells whether the closure called ``backward``, where that does not show in ``.grad``.
    """
    for p in parameters:
        p.grad = None
    with torch.enable_grad():
        loss = closure()
        if not isinstance(loss, Tensor):
            raise ValueError(
                f"the closure must return the loss, got {type(loss).__name__}; expected a tensor with one entry"
            )
        if loss.numel() != 1:
            raise ValueError(
                f"the closure must return the loss, got shape {tuple(loss.shape)}; expected a tensor with one entry"
            )
        seen = backward_seen() if backward_seen is not None else any(p.grad is not None for p in parameters)
        if not seen:
            if not loss.requires_grad:
                raise ValueError(
                    "the closure returned a loss without gradient and computed none for the optimiser's parameters: compute "
                    "the loss inside the closure, from the model, with gradients enabled, and call backward or leave it out"
                )
            try:
                (loss if scaler is None else scaler.scale(loss)).backward()
            except RuntimeError as error:
                if "second time" not in str(error):
                    raise  # else the closure did call backward, and these parameters had no part in it
    return loss.detach()
