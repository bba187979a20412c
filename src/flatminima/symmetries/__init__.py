"""JUDGE: maps of the parameters that change no prediction; found in a model's run, applied to a copy, and proved.

    found = find_symmetries(model, x).found                    # what this network admits
    member = found[0].member(torch.Generator().manual_seed(0))
    twin = member.apply(model)                                 # other weights, same function
    prove(model, member, x)                                    # Proof(kind=..., max_change=3e-16, tolerance=1e-09)

A number that differs between `model` and `twin` says nothing about the function that they share. `KINDS` lists what is looked
for; docs/symmetries.md has the catalogue with its laws.
"""

from .actions import Action, Feed, Mix, Permute, Scale, Shift
from .base import Member, Site, Symmetry
from .kinds import KINDS, Kind
from .proof import Proof, prove
from .search import SymmetrySearch, find_symmetries
from .sites import Entries, Rescaling

__all__ = [
    "KINDS",
    "Action",
    "Entries",
    "Feed",
    "Kind",
    "Member",
    "Mix",
    "Permute",
    "Proof",
    "Rescaling",
    "Scale",
    "Shift",
    "Site",
    "Symmetry",
    "SymmetrySearch",
    "find_symmetries",
    "prove",
]
