"""JUDGE: maps of the parameters that change no prediction; found in a model's graph, applied to a copy, and proved.

    found = find_symmetries(model, x).found                    # what this network admits
    member = found[0].member(torch.Generator().manual_seed(0))
    twin = member.apply(model)                                 # other weights, same function
    prove(model, member, x)                                    # Proof(kind=..., max_change=3e-16, tolerance=1e-09)

A number that differs between `model` and `twin` says nothing about the function that they share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from . import relu
from .actions import Action, Scale
from .base import Findings, Member, Site, Symmetry
from .graph import Network, UntraceableError, trace
from .kinds import KINDS, Kind
from .proof import Proof, prove

__all__ = [
    "KINDS",
    "Action",
    "Kind",
    "Member",
    "Proof",
    "Scale",
    "Site",
    "Symmetry",
    "SymmetrySearch",
    "find_symmetries",
    "prove",
]

FINDERS: tuple[Callable[[Network], Findings], ...] = (relu.find,)
"""Every kind of symmetry that is looked for, in the order in which it is reported."""


@dataclass(frozen=True)
class SymmetrySearch:
    """What `find_symmetries` found and what it refused.

    Args:
        found: proved symmetries, one for each kind that has a site in the network.
        rejected: (site, reason) for each place that could not be used; the site is ``'model'`` where no place was.
    """

    found: tuple[Symmetry, ...]
    rejected: tuple[tuple[str, str], ...]


def find_symmetries(model: nn.Module, example_input: Tensor) -> SymmetrySearch:
    """The function-preserving maps that a network admits, each proved on a random member with `example_input`.

    The model is read through torch.fx; it must take one tensor and return one tensor. Sites are judged one by one, so
    a part that admits nothing (GELU, residual sums, tied weights) does not hide the rest. The model, its gradients and
    the global random state stay as they are.

    Args:
        model: any module. Symmetries hold in evaluation mode.
        example_input: a batch as the model takes it, at least one row.

    Returns:
        What was found, and what was refused with the reason. A model that torch.fx cannot follow gives no symmetry and
        one reason, not an exception.

    Raises:
        TypeError: `example_input` is not a tensor.
        ValueError: `example_input` is empty or the model fails on it.

    Cost: two forward passes, and two in float64 for each kind (for each site as well, where a proof fails).

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> search = find_symmetries(net, torch.randn(5, 4))
        >>> [(symmetry.kind, symmetry.sites) for symmetry in search.found]
        [('relu-layer-rescaling', ('0 -> 2',)), ('relu-unit-rescaling', ('0 -> 2',))]
        >>> search.rejected
        ()
    """
    if not isinstance(example_input, Tensor):
        raise TypeError(f"example_input is {type(example_input).__name__}; expected one tensor: a batch of inputs")
    if example_input.numel() == 0:
        raise ValueError(f"example_input has shape {tuple(example_input.shape)}; expected at least one row")
    try:
        network = trace(model, example_input)
    except UntraceableError as error:
        return SymmetrySearch((), (("model", str(error)),))
    found: list[Symmetry] = []
    rejected: list[tuple[str, str]] = []
    for find in FINDERS:
        findings = find(network)
        rejected.extend(findings.rejected)
        for symmetry in findings.proposed:
            kept, failures = _proved(model, symmetry, example_input)
            rejected.extend(failures)
            if kept is not None:
                found.append(kept)
    return SymmetrySearch(tuple(found), tuple(dict.fromkeys(rejected)))


def _proved(
    model: nn.Module, symmetry: Symmetry, inputs: Tensor
) -> tuple[Symmetry | None, tuple[tuple[str, str], ...]]:
    """The part of a proposed symmetry that passes the proof, and the sites that do not."""
    failure = _failure(model, symmetry, inputs)
    if failure is None:
        return symmetry, ()
    if len(symmetry.places) == 1:
        return None, ((symmetry.sites[0], failure),)
    kept, failures = [], []
    for place in symmetry.places:
        reason = _failure(model, replace(symmetry, places=(place,)), inputs)
        if reason is None:
            kept.append(place)
        else:
            failures.append((place.name, reason))
    if kept:
        remainder = replace(symmetry, places=tuple(kept))
        failure = _failure(model, remainder, inputs)
        if failure is None:
            return remainder, tuple(failures)
        failures.append((f"{symmetry.kind} at {', '.join(remainder.sites)}", failure))
    return None, tuple(failures)


def _failure(model: nn.Module, symmetry: Symmetry, inputs: Tensor) -> str | None:
    """Why a random member does not preserve the function on `inputs`, or None if it does."""
    try:
        proof = prove(model, symmetry.member(torch.Generator().manual_seed(0)), inputs)
    except Exception as error:  # the model's own code runs here, in a dtype that it may never have seen
        return f"could not be proved: {type(error).__name__}: {error}".splitlines()[0]
    if proof.preserved:
        return None
    return (
        f"not function preserving: {symmetry.kind} changes the outputs by {proof.max_change:.1e} of the largest "
        f"(tolerance {proof.tolerance:.0e})"
    )
