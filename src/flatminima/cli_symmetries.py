"""The body of ``flatminima symmetries``: the search on a user's model, and its tables."""

from __future__ import annotations

import torch
from rich.console import RenderableType
from torch import nn

from flatminima.batches import count_rows, cut_rows, moved
from flatminima.names import unknown
from flatminima.report.symmetry_listing import symmetry_listing
from flatminima.study.settings import SettingsError
from flatminima.study.target import Target
from flatminima.symmetries import KINDS, SymmetrySearch, find_symmetries
from flatminima.symmetries.execution import MODES


def check(kinds: str | None, mode: str, rows: int) -> None:
    """Refuse what cannot be used before the user's code runs.

    Raises:
        SettingsError: an unknown kind or mode, or fewer than one row.
    """
    for kind in _names(kinds) or ():
        if kind not in KINDS:
            raise SettingsError(unknown("kind of symmetry", kind, KINDS))
    if mode not in MODES:
        raise SettingsError(f"--mode must be one of {', '.join(MODES)}, got {mode!r}")
    if rows < 1:
        raise SettingsError(f"--rows must be at least 1, got {rows}")


def search(target: Target, kinds: str | None, mode: str, rows: int) -> SymmetrySearch:
    """The symmetries of the target's model, proved on the first rows of its first batch."""
    example, _ = target.data[0]
    example = cut_rows(example, count_rows(example), slice(0, rows))
    first = next(target.model.parameters(), torch.zeros(()))
    return find_symmetries(target.model, moved(example, first.device), kinds=_names(kinds), mode=mode)


def listing(found: SymmetrySearch, model: nn.Module) -> RenderableType:
    """What was found layer by layer, what follows from it, and what was rejected, for ``console.print``."""
    layers = [name for name, _ in (*model.named_modules(), *model.named_parameters())]
    return symmetry_listing(found.to_dict(), layers)


def _names(kinds: str | None) -> list[str] | None:
    return None if kinds is None else [kind.strip() for kind in kinds.split(",") if kind.strip()]
