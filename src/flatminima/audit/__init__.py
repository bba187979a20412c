"""JUDGE: which numbers survive a change of coordinates that changes no prediction, and which of two minima is flatter.

    print(audit(model, loss_fn, data))                      # one minimum: every measure along every symmetry
    print(compare_minima(first, second, loss_fn, data))     # two: is one flatter, or only in other coordinates?

A measure is evaluated at the network and at random members of its symmetries, which are proved first. A number that moves
while no output does says something about the coordinates. docs/audit.md explains the reports and their fields.
"""

from flatminima.audit.function import FunctionComparison
from flatminima.audit.judge import MEANING, Change
from flatminima.audit.law import Part, TraceLaw
from flatminima.audit.orbit import Orbit
from flatminima.audit.pair import Difference, MinimaComparison, compare_minima
from flatminima.audit.random_orbit import RandomOrbitTest, random_orbit_test
from flatminima.audit.repair import Repair
from flatminima.audit.report import AuditReport
from flatminima.audit.single import DEFAULT_OPTIONS, audit

__all__ = [
    "DEFAULT_OPTIONS",
    "MEANING",
    "AuditReport",
    "Change",
    "Difference",
    "FunctionComparison",
    "MinimaComparison",
    "Orbit",
    "Part",
    "RandomOrbitTest",
    "Repair",
    "TraceLaw",
    "audit",
    "compare_minima",
    "random_orbit_test",
]
