"""What a run will take, from shapes alone: size, bits, memory and time; nothing is read but headers.

Where bits are allocated by sensitivity, the plan is that of equal bits: what each matrix gets is known when the run has measured
it.  All together keep to the budget, so bits and the bytes of the tensors are upper bounds then.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from math import floor, prod

import torch

from lplr.errors import RecipeError
from lplr.factor.curves import MEASURED
from lplr.factor.curves import ROWS as CURVE_ROWS
from lplr.factor.double_binary import ITERATIONS
from lplr.factor.rank import exchanges
from lplr.recipe import Recipe
from lplr.recover.distill import TOKENS_AT_ONCE as HEAD_AT_ONCE
from lplr.stream.allocation import ROWS, taking_part
from lplr.stream.calibrate import ACTIVATION_LIMIT, TOKENS_AT_ONCE
from lplr.stream.checkpoint import Checkpoint, LayerPlan, Stored
from lplr.stream.device import memory_of, product_dtype, usable_device
from lplr.stream.distill import KEPT, ROUNDED_AFTER, TOKENS_A_STEP, WIDTHS
from lplr.stream.shards import shard_header, shard_name

GIB = 1 << 30
LIBRARIES = 600 << 20  # resident size of Python, torch and transformers before any weight is read
# operations that the encoder of a grid takes for a weight, as many as matrix products do in its time (eval/results/grids.json)
ENCODER = {"trellis": 3e4, "lattice": 8e3}
OVERHEAD = 2.0  # wall time over the time of the matrix products alone: a rough allowance, not a measurement


@dataclass(frozen=True)
class Estimate:
    """output_bytes is the sum of all tensors, files the size of each weight file; seconds are for this machine.

    allocated: the bits of how many matrices are allocated later; then bits and output_bytes are upper bounds, and files are those
    of the plan of equal bits.
    """

    weights: int
    allocated: int
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
    """Size and bits are exact with uniform bits, upper bounds where they are allocated; memory is an upper estimate; time follows
    a measured matrix product of a tenth of a second.
    """
    device = usable_device(recipe.device)
    view = checkpoint.view
    compressed = {f"{p.name}.weight": p for p in plans if p.format}
    sizes = {name: prod(view.shape(name)) for name in view.names()}
    shared = {p.name for p in taking_part(plans, recipe)}
    bits = sum(p.format.stored_bits() for p in compressed.values() if p.format and p.name not in shared)
    bits += sum(floor(recipe.bits * prod(p.shape)) for p in plans if p.name in shared)
    weights = sum(p.shape[0] * p.shape[1] for p in compressed.values())
    dense = sum(size * checkpoint.stored_dtype(name).itemsize for name, size in sizes.items() if name not in compressed)
    output = bits // 8 + dense  # every tensor takes whole bytes
    parameters = sum(sizes.values())
    memory, disk = _memory(checkpoint, plans, recipe)
    return Estimate(
        weights=weights,
        allocated=len(shared),
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
    """Operations of the matrix products (allocation, calibration, factorization, certificates) and of the grids' encoders."""
    calibrated = recipe.dataset != "none"
    tokens = recipe.nsamples * recipe.seqlen if calibrated else 0
    total = _allocation_flops(checkpoint, plans, recipe)
    for p in plans:
        if p.format is None:
            continue
        n, d = p.shape
        small = min(n, d)
        for tried in exchanges(p.shape, p.asked):
            r, rounds = tried.rank or 0, 2 if tried.rank and tried.q else 1
            products = 2 + 2 * recipe.power_iterations + 4 * (recipe.alternations + 1)
            products *= ITERATIONS if tried.method == "double_binary" else 1
            total += rounds * 2.0 * n * d * r * products + (4.0 * n * d * d if calibrated else 0.0)
            total += rounds * n * d * ENCODER.get(tried.q.grid if tried.q else "", 0.0)
        total += 2.0 * n * d * small + 10.0 * small**3 + 2.0 * n * d * p.format.rank  # spectrum and certificates
        # through the compressed block, and about twice through the one at work, from stage to stage; half of the moments
        total += tokens * (3 * 2.0 * n * d + d * d)
        if recipe.propagation:  # twice through the original block, its drift
            total += tokens * (2 * 2.0 * n * d + 2.0 * d * d)
    return total + (_recovery_flops(checkpoint, plans, recipe) if calibrated else 0.0)


