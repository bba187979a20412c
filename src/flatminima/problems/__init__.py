"""Problems whose curvature is known in closed form: oracles for every estimator of this library."""

from flatminima.problems.convex import FlatSharpERM, SAGDTrap, SAMTrap, SharpSAM1D
from flatminima.problems.factorization import DeepMatrixFactorization
from flatminima.problems.quadratic import Quadratic

__all__ = ["DeepMatrixFactorization", "FlatSharpERM", "Quadratic", "SAGDTrap", "SAMTrap", "SharpSAM1D"]
