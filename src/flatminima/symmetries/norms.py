"""What normalisations leave free: gains, the scale of what feeds them, and a shift that they remove.

* ``norm-gain-rescaling``: gain and bias of a unit times d, the columns that read it divided by d. Any sign where nothing but
  linear layers comes in between, positive behind ReLU. The Hessian obeys ``H' = D^-1 H D^-1`` with D diagonal.
* ``pre-norm-rescaling``: what feeds a normalisation times c > 0. With running statistics (batch normalisation in evaluation
  mode) the mean is multiplied by c and the variance v becomes ``c^2 (v + eps) - eps``: exact, per channel. With the
  statistics of the batch or of the row it is exact only for eps = 0: the change is of order ``eps / (c^2 v)``, so that such a
  symmetry is approximate, with scales drawn so that this is at most `_SLACK` where the example allows it.
* ``layernorm-shift``: layer normalisation removes the mean over its units, so that the same function may be added to all of
  them; group and batch normalisation remove a constant.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .actions import Action, Scale, Shift
from .base import Findings, Site, Symmetry
from .classes import FIXED, position_among
from .groups import NORMS, Group, brief, depends_on_data
from .network import Network
from .records import NormUse
from .scales import Scales
from .sites import Rescaling, Shifting, log_uniform, log_uniform_signed, normal, slices, uniform

_SLACK = 1e-4


def find(network: Network) -> Findings:
    """All three kinds."""
    gains = [group for group in network.scales.groups if _is_gain(group, network)]
    exact: list[Site] = []
    approximate: list[Site] = []
    for group in network.through_norms.groups:
        if group.categories & NORMS:
            site, is_exact = _pre_norm(group, network)
            (exact if is_exact else approximate).append(site)
    shifts, refused = _shifts(network)
    proposed = [
        Symmetry.of(
            "norm-gain-rescaling",
            [g.rescaling(log_uniform if "homogeneous" in g.categories else log_uniform_signed) for g in gains],
        ),
        Symmetry.of("pre-norm-rescaling", exact, exact=True),
        Symmetry.of("pre-norm-rescaling", approximate),
        Symmetry.of("layernorm-shift", shifts),
    ]
    return Findings(tuple(s for s in proposed if s.places), tuple(refused))


def _is_gain(group: Group, network: Network) -> bool:
    gated = any(e.category in ("scaled", "averaged") and depends_on_data(e, network.flow) for e in group.events)
    return "gain" in group.categories and not gated


# ----- the scale of what is normalised --------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Running:
    """Running statistics that follow the scale c of a channel: ``mean -> c mean``, ``v -> c^2 (v + eps) - eps``."""

    mean: str
    variance: str
    unit: Tensor  # of each channel, -1 for none
    power: Tensor  # c is the unit's scale to this power
    eps: float


@dataclass(frozen=True, eq=False)
class _PreNorm:
    """A `Rescaling` that takes running statistics along, with scales between the bounds of each unit."""

    rescaling: Rescaling
    running: tuple[_Running, ...]
    least: Tensor
    most: Tensor

    @property
    def name(self) -> str:
        return self.rescaling.name

    def sample(self, generator: torch.Generator, max_scale: float) -> tuple[Action, ...]:
        low = self.least.clamp(min=1 / max_scale).log()
        high = self.most.clamp(max=max_scale).log()
        scales = torch.exp(low + uniform(generator, self.rescaling.units) * (high - low))
        actions = list(self.rescaling.actions(scales))
        padded = torch.cat([scales, torch.ones(1, dtype=torch.float64)])
        for running in self.running:
            c = padded[running.unit] ** running.power
            actions += [
                Scale(running.mean, c), Scale(running.variance, c**2), Shift(running.variance, (c**2 - 1) * running.eps),
            ]  # fmt: skip
        return tuple(actions)


def _pre_norm(group: Group, network: Network) -> tuple[_PreNorm, bool]:
    """The site, and whether it is exact."""
    scales, tape = network.through_norms, network.tape
    least = torch.zeros(len(group.roots), dtype=torch.float64)
    most = torch.full_like(least, math.inf)
    running: list[_Running] = []
    names: list[str] = []
    exact = True
    for use in network.flow.norms:
        unit, power = _units(use.before, group, scales)
        if not bool((unit >= 0).any()):
            continue
        names.append(use.call.module or tape.describe(use.call))
        smallest, eps = _smallest_variance(use, network), use.norm.eps
        if use.norm.running is not None:
            running.append(_Running(*use.norm.running, unit.reshape(-1), power.reshape(-1), eps))
            bound = torch.sqrt(eps / (smallest + eps))  # the new variance stays positive
        else:
            exact &= eps == 0
            bound = torch.sqrt(eps / (2 * _SLACK * smallest.clamp(min=1e-300))).clamp(max=1.0)
        for i, p, c in zip(unit.reshape(-1), power.reshape(-1), bound.expand(unit.shape).reshape(-1), strict=True):
            if i >= 0 and p > 0:
                least[i] = torch.maximum(least[i], c ** (1 / p))
            elif i >= 0:
                most[i] = torch.minimum(most[i], c ** (1 / p))
    name = f"{brief(group.writers)} -> {brief(tuple(dict.fromkeys([*names, *group.readers])))}"
    return _PreNorm(replace(group.rescaling(log_uniform), name=name), tuple(running), least, most), exact


def _units(labels: Tensor, group: Group, scales: Scales) -> tuple[Tensor, Tensor]:
    """The unit of the group that each label belongs to, -1 for none, and the ratio of its scale."""
    roots, ratios = scales.classes.roots(labels)
    return position_among(roots, group.roots), ratios


def _smallest_variance(use: NormUse, network: Network) -> Tensor:
    """The smallest variance (mean square, where the mean stays) that the example shows, in a shape like the labels'."""
    norm, x = use.norm, use.call.args[0].tensor
    if norm.running is not None:
        variance: Tensor = network.tape.buffers[norm.running[1]]
        return variance.reshape(use.before.shape)
    if norm.style == "group":
        x = x.reshape(x.shape[0], norm.groups, -1)
        least: Tensor = x.var(2, correction=0).amin(0)
        return least.repeat_interleave(use.before.numel() // norm.groups).reshape(use.before.shape)
    over = norm.axes if norm.style == "layer" else (0, *range(2, x.ndim))
    square: Tensor = x.var(over, correction=0, keepdim=True) if norm.centred else x.square().mean(over, keepdim=True)
    return square.reshape(use.before.shape) if norm.style == "batch" else square.amin().reshape((1,) * x.ndim)


# ----- the mean that is removed ---------------------------------------------------------------------------------------


def _shifts(network: Network) -> tuple[list[Shifting | _RunningShift], list[tuple[str, str]]]:
    """Sites of ``layernorm-shift``; refused where weights are tied."""
    flow = network.flow
    sets: dict[frozenset[int], list[NormUse]] = defaultdict(list)
    for use in flow.norms:
        sets[frozenset(network.raw.classes.roots(use.before)[0].reshape(-1).tolist())].append(use)
    found: list[Shifting | _RunningShift] = []
    refused: list[tuple[str, str]] = []
    for roots, uses in sets.items():
        met = set().union(*(network.raw.met[root] for root in roots))
        elsewhere = any(roots & other for other in sets if other != roots)
        alike = all(use.norm.centred for use in uses) and len({use.norm.style for use in uses}) == 1
        if FIXED in roots or elsewhere or not alike or not met <= {"write", "scaled", *NORMS}:
            continue
        for site in _removed(torch.tensor(sorted(roots)), uses, network):
            if isinstance(site, tuple):
                refused.append(site)
            else:
                found.append(site)
    return found, refused


def _removed(
    roots: Tensor, uses: list[NormUse], network: Network
) -> Iterator[Shifting | _RunningShift | tuple[str, str]]:
    """One site for each parameter that may be shifted: weights only where every position is centred by itself."""
    flow, norm = network.flow, uses[0].norm
    ends = brief(tuple(dict.fromkeys(use.call.module or network.tape.describe(use.call) for use in uses)))
    alone = norm.style == "layer" and len(roots) == math.prod(uses[0].call.args[0].shape[axis] for axis in norm.axes)
    for name, found in network.raw.uses_of.items():
        for entry, is_data in found:
            unit = position_among(network.raw.classes.roots(entry.out)[0], roots)
            if not bool((unit >= 0).any()) or not (is_data or alone) or entry.separate:
                continue
            site = f"{name if is_data else flow.parameters.layer(name)} -> {ends}"
            if len(found) > 1:
                yield (
                    site,
                    f"layernorm-shift: '{name}' is used {len(found)} times in the forward pass (tied parameters)",
                )
                break
            value, size = network.tape.parameters[name], network.typical(name)
            if norm.style in ("batch", "running"):
                means = tuple(
                    (use.norm.running[0], position_among(network.raw.classes.roots(use.before)[0].reshape(-1), roots))
                    for use in uses
                    if use.norm.running is not None
                )
                yield _RunningShift(site, name, unit, means, len(roots), size)
                continue
            for together in uses[0].together():
                members = position_among(network.raw.classes.roots(together)[0], roots)
                mine = position_among(torch.where(unit >= 0, unit, -1), members.unique())
                try:
                    part = slices(name, value.shape, mine, len(members.unique()))
                except ValueError as error:
                    yield site, f"layernorm-shift: {error}"
                    break
                if part is not None:
                    yield Shifting(site, part, size)


@dataclass(frozen=True, eq=False)
class _RunningShift:
    """A bias in front of batch normalisation: shifted at will, the running mean (if it is used) along."""

    name: str
    tensor: str
    unit: Tensor
    means: tuple[tuple[str, Tensor], ...]
    units: int
    size: float

    def sample(self, generator: torch.Generator, max_scale: float) -> tuple[Action, ...]:
        amount = normal(generator, self.units) * (self.size * math.log(max_scale))
        padded = torch.cat([amount, torch.zeros(1, dtype=torch.float64)])
        return tuple(Shift(name, padded[unit]) for name, unit in ((self.tensor, self.unit), *self.means))
