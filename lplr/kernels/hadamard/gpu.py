# a compile-time constant is an int where it is passed and a `constexpr` where it is used:
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
"""The Walsh-Hadamard transform by Triton: a row in one program, log2(p) butterflies (a + b, a - b) between neighbours.

Up to LARGEST entries a row; a longer one takes the torch form, two matrix products.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from lplr.kernels.hadamard import reference

LARGEST = 16384


@triton.jit
def transform_rows(x, out, m, P: tl.constexpr, LOG: tl.constexpr, ROWS: tl.constexpr, SCALE: tl.constexpr):
    """ROWS rows of P = 2^LOG entries; the last axis is split, combined and put in front, LOG times: the order comes back."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place = row.to(tl.int64)[:, None] * P + tl.arange(0, P)[None, :]
    seen = tl.broadcast_to((row < m)[:, None], [ROWS, P])
    t = tl.load(x + place, mask=seen, other=0).to(tl.float32)
    for _ in tl.static_range(LOG):
        even, odd = tl.split(tl.reshape(t, [ROWS, P // 2, 2]))
        t = tl.reshape(tl.permute(tl.join(even + odd, even - odd), [0, 2, 1]), [ROWS, P])
    tl.store(out + place, (t * SCALE).to(out.dtype.element_ty), mask=seen)


def hadamard(x: Tensor) -> Tensor:
    """See `lplr.kernels.hadamard.hadamard`; sums are float32."""
    p = x.shape[-1]
    if p < 2 or p & (p - 1) or p > LARGEST or x.dtype == torch.float64:
        return reference.hadamard(x)
    flat = x.reshape(-1, p).contiguous()
    out = torch.empty_like(flat)
    if len(flat):
        sizes = constants(p)
        launch = cast(Any, transform_rows)[(triton.cdiv(len(flat), sizes["ROWS"]),)]
        with torch.cuda.device_of(x):
            launch(flat, out, len(flat), **sizes, num_warps=warps(p))
    return out.view(x.shape)


def constants(p: int) -> dict[str, Any]:
    """The constants of the kernel for rows of p entries."""
    return {"P": p, "LOG": p.bit_length() - 1, "ROWS": max(1, 1024 // p), "SCALE": p**-0.5}


def warps(p: int) -> int:
    """Warps for rows of p entries: at most 32 entries a thread."""
    return min(16, max(4, p // 1024))
