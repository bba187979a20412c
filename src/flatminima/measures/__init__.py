"""Measure one number for one minimum, with its error, its cost and the symmetries under which it is invariant.

Importing this package registers the measures it holds; :data:`MEASURES` lists them in the order of the tables.
"""

from flatminima.measures import adaptive, hessian, norms, sharpness
from flatminima.measures.base import MEASURES, Measure, Measurement, MeasureOptions, Workbench, measure

__all__ = [
    "MEASURES",
    "Measure",
    "MeasureOptions",
    "Measurement",
    "Workbench",
    "adaptive",
    "hessian",
    "measure",
    "norms",
    "sharpness",
]
