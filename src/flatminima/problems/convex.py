r"""Convex learning problems in which flatness lies, exactly: everything that belongs to them, under one name.

M. Schliserman, S. Vansover-Hager and T. Koren, *Flat Minima and Generalization: Insights from Stochastic Convex
Optimization* (arXiv:2511.03548), construct convex, smooth, non-negative losses whose population risk can be reached, and

- :class:`FlatSharpERM`: a flat empirical minimum with a bad population risk beside a sharp one without any (Theorem 1);
- :class:`SAGDTrap`: SA-GD ends in such a flat minimum, if its ties are broken badly (Theorem 3);
- :class:`SharpSAM1D`: SAM ends at the sharpest minimum (Theorem 6);
- :class:`SAMTrap`: SAM ends in an empirical minimum with a bad population risk (Theorem 7).

:class:`DeadZoneRegression` and :class:`RadialDeadZone` are benign. :func:`gd`, :func:`sam` and :func:`sagd` are the
algorithms of the theory, and :func:`optimization_bound`, :func:`stability_bound`, :func:`risk_bound` and :func:`gap_bound`
what is proved about them. ``docs/flatness-can-lie.md`` tells the story in pictures, ``flatminima reproduce convex`` checks
every statement.
"""

from flatminima.problems.convex_base import ConvexProblem, mean_loss
from flatminima.problems.convex_bounds import gap_bound, optimization_bound, risk_bound, stability_bound
from flatminima.problems.convex_columns import ColumnProblem
from flatminima.problems.convex_dead_zone import DeadZoneRegression, RadialDeadZone
from flatminima.problems.convex_flat_sharp import FlatSharpERM
from flatminima.problems.convex_risk import Certificate, Check, Risk, Sharpness
from flatminima.problems.convex_sagd_trap import SAGDTrap
from flatminima.problems.convex_sam_constants import Chain, Constants, sam_chain
from flatminima.problems.convex_sam_trap import SAMTrap
from flatminima.problems.convex_sample import Sample, event_probability
from flatminima.problems.convex_sharp_sam import SharpSAM1D
from flatminima.problems.convex_trajectories import EpsilonWarning, Trajectory, gd, sagd, sam

__all__ = [
    "Certificate",
    "Chain",
    "Check",
    "ColumnProblem",
    "Constants",
    "ConvexProblem",
    "DeadZoneRegression",
    "EpsilonWarning",
    "FlatSharpERM",
    "RadialDeadZone",
    "Risk",
    "SAGDTrap",
    "SAMTrap",
    "Sample",
    "SharpSAM1D",
    "Sharpness",
    "Trajectory",
    "event_probability",
    "gap_bound",
    "gd",
    "mean_loss",
    "optimization_bound",
    "risk_bound",
    "sagd",
    "sam",
    "sam_chain",
    "stability_bound",
]
