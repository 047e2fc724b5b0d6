"""How large the error of a uniform grid is: worst cases, variances, and means over a random rotation.

Proofs: docs/bounds.md, section "The grid".
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lplr.quant.uniform import NORMAL_SCALE
from lplr.recipe import QuantSpec

ROUND_UP = 1 + 2.0**-7  # the next bfloat16 above a number is no further
_SCALE_ROUNDING = 2.0**-18  # square of bfloat16's relative rounding error, 2^-9
_QUADRATURE = 1e-4  # relative allowance for the midpoint rule, far above its error with 2^17 points


def saturation_free(quant: QuantSpec) -> bool:
    """Stochastic rounding on a range that holds every entry: unbiased, with variance at most the squared half step."""
    return quant.rounding == "stochastic" and quant.clip == "max"


def worst_case(x: Tensor, rows: Tensor, cols: Tensor, quant: QuantSpec) -> Tensor:
    """Largest possible |x - Q(x)|, entry by entry, for the grid with half steps rows_i cols_j."""
    half = rows[:, None] * cols
    top = (1 << int(quant.bits)) - 1
    inside = half if quant.rounding == "nearest" else 2 * half
    return torch.maximum(inside, x.abs() - top * half)


def expected_max(squares: Tensor, copies: int) -> float:
    """Bound on E max g_i^2 over `copies` normal variables of each variance in `squares`, dependent or not.

    inf_t (1/t) ln(copies sum_i (1 - 2 t s_i)^(-1/2)), by Jensen and E exp(t g^2) = (1 - 2 t s)^(-1/2).
    """
    largest = float(squares.max())
    if not largest > 0:
        return 0.0
    share = torch.linspace(0.02, 0.998, 99, dtype=torch.float64, device=squares.device)  # 2 t max s
    moments = (1 - share[:, None] * (squares.double() / largest)).rsqrt().sum(1)
    return float((2 * largest / share * (math.log(copies) + moments.log())).min())


def sphere_distortion(bits: int, m: int) -> float:
    """E (x - Q(x))^2 for x = sqrt(m) u_1, u uniform on the unit sphere of R^m, and Max's grid for N(0, 1).

    u_1 = cos(phi) with density proportional to sin(phi)^(m-2); midpoint rule in phi.
    """
    top, half = (1 << bits) - 1, NORMAL_SCALE[bits]
    points = 1 << 17 if m > 1 else 1
    phi = (torch.arange(points, dtype=torch.float64) + 0.5) * (math.pi / 2 / points) if m > 1 else torch.zeros(1)
    x = math.sqrt(m) * phi.double().cos()
    density = ((m - 2) * phi.double().sin().log()).exp() if m > 1 else torch.ones(1, dtype=torch.float64)
    # x >= 0 and the grid is symmetric: half of the odd levels suffice
    level = (2 * torch.floor(x / (2 * half)) + 1).clamp(max=top) * half
    return float(((x - level).square() * density).sum() / density.sum()) * (1 + _QUADRATURE)


def noise_energy(quant: QuantSpec, energy: float, row_squares: Tensor, m: int) -> float | None:
    """Bound on E||Y - Q(Y)||_F^2 for Y = M O (n x m), O a random rotation; None where no bound is known.

    energy >= ||M||_F^2 and row_squares_i >= ||row i of M||^2.  Holds for nearest and stochastic rounding alike.
    """
    step = (ROUND_UP / ((1 << int(quant.bits)) - 1)) ** 2
    if quant.ranges == "both" or (quant.clip == "mse" and quant.rounding == "stochastic"):
        return None
    if quant.clip == "mse":
        share = min(1.0, sphere_distortion(int(quant.bits), m) + _SCALE_ROUNDING) if quant.ranges == "row" else 1.0
        return share * energy
    if quant.ranges == "row":
        return step * row_peak(m) * energy
    return step * row_squares.numel() * matrix_peak(row_squares, m, m if quant.ranges == "tensor" else 1)


def row_peak(m: int) -> float:
    """Bound on m E max_j u_j^2, u uniform on the unit sphere of R^m."""
    return min(float(m), expected_max(torch.ones(1, dtype=torch.float64), m))


def matrix_peak(row_squares: Tensor, m: int, copies: int) -> float:
    """Bound on m E max_ij Y_ij^2 over `copies` columns j of Y = M O (n x m) with the given squared row norms."""
    return min(m * float(row_squares.max()), expected_max(row_squares, copies))
