"""Trellis-coded quantization of sequences: a bit-shift trellis with a computed codebook, exact Viterbi encoder."""

from __future__ import annotations

from torch import Tensor

from lplr.kernels.trellis import cpu
from lplr.kernels.trellis import reference as _reference
from lplr.kernels.trellis.reference import STATE_BITS, WIDTHS, codebook, decode, packed_width


def encode(x: Tensor, bits: float) -> tuple[Tensor, Tensor]:
    """The points of the trellis nearest to x; see `reference.encode`, which this calls where numba is missing."""
    if cpu.usable() and x.device.type == "cpu":
        return cpu.encode(x, bits)
    return _reference.encode(x, bits)


__all__ = ["STATE_BITS", "WIDTHS", "codebook", "decode", "encode", "packed_width"]
