"""Rescaling of the branch that a gate multiplies: SwiGLU, GEGLU and every other ``down(gate(x) * up(x))``.

The product is linear in the ungated branch, whatever the gate does: row i of ``up`` (with its bias) times ``c_i``, column i of
``down`` divided by ``c_i``, any ``c_i != 0``. The gated branch passes a smooth activation and admits nothing; rescaling it is
proposed as a false friend and refused with a number. Where both branches are linear, one may also grow as the other shrinks.
The map is diagonal: ``H' = D^-1 H D^-1``.
"""

from __future__ import annotations

from .base import Findings, Symmetry
from .groups import Group, depends_on_data
from .network import Network
from .sites import Draw, log_uniform, log_uniform_signed


def find(network: Network) -> Findings:
    """Every gated product with a free factor."""
    gated = [group for group in network.scales.groups if _is_gated(group, network)]
    if network.flow.products:
        gated += [group for group in network.trades.groups if "product" in group.categories]
    places = [group.rescaling(_draw(group)) for group in gated]
    return Findings((Symmetry.of("gated-rescaling", places),) if places else ())


def _is_gated(group: Group, network: Network) -> bool:
    times_data = any(e.category == "scaled" and depends_on_data(e, network.flow) for e in group.events)
    return (times_data or "product" in group.categories) and "averaged" not in group.categories


def _draw(group: Group) -> Draw:
    return log_uniform if "homogeneous" in group.categories else log_uniform_signed
