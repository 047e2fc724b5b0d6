"""The NormalFloat grid; its levels are in `kernels.normal_float`, where packed codes are read."""

from lplr.kernels.normal_float import levels, normal_scale, round_to_levels

__all__ = ["levels", "normal_scale", "round_to_levels"]