def _recovery_flops(checkpoint: Checkpoint, plans: list[LayerPlan], recipe: Recipe) -> float:
    """Of tuning: passes forward and back, and the encoder once a step and once for what is held out."""
    recovery, tokens = recipe.recovery, recipe.nsamples * recipe.seqlen
    inner = float(sum(prod(p.shape) for p in plans))
    encoder = sum(prod(p.shape) * ENCODER.get(p.format.q_grid, 2.0) for p in plans if p.format and recovery.lr)
    head = float(_vocabulary(checkpoint) * _hidden(checkpoint))
    steps = [epochs * (-(-tokens // at_once) + 1) for epochs, at_once in _steps(recipe)]
    passed = 6.0 if recovery.lr else 4.0  # forward and back for a weight and token, without its own gradient where it is fixed
    total = sum(steps) * encoder + recovery.epochs * tokens * passed * inner
    if recovery.distill_epochs:  # the head forward twice; the original once
        total += recovery.distill_epochs * tokens * (passed * inner + 8.0 * head) + tokens * 2.0 * (inner + head)
    return total


def _steps(recipe: Recipe) -> list[tuple[int, int]]:
    """(passes, tokens after which latents move) of the tuning of blocks, and of the whole model."""
    return [(recipe.recovery.epochs, TOKENS_AT_ONCE), (recipe.recovery.distill_epochs, max(ROUNDED_AFTER, recipe.seqlen))]


def _allocation_flops(checkpoint: Checkpoint, plans: list[LayerPlan], recipe: Recipe) -> float:
    """Of `stream.allocation`: the passes of `sensitivity.measure` with their second moments, and the curves."""
    chosen = taking_part(plans, recipe)
    if not chosen:
        return 0.0
    total = 0.0
    for p in chosen:
        n, d = p.shape
        total += len(MEASURED) * min(n, CURVE_ROWS) * d * ENCODER.get(p.format.q_grid if p.format else "", 2.0 * d)
    if recipe.dataset == "none":
        return total
    tokens = min(recipe.nsamples, ROWS) * recipe.seqlen
    head = _vocabulary(checkpoint) * _hidden(checkpoint)
    inner = sum(prod(p.shape) for p in plans)
    total += 4 * tokens * 2.0 * (inner + head)  # forward, forward again with a graph, and back
    # second moments; their factors and rotations
    return total + sum(2.0 * tokens * p.shape[1] ** 2 + 6.0 * p.shape[1] ** 3 for p in chosen)


def _vocabulary(checkpoint: Checkpoint) -> int:
    return getattr(checkpoint.config.get_text_config(), "vocab_size", 0)


def _hidden(checkpoint: Checkpoint) -> int:
    return getattr(checkpoint.config.get_text_config(), "hidden_size", 0) or 0


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
    matrix = matrix_memory(largest)
    outside = max((4 * prod(view.shape(name)) for name in checkpoint.other_tensors()), default=0)
    if recipe.dataset == "none":
        return LIBRARIES + max(matrix, outside), 0
    block = 4 * max(sum(prod(view.shape(n)) for n in checkpoint.block_tensors(i)) for i in range(len(checkpoint.stack)))
    tuned = bool(recipe.recovery.epochs)
    twice = 2 if recipe.propagation or tuned else 1  # the original block beside the one at work, its states and drifts
    hessians = (2 + 2 * twice) * _moments_bytes(checkpoint, plans, weighted=False)  # sums of all batches and of one, factors
    hidden = _hidden(checkpoint) or d
    activations = 4 * recipe.nsamples * recipe.seqlen * hidden
    passing = 4 * TOKENS_AT_ONCE * 8 * max(max(p.shape) for p in plans)
    kept = twice * activations if activations <= ACTIVATION_LIMIT else 0
    most = max(twice * block + hessians + passing, hessians + matrix, outside)
    if tuned:  # latents, the best, a gradient, two moments; what a pass forward keeps
        most = max(most, 7 * block + 4 * TOKENS_AT_ONCE * WIDTHS * hidden)
    most += kept
    on_disk = twice * activations - kept
    if taking_part(plans, recipe):
        moments = sum(_moments_bytes(checkpoint, plans, weighted) for weighted in (False, True))
        measuring, files = _sensitivity_memory(checkpoint, recipe, moments + max(block + 2 * passing, matrix))
        most, on_disk = max(most, measuring), max(on_disk, files)
    return LIBRARIES + max(most, _distillation_memory(checkpoint, plans, recipe)), on_disk


def _distillation_memory(checkpoint: Checkpoint, plans: list[LayerPlan], recipe: Recipe) -> int:
    """Peak bytes of the last stage of recovery, which holds all blocks at once; 0 without it."""
    if not recipe.recovery.distill_epochs or recipe.dataset == "none":
        return 0
    latents = 28 if recipe.recovery.optimizer == "adamw" else 22
    each = latents if recipe.recovery.lr else product_dtype(usable_device(recipe.device)).itemsize
    packed = recipe.bits / 8  # the codes, which stay beside
    weights = sum(int((each + packed if p.format else 4) * prod(p.shape)) for p in plans)
    hidden, count = _hidden(checkpoint) or max(p.shape[1] for p in plans), len(checkpoint.stack)
    states = 4 * max(TOKENS_A_STEP, recipe.seqlen) * hidden  # of a batch, before each block
    passed = WIDTHS * states * count
    if passed > KEPT:  # then each block is run twice, and what passes through one of them is there at a time
        passed = (WIDTHS + count) * states
    outside = 4 * sum(prod(checkpoint.view.shape(name)) for name in checkpoint.other_tensors())
    return weights + passed + outside + 4 * 6 * _vocabulary(checkpoint) * HEAD_AT_ONCE


def check_memory(checkpoint: Checkpoint, plans: list[LayerPlan], recipe: Recipe) -> None:
    """RecipeError where the distillation, which alone holds the whole model, cannot fit into the memory of its device."""
    needed, there = _distillation_memory(checkpoint, plans, recipe), memory_of(usable_device(recipe.device))
    if needed > there:
        raise RecipeError(
            f"the last stage of recovery holds the whole model, about {needed / GIB:.1f} GiB, and {recipe.device} has "
            f"{there / GIB:.1f} GiB: take --preset fast, a larger machine, or, in a recipe, `recovery: {{epochs: 1}}`, "
            "which holds one block at a time"
        )


def matrix_memory(shape: tuple[int, int], *, moments: bool = False) -> int:
    """Peak bytes of one matrix at work: float32 copies, the spectrum in float64; with `moments`, H, its factor and the step."""
    n, d = shape
    return 4 * 6 * n * d + 8 * min(n, d) ** 2 * 3 + (4 * 3 * d * d if moments else 0)


def _moments_bytes(checkpoint: Checkpoint, plans: list[LayerPlan], weighted: bool) -> int:
    """Second moments of a block's inputs: of each distinct width once, or weighted by the gradients of every matrix."""
    most = 0
    for i in range(len(checkpoint.stack)):
        widths = [p.shape[1] for p in plans if p.block == i and p.format]
        most = max(most, sum(w * w for w in (widths if weighted else set(widths))))
    return 4 * most


def _sensitivity_memory(checkpoint: Checkpoint, recipe: Recipe, work: int) -> tuple[int, int]:
    """Peak bytes of `sensitivity.measure` and the curves, and bytes of activations on disk: those of every block are kept.

    work: bytes of one block and its second moments at work.  The graph of a batch holds what passes, its gradients as much again.
    """
    count = len(checkpoint.stack)
    states = 4 * min(recipe.nsamples, ROWS) * recipe.seqlen * _hidden(checkpoint)
    kept = states * ((states <= ACTIVATION_LIMIT) + count * (states <= ACTIVATION_LIMIT // count))
    outside = 4 * sum(prod(checkpoint.view.shape(name)) for name in checkpoint.other_tensors())
    head = outside + 4 * 5 * recipe.seqlen * _vocabulary(checkpoint)  # scores, probabilities and gradients of one row
    return kept + max(work, head), states * (1 + count) - kept
