"""Random members of every symmetry of a network, each proved before anything is measured there."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from flatminima.audit.bench import Bench
from flatminima.symmetries import Member, Symmetry, SymmetrySearch, find_symmetries
from flatminima.symmetries.base import EXACT
from flatminima.symmetries.kinds import Preserves
from flatminima.symmetries.proof import Prover

_PROBE_ROWS = 64  # of the first batch, to find the symmetries
_PROOF_ROWS = 1024  # of the first batch, to prove every member
UNUSED = "found, but member"  # how a kind is reported whose members could not all be proved
LOSS_TOLERANCE = 1e-6  # relative: cancellation in a small loss magnifies the rounding of the outputs


@dataclass(frozen=True)
class Orbit:
    """One kind of symmetry of a network, and how its random members are drawn.

    Attributes:
        symmetry: kind, sites, law, and what stays.
        members: how many were drawn.
        max_scale: of them.
        seed: of them.
        max_change: largest relative change of an output over the members, in double precision on the rows of the proof.
        loss_change: largest relative change of the loss over the members, on all rows.
    """

    symmetry: Symmetry
    members: int
    max_scale: float
    seed: int
    max_change: float = 0.0
    loss_change: float = 0.0

    @property
    def kind(self) -> str:
        """The name under which measures declare their invariance."""
        return self.symmetry.kind

    @property
    def preserves(self) -> Preserves:
        """What its maps keep: outputs, probabilities or only predictions."""
        return self.symmetry.preserves

    @property
    def function_preserving(self) -> bool:
        """Whether its maps are changes of coordinates and nothing else; others keep only the probabilities or predictions."""
        return keeps_outputs(self.symmetry)

    def member(self, index: int) -> Member:
        """The random member of this number; the same one at every call, whatever else is audited."""
        key = zlib.crc32(f"{self.seed}/{self.kind}/{index}".encode())
        return self.symmetry.member(torch.Generator().manual_seed(key), self.max_scale)

    def mixes_frozen(self, model: nn.Module) -> bool:
        """Whether the maps add frozen parameters to others, or others to frozen ones.

        Then the law ``H' = D^-T H D^-1`` holds for all parameters together, but for those that are not frozen there is no
        D of their own, and no theorem about what is measured with them alone.
        """
        free = torch.cat([torch.full((p.numel(),), p.requires_grad) for p in model.parameters()])
        if self.symmetry.form not in ("linear", "affine") or bool(free.all()):
            return False
        direction = torch.randn(len(free), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        alone = torch.stack([direction * free, direction * ~free], 1)
        moved = self.member(0).linear_part(model, alone)
        return bool(moved[~free, 0].any() or moved[free, 1].any())


def find_orbits(
    bench: Bench,
    kinds: Iterable[str] | None,
    hints: Iterable[Symmetry],
    count: Callable[[Symmetry], int],
    max_scale: float,
    budget: int | None = None,
) -> tuple[list[Orbit], list[tuple[str, str]]]:
    """The symmetries of a network whose members are all proved, and ``(site, reason)`` for what is left out.

    Args:
        bench: the network.
        kinds: to look for; all by default.
        hints: proved like all others.
        count: how many members are wanted of a symmetry.
        max_scale: of the members.
        budget: most members in all; the kinds with most get fewer then, and each at least one.

    Cost: that of :func:`~flatminima.symmetries.find_symmetries`, and a forward pass for every member.
    """
    search = find_symmetries(
        bench.model,
        bench.inputs(_PROBE_ROWS),
        kinds=None if kinds is None else list(kinds),
        mode=bench.mode,
        hints=hints,
    )
    rejected = list(search.rejected)
    usable = list(_usable(bench, search, rejected))
    wanted = [count(symmetry) for symmetry in usable]
    most = max(wanted, default=0)
    while budget is not None and most > 1 and sum(min(w, most) for w in wanted) > budget:
        most -= 1
    orbits = []
    for symmetry, members in zip(usable, wanted, strict=True):
        orbit, reason = _proved(bench, Orbit(symmetry, min(members, most), max_scale, bench.seed))
        if reason is None:
            orbits.append(orbit)
        else:
            rejected.append((symmetry.kind, reason))
    return orbits, rejected


def keeps_outputs(symmetry: Symmetry) -> bool:
    """Whether a symmetry changes coordinates and nothing else."""
    return symmetry.preserves == "outputs"


def left_out(orbit: Orbit, loss: float, losses: Sequence[float]) -> str | None:
    """Why the members of an orbit are no change of coordinates of this loss, seen on all rows; ``None`` if they are."""
    if orbit.preserves == "predictions" or not orbit.symmetry.exact:
        return None
    change = loss_change(loss, losses)
    if change <= LOSS_TOLERANCE:
        return None
    if orbit.preserves == "probabilities":
        return f"the loss sees what the softmax would hide: it changes by {change:.1e}, relative; not used"
    return (
        f"keeps the outputs on the rows of the proof, but a member changes the loss over all rows by {change:.1e}, relative; "
        "not used. Either the loss sees more than the outputs (a penalty on the weights, say), or other rows take another path "
        "through the model"
    )


def loss_change(loss: float, losses: Sequence[float]) -> float:
    """Largest relative change of the loss."""
    return max((abs(a - loss) / max(abs(a), abs(loss)) for a in losses if a != loss), default=0.0)


def _usable(bench: Bench, search: SymmetrySearch, rejected: list[tuple[str, str]]) -> Iterable[Symmetry]:
    for symmetry in (*search.found, *search.approximate):
        if symmetry.preserves == "predictions" and not bench.classifies:
            rejected.append((symmetry.kind, "keeps the order of the outputs only, and the targets are no classes"))
        else:
            yield symmetry


def _proved(bench: Bench, orbit: Orbit) -> tuple[Orbit, str | None]:
    prover = Prover(bench.model, bench.inputs(_PROOF_ROWS), bench.mode)
    largest = 0.0
    for index in range(orbit.members):
        proof = prover.prove(orbit.member(index))
        if not proof.preserved:
            return orbit, (
                f"{UNUSED} {index} changes the {orbit.preserves} by {proof.max_change:.1e} of the largest "
                f"(tolerance {proof.tolerance:.0e}); not used. Lower max_scale ({orbit.max_scale:g})"
                + (" if the outputs are ill-conditioned" if proof.tolerance <= EXACT else "")
            )
        largest = max(largest, proof.max_change)
    return replace(orbit, max_change=largest), None
