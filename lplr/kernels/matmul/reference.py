"""The product with a packed matrix in plain torch: the points are formed, then multiplied.

    y = ((x * col) C^T) * row,       C = [ratio C_narrow, C_rest]
"""

from __future__ import annotations

import torch
from torch import Tensor

from lplr.kernels.levels import levels, narrower


def matmul(
    x: Tensor,
    codes: Tensor,
    n: int,
    grid: tuple[str, float],
    row: Tensor | None,
    col: Tensor | None,
    narrow_codes: Tensor | None,
    narrow: int,
) -> Tensor:
    """See `lplr.kernels.matmul.matmul`."""
    x = x if col is None else x * col.to(x.dtype)
    y = torch.matmul(x[..., narrow:], levels(codes, (n, x.shape[-1] - narrow), *grid, x.dtype).T)
    if narrow_codes is not None:
        lower, ratio = narrower(*grid)
        y = y + torch.matmul(x[..., :narrow], levels(narrow_codes, (n, narrow), grid[0], lower, x.dtype).T) * ratio
    return y if row is None else y * row.to(y.dtype)


def points(
    codes: Tensor, shape: tuple[int, int], grid: tuple[str, float], narrow_codes: Tensor | None, narrow: int, dtype: torch.dtype
) -> Tensor:
    """C (n, d) itself."""
    n, d = shape
    rest = levels(codes, (n, d - narrow), *grid, dtype)
    if not narrow:
        return rest
    if narrow_codes is None:
        return torch.cat([rest.new_zeros(n, narrow), rest], 1)
    lower, ratio = narrower(*grid)
    return torch.cat([levels(narrow_codes, (n, narrow), grid[0], lower, dtype) * ratio, rest], 1)
