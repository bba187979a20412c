"""Reproductions of published experiments: each gives its statements with what was expected, what was measured and a verdict."""

from flatminima.protocols.convex import reproduce_convex
from flatminima.protocols.domains import reproduce_swad
from flatminima.protocols.factorization import reproduce_factorization

__all__ = ["reproduce_convex", "reproduce_factorization", "reproduce_swad"]
