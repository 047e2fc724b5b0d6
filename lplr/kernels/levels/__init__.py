"""From packed codes to the points of a grid, whatever the grid."""

from lplr.kernels.levels.reference import BY_COLUMN, WIDTHS, levels, narrower, nearest, normal_step, packed_shape

__all__ = ["BY_COLUMN", "WIDTHS", "levels", "narrower", "nearest", "normal_step", "packed_shape"]
