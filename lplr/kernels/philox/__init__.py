"""Random bits from a counter: the same on every device, in any order, never stored."""

from lplr.kernels.philox.reference import words

__all__ = ["words"]
