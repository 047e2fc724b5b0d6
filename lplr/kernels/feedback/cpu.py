"""Rounding with feedback along both sides of a matrix, and coordinate descent, compiled for the CPU.

Columns are visited in blocks of BLOCK: a matrix product carries what other blocks contribute, the compiled pass what the block
and the column itself do.  Matrices are held transposed, a column in a contiguous row.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lplr.kernels.backend import jit

BLOCK = 64
PANEL = 8  # entries of a column whose errors are carried to the rest of it together


_compile = jit("contract")


def feedback_round(
    X: Tensor, bits: int, row: Tensor, col: Tensor, U_H: Tensor, U_G: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `lplr.kernels.feedback.feedback_round`."""
    r, d = X.shape
    Xt = X.T.contiguous()
    carried = torch.zeros_like(Xt)  # E U_H of the blocks that are done, transposed
    E = torch.empty_like(Xt)
    codes = torch.empty(d, r, dtype=torch.uint8)
    above = (X.new_empty(0, 0) if U_G is None else U_G.contiguous()).numpy()
    steps = row.contiguous().numpy()
    for start in range(0, d, BLOCK):
        part = slice(start, min(start + BLOCK, d))
        inside = U_H[part, part].contiguous()
        blocks = [t.numpy() for t in (Xt[part], carried[part], inside, col[part].contiguous(), codes[part], E[part])]
        _columns((1 << bits) - 1, steps, above, *blocks)
        if part.stop < d:
            carried[part.stop :].addmm_(U_H[part, part.stop :].T, E[part])
    return codes.T.contiguous(), E.T.contiguous()


@_compile
def _columns(
    top: int,
    row: np.ndarray,
    U_G: np.ndarray,
    X: np.ndarray,
    carried: np.ndarray,
    U_H: np.ndarray,
    col: np.ndarray,
    codes: np.ndarray,
    E: np.ndarray,
) -> None:
    """Round the columns of one block, X, carried, codes, E: (block, r); U_G is empty where no error goes down a column."""
    width, r = X.shape
    above, t = np.zeros(r, X.dtype), np.zeros(PANEL, X.dtype)
    half = X.dtype.type(top / 2)
    for j in range(width):
        left, e, x = carried[j], E[j], X[j]
        for k in range(j):
            u = U_H[k, j]
            for i in range(r):
                left[i] += u * E[k, i]
        above[:] = 0
        for start in range(0, r, PANEL):
            stop = min(start + PANEL, r)
            for i in range(start, stop):
                scale = row[i] * col[j]
                inverse = X.dtype.type(0.5) / scale if scale != 0 else scale
                code = np.rint(half + (x[i] + left[i] + above[i]) * inverse)
                code = min(max(code, X.dtype.type(0)), X.dtype.type(top))
                codes[j, i] = np.uint8(code)
                e[i] = x[i] - (2 * code - top) * scale
                if U_G.size:
                    t[i - start] = left[i] + e[i]
                    for m in range(i + 1, stop):
                        above[m] += U_G[i, m] * t[i - start]
            if U_G.size:
                for m in range(stop, r):  # the panel is full where anything is left
                    total = above[m]
                    for q in range(PANEL):
                        total += U_G[start + q, m] * t[q]
                    above[m] = total


def descend(codes: Tensor, T: Tensor, bits: int, row: Tensor, col: Tensor, H: Tensor, G: Tensor | None = None) -> Tensor:
    """See `lplr.kernels.feedback.descend`."""
    top = (1 << bits) - 1
    codes_t = codes.T.contiguous()
    if codes_t.data_ptr() == codes.data_ptr():
        codes_t = codes_t.clone()
    X = (2 * codes_t.to(T.dtype) - top) * row * col[:, None]
    sides = T.new_empty(0, 0) if G is None else G.contiguous()
    for start in range(0, len(X), BLOCK):
        part = slice(start, min(start + BLOCK, len(X)))
        product = H[part] @ X
        slope = (T[:, part].T - (product if G is None else product @ G)).contiguous()
        blocks = [t.contiguous().numpy() for t in (row, sides, slope, H[part, part], col[part])]
        _descend(top, *blocks, codes_t[part].numpy(), X[part].numpy())
    return codes_t.T.contiguous()


@_compile
def _descend(
    top: int,
    row: np.ndarray,
    G: np.ndarray,
    slope: np.ndarray,
    H: np.ndarray,
    col: np.ndarray,
    codes: np.ndarray,
    X: np.ndarray,
) -> None:
    """One sweep over one block; slope (before the sweep), codes, X: (block, r); G is empty for the identity."""
    width, r = slope.shape
    moved = np.zeros((width, r), slope.dtype)  # G times what the columns changed by
    one = slope.dtype.type(1)
    for j in range(width):
        here = slope[j]
        for k in range(j):
            h = H[k, j]
            for i in range(r):
                here[i] -= h * moved[k, i]
        for i in range(r):
            step = 2 * row[i] * col[j]
            if step == 0:
                continue
            curvature = H[j, j] * (G[i, i] if G.size else one)
            old = slope.dtype.type(codes[j, i])
            new = np.rint(old + here[i] * (one / (curvature * step)))
            new = min(max(new, slope.dtype.type(0)), slope.dtype.type(top))
            if new == old:
                continue
            change = (new - old) * step
            codes[j, i] = np.uint8(new)
            X[j, i] += change
            if G.size:
                for m in range(r):
                    moved[j, m] += change * G[i, m]
                    here[m] -= change * H[j, j] * G[i, m]
            else:
                moved[j, i] += change
                here[i] -= change * H[j, j]
