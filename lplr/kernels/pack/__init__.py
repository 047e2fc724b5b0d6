"""Dense packing of 1- to 8-bit codes."""

from lplr.kernels.pack.reference import pack, packed_width, unpack

__all__ = ["pack", "packed_width", "unpack"]
