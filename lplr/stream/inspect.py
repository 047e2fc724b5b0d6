"""Look at a checkpoint before compressing it, or at the bits that its matrices were given.

Of each matrix: shape, stable rank and the energy that a budget's rank captures; and its loss at any width, from the curve that
`stream.allocation` measured, on the line through two of its points in log loss against bits.
"""

from __future__ import annotations

import tempfile
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from lplr import records
from lplr.errors import OutputError, RecipeError
from lplr.factor import spectrum
from lplr.factor.allocate import Point
from lplr.recipe import Recipe
from lplr.records import LEDGER
from lplr.stream.allocation import KIND, allocation, taking_part
from lplr.stream.calibrate import calibration_windows
from lplr.stream.checkpoint import Checkpoint, LayerPlan
from lplr.stream.compress import Notify
from lplr.stream.device import usable_device
from lplr.stream.matrix import seeded
from lplr.stream.sensitivity import Say
from lplr.stream.source import check_finite
from lplr.stream.workers import Threads

SHOWN = (1, 2, 3, 4)  # bits per weight at which losses are told


@dataclass(frozen=True)
class MatrixFacts:
    """stable_rank = ||W||_F^2 / sigma_1^2; energy = share of ||W||_F^2 in the leading `rank` directions."""

    plan: LayerPlan
    norm: float
    stable_rank: float
    energy: float


@dataclass(frozen=True)
class MatrixLoss:
    """Bits per weight, the loss predicted at them, and at each of SHOWN; None beyond the ends of the curve, or without one."""

    name: str
    bits: float
    loss: float | None
    at: tuple[float | None, ...]


@dataclass(frozen=True)
class Losses:
    """Every matrix and their sums, in `unit`; total is that of the allocation, at those of equal bits.  None: no allocation."""

    rows: list[MatrixLoss]
    unit: str | None
    total: float | None
    at: tuple[float | None, ...]


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


def is_compressed(model: str) -> bool:
    """Whether a folder is one that `compress` writes."""
    return (Path(model).expanduser() / LEDGER).is_file()


def stored_losses(folder: Path) -> Losses:
    """What a finished folder's run.jsonl tells: the bits that are stored and, where they were allocated, the losses.

    Raises OutputError when the run is not finished, or its file damaged.
    """
    entries = records.read(folder / LEDGER)
    if not entries or entries[-1]["kind"] != "done":
        raise OutputError(f"{folder} is not finished: run the same `lplr compress` command again to go on")
    rows = list(records.layers(entries))
    line = next((entry for entry in entries if entry["kind"] == KIND), None)
    return _losses(line, {r.name: (float(r.bits), prod(r.shape)) for r in rows})


def measured_losses(checkpoint: Checkpoint, plans: list[LayerPlan], recipe: Recipe, notify: Notify, say: Say) -> Losses:
    """The allocation that `compress` would begin with, measured in a temporary folder.

    Raises RecipeError when no matrix has a curve, and the errors of `calibration_windows`.  Not for inference mode.
    """
    chosen = taking_part(plans, recipe)
    if not chosen:
        raise RecipeError(
            f"no matrix takes part in an allocation with method {recipe.method!r} at {recipe.bits:g} bits: "
            "raise --bits, or choose ldlq or caldera"
        )
    device = usable_device(recipe.device)
    tokens, _ = calibration_windows(recipe, checkpoint, seeded(recipe.seed, "calibration"), notify)
    generator = seeded(recipe.seed, KIND, device)
    with tempfile.TemporaryDirectory() as folder, closing(Threads(device)) as workers:
        line = allocation(checkpoint, chosen, recipe, tokens, Path(folder), device, generator, workers, say)
    return _losses(line, {p.name: (line["layers"][p.name]["bits"], prod(p.shape)) for p in chosen})


def loss_at(curve: Sequence[Point], bits: float) -> float | None:
    """A falling curve at some stored bits, linear in log loss between two points; None beyond its ends.

    Where whole bytes make two widths take the same bits, the last counts.
    """
    if not curve or not curve[0][0] <= bits <= curve[-1][0]:
        return None
    i = bisect_right([b for b, _ in curve], bits) - 1
    if curve[i][0] == bits:
        return curve[i][1]
    (b0, e0), b1 = curve[i], curve[i + 1][0]
    e1 = min(e for b, e in curve if b == b1)
    t = (bits - b0) / (b1 - b0)
    return e0 ** (1 - t) * e1**t


def _losses(line: dict[str, Any] | None, matrices: Mapping[str, tuple[float, int]]) -> Losses:
    """matrices: name -> (bits, weights)."""
    layers = line["layers"] if line else {}
    rows = []
    for name, (bits, weights) in matrices.items():
        curve = [(float(b), float(e)) for b, e in layers[name]["curve"]] if name in layers else []
        rows.append(MatrixLoss(name, bits / weights, loss_at(curve, bits), tuple(loss_at(curve, b * weights) for b in SHOWN)))
    taking = [row for row in rows if row.name in layers]
    sums = tuple(_sum([row.at[i] for row in taking]) for i in range(len(SHOWN)))
    return Losses(rows, line["unit"] if line else None, line["predicted"] if line else None, sums)


def _sum(values: list[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return sum(found) if found and len(found) == len(values) else None
