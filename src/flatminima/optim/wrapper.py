"""One identity with the wrapped optimiser: groups, state, defaults, hooks and checkpoint are the base's."""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
from collections.abc import Iterator, Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

_OWN = "sharpness_aware"  # begins the keys of a checkpoint that hold what a variant remembers; plain SAM has none
_SHARED_HOOKS = (
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


class Own(NamedTuple):
    """What a checkpoint holds besides the base's state.

    Attributes:
        plain: without tensors.
        vectors: for each parameter, by its place in the groups, tensors of its shape by name.
    """

    plain: dict[str, Any]
    vectors: dict[int, dict[str, Tensor]]


class Wrapper(torch.optim.Optimizer):
    """An optimiser around another one, with a radius ``rho`` in each parameter group."""

    def __init__(self, base_optimizer: torch.optim.Optimizer, rho: float) -> None:
        _check_base(base_optimizer)
        check_rho(rho)
        for group in base_optimizer.param_groups:
            check_rho(group.get("rho", rho))
        self.base = base_optimizer
        base_optimizer.defaults["rho"] = rho
        # Optimizer.__init__ starts from empty groups and state; hand it the base's and put the originals back.
        state, groups = base_optimizer.state, base_optimizer.param_groups
        super().__init__(groups, base_optimizer.defaults)
        base_optimizer.state, base_optimizer.param_groups = state, groups
        self._share_hooks()

    def _share_hooks(self) -> None:
        for hooks in _SHARED_HOOKS:
            setattr(self, hooks, getattr(self.base, hooks))

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimiser's groups, each with its own ``rho``."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base.param_groups = groups

    @property
    def state(self) -> Any:
        """The base optimiser's state."""
        return self.base.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base.state = state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base; its ``rho`` is this optimiser's unless it brings one."""
        if isinstance(param_group, dict):
            check_rho(param_group.get("rho", 0.0))
            check_minimises(param_group)
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The base optimiser's ``state_dict``; it holds no copy of the weights.

        What a variant remembers lies where ``torch.distributed.checkpoint`` looks: vectors, such as a running mean, in the
        state of their parameters as ``sharpness_aware_*``, NaN where there is none yet; the rest, such as a count of steps, in
        the groups as ``sharpness_aware``. The bare base ignores both; ``flatten_optimizer_state_dict=True`` leaves them out.
        """
        state = self.base.state_dict()
        own = self._own_state()
        for place, vectors in own.vectors.items():
            named_vectors = {f"{_OWN}_{name}": vector for name, vector in vectors.items()}
            state["state"][place] = {**state["state"].get(place, {}), **named_vectors}
        if own.plain:
            for group in state["param_groups"]:
                group[_OWN] = copy.deepcopy(own.plain)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this optimiser or of the bare base; groups without ``rho`` keep the present one.

        Raises:
            ValueError: it was saved by a variant that remembers something else. Nothing is changed then.
        """
        bare, own = _parted(state_dict)
        self._check_own_state(own)
        present = [group["rho"] for group in self.param_groups]
        with self._loading():
            self.base.load_state_dict(bare)
        for group, rho in zip(self.param_groups, present, strict=True):
            group.setdefault("rho", rho)
        self._load_own_state(own)

    def _own_state(self) -> Own:
        """What is saved besides the base's state."""
        return Own({}, {})

    def _check_own_state(self, own: Own) -> None:
        """Refuse what :meth:`_load_own_state` cannot take up."""

    def _load_own_state(self, own: Own) -> None:
        """Take up what :meth:`_own_state` gave, or nothing."""

    def _loading(self) -> contextlib.AbstractContextManager[Any]:
        """What the base's loading happens in."""
        return contextlib.nullcontext()

    def __getstate__(self) -> dict[str, Any]:
        """Everything but hooks and the patches of schedulers, which are functions of this process."""
        return {k: v for k, v in self.__dict__.items() if not k.startswith("_optimizer_") and k != "step"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share_hooks()


def _parted(state_dict: dict[str, Any]) -> tuple[dict[str, Any], Own]:
    """A checkpoint as the bare base would have saved it, and what was added to that."""
    groups = state_dict["param_groups"]
    places = {key: place for place, key in enumerate(key for group in groups for key in group["params"])}
    plain: dict[str, Any] = next((group[_OWN] for group in groups if _OWN in group), {})
    vectors: dict[int, dict[str, Tensor]] = {}
    state: dict[Any, Any] = {}
    for key, kept in state_dict["state"].items():
        mine = (
            {name: v for name, v in kept.items() if str(name).startswith(f"{_OWN}_")} if isinstance(kept, dict) else {}
        )
        if not mine:
            state[key] = kept
            continue
        if key in places:
            vectors[places[key]] = {name[len(_OWN) + 1 :]: v for name, v in mine.items()}
        if len(mine) < len(kept):
            state[key] = {name: v for name, v in kept.items() if name not in mine}
    bare_groups = [{name: v for name, v in group.items() if name != _OWN} for group in groups]
    return {**state_dict, "state": state, "param_groups": bare_groups}, Own(plain, vectors)


def named(groups: list[dict[str, Any]]) -> Iterator[tuple[str, Tensor]]:
    """Every parameter with the name it was given, or with its place."""
    for i, group in enumerate(groups):
        places = [f"parameter {j} of group {i}" for j in range(len(group["params"]))]
        names: Sequence[str] = group.get("param_names") or places
        yield from zip(names, group["params"], strict=True)


def check_rho(rho: Any) -> None:
    """Refuse what is no radius."""
    if isinstance(rho, bool) or not isinstance(rho, Real):
        raise ValueError(f"rho is the radius of a ball and must be a number, got {rho!r} ({type(rho).__name__})")
    if not (math.isfinite(rho) and float(rho) >= 0):
        raise ValueError(f"rho is the radius of a ball and must be finite and >= 0, got {rho}")


def check_minimises(group: dict[str, Any]) -> None:
    """Refuse a group that climbs: the worst point nearby would be the lowest."""
    if group.get("maximize"):
        raise ValueError(
            "the base has maximize=True, and the perturbation looks for a larger loss: minimise the negative instead"
        )


def _check_base(base: Any) -> None:
    if not isinstance(base, torch.optim.Optimizer):
        hint = " Build it first: SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.05)."
        given = base.__name__ if isinstance(base, type) else type(base).__name__
        raise TypeError(f"SAM wraps an optimiser instance, got {given}.{hint}")
    name = type(base).__name__
    if "rho" in base.defaults:
        raise ValueError(
            f"{name} already has a hyperparameter named rho: either a SAM wraps it already, "
            "then build a fresh optimiser, or it means something else by it, as Adadelta does, then wrap another kind"
        )
    for group in base.param_groups:
        check_minimises(group)
    closure = inspect.signature(type(base).step).parameters.get("closure")
    if isinstance(base, torch.optim.LBFGS) or (closure is not None and closure.default is inspect.Parameter.empty):
        raise TypeError(
            f"{name} evaluates the loss itself, as often as it likes, so that no single gradient is left to replace: "
            "wrap an optimiser whose step() needs no closure, such as SGD or AdamW"
        )
