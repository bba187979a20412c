"""Rescaling of positively homogeneous units: ReLU, leaky ReLU, PReLU, and powers of them.

A positively homogeneous activation satisfies ``relu(d z) = d relu(z)`` for every ``d > 0``. A unit may therefore be
written ``d`` times larger (its row of the layer's weight, and its bias) if every layer that reads it has its columns
divided by ``d``; no prediction changes. Collected in one diagonal matrix ``D``,

    theta' = D theta,    f(D theta) = f(theta) for all theta    =>    g' = D^-1 g,    H' = D^-1 H D^-1.

Trace and largest eigenvalue of the Hessian are thus not properties of the function. Two kinds share their sites:

* ``relu-layer-rescaling``: one ``d`` for a whole layer;
* ``relu-unit-rescaling``: one ``d`` for each unit or channel, where batch normalisation comes in between its gain and bias.

Residual streams of ReLU networks qualify (all that writes a channel grows, all that reads it shrinks), and so do linear layers
in a row, the identity being positively homogeneous. Behind ReLU^2 the columns are divided by ``d^2``.

Source: Dinh, Pascanu, Bengio, Bengio, "Sharp minima can generalize for deep nets", 2017 (arXiv 1703.04933).
"""

from __future__ import annotations

from collections.abc import Iterator

from .base import FalseFriend, Findings, Symmetry
from .classes import FIXED
from .groups import Group, depends_on_data
from .network import Network
from .sites import log_uniform, log_uniform_shared

LAYER = "relu-layer-rescaling"
UNIT = "relu-unit-rescaling"


def find(network: Network) -> Findings:
    """Both kinds of rescaling for every site of the network; refused sites come with the reason."""
    found = [group for group in network.scales.groups if is_relu(group, network)]
    friends = tuple(_false_friends(network, {group.name for group in network.scales.groups}))
    refused = tuple((layer, why) for layer, why in _refused(network) if layer not in {f.site for f in friends})
    proposed = (
        Symmetry.of(LAYER, [group.rescaling(log_uniform_shared) for group in found]),
        Symmetry.of(UNIT, [group.rescaling(log_uniform) for group in found]),
    )
    return Findings(proposed if found else (), refused, friends)


def is_relu(group: Group, network: Network) -> bool:
    """Whether the units pass a homogeneous activation, or nothing at all; gates and attention have kinds of their own."""
    if any(e.category in ("scaled", "averaged") and depends_on_data(e, network.flow) for e in group.events):
        return False
    return "homogeneous" in group.categories or not group.categories & {"gain", "product"}


def _false_friends(network: Network, true: set[str]) -> Iterator[FalseFriend]:
    """Rescaling across GELU, SiLU and their like, where there is no true one."""
    flow = network.suspects.flow
    for group in network.suspects.groups:
        across = [event.call for event in group.events if event.category == "suspect" and event.call is not None]
        if across and group.name not in true:
            where = flow.tape.describe(across[0])
            for writer in group.writers:
                yield FalseFriend(
                    writer, Symmetry.of(UNIT, [group.rescaling(log_uniform)]),
                    f"its units reach {where}, which is not positively homogeneous",
                )  # fmt: skip


def _refused(network: Network) -> Iterator[tuple[str, str]]:
    """Layers whose units cannot be rescaled; not those that other kinds look after (queries and keys, outputs, what feeds
    batch normalisation)."""
    flow, scales, raw = network.flow, network.scales, network.raw
    for use in flow.uses:
        for entry in use.entries:
            free = scales.classes.roots(entry.out)[0] > FIXED
            labels = entry.out[~free & (entry.out > FIXED)]
            if not len(labels):
                continue
            label = int(labels.reshape(-1)[0])
            met = raw.met[raw.classes.root(label)[0]]
            by_construction = "contracted" in met or met <= {"write", "batch-norm", "output", "scaled"}
            if raw.classes.reason(label) is not None or not by_construction:
                yield flow.parameters.layer(entry.name), str(scales.classes.reason(label))
    yield from flow.computed
