"""Seek flat minima, measure flatness with error bars, and judge whether the number means anything."""

from flatminima import curvature, operators, problems
from flatminima.audit import AuditReport, MinimaComparison, audit, compare_minima, random_orbit_test
from flatminima.averaging import EMA, LAWA, SWA, SWAD, TailAverage, reestimate_batchnorm
from flatminima.curvature import density, eigenpairs, spectrum, trace
from flatminima.measures import MEASURES, Measurement, MeasureOptions, measure
from flatminima.objective import Objective
from flatminima.optim import BSAM, SAM, FlatRegion
from flatminima.perturbation import Perturbation
from flatminima.symmetries import find_symmetries, prove

__version__ = "0.1.0"

__all__ = [
    "BSAM",
    "EMA",
    "LAWA",
    "MEASURES",
    "SAM",
    "SWA",
    "SWAD",
    "AuditReport",
    "FlatRegion",
    "MeasureOptions",
    "Measurement",
    "MinimaComparison",
    "Objective",
    "Perturbation",
    "TailAverage",
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
    "reestimate_batchnorm",
    "spectrum",
    "trace",
]
