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
from flatminima.measures.neighbourhood import LocalFlatness, local_flatness
from flatminima.measures.options import MeasureOptions
from flatminima.measures.plane import LossPlane, loss_plane

arrange(
    sharpness, adaptive, logit_normalised, hessian, orbit, inertia, fisher, relative_flatness, pac_bayes, volume, llc, norms,
    path_norm, margins, simplicity, compressed, unseen,
)  # fmt: skip

__all__ = [
    "GROUPS",
    "MEASURES",
    "LocalFlatness",
    "LossPlane",
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
    "local_flatness",
    "logit_normalised",
    "loss_plane",
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
