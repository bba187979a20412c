"""Seek flat minima by gradient: optimisers that wrap the one you already use."""

from flatminima.optim.sam import SAM

__all__ = ["SAM"]
