"""What the loss minds of each matrix's outputs, G = E[g g^T], kept on disk from the allocation to the block that uses it.

One hidden file a block in the output folder, float16 in units of the mean diagonal, removed when the block is finished; its
checksum stands in run.jsonl, so that a resumed run rounds in the same metric.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lplr.errors import OutputError
from lplr.factor.rank import WEIGH_OUTPUTS
from lplr.files import remove, sha256
from lplr.stream.checkpoint import LayerPlan
from lplr.stream.shards import write_shard
from lplr.stream.source import read_entries

LIMIT = 4 << 30  # bytes of G of one block in float32; the largest matrices beyond it do without


def wanted(plans: list[LayerPlan]) -> set[str]:
    """Names of the matrices of one block whose rounding uses G, the ones with fewest outputs first, as far as LIMIT goes."""
    names, left = set(), LIMIT
    for p in sorted(plans, key=lambda p: p.shape[0]):
        left -= 4 * p.shape[0] ** 2
        if p.spec.method in WEIGH_OUTPUTS and p.spec.q is not None and p.spec.q.grid == "trellis" and left >= 0:
            names.add(p.name)
    return names


def keep(folder: Path, block: int, moments: Mapping[str, Tensor]) -> str:
    """Write the moments of one block; returns the file's SHA-256."""
    units = {name: G.diagonal().double().mean().clamp(min=1e-300) for name, G in moments.items()}
    return write_shard(_file(folder, block), {name: (G.double() / units[name]).half() for name, G in moments.items()})


def kept(folder: Path, block: int, told: str) -> dict[str, Tensor]:
    """Name -> G (n x n) in units of its mean diagonal; OutputError when the file is not the one that was written."""
    path = _file(folder, block)
    if not intact(folder, block, told):
        raise OutputError(f"{path} is missing or was altered during the run: run the same command again")
    return {name: entry.read().float() for name, entry in read_entries(path).items()}


def intact(folder: Path, block: int, told: str) -> bool:
    """Whether the file is there as it was written."""
    path = _file(folder, block)
    return path.is_file() and sha256(path) == told


def drop(folder: Path, block: int) -> None:
    """Remove the file of a block that is finished."""
    remove(_file(folder, block))


def _file(folder: Path, block: int) -> Path:
    return folder / f".gradients-{block + 1:05d}.safetensors"
