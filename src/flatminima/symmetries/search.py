"""Looking for every kind of symmetry in a model, and keeping what passes the proof."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from flatminima.batches import count_rows, cut_rows
from flatminima.names import unknown

from . import attention, flips, gated, norms, output, permutations, relu, residual, units
from .base import EXACT, FalseFriend, Findings, Symmetry
from .execution import MODES
from .kinds import KINDS
from .network import Network
from .proof import Proof, Prover
from .propagation import COMPUTED, NOT_ANALYSED
from .recorder import UntraceableError, reason, record
from .tape import CHOICE, INPUT, PARAMETER, Tape


@dataclass(frozen=True)
class Finder:
    """A family of symmetries: the kinds that it looks for, and how."""

    kinds: tuple[str, ...]
    find: Callable[[Network], Findings]


FINDERS = (
    Finder((relu.LAYER, relu.UNIT), relu.find),
    Finder(("norm-gain-rescaling", "pre-norm-rescaling", "layernorm-shift"), norms.find),
    Finder(("gated-rescaling",), gated.find),
    Finder(
        (
            "query-key", "query-key-diagonal", "key-bias-shift", "value-output", "value-output-diagonal", "value-bias-shift",
        ),
        attention.find,
    ),
    Finder(("residual-stream",), residual.find),
    Finder(("unit-permutation", "head-permutation"), permutations.find),
    Finder(("sign-flip", "sigmoid-flip"), flips.find),
    Finder(("softmax-shift", "temperature"), output.find),
    Finder(("dead-unit", "duplicate-unit"), units.find),
)  # fmt: skip
"""Every family of symmetries that is looked for."""

#: How a decision by integer inputs, such as a padding mask, is reported: what was found holds for such inputs.
INPUTS_LIKE_THE_EXAMPLE = "analysed for inputs like the example"
NOT_FOLLOWED = "not followed: what rescales the units that reach it may have been missed"
_NOT_PRESERVED = "not function preserving"
_HIDES = (
    "control flow", "was not analysed", NOT_ANALYSED, NOT_FOLLOWED, COMPUTED, _NOT_PRESERVED, "could not be proved",
)  # fmt: skip
_ROWS = 4  # of the example, for reading the model; the proofs see all of it


@dataclass(frozen=True)
class SymmetrySearch:
    """What `find_symmetries` found and what it refused.

    Attributes:
        found: exact symmetries, each proved; one for each kind that has a site in the network. `Symmetry.preserves` says
            whether the outputs, the probabilities or only the predictions stay.
        rejected: (site, reason) for each place that could not be used; the site is ``'model'`` where no place was.
        proofs: of each kind in `found`, of a random member that acts at all sites at once.
        approximate: those that hold only up to the ``eps`` of a normalisation.
        changes: of each kind in `approximate`, the measured change with its tolerance.
    """

    found: tuple[Symmetry, ...]
    rejected: tuple[tuple[str, str], ...]
    proofs: Mapping[str, Proof] = field(default_factory=dict)
    approximate: tuple[Symmetry, ...] = ()
    changes: Mapping[str, Proof] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        every = [(s, self.proofs[s.kind]) for s in self.found] + [(s, self.changes[s.kind]) for s in self.approximate]
        return {
            "found": [
                {
                    "kind": s.kind,
                    "sites": list(s.sites),
                    "preserves": s.preserves,
                    "exact": s.exact,
                    "form": s.form,
                    "orthogonal": s.orthogonal,
                    "law": s.law,
                    "hessian_law": s.hessian_law,
                    "proof": {"status": proof.status, "max_change": proof.max_change, "tolerance": proof.tolerance},
                }
                for s, proof in every
            ],
            "rejected": [list(pair) for pair in self.rejected],
        }


def find_symmetries(
    model: nn.Module,
    example_input: Any,
    *,
    kinds: Iterable[str] | None = None,
    mode: str = "eval",
    hints: Iterable[Symmetry] = (),
) -> SymmetrySearch:
    """The function-preserving maps that a network admits, each proved on a random member with `example_input`.

    The model is run once, operation by operation; what its run does to every unit decides which maps are proposed, and only
    what passes `prove` in float64 comes back. Sites are judged one by one, so that a part that admits nothing (GELU, tied
    weights, a branch that depends on values) does not hide the rest. The model, its gradients and the global random state
    stay as they are.

    Args:
        model: any module. It returns a tensor, tensors, or an object with `logits` (then these count).
        example_input: a batch as the model takes it, at least one row: a tensor, a tuple for ``model(*batch)``, or a dictionary
            for ``model(**batch)``.
        kinds: which of `KINDS` to look for; all by default.
        mode: ``'eval'``, or ``'train'`` for batch statistics and dropout with equal draws.
        hints: symmetries that you know of, e.g. ``Symmetry.of("gated-rescaling", [Rescaling(...)])``; proved like all others.

    Returns:
        What was found, and what was refused with the reason. A model that cannot be followed gives no symmetry and one reason,
        not an exception.

    Raises:
        TypeError: `example_input` is none of these.
        ValueError: `example_input` is empty, the model fails on it, or an unknown kind or mode.

    Cost: two forward passes, and one in float64 for each kind (for each site as well, where a proof fails, and for each
    false friend).

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> search = find_symmetries(net, torch.randn(5, 4), kinds=["relu-layer-rescaling", "relu-unit-rescaling"])
        >>> [(symmetry.kind, symmetry.sites) for symmetry in search.found]
        [('relu-layer-rescaling', ('0 -> 2',)), ('relu-unit-rescaling', ('0 -> 2',))]
        >>> search.proofs["relu-unit-rescaling"].status
        'proved'
        >>> search.rejected
        ()
    """
    wanted = _wanted(kinds, mode)
    _check(example_input)
    hinted = tuple(hints)
    try:
        network = Network(_read(model, example_input, mode))
        prover = _prover(model, example_input, mode)
    except UntraceableError as error:
        return SymmetrySearch((), (("model", str(error)),))
    rejected = list(_not_analysed(network))
    found: dict[bool, dict[str, Symmetry]] = {True: {}, False: {}}  # by whether they are exact
    proofs: dict[bool, dict[str, Proof]] = {True: {}, False: {}}
    chosen = [finder for finder in FINDERS if wanted & set(finder.kinds)]
    for findings in (*(_findings(finder, network) for finder in chosen), Findings(hinted)):
        rejected.extend(findings.rejected)
        for symmetry in findings.proposed:
            if symmetry.kind in wanted or symmetry in hinted:
                kept, proof, failures = _proved(prover, symmetry)
                rejected.extend(failures)
                if kept is not None and proof is not None:
                    same, theirs = found[kept.exact], proofs[kept.exact]
                    same[kept.kind] = _joined(same.get(kept.kind), kept)
                    theirs[kept.kind] = max(proof, theirs.get(kept.kind, proof), key=lambda p: p.max_change)
        rejected.extend(_refuted(prover, friend) for friend in findings.false_friends if friend.symmetry.kind in wanted)
    return SymmetrySearch(
        _in_order(found[True]), tuple(dict.fromkeys(rejected)), proofs[True], _in_order(found[False]), proofs[False]
    )


def _in_order(found: Mapping[str, Symmetry]) -> tuple[Symmetry, ...]:
    return tuple(found[kind] for kind in dict.fromkeys([*KINDS, *found]) if kind in found)


def _findings(finder: Finder, network: Network) -> Findings:
    try:
        return finder.find(network)
    except Exception as error:  # one family that stumbles over a model must not hide the others
        return Findings((), ((", ".join(finder.kinds), f"was not analysed, because of {reason(error)}"),))


def _wanted(kinds: Iterable[str] | None, mode: str) -> frozenset[str]:
    if mode not in MODES:
        raise ValueError(f"mode must be 'eval' or 'train', got {mode!r}")
    wanted = frozenset(KINDS if kinds is None else kinds)
    for kind in sorted(wanted - KINDS.keys()):
        raise ValueError(unknown("kind of symmetry", kind, KINDS))
    return wanted


def _check(example: Any) -> None:
    tensors = list(_tensors(example))
    if not isinstance(example, Tensor | tuple | Mapping) or not tensors:
        raise TypeError(
            f"example_input is {type(example).__name__}; expected one tensor, a tuple or a dictionary of tensors: a batch"
        )
    if not all(tensor.numel() for tensor in tensors):
        raise ValueError(f"example_input has shape {tuple(tensors[0].shape)}; expected at least one row")


def _tensors(tree: Any) -> Iterable[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    for value in tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, tuple | list) else ():
        yield from _tensors(value)


def _read(model: nn.Module, example: Any, mode: str) -> Tape:
    """The run on a few rows; on all of them where the model insists."""
    rows = count_rows(example)
    few = cut_rows(example, rows, slice(0, _ROWS))
    if mode == "eval" and rows > _ROWS:
        try:
            return record(model, few, mode)
        except (ValueError, UntraceableError):
            pass
    return record(model, example, mode)


def _prover(model: nn.Module, example: Any, mode: str) -> Prover:
    try:
        return Prover(model, example, mode)
    except ValueError as error:
        raise UntraceableError(str(error)) from error
    except Exception as error:  # on the whole example, or on its own device
        raise UntraceableError(f"{type(model).__name__} cannot be run in float64: {reason(error)}") from error


def _not_analysed(network: Network) -> Iterable[tuple[str, str]]:
    """Code that decides by values, parameters in operations that are not known, and parameters that were not used."""
    for branch in network.tape.branches:
        where = branch.module or "model"
        if branch.depends & (PARAMETER | INPUT):
            line = f"control flow depends on values at `{branch.line}`"
            yield where, f"{line}: only the insides of its parts were analysed, and nothing that passes between them"
        elif branch.depends & CHOICE:
            yield where, f"`{branch.line}` depends on integer inputs: {INPUTS_LIKE_THE_EXAMPLE}"
    yield from network.flow.unread
    for call in network.flow.unfollowed:
        yield network.tape.describe(call), f"is {NOT_FOLLOWED}"
    for products in network.attentions:
        if products.unscaled:
            yield products.name, f"multiplies units with units, without a softmax, and what it makes is {NOT_FOLLOWED}"
    for name in network.flow.parameters.numbers:
        if not network.times_used(name) and name not in dict(network.flow.unread):
            reader = network.reader(name)
            yield (
                name,
                "it does not reach the outputs on this input"
                if reader is None
                else f"it is read by {network.tape.describe(reader)}, and no kind of map changes it",
            )


def may_hide(site: str, reason: str) -> bool:
    """Whether a line of `SymmetrySearch.rejected` says that symmetries may have been missed, and not that there are none.

    Example:
        >>> may_hide("0", "its units reach 1 (GELU), which is not positively homogeneous")
        False
        >>> may_hide("fft_fft", f"is {NOT_FOLLOWED}")
        True
    """
    if INPUTS_LIKE_THE_EXAMPLE in reason:
        return False
    return site == "model" or any(words in reason for words in _HIDES)


def _joined(first: Symmetry | None, second: Symmetry) -> Symmetry:
    return second if first is None else replace(first, places=first.places + second.places)


def _proved(prover: Prover, symmetry: Symmetry) -> tuple[Symmetry | None, Proof | None, list[tuple[str, str]]]:
    """The part of a proposed symmetry that passes the proof, the proof, and the sites that do not."""
    proof, failure = _attempt(prover, symmetry)
    if failure is None:
        return symmetry, proof, []
    if len(symmetry.places) == 1:
        return None, None, [(symmetry.sites[0], failure)]
    kept, failures = [], []
    for place in symmetry.places:
        _, reason = _attempt(prover, replace(symmetry, places=(place,)))
        if reason is None:
            kept.append(place)
        else:
            failures.append((place.name, reason))
    if kept:
        remainder = replace(symmetry, places=tuple(kept))
        proof, failure = _attempt(prover, remainder)
        if failure is None:
            return remainder, proof, failures
        failures.append((f"{symmetry.kind} at {', '.join(remainder.sites)}", failure))
    return None, None, failures


def _attempt(prover: Prover, symmetry: Symmetry) -> tuple[Proof | None, str | None]:
    """The proof of a random member, and why it does not preserve the function, or None if it does."""
    try:
        proof = prover.prove(symmetry.member(torch.Generator().manual_seed(0)))
    except Exception as error:  # the model's own code runs here
        return None, f"could not be proved: {type(error).__name__}: {error}".splitlines()[0]
    if proof.preserved:
        return proof, None
    return proof, (
        f"{_NOT_PRESERVED}: {symmetry.kind} changes the {symmetry.preserves} by {proof.max_change:.1e} of the largest "
        f"(tolerance {proof.tolerance:.0e})"
    )


def _refuted(prover: Prover, friend: FalseFriend) -> tuple[str, str]:
    proof, failure = _attempt(prover, friend.symmetry)
    if proof is None:
        return friend.site, f"{friend.reason} ({failure})"
    change = f"changes the outputs by {proof.max_change:.1e} of the largest"
    verdict = f"{change} (tolerance {EXACT:.0e})" if failure else f"{change} on this example, but no theorem says so"
    return friend.site, f"{friend.reason}: {friend.symmetry.kind} {verdict}"
