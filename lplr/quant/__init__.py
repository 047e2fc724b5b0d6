"""Grids, rounding and packed matrices."""

from lplr.quant.qtensor import QTensor
from lplr.quant.uniform import quantize

__all__ = ["QTensor", "quantize"]
