"""y = x W^T for W = Q + L R, from packed codes and scales."""

from lplr.kernels.lowrank.reference import NARROW_RATIO, lowrank_linear

__all__ = ["NARROW_RATIO", "lowrank_linear"]
