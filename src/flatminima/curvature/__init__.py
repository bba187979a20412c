"""Measure the Hessian: eigenvalues with residual bounds, trace with a standard error."""

from flatminima.curvature.lanczos import EigenResult, top_eigenpair
from flatminima.curvature.trace import TraceResult, trace

__all__ = ["EigenResult", "TraceResult", "top_eigenpair", "trace"]
