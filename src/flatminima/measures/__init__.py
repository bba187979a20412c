"""Measure one number for one minimum, with its error, its cost and the symmetries under which it is invariant.

Importing this package registers the measures it holds; :data:`MEASURES` lists them in the order of the tables.
"""

from flatminima.measures import adaptive, hessian, norms, sharpness
from flatminima.measures.base import MEASURES, Measure, Measurement, MeasureOptions, Workbench, measure
from flatminima.measures.neighbourhood import LocalFlatness, local_flatness
from flatminima.measures.plane import LossPlane, loss_plane

__all__ = [
    "MEASURES",
    "LocalFlatness",
    "LossPlane",
    "Measure",
    "MeasureOptions",
    "Measurement",
    "Workbench",
    "adaptive",
    "hessian",
    "local_flatness",
    "loss_plane",
    "measure",
    "norms",
    "sharpness",
]
