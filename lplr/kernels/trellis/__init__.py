"""Trellis-coded quantization of sequences: a bit-shift trellis with a computed codebook, exact Viterbi encoder."""

from __future__ import annotations

import torch
from torch import Tensor

from lplr.kernels.backend import form
from lplr.kernels.trellis import reference
from lplr.kernels.trellis.reference import STATE_BITS, WIDTHS, Feedback, codebook, packed_width

__all__ = ["STATE_BITS", "WIDTHS", "Feedback", "codebook", "decode", "encode", "packed_width"]


def encode(x: Tensor, bits: float, feedback: Feedback | None = None) -> tuple[Tensor, Tensor]:
    """The sequences of the trellis nearest to x: packed codes, and values; see `reference.encode`."""
    return form("trellis", reference, x).encode(x, bits, feedback)


def decode(codes: Tensor, bits: float, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Packed codes (m, packed_width) -> the sequences (m, n); see `reference.decode`."""
    return form("trellis", reference, codes).decode(codes, bits, n, dtype)
