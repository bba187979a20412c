"""Seek flat minima, measure flatness with error bars, and judge whether the number means anything."""

from flatminima import curvature, operators, problems
from flatminima.audit import AuditReport, MinimaComparison, audit, compare_minima, random_orbit_test
from flatminima.averaging import SWAD
from flatminima.curvature import density, eigenpairs, spectrum, trace
from flatminima.measures import MEASURES, Measurement, MeasureOptions, measure
from flatminima.objective import Objective
from flatminima.optim import SAM
from flatminima.perturbation import Perturbation
from flatminima.symmetries import find_symmetries, prove

__version__ = "0.1.0"

__all__ = [
    "MEASURES",
    "SAM",
    "SWAD",
    "AuditReport",
    "MeasureOptions",
    "Measurement",
    "MinimaComparison",
    "Objective",
    "Perturbation",
    "__version__",
    "audit",
    "compare_minima",
    "curvature",
    "density",
    "eigenpairs",
    "find_symmetries",
    "measure",
    "operators",
    "problems",
    "prove",
    "random_orbit_test",
    "spectrum",
    "trace",
]
