"""The fast Walsh-Hadamard transform."""

from lplr.kernels.hadamard.reference import hadamard

__all__ = ["hadamard"]
