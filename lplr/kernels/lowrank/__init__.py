"""y = x W^T for W = Q + L R, from packed codes and scales."""

from lplr.kernels.lowrank.reference import lowrank_linear

__all__ = ["lowrank_linear"]
