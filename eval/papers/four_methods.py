"""LPLR and its baselines as published, and lplr's own at the same number of stored bits: A (n x d), rank m, B bits in L, B' in R.

    lplr    L = Q(A S), S Gaussian of variance 1/m;       R = Q'(argmin_X ||L X - A||_F)
    lsvd    L = Q(U_m Sigma_m G), G Gaussian m x m;       R = Q'(argmin_X ||L X - A||_F)
    dsvd    L = Q(U_m),                                   R = Q'(Sigma_m V_m^T)
    naive   Q''(A) at B_nq bits

Q rounds to the nearest of 2^B points between the least and the largest entry of the whole matrix.  The rank is the published one,
m = floor(B_nq n d / (n B + d B')), at which the codes of L R take no more bits than those of naive.  Where a whole-image fit is
published (`fitted`), alpha L R + beta is taken in place of L R.  Stored bits count the codes and the scalars, 32 bits each.
Source: Saha, Srivastava, Pilanci, NeurIPS 2023, Algorithm 1 and section 4; rank and quantizer as its authors' code has them.

    ours       `factorize(method="lplr")` of this package, widths and rank by its defaults, within B_nq bits, every bit counted
    ours B B'  the same with the published widths, and the largest rank within the same bits
    ours auto  `factorize(method="auto")` within the same bits
"""

from __future__ import annotations

import json
import os
import platform
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lplr import FactorSpec, QuantSpec, factorize

RESULTS = Path(__file__).parents[1] / "results"
PUBLISHED = ("lplr", "lsvd", "dsvd", "naive")
OURS = {"ours": "lplr", "ours B B'": "lplr", "ours auto": "auto"}
SCALAR = 32


def rank_at(shape: tuple[int, int], bits: int, l_bits: int, r_bits: int) -> int:
    """The published rank; 1 at least, min(n, d) at most."""
    n, d = shape
    return max(1, min(n, d, bits * n * d // (n * l_bits + d * r_bits)))


def to_nearest(A: Tensor, bits: int) -> Tensor:
    """Q: one range for the whole matrix."""
    low, high = A.min(), A.max()
    step = (high - low) / (2**bits - 1)
    return A.clone() if step == 0 else low + step * ((A - low) / step).round()


def published(A: Tensor, method: str, bits: int, l_bits: int, r_bits: int, *, fitted: bool, seed: int) -> tuple[Tensor, float]:
    """What `method` makes of A, and its stored bits an entry."""
    n, d = A.shape
    if method == "naive":
        return to_nearest(A, bits), bits + 2 * SCALAR / A.numel()
    m, generator = rank_at((n, d), bits, l_bits, r_bits), torch.Generator().manual_seed(seed)
    if method == "lplr":
        L = to_nearest(A @ torch.randn(d, m, generator=generator, dtype=A.dtype) / m**0.5, l_bits)
    else:
        U, s, Vt = torch.linalg.svd(A, full_matrices=False)
        U, s, Vt = U[:, :m], s[:m], Vt[:m]
        mixed = (U * s) @ torch.randn(m, m, generator=generator, dtype=A.dtype)
        L = to_nearest(U if method == "dsvd" else mixed, l_bits)
    R = s[:, None] * Vt if method == "dsvd" else torch.linalg.lstsq(L, A, driver="gelsd").solution
    made = L @ to_nearest(R, r_bits)
    if fitted:
        columns = torch.stack([made.flatten(), torch.ones(A.numel(), dtype=A.dtype)], 1)
        made = (columns @ torch.linalg.lstsq(columns, A.flatten()[:, None]).solution).view(n, d)
    return made, (m * (n * l_bits + d * r_bits) + SCALAR * (4 + 2 * fitted)) / A.numel()


def ours(A: Tensor, name: str, bits: float, widths: tuple[int, int], seed: int) -> tuple[Tensor, float]:
    """The same of this package's own methods."""
    l, r = (QuantSpec(bits=width) if name == "ours B B'" else None for width in widths)
    spec = FactorSpec(method=OURS[name], bits_per_weight=bits, l=l, r=r, power_iterations=2, alternations=4)
    f = factorize(A.float(), spec, generator=torch.Generator().manual_seed(seed))
    return f.dequantize(torch.float64), f.format.bits_per_weight


def error(A: Tensor, made: Tensor) -> float:
    """Relative Frobenius error."""
    return float((A - made).norm() / A.norm())


def compare(
    A: Tensor, bits: int, l_bits: int, r_bits: int, *, fitted: bool = False, seed: int = 0
) -> dict[str, tuple[Tensor, dict]]:
    """Method -> what it makes of A (float64), and its error, bits, seconds."""
    found = {}
    for method in (*PUBLISHED, *OURS):
        started = time.perf_counter()
        if method in OURS:
            made, stored = ours(A, method, bits, (l_bits, r_bits), seed)
        else:
            made, stored = published(A, method, bits, l_bits, r_bits, fitted=fitted, seed=seed)
        facts = {"error": error(A, made), "bits": stored, "seconds": round(time.perf_counter() - started, 3)}
        found[method] = made, facts
    return found


def write(path: Path, results: dict[str, Any]) -> None:
    """The results with where they were made."""
    facts = {p: metadata.version(p) for p in ("torch", "numpy")} | {"python": platform.python_version()}
    machine = {"processor": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    path.write_text(json.dumps({**results, "versions": facts, "machine": machine}, indent=1) + "\n")
    print(f"wrote {path.name}")
