"""Sign flips: ``tanh(-z) = -tanh(z)`` and ``sigmoid(-z) = 1 - sigmoid(z)``.

* ``sign-flip``: row and bias of a unit of an odd activation, and the columns that read it, times -1. The map is diagonal with
  entries +-1, so orthogonal: Hessian eigenvalues are kept.
* ``sigmoid-flip``: the same, and what was ``w sigmoid(z)`` becomes ``w - w sigmoid(-z)``: the outgoing weights are added to
  the bias of the layer that reads the unit. Linear in the parameters, but a shear, so not orthogonal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .actions import Action
from .base import Findings, Symmetry
from .feeds import BiasFeed, bias_feeds
from .network import Network
from .sites import Rescaling, signs


def find(network: Network) -> Findings:
    """Both kinds."""
    odd, sigmoid, refused = [], [], []
    for group in network.flips.groups:
        if "sigmoid" in group.categories:
            alone = group.categories <= {"write", "read", "sigmoid"}
            feeds = bias_feeds(network.flips.flow, network.flips.classes, group.roots) if alone else None
            if feeds is None and alone:
                refused.append(
                    (group.name, "a sigmoid unit can be flipped only if layers with a bias of their own read it")
                )
            elif feeds is not None:
                sigmoid.append(_SigmoidFlip(group.rescaling(signs), feeds))
        elif "odd" in group.categories:
            odd.append(group.rescaling(signs))
    proposed = [Symmetry.of("sign-flip", odd), Symmetry.of("sigmoid-flip", sigmoid)]
    return Findings(tuple(s for s in proposed if s.places), tuple(refused))


@dataclass(frozen=True, eq=False)
class _SigmoidFlip:
    rescaling: Rescaling
    feeds: tuple[BiasFeed, ...]

    @property
    def name(self) -> str:
        return self.rescaling.name

    def sample(self, generator: torch.Generator, max_scale: float) -> tuple[Action, ...]:
        flips = signs(generator, max_scale, self.rescaling.units)
        fed = (feed.action((flips < 0).double()) for feed in self.feeds)
        return (*fed, *self.rescaling.actions(flips))
