"""The bits of every matrix of a model: curves of the original weights, weighted by what the loss minds, solved for the budget.

With calibration a matrix's curve is s_i tr(E M_i E^T), the divergence in nats a token that its rounding predicts
(`stream.sensitivity`); without, tr(E E^T) / ||W||_F^2, every matrix as dear as the next.  The budget is that of all matrices that
take part: those of the methods in `factor.curves.CURVED` whose bits no rule sets.  What was decided stands in run.jsonl before
the first block, and a resumed run goes by it.

The prediction is of second order and holds near the original model only, so no matrix falls far below the budget (`least_bits`):
on SmolLM2-135M at 2 bits the first block's attention, four matrices of next to no predicted loss each, cost 0.3 nats when
all were given half a bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import groupby
from math import floor, nextafter, prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lplr.factor import layout, plan
from lplr.factor.allocate import Point, allocate
from lplr.factor.curves import CURVED, error_curve
from lplr.recipe import Recipe
from lplr.stream import gradients
from lplr.stream.checkpoint import Checkpoint, LayerPlan
from lplr.stream.sensitivity import Measured, Say, measure
from lplr.stream.source import check_finite
from lplr.stream.workers import Pending, Workers, in_flight

KIND = "allocation"
ROWS = 32  # calibration rows that losses and curves are measured on
SPREAD = 0.5  # bits that a matrix may fall below the budget
PADDING = 0.1  # bits a weight that the scale and the last bytes of the columns take at most, of a width that counts as reached


def taking_part(plans: list[LayerPlan], recipe: Recipe) -> list[LayerPlan]:
    """The matrices that share the budget; nothing where the recipe asks for uniform bits."""
    if recipe.allocation == "uniform":
        return []
    ruled = {p.name for p in plans for rule in recipe.rules if rule.bits and fnmatchcase(p.name, rule.match)}
    return [p for p in plans if p.format and p.spec.method in CURVED and p.asked.rank is None and p.name not in ruled]


def allocation(
    checkpoint: Checkpoint,
    plans: list[LayerPlan],
    recipe: Recipe,
    tokens: Tensor | None,
    folder: Path,
    device: torch.device,
    generator: torch.Generator,
    workers: Workers,
    say: Say,
) -> dict[str, Any]:
    """The line of run.jsonl: for each matrix its curve (stored bits, predicted loss) and the bits that it is given, and the
    checksums of the files of `gradients` by block.

    tokens (rows, seqlen), None without calibration; curves are measured by `workers`, those of a block together, or of the whole
    model where nothing is collected block by block.  Not for inference mode.
    """
    rows = None if tokens is None else tokens[:ROWS]
    curves: dict[str, list[Point]] = {}
    files: dict[str, str] = {}
    measured = _measured(checkpoint, plans, rows, folder, device, generator, say)
    moments: dict[str, Tensor] = {}  # of one block

    def begun(m: Measured) -> Pending[tuple[str, list[Point]]]:
        if m.G is not None:
            moments[m.plan.name] = m.G
        weight = checkpoint.view.get(f"{m.plan.name}.weight")
        return workers.submit(_curve, m, weight, rows is not None, recipe.bits, device)

    for block, group in groupby(measured, lambda m: m.plan.block if rows is not None else None):
        curves.update(in_flight(map(begun, group), workers.slots))
        if block is not None and moments:
            files[str(block)] = gradients.keep(folder, block, moments)
            moments.clear()
    budget = sum(floor(recipe.bits * prod(p.shape)) for p in plans)
    if budget < sum(curve[0][0] for curve in curves.values()):
        curves = {}  # only columns of no bits make the plans fit: every matrix keeps its own
    found = allocate(curves, budget)
    layers = {name: {"bits": found.bits[name], "curve": [list(point) for point in curves[name]]} for name in sorted(curves)}
    unit = "relative squared error" if rows is None else "nats a token"
    line = {"kind": KIND, "unit": unit, "predicted": found.error, "slope": found.slope, "layers": layers}
    return {**line, "gradients": files} if files else line


def _curve(m: Measured, weight: Tensor, calibrated: bool, bits: float, device: torch.device) -> tuple[str, list[Point]]:
    """Name and curve of a matrix from its tensor in the checkpoint, in the unit of the line."""
    check_finite(f"{m.plan.name}.weight", weight)
    W = weight.float().to(device)
    W = W.T.contiguous() if m.plan.transposed else W
    square = float(W.double().square().sum())
    loss = m.weight if calibrated else 1 / square if square else 0.0
    found = [(stored, loss * error) for stored, error in error_curve(W, m.plan.asked, H=m.H, M=m.M, G=m.G)]
    return m.plan.name, _admitted(found, least_bits(bits) * W.numel(), m.plan.dense_bits)


def least_bits(budget: float) -> float:
    """The width below which no matrix falls, but for the next width of its grid."""
    return budget - SPREAD + PADDING


def _admitted(curve: list[Point], least: float, dense_bits: int) -> list[Point]:
    """The points from the last one of at most `least` bits on, as far as they are smaller than the dense matrix."""
    start = max((i for i, (bits, _) in enumerate(curve) if bits <= least), default=0)
    return [point for point in curve[start:] if point[0] < dense_bits] or curve[start : start + 1]


def allocated(plans: list[LayerPlan], line: dict[str, Any]) -> list[LayerPlan]:
    """The plans with the bits of the line; those that it does not name as they are."""
    out = []
    for p in plans:
        if (entry := line["layers"].get(p.name)) is None:
            out.append(p)
            continue
        # stored bits are whole: the next number up keeps a division's rounding from taking one away
        asked = p.asked.model_copy(update={"bits_per_weight": nextafter(entry["bits"] / prod(p.shape), 17.0)})
        spec = plan(p.shape, asked)
        out.append(replace(p, asked=asked, spec=spec, format=layout(p.shape, spec)))
    return out


def _measured(
    checkpoint: Checkpoint,
    plans: list[LayerPlan],
    tokens: Tensor | None,
    folder: Path,
    device: torch.device,
    generator: torch.Generator,
    say: Say,
) -> Iterator[Measured]:
    if tokens is None:
        return _unweighted(plans, say)
    return measure(checkpoint, plans, tokens, folder, device, generator, say)


def _unweighted(plans: list[LayerPlan], say: Say) -> Iterator[Measured]:
    for i, p in enumerate(plans):
        say(i / len(plans), f"error of {p.name} at each width")
        yield Measured(p, 1.0, None, None)
