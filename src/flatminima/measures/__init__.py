"""Measure one number for one minimum, with its error, its cost and the symmetries under which it is invariant.

Importing this package registers the measures it holds; :data:`MEASURES` lists them in the order of the tables.
"""

from flatminima.measures import (
    adaptive,
    compressed,
    fisher,
    hessian,
    inertia,
    invariance,
    llc,
    logit_normalised,
    margins,
    norms,
    orbit,
    pac_bayes,
    path_norm,
    relative_flatness,
    sharpness,
    simplicity,
    unseen,
    volume,
)
from flatminima.measures.base import (
    GROUPS,
    MEASURES,
    Measure,
    Measurement,
    NotApplicableError,
    Workbench,
    arrange,
    measure,
    resolve,
)
from flatminima.measures.options import MeasureOptions

arrange(
    sharpness, adaptive, logit_normalised, hessian, orbit, inertia, fisher, relative_flatness, pac_bayes, volume, llc, norms,
    path_norm, margins, simplicity, compressed, unseen,
)  # fmt: skip

__all__ = [
    "GROUPS",
    "MEASURES",
    "Measure",
    "MeasureOptions",
    "Measurement",
    "NotApplicableError",
    "Workbench",
    "adaptive",
    "compressed",
    "fisher",
    "hessian",
    "inertia",
    "invariance",
    "llc",
    "logit_normalised",
    "margins",
    "measure",
    "norms",
    "orbit",
    "pac_bayes",
    "path_norm",
    "relative_flatness",
    "resolve",
    "sharpness",
    "simplicity",
    "unseen",
    "volume",
]
