"""Maps of the parameters that change no prediction: what they are made of, and the proof that they change none.

Three small pieces, from the inside out:

* an **action** says how some named tensors of a model change (`Scale` multiplies one tensor by a factor);
* a **site** is one place in one network where a symmetry acts; it turns random numbers into actions;
* a **symmetry** is all sites of one kind; it draws **members**, which are applied to a model and can be proved.

A new kind of symmetry is one file with a finder, ``find(network) -> Findings`` (see `graph.Network`), listed in
``FINDERS`` in ``__init__.py``. A kind that multiplies entries of tensors by powers of unit scales needs no class of
its own: it describes its sites with `Rescaling`. Any other kind (permutations, matrices, shifts) writes its own
`Action` and `Site`. Nothing is trusted because a finder proposed it: `find_symmetries` keeps only what passes `prove`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn


class Action(Protocol):
    """A change of some named tensors (parameters or buffers) of a model."""

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors that the action reads or changes, by their names in the model."""
        ...

    def __call__(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The new values of the tensors that change; `values` holds all of `names` in float64 and is left untouched.

        Raises ValueError where a value does not have the shape that the action was made for.
        """
        ...

    def inverse(self) -> Action:
        """The action that undoes this one."""
        ...


@dataclass(frozen=True, eq=False)
class Scale:
    """``tensor -> factor * tensor``, entry by entry.

    Args:
        name: the tensor, by its name in the model.
        factor: nonzero float64 tensor that broadcasts to the tensor's shape.
    """

    name: str
    factor: Tensor

    @property
    def names(self) -> tuple[str, ...]:
        """The one tensor that changes."""
        return (self.name,)

    def __call__(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The scaled tensor; ValueError where the factor does not fit its shape."""
        value = values[self.name]
        fits = self.factor.ndim <= value.ndim and all(
            f in (1, v) for f, v in zip(reversed(self.factor.shape), reversed(value.shape), strict=False)
        )
        if not fits:
            raise ValueError(
                f"'{self.name}' has shape {tuple(value.shape)}, but this symmetry scales it by a factor of shape "
                f"{tuple(self.factor.shape)}: it was found in a different network; find the symmetries of this one"
            )
        return {self.name: value * self.factor.to(value.device)}

    def inverse(self) -> Scale:
        """Division by the same factor."""
        return Scale(self.name, 1.0 / self.factor)


@dataclass(frozen=True, eq=False)
class Member:
    """One map ``theta -> theta'`` out of a symmetry, ready to be applied to a model.

    The arithmetic is float64 and every tensor is rounded once, to its own dtype.

    Example:
        >>> import torch
        >>> double = Member("example", "doubles every weight", (Scale("weight", torch.tensor(2.0).double()),))
        >>> layer = torch.nn.Linear(2, 1)
        >>> bool((double.apply(layer).weight == 2 * layer.weight).all())
        True
    """

    kind: str
    description: str
    actions: tuple[Action, ...]

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
        tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        tensors |= dict(model.named_buffers(remove_duplicate=False))
        missing = sorted({name for action in self.actions for name in action.names} - tensors.keys())
        if missing:
            raise ValueError(
                f"this {self.kind} changes {', '.join(map(repr, missing))}, unknown to {type(model).__name__}; "
                "find the symmetries of this model first"
            )
        with torch.no_grad():
            values = {name: _double(tensors[name]) for action in self.actions for name in action.names}
            changed: dict[str, Tensor] = {}
            for action in self.actions:
                update = action(values)
                values |= update
                changed |= update
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
        return Member(self.kind, f"inverse of: {self.description}", actions)


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
        law: what the maps do to parameters, gradient and Hessian, in one line.
        places: the sites; `sites` gives their names.
    """

    kind: str
    law: str
    places: tuple[Site, ...]

    @property
    def sites(self) -> tuple[str, ...]:
        """The names of the places, for people."""
        return tuple(place.name for place in self.places)

    def __repr__(self) -> str:
        return f"Symmetry(kind={self.kind!r}, sites={self.sites!r})"

    def member(self, generator: torch.Generator, max_scale: float = 20.0) -> Member:
        """A random member that acts at every site at once.

        Args:
            generator: the only source of randomness; the same state gives the same member.
            max_scale: the size of the map, finite and above 1; scales are log-uniform in ``[1/max_scale, max_scale]``.

        Example:
            >>> import torch
            >>> from flatminima.symmetries import find_symmetries, prove
            >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
            >>> layer, unit = find_symmetries(net, torch.randn(5, 4)).found
            >>> unit.sites
            ('0 -> 2',)
            >>> prove(net, unit.member(torch.Generator().manual_seed(0)), torch.randn(5, 4)).preserved
            True
        """
        if not (math.isfinite(max_scale) and max_scale > 1):
            raise ValueError(f"max_scale is {max_scale}; expected a finite number above 1, e.g. 20")
        actions = tuple(action for place in self.places for action in place.sample(generator, max_scale))
        where = f"{len(self.places)} site{'s' if len(self.places) != 1 else ''}"
        return Member(self.kind, f"{self.kind} at {where}, scales in [1/{max_scale:g}, {max_scale:g}]", actions)


@dataclass(frozen=True, eq=False)
class Entries:
    """How the entries of one tensor follow the scales of a site: ``entry -> d[unit of the entry] ** power * entry``.

    Args:
        name: the tensor, by its name in the model.
        unit: int64 tensor that broadcasts to the tensor's shape: the unit that each entry belongs to.
        power: +1 where a unit is written, -1 where it is read by a layer that is linear in it.
    """

    name: str
    unit: Tensor
    power: int


def log_uniform(generator: torch.Generator, max_scale: float, units: int) -> Tensor:
    """One positive scale per unit, log-uniform in ``[1/max_scale, max_scale]``: shape (units,), float64, on the CPU."""
    uniform = torch.rand(units, generator=generator, device=generator.device, dtype=torch.float64).cpu()
    return torch.exp((2.0 * uniform - 1.0) * math.log(max_scale))


def log_uniform_shared(generator: torch.Generator, max_scale: float, units: int) -> Tensor:
    """One positive scale for all units, log-uniform in ``[1/max_scale, max_scale]``: shape (units,), float64, CPU."""
    return log_uniform(generator, max_scale, 1).expand(units)


@dataclass(frozen=True, eq=False)
class Rescaling:
    """A site of a diagonal symmetry ``theta' = D theta``: every entry is multiplied by a power of its unit's scale.

    If ``f(D theta) = f(theta)`` for every theta then ``g' = D^-1 g`` and ``H' = D^-1 H D^-1``.

    Args:
        name: for people, e.g. ``'fc1 -> fc2'``.
        units: how many units the site has.
        entries: the tensors that change.
        draw: (generator, max_scale, units) -> scales (units,), e.g. `log_uniform`.
    """

    name: str
    units: int
    entries: tuple[Entries, ...]
    draw: Callable[[torch.Generator, float, int], Tensor]

    def sample(self, generator: torch.Generator, max_scale: float) -> tuple[Action, ...]:
        """The actions for scales drawn at random."""
        return self.actions(self.draw(generator, max_scale, self.units))

    def actions(self, scales: Tensor) -> tuple[Action, ...]:
        """The actions for given nonzero scales, shape (units,)."""
        if scales.shape != (self.units,):
            raise ValueError(f"site '{self.name}' has {self.units} units; got scales of shape {tuple(scales.shape)}")
        scales = scales.double()
        return tuple(Scale(e.name, scales[e.unit] ** e.power) for e in self.entries)


@dataclass(frozen=True)
class Findings:
    """What one finder has to say: symmetries it proposes, and (site, reason) for the places it had to refuse."""

    proposed: tuple[Symmetry, ...]
    rejected: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Proof:
    """The outcome of `prove`: ``max_change = max |output' - output| / max |output|``, in float64."""

    kind: str
    max_change: float
    tolerance: float = 1e-9

    @property
    def preserved(self) -> bool:
        """Whether the outputs agree within the tolerance."""
        return self.max_change <= self.tolerance


def prove(model: nn.Module, member: Member, inputs: Tensor) -> Proof:
    """Compare the outputs of a model with those of its image under `member`.

    Both are copies in float64 and evaluation mode, on the model's device (on the CPU where the device has no float64),
    and both see the same random numbers. Neither the model nor the global random state changes. The proof speaks about
    these inputs and these weights: a path that they leave unused (a layer of zeros) is not put to the test.

    Args:
        model: any module that returns one tensor.
        member: from `Symmetry.member`.
        inputs: a batch, as the model takes it; floating-point inputs are converted to float64.

    Raises:
        TypeError: the model does not return one float64 tensor when it is converted to float64.
        ValueError: the model's own output is empty or not finite, so that nothing can be compared.

    Cost: two forward passes, no gradient.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> wrong = Member("example", "rescales the weight, forgets the rest", (Scale("0.weight", torch.tensor(2.0)),))
        >>> prove(net, wrong, torch.randn(5, 4)).preserved
        False
    """
    before = _float64_output(model, None, inputs)
    if before.numel() == 0 or not bool(before.isfinite().all()):
        what = "empty" if before.numel() == 0 else "not finite"
        raise ValueError(f"the model's output on these inputs is {what}: give inputs on which it can be compared")
    after = _float64_output(model, member, inputs)
    if after.shape != before.shape or not bool(after.isfinite().all()):
        return Proof(member.kind, math.inf)
    change, size = float((after - before).abs().max()), float(before.abs().max())
    return Proof(member.kind, change / size if size > 0 else (0.0 if change == 0 else math.inf))


def _float64_output(model: nn.Module, member: Member | None, inputs: Tensor) -> Tensor:
    twin = copy.deepcopy(model)
    first = next(iter(twin.parameters()), inputs)
    device = torch.device("cpu") if first.device.type == "mps" else first.device  # mps has no float64
    twin = twin.to(device).double().eval()
    if member is not None:
        member.apply_(twin)
    inputs = inputs.to(device=device, dtype=torch.float64 if inputs.is_floating_point() else inputs.dtype)
    with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        # A model may work on its input in place; the other twin must see the original.
        output = twin(inputs.clone())
    if not isinstance(output, Tensor):
        raise TypeError(f"{type(model).__name__} returns {type(output).__name__}; expected one tensor, e.g. the logits")
    if output.dtype != torch.float64:
        raise TypeError(
            f"{type(model).__name__} returns {output.dtype} although it was converted to float64: it fixes a dtype "
            "inside, so that rounding cannot be told from a change of function; let it follow the dtype of its weights"
        )
    return output


def _double(tensor: Tensor) -> Tensor:
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).detach().double()
