"""What a run will take, from shapes alone: size, bits, memory and time; nothing is read but headers."""

from __future__ import annotations

import time
from dataclasses import dataclass
from math import prod

import torch

from lplr.factor.rank import exchanges
from lplr.recipe import Recipe
from lplr.stream.calibrate import ACTIVATION_LIMIT, TOKENS_AT_ONCE
from lplr.stream.checkpoint import Checkpoint, LayerPlan, Stored
from lplr.stream.device import usable_device
from lplr.stream.shards import shard_header, shard_name

LIBRARIES = 600 << 20  # resident size of Python, torch and transformers before any weight is read
# operations that the encoder of a grid takes for a weight, as many as matrix products do in its time (eval/results/grids.json)
ENCODER = {"trellis": 3e4, "lattice": 8e3}
OVERHEAD = 2.0  # wall time over the time of the matrix products alone: a rough allowance, not a measurement


@dataclass(frozen=True)
class Estimate:
    """output_bytes is the sum of all tensors, files the size of each weight file; seconds are for this machine."""

    weights: int
    bits_per_weight: float
    parameters: int
    bits_per_parameter: float
    source_bytes: int
    output_bytes: int
    files: dict[str, int]
    memory_bytes: int
    disk_bytes: int
    seconds: float


def estimate(checkpoint: Checkpoint, plans: list[LayerPlan], recipe: Recipe) -> Estimate:
    """Size and bits are exact; memory is an upper estimate; time follows a measured matrix product of a tenth of a second."""
    device = usable_device(recipe.device)
    view = checkpoint.view
    compressed = {f"{p.name}.weight": p for p in plans if p.format}
    sizes = {name: prod(view.shape(name)) for name in view.names()}
    bits = sum(p.format.stored_bits() for p in compressed.values() if p.format)
    weights = sum(p.shape[0] * p.shape[1] for p in compressed.values())
    dense = sum(size * checkpoint.stored_dtype(name).itemsize for name, size in sizes.items() if name not in compressed)
    output = bits // 8 + dense
    parameters = sum(sizes.values())
    memory, disk = _memory(checkpoint, plans, recipe)
    return Estimate(
        weights=weights,
        bits_per_weight=bits / weights,
        parameters=parameters,
        bits_per_parameter=8 * output / parameters,
        source_bytes=sum(view.nbytes(name) for name in view.names()),
        output_bytes=output,
        files=weight_files(checkpoint, plans),
        memory_bytes=memory,
        disk_bytes=disk,
        seconds=OVERHEAD * flops(checkpoint, plans, recipe) / matmul_rate(device),
    )


def weight_files(checkpoint: Checkpoint, plans: list[LayerPlan]) -> dict[str, int]:
    """Name -> bytes of every weight file, headers included."""
    count = len(checkpoint.stack)
    out = {}
    for index in range(count + 1):
        names = checkpoint.block_tensors(index) if index < count else checkpoint.other_tensors()
        layout = dict(Stored(checkpoint, names).layout)
        for p in plans:
            if p.block == index and p.format:
                del layout[f"{p.name}.weight"]
                layout |= {f"{p.name}.{part}": entry for part, entry in p.format.layout().items()}
        out[shard_name(index, count + 1)] = shard_header(layout)[2]
    return out


def flops(checkpoint: Checkpoint, plans: list[LayerPlan], recipe: Recipe) -> float:
    """Operations of the matrix products: calibration passes, factorization, certificates; and of the grids' encoders."""
    calibrated = recipe.dataset != "none"
    tokens = recipe.nsamples * recipe.seqlen if calibrated else 0
    total = 0.0
    for p in plans:
        if p.format is None:
            continue
        n, d = p.shape
        r, small = p.format.rank, min(n, d)
        tried = len(exchanges(p.shape, p.asked))
        rounds = 2 * tried - 1 if tried > 1 else 2 if p.format.q_bits and r else 1
        products = 2 + 2 * recipe.power_iterations + 4 * (recipe.alternations + 1)
        total += rounds * 2.0 * n * d * r * products + (4.0 * n * d * d if calibrated else 0.0)
        total += 2.0 * n * d * small + 10.0 * small**3 + 2.0 * n * d * r  # spectrum and certificates
        total += rounds * n * d * ENCODER.get(p.format.q_grid, 0.0)
        total += tokens * (2 * 2.0 * n * d + 2.0 * d * d)  # through the dense and the compressed block; the moments
    return total


def matmul_rate(device: torch.device) -> float:
    """Operations a second of a float32 matrix product, measured for about a tenth of a second."""
    size = 1024
    a = torch.ones(size, size, device=device)
    out = torch.mm(a, a)
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < 0.1:
        torch.mm(a, a, out=out)
        done += 1
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return done * 2.0 * size**3 / (time.perf_counter() - started)


def _memory(checkpoint: Checkpoint, plans: list[LayerPlan], recipe: Recipe) -> tuple[int, int]:
    """Peak bytes in memory, and bytes of activations on disk."""
    view = checkpoint.view
    largest = max((p.shape for p in plans), key=lambda shape: shape[0] * shape[1])
    n, d = largest
    matrix = 4 * 6 * n * d + 8 * min(n, d) ** 2 * 3  # float32 copies of one matrix at work, the spectrum in float64
    outside = max((4 * prod(view.shape(name)) for name in checkpoint.other_tensors()), default=0)
    if recipe.dataset == "none":
        return LIBRARIES + max(matrix, outside), 0
    block = 4 * max(sum(prod(view.shape(n)) for n in checkpoint.block_tensors(i)) for i in range(len(checkpoint.stack)))
    widths = {p.shape[1] for p in plans if p.block == 0}
    hessians = 4 * sum(w * w for w in widths) * 3
    hidden = getattr(checkpoint.config.get_text_config(), "hidden_size", d)
    activations = 4 * recipe.nsamples * recipe.seqlen * hidden
    passing = 4 * TOKENS_AT_ONCE * 8 * max(max(p.shape) for p in plans)
    kept = activations if activations <= ACTIVATION_LIMIT else 0
    return LIBRARIES + max(block + hessians + passing, hessians + matrix, outside) + kept, activations - kept
