"""Single-precision masters of half-precision parameters.

Near 0.03 neighbouring bfloat16 numbers are 1e-4 apart: a perturbation of 5e-5 or an update of 1e-5 rounds to nothing. So
perturbation and update are made on a float32 copy, the master, and the parameter is the master rounded. The low bits of a
master are as good as random after some steps, and then the rounded parameters move by the perturbation on average
(as with stochastic rounding) instead of staying where they are.

Memory, in bytes per half-precision parameter: 4 for the master, kept and saved; 4 for the clean values and 4 for the
gradient in passing; and the base optimiser keeps its state in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flatminima.vectors import local

_HALF = (torch.float16, torch.bfloat16)


class Masters:
    """The masters of one optimiser's half-precision parameters; its other parameters are their own.

    The base optimiser's groups and state belong to the parameters. While the base steps or loads, the masters stand in for
    them (:meth:`in_base`), so that its state is made, and its arithmetic done, in float32.

    Args:
        base: its groups may grow later.

    Attributes:
        followed: the parameters were compared with their masters already in this step.
    """

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self._base = base
        self._masters: dict[Tensor, Tensor] = {}
        self.followed = False
        self.of([p for group in base.param_groups for p in group["params"]])

    def of(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """The masters of these parameters, made when they are first asked for."""
        return [self._master(p) for p in parameters]

    @torch.no_grad()
    def follow(self, parameters: Sequence[Tensor]) -> None:
        """Take over what was done to the parameters from outside, such as loading a checkpoint into the model."""
        if self.followed:
            return
        self.followed = True
        pairs = [(p, m) for p, m in self._pairs(parameters) if p.numel()]
        if not pairs:
            return
        differences = [m.to(p.dtype).sub_(p) for p, m in pairs]
        largest = torch.stack([d.abs().max().to(differences[0].device) for d in differences])
        changed = (largest != 0).tolist()  # so is NaN
        for (p, m), flag in zip(pairs, changed, strict=True):
            if flag:
                m.copy_(torch.where(m.to(p.dtype) == p, m, p.float()))

    @torch.no_grad()
    def publish(self, parameters: Sequence[Tensor]) -> None:
        """Round the masters into these parameters."""
        pairs = self._pairs(parameters)
        if pairs:
            torch._foreach_copy_([p for p, _ in pairs], [m for _, m in pairs])

    @contextmanager
    def in_base(
        self, parameters: Sequence[Tensor] = (), gradients: Sequence[Tensor] = ()
    ) -> Iterator[torch.optim.Optimizer]:
        """Within the block the base's groups and state hold the masters, with these gradients."""
        base, stood_in = self._base, [group["params"] for group in self._base.param_groups]
        back: dict[Tensor, Tensor] = {}
        for group in base.param_groups:
            masters = self.of(group["params"])
            back |= {m: p for p, m in zip(group["params"], masters, strict=True) if m is not p}
            group["params"] = masters
        for m, p in back.items():
            if p in base.state:
                base.state[m] = base.state.pop(p)
        for p, g in zip(parameters, gradients, strict=True):
            if self._master(p) is not p:
                self._master(p).grad = _like(g, p)
        try:
            yield base
        finally:
            for group, params in zip(base.param_groups, stood_in, strict=True):
                group["params"] = params
            for m, p in back.items():
                m.grad = None
                if m in base.state:
                    base.state[p] = base.state.pop(m)

    def state_dict(self, index: Mapping[Tensor, int]) -> dict[int, Tensor]:
        """A copy of the masters, by the place of their parameters."""
        return {index[p]: m.detach().clone() for p, m in self._masters.items() if m is not p and p in index}

    def load_state_dict(self, state: Mapping[Any, Tensor], parameters: Sequence[Tensor]) -> None:
        """Take these masters (what this rank holds of them).

        Where one is missing, or is of another parameter value, the parameter decides.
        """
        self._masters = {}
        saved = {int(i): m for i, m in state.items()}
        with torch.no_grad():
            for i, p in enumerate(parameters):
                if i in saved and self._master(p) is not p:
                    local(self._master(p).detach()).copy_(saved[i])
        self.followed = False

    def _master(self, p: Tensor) -> Tensor:
        if p not in self._masters:
            self._masters[p] = nn.Parameter(p.detach().float()) if p.dtype in _HALF else p
            if p.dtype in _HALF and p in self._base.state:
                state = self._base.state[p]  # of steps that the base made before it was wrapped
                for name, value in state.items():
                    if isinstance(value, Tensor) and value.dtype == p.dtype and value.shape == p.shape:
                        state[name] = value.float()
        return self._masters[p]

    def _pairs(self, parameters: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """What this rank holds of the half-precision parameters, and of their masters."""
        pairs = zip(parameters, self.of(parameters), strict=True)
        return [(local(p), local(m.detach())) for p, m in pairs if m is not p]


def _like(gradient: Tensor, parameter: Tensor) -> Tensor:
    """The gradient as the master of a sharded parameter needs it: sharded too."""
    if not hasattr(parameter, "device_mesh"):
        return gradient
    assert parameter.grad is not None
    whole: Tensor = parameter.grad.float()
    local(whole).copy_(gradient)
    return whole
