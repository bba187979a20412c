"""Maps of the parameters that change no prediction: what they are made of.

Small pieces, from the inside out:

* an **action** says how some named tensors of a model change (`actions.py`);
* a **site** is one place in one network where a symmetry acts; it turns random numbers into actions (`sites.py`);
* a **symmetry** is all sites of one kind; it draws **members**, which are applied to a model and can be proved (`proof.py`).

A new kind of symmetry is a line in `kinds.py` and a finder, ``find(network) -> Findings``, listed in ``FINDERS`` in
``search.py``. Nothing is trusted because a finder proposed it: `find_symmetries` keeps only what passes `prove`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from flatminima.objective import unwrapped

from .actions import Action
from .kinds import HESSIAN_LAWS, KINDS, Form, Preserves

EXACT = 1e-9
"""Largest relative change of an output, in float64, of a map that is called function preserving."""

APPROXIMATE = 1e-2
"""The same for maps that are exact only without the ``eps`` of a normalisation; their measured change is always given."""


@dataclass(frozen=True, eq=False)
class Member:
    """One map ``theta -> theta'`` out of a symmetry, ready to be applied to a model.

    The arithmetic is float64 and every tensor is rounded once, to its own dtype.

    Attributes:
        kind: of the symmetry.
        description: one line for people.
        actions: what happens, in this order.
        preserves: what stays, see `kinds.Kind`.
        class_axis: of the outputs, for those kinds that do not preserve them all.
        tolerance: of the proof.
        form: of the map, see `kinds`.

    Example:
        >>> import torch
        >>> from flatminima.symmetries import Scale
        >>> double = Member("example", "doubles every weight", (Scale("weight", torch.tensor(2.0).double()),))
        >>> layer = torch.nn.Linear(2, 1)
        >>> bool((double.apply(layer).weight == 2 * layer.weight).all())
        True
    """

    kind: str
    description: str
    actions: tuple[Action, ...]
    preserves: Preserves = "outputs"
    class_axis: int = -1
    tolerance: float = EXACT
    form: Form = "linear"

    def apply(self, model: nn.Module) -> nn.Module:
        """A transformed deep copy of `model`; see `apply_`."""
        transformed = copy.deepcopy(model)
        self.apply_(transformed)
        return transformed

    def apply_(self, model: nn.Module) -> None:
        """Transform `model` in place: same tensors, same dtypes, new values.

        Raises:
            ValueError: the model lacks a tensor that the map changes, or has it with another shape.
            OverflowError: a new value does not fit the tensor's dtype.
            Nothing is written in either case.
        """
        tensors = self._tensors(model)
        with torch.no_grad():
            changed = self._changed({name: _double(tensor) for name, tensor in tensors.items()})
            rounded = {name: value.to(tensors[name].dtype) for name, value in changed.items()}
            for name, value in rounded.items():
                if bool((~value.isfinite() & tensors[name].isfinite().to(value.device)).any()):
                    raise OverflowError(
                        f"this {self.kind} moves '{name}' out of the range of {value.dtype}: "
                        "draw a member with a smaller max_scale, or convert the model to a wider dtype"
                    )
            for name, value in rounded.items():
                tensors[name].copy_(value)

    def inverse(self) -> Member:
        """The member that undoes this one, up to rounding."""
        actions = tuple(action.inverse() for action in reversed(self.actions))
        return replace(self, description=f"inverse of: {self.description}", actions=actions)

    def linear_part(self, model: nn.Module, vectors: Tensor) -> Tensor:
        """``D v`` of an affine map ``theta' = D theta + t``, for directions in the space of the parameters.

        Args:
            model: the network that the symmetry was found in.
            vectors: (n,) or (n, k), in the order of ``model.parameters()``; any floating-point dtype.

        Returns:
            float64, of the same shape. Buffers (running statistics) are no parameters: they move along with the map, and
            the law ``H' = D^-T H D^-1`` holds for the loss as a function of the parameters alone.

        Raises:
            ValueError: wrong length, or the map is not affine.

        Example:
            >>> import torch
            >>> from flatminima.symmetries import Scale
            >>> twice = Member("example", "", (Scale("weight", torch.tensor(2.0).double()),))
            >>> twice.linear_part(torch.nn.Linear(2, 1), torch.ones(3)).tolist()       # weight (2), bias (1)
            [2.0, 2.0, 1.0]
        """
        if self.form not in ("linear", "affine"):
            raise ValueError(f"this {self.kind} is {self.form}: it has no linear part")
        inner = unwrapped(model)[0]
        parameters = dict(inner.named_parameters())
        sizes = [p.numel() for p in parameters.values()]
        if vectors.ndim not in (1, 2) or vectors.shape[0] != sum(sizes):
            raise ValueError(
                f"vectors have shape {tuple(vectors.shape)}; expected ({sum(sizes)},) or ({sum(sizes)}, k)"
            )
        # A tensor with several names is changed under the one that the action uses.
        first = {id(p): name for name, p in parameters.items()}
        own = {name: first[id(p)] for name, p in inner.named_parameters(remove_duplicate=False)}
        tensors = {name: _double(tensor) for name, tensor in self._tensors(model).items()}
        still = self._changed({n: torch.zeros_like(t) if n in own else t for n, t in tensors.items()})
        columns = []
        for column in vectors.detach().double().cpu().reshape(sum(sizes), -1).unbind(1):
            pieces = {
                name: piece.reshape(p.shape)
                for (name, p), piece in zip(parameters.items(), column.split(sizes), strict=True)
            }
            moved = self._changed({n: pieces[own[n]] if n in own else t for n, t in tensors.items()})
            for name in moved.keys() & own.keys():
                pieces[own[name]] = moved[name] - still[name]
            columns.append(torch.cat([piece.reshape(-1) for piece in pieces.values()]))
        return torch.stack(columns, 1).reshape(vectors.shape)

    def _tensors(self, model: nn.Module) -> dict[str, Tensor]:
        inner = unwrapped(model)[0]
        tensors: dict[str, Tensor] = dict(inner.named_parameters(remove_duplicate=False))
        tensors |= dict(inner.named_buffers(remove_duplicate=False))
        needed = list(dict.fromkeys(name for action in self.actions for name in action.names))
        missing = sorted(set(needed) - tensors.keys())
        if missing:
            raise ValueError(
                f"this {self.kind} changes {', '.join(map(repr, missing))}, unknown to {type(inner).__name__}; "
                "find the symmetries of this model first"
            )
        return {name: tensors[name] for name in needed}

    def _changed(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        changed: dict[str, Tensor] = {}
        for action in self.actions:
            update = action(values)
            values = values | update
            changed |= update
        return changed


class Site(Protocol):
    """One place in one network where a symmetry acts."""

    @property
    def name(self) -> str:
        """For people: the layers involved, e.g. ``'fc1 -> fc2'``."""
        ...

    def sample(self, generator: torch.Generator, max_scale: float) -> tuple[Action, ...]:
        """The actions of one random map at this site, of size at most `max_scale` (2 is mild, 20 is strong)."""
        ...


@dataclass(frozen=True, repr=False)
class Symmetry:
    """A family of function-preserving maps of one kind, over all its sites in one network.

    Args:
        kind: the name under which measures declare their invariance, e.g. ``'relu-unit-rescaling'``.
        law: what the maps do to the parameters, in one line.
        places: the sites; `sites` gives their names.
        preserves: ``'outputs'``, ``'probabilities'`` or ``'predictions'``, see `kinds.Kind`.
        form: of the maps: ``'linear'``, ``'affine'``, ``'nonlinear'`` or ``'conditional'``, see `kinds`.
        orthogonal: whether the linear part of every map is orthogonal.
        exact: False if the function is preserved up to the ``eps`` of a normalisation only.
        class_axis: of the outputs, for kinds that do not preserve them all.
    """

    kind: str
    law: str
    places: tuple[Site, ...]
    preserves: Preserves = "outputs"
    form: Form = "linear"
    orthogonal: bool = False
    exact: bool = True
    class_axis: int = -1

    @staticmethod
    def of(kind: str, places: Iterable[Site], **changes: object) -> Symmetry:
        """A symmetry of a known kind with what `KINDS` says about it; `changes` where one network differs from that."""
        known = KINDS[kind]
        given = {
            "preserves": known.preserves, "form": known.form, "orthogonal": known.orthogonal, "exact": known.exact,
        } | changes  # fmt: skip
        return Symmetry(kind, known.law, tuple(places), **given)  # type: ignore[arg-type]

    @property
    def sites(self) -> tuple[str, ...]:
        """The names of the places, for people."""
        return tuple(place.name for place in self.places)

    @property
    def linear(self) -> bool:
        """Whether every map is ``theta' = D theta``, so that ``H' = D^-T H D^-1`` without an offset."""
        return self.form == "linear"

    @property
    def hessian_law(self) -> str:
        """What follows for gradient and Hessian of a loss of what is preserved, in one line."""
        if self.preserves == "predictions":
            return "no law: the loss is another one"
        law = HESSIAN_LAWS[self.form, self.orthogonal]
        return law if self.exact else f"{law}, up to eps"

    def __repr__(self) -> str:
        return f"Symmetry(kind={self.kind!r}, sites={self.sites!r})"

    def member(self, generator: torch.Generator, max_scale: float = 20.0) -> Member:
        """A random member that acts at every site at once.

        Args:
            generator: the only source of randomness; the same state gives the same member.
            max_scale: the size of the map, finite and above 1; scales are log-uniform in ``[1/max_scale, max_scale]``, matrices
                have such singular values, shifts are up to ``log(max_scale)`` typical weights.

        Example:
            >>> import torch
            >>> from flatminima.symmetries import find_symmetries, prove
            >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
            >>> found = {symmetry.kind: symmetry for symmetry in find_symmetries(net, torch.randn(5, 4)).found}
            >>> unit = found["relu-unit-rescaling"]
            >>> unit.sites
            ('0 -> 2',)
            >>> prove(net, unit.member(torch.Generator().manual_seed(0)), torch.randn(5, 4)).preserved
            True
        """
        if not (math.isfinite(max_scale) and max_scale > 1):
            raise ValueError(f"max_scale is {max_scale}; expected a finite number above 1, e.g. 20")
        actions = tuple(action for place in self.places for action in place.sample(generator, max_scale))
        where = f"{len(self.places)} site{'s' if len(self.places) != 1 else ''}"
        description = f"{self.kind} at {where}, scales in [1/{max_scale:g}, {max_scale:g}]"
        tolerance = EXACT if self.exact else APPROXIMATE
        return Member(self.kind, description, actions, self.preserves, self.class_axis, tolerance, self.form)


@dataclass(frozen=True)
class FalseFriend:
    """A map that looks like a symmetry and is none: proposed all the same, so that the proof refuses it with a number.

    Attributes:
        site: the layer, for people.
        symmetry: the map.
        reason: why it is none.
    """

    site: str
    symmetry: Symmetry
    reason: str


@dataclass(frozen=True)
class Findings:
    """What one finder has to say: symmetries it proposes, and (site, reason) for the places it had to refuse."""

    proposed: tuple[Symmetry, ...] = ()
    rejected: tuple[tuple[str, str], ...] = ()
    false_friends: tuple[FalseFriend, ...] = ()


def _double(tensor: Tensor) -> Tensor:
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).detach().double()
