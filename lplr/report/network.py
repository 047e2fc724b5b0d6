"""The network as a picture: a row for each kind of matrix, a column for each block, a cell for what is stored there.

A cell's shade runs with the logarithm of its bits per weight from the least to the most that a compressed matrix of the run
has; the number stands in it, so that nobody needs the colour.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from lplr.records import LayerRecord, bits_per_weight
from lplr.report.text import DASH, number

SHADES = 6  # classes m0 .. m5 of the style sheet


class Cell(NamedTuple):
    """What is stored of one kind in one block (of several matrices, experts for example, the mean)."""

    bits: str
    rank: str
    shade: str


class Row(NamedTuple):
    """A kind of matrix: how many there are, their mean bits per weight, and its cells, None where a block has none."""

    kind: str
    count: str
    mean: str
    cells: list[Cell | None]


def kind(name: str) -> str:
    """The path of a matrix within its block, without numbers: model.layers.3.mlp.experts.7.up_proj is mlp.experts.up_proj."""
    parts = name.removesuffix(".weight").split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
    found = [part for part in parts[numbers[0] if numbers else -1 :] if not part.isdecimal()]
    return ".".join(found) or name or DASH


def kinds(records: Sequence[LayerRecord], most: int | None = None) -> dict[str, list[LayerRecord]]:
    """Records by their kind; where there are more than `most` kinds, the rarest under `other`."""
    found: dict[str, list[LayerRecord]] = {}
    for r in records:
        found.setdefault(kind(r.name), []).append(r)
    if most is None or len(found) <= most:
        return found
    common = sorted(found, key=lambda name: -len(found[name]))[: most - 1]
    kept = {name: rs for name, rs in found.items() if name in common}
    return {**kept, "other": [r for name, rs in found.items() if name not in common for r in rs]}


def network(records: Sequence[LayerRecord]) -> dict[str, Any] | None:
    """blocks, rows, and the least and most bits of the shades (None where nothing is compressed); None without records."""
    if not records:
        return None
    blocks = sorted({r.block for r in records})
    by_kind = {name: {b: [r for r in found if r.block == b] for b in blocks} for name, found in kinds(records).items()}
    compressed = [bits_per_weight(cell) for row in by_kind.values() for cell in row.values() if bits_per_weight(cell) > 0]
    ends = (min(compressed), max(compressed)) if compressed else None
    rows = []
    for name, row in by_kind.items():
        members = [r for cell in row.values() for r in cell]
        cells = [_cell(cell, ends) if cell else None for cell in row.values()]
        rows.append(Row(name, number(len(members), 9), number(_bits(members), 3), cells))
    return {"blocks": blocks, "rows": rows, "ends": ends and tuple(number(end, 3) for end in ends), "shades": SHADES}


def _cell(records: Sequence[LayerRecord], ends: tuple[float, float] | None) -> Cell:
    bits, ranks = _bits(records), {r.rank for r in records if r.stored == "compressed"}
    low, high = min(ranks, default=0), max(ranks, default=0)
    rank = "" if not high else f"{low}" if low == high else f"{low}{DASH}{high}"
    return Cell(f"{bits:.2g}" if bits < 10 else f"{bits:.0f}", rank, _shade(records, ends))


def _shade(records: Sequence[LayerRecord], ends: tuple[float, float] | None) -> str:
    if all(r.stored == "dense" for r in records):
        return "dense"
    bits = bits_per_weight(records)
    if ends is None or ends[0] == ends[1] or bits <= 0:
        return "m0"
    low, high = (math.log(end) for end in ends)
    return f"m{round((SHADES - 1) * (math.log(bits) - low) / (high - low))}"


def _bits(records: Sequence[LayerRecord]) -> float:
    """Bits per weight of compressed matrices; of dense ones where there are no others."""
    return bits_per_weight(records) or sum(r.bits for r in records) / sum(r.shape[0] * r.shape[1] for r in records)
