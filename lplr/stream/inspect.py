"""Look at a checkpoint before compressing it: shape, stable rank, and the energy that a budget's rank captures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lplr.factor import spectrum
from lplr.stream.checkpoint import Checkpoint, LayerPlan
from lplr.stream.source import check_finite


@dataclass(frozen=True)
class MatrixFacts:
    """stable_rank = ||W||_F^2 / sigma_1^2; energy = share of ||W||_F^2 in the leading `rank` directions."""

    plan: LayerPlan
    norm: float
    stable_rank: float
    energy: float


def inspect(checkpoint: Checkpoint, plans: list[LayerPlan]) -> Iterator[MatrixFacts]:
    """The facts of each planned matrix, read one at a time."""
    for p in plans:
        W = checkpoint.view.get(f"{p.name}.weight")
        check_finite(f"{p.name}.weight", W)
        squares = spectrum(W.float()).double().square()
        total = float(squares.sum())
        rank = p.format.rank if p.format else 0
        energy = float(squares[:rank].sum()) / total if total else 1.0
        yield MatrixFacts(p, total**0.5, total / float(squares[0]) if total else 0.0, energy)
