"""Reproductions of published experiments: each gives its statements with what was expected, what was measured and a verdict."""

from flatminima.protocols.convex import reproduce_convex
from flatminima.protocols.domains import reproduce_swad
from flatminima.protocols.factorization import reproduce_factorization
from flatminima.protocols.reparameterization import reproduce_reparameterization

__all__ = ["reproduce_convex", "reproduce_factorization", "reproduce_reparameterization", "reproduce_swad"]
