"""NormalFloat levels, and rounding to them."""

from lplr.kernels.normal_float.reference import WIDTHS, levels, normal_scale, round_to_levels

__all__ = ["WIDTHS", "levels", "normal_scale", "round_to_levels"]
