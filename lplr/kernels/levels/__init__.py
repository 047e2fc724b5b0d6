"""From packed codes to the points of a grid, whatever the grid."""

from lplr.kernels.levels.reference import GRIDS, Grid, levels, narrower, nearest, normal_step, packed_shape

__all__ = ["GRIDS", "Grid", "levels", "narrower", "nearest", "normal_step", "packed_shape"]
