"""The Walsh-Hadamard transform and rotations built on it."""

from lplr.kernels.hadamard.reference import hadamard, rotate, rotation_signs

__all__ = ["hadamard", "rotate", "rotation_signs"]
