"""Rounding a matrix to a grid under a quadratic form that couples all its entries: with feedback, and by coordinate descent."""

from __future__ import annotations

from torch import Tensor

from lplr.kernels.backend import form
from lplr.kernels.feedback import reference

__all__ = ["descend", "feedback_round"]


def feedback_round(
    X: Tensor, bits: int, row: Tensor, col: Tensor, U_H: Tensor, U_G: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes (r, d), uint8, and errors E = X - Xhat (r, d) of X rounded so that U_G^T E U_H is the rounding residual.

    Xhat_ij = row_i (2 c_ij - (2^bits - 1)) col_j, row: (r,), col: (d,), zero where either scale is.  U_H (d, d) and U_G (r, r)
    are unit upper triangular; without U_G errors are fed back along the rows alone.  All have X's dtype, float32 or float64.
    The compiled form and the torch one agree but for the rounding of floating-point sums; neither writes to its arguments.
    """
    return form("feedback", reference, X).feedback_round(X, bits, row, col, U_H, U_G)


def descend(codes: Tensor, T: Tensor, bits: int, row: Tensor, col: Tensor, H: Tensor, G: Tensor | None = None) -> Tensor:
    """Codes (r, d) after one sweep of coordinate descent on tr(Xhat^T G Xhat H) - 2 tr(T^T Xhat) from `codes`; G = I where None.

    Columns first to last, each from its first entry to its last; every entry goes to its best point with all others fixed, so
    the form never rises.  T: (r, d), H (d, d) and G (r, r) symmetric with positive diagonals; scales as in `feedback_round`.
    """
    return form("feedback", reference, T).descend(codes, T, bits, row, col, H, G)
