"""Fewer neurons in the gated MLPs of a model: down(act(gate x) * up x) with a part of its neurons, down refitted to what is left.

Neuron j is a block in the sense of `convex.prune`, its fit h_j w_j: its activation on the calibration text times its column of
down.  Block by block, behind everything that is pruned already, the second moments H = E[h h^T] are collected, neurons are
chosen, and down becomes the least-squares map of the kept activations to the outputs (`linalg.eliminate`).  With `propagation`
these are in part the original model's outputs (`stream.moments`).  Every block keeps as many neurons: the config has one number.

A token counts by 1 / mean(y^2), y the hidden state behind the block: what follows divides by the size of y, and the few tokens
whose states are a thousand times larger than others' (Sun et al., "Massive activations in large language models", COLM 2024) are
not to decide alone what a block keeps.

The result is a plain dense folder.  It is made from a dense model and compressed afterwards: in a compressed one, rows of gate
and up could be dropped from codes that stand by rows, but not where an output rotation mixes the rows, as in most formats, and a
refitted down needs new codes in any case.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass
from importlib.metadata import version
from math import ceil, prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lplr
from lplr.errors import CheckpointError, OutputError, RecipeError, UnsupportedModel, choose
from lplr.files import write_atomic, write_text_atomic
from lplr.hf.export import tokenizer_files
from lplr.hf.skeleton import run_block
from lplr.linalg.eliminate import eliminated, others, output_error, refitted
from lplr.linalg.hessian import Hessian, shrunk
from lplr.nn.gated import GatedMLP, gated_mlps
from lplr.nn.swap import weight_of
from lplr.recipe import Recipe
from lplr.stream.calibrate import Activations, advance, calibration_windows, embed, loaded
from lplr.stream.checkpoint import Checkpoint, Stored, open_checkpoint
from lplr.stream.device import usable_device
from lplr.stream.estimate import LIBRARIES, OVERHEAD, matmul_rate
from lplr.stream.matrix import seeded
from lplr.stream.meter import Progress
from lplr.stream.moments import Drift, Original
from lplr.stream.shards import shard_name, write_index, write_shard

RECORD = "pruned.json"
MULTIPLE = 8  # a share is rounded so that this divides what is left, as it divides what is there: kernels want it
WIDTH = "intermediate_size"  # the number of neurons in a config
Notify = Callable[[str], None]
Selection = Callable[[GatedMLP, Tensor | None, Tensor, int], Tensor]  # (mlp, H, W of down, count) -> neurons that go


def _elimination(_: GatedMLP, H: Tensor | None, W: Tensor, count: int) -> Tensor:
    """Least cost in the block's output once the others have made up for it, one after the other."""
    assert H is not None
    return eliminated(H, W, count)[0]


def _activation(_: GatedMLP, H: Tensor | None, W: Tensor, count: int) -> Tensor:
    """Least E[h_j^2] ||w_j||^2: the size of the fit, as Wanda (Sun et al., ICLR 2024) scores weights."""
    assert H is not None
    return (H.diagonal() * W.float().square().sum(0)).argsort()[:count]


def _magnitude(mlp: GatedMLP, H: Tensor | None, W: Tensor, count: int) -> Tensor:
    """Least norm of all weights of a neuron."""
    return mlp.squares().argsort()[:count]


# how neurons are chosen: the last two are what the first is compared with (eval/quality/prune_mlp.py)
SELECTIONS: dict[str, Selection] = {"elimination": _elimination, "activation": _activation, "magnitude": _magnitude}


@dataclass(frozen=True)
class PrunePlan:
    """What pruning will make, from shapes alone: neurons, parameters and bytes before and after; memory and time, about."""

    neurons: tuple[int, int]
    blocks: int
    parameters: tuple[int, int]
    tensor_bytes: tuple[int, int]
    memory_bytes: int
    seconds: float


@dataclass(frozen=True)
class BlockPruned:
    """The neurons of a block that went, and the relative squared error of its MLP on the calibration text (None without)."""

    block: int
    error: float | None
    removed: list[int]


@dataclass(frozen=True)
class Pruned:
    """What `prune` made."""

    model: str
    folder: str
    selection: str
    correct: bool
    plan: PrunePlan
    calibration: dict[str, Any] | None
    blocks: list[BlockPruned]
    seconds: float


def prune(
    recipe: Recipe,
    neurons: str,
    output: Path | str,
    *,
    selection: str = "activation",
    correct: bool = True,
    notify: Notify | None = None,
    progress: Progress | None = None,
) -> Pruned:
    """Write the model of a recipe without `neurons` of each MLP (a share such as 10%, or a number) into the new folder `output`.

    Of the recipe count model, revision, dataset, nsamples, seqlen, propagation, seed and device.  correct: refit down.  Without a
    dataset (`none`) neurons go by magnitude, uncorrected.  output appears whole or not at all, with the result as pruned.json.
    Raises RecipeError, UnsupportedModel for a model that is compressed or has no gated MLPs of one size, CheckpointError,
    DatasetError, OutputError.
    """
    say, step, started = notify or (lambda _: None), progress or (lambda *_: None), time.perf_counter()
    choose(SELECTIONS, selection, "selection")
    if recipe.dataset == "none" and (correct or selection != "magnitude"):
        raise RecipeError("neurons are chosen by what they do on a text: give a --dataset other than none")
    target = Path(output).expanduser()
    if target.exists():
        raise OutputError(f"{target} is there already: give a new folder")
    device = usable_device(recipe.device)
    checkpoint = open_checkpoint(recipe.model, recipe.revision, say)
    plan = planned(checkpoint, recipe, neurons)
    tokens, calibration = calibration_windows(recipe, checkpoint, seeded(recipe.seed, "calibration"), say)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        choice = _Choice(SELECTIONS[selection], correct, plan.neurons[1], recipe.propagation if correct else 0.0)
        blocks = _write(checkpoint, choice, tokens, partial, device, step)
        name = checkpoint.path.resolve().name if Path(recipe.model).expanduser().exists() else recipe.model
        seconds = time.perf_counter() - started
        made = Pruned(name, target.name, selection, correct, plan, calibration, blocks, seconds)
        versions = {"lplr": lplr.__version__, "torch": torch.__version__, "transformers": version("transformers")}
        record = {**asdict(made), "propagation": choice.propagation, "seed": recipe.seed, "versions": versions}
        write_text_atomic(partial / RECORD, json.dumps(record) + "\n")
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return made


def as_table(plan: PrunePlan, made: Pruned | None = None) -> list[tuple[str, str]]:
    """(what, value) for a table: of a plan, or of what was made by it."""
    before, after = plan.neurons
    rows = [
        ("neurons of each MLP", f"{before:,} -> {after:,} ({1 - after / before:.1%} fewer), in {plan.blocks} blocks"),
        ("parameters", f"{plan.parameters[0]:,} -> {plan.parameters[1]:,}"),
        ("bytes of all tensors", f"{plan.tensor_bytes[0]:,} -> {plan.tensor_bytes[1]:,}"),
    ]
    if made is None:
        return [*rows, ("peak memory, about", f"{plan.memory_bytes:,} bytes"), ("time, about", f"{plan.seconds:.0f} s")]
    if errors := sorted((b.error, b.block) for b in made.blocks if b.error is not None):
        (middle, _), (worst, where) = errors[len(errors) // 2], errors[-1]
        told = f"median {middle:.2e}, largest {worst:.2e} in block {where + 1}"
        rows.append(("squared error of the MLPs on the calibration text, relative", told))
    text = made.calibration
    if text:
        rows.append(("calibration", f"{text['rows']} windows of {text['seqlen']} tokens of {text['name']}"))
    return [*rows, ("seconds", f"{made.seconds:.0f}")]


def kept_neurons(neurons: str, before: int) -> int:
    """How many neurons stay of `before` when a share or a number of them goes; RecipeError for none, all, or no number.

    A share removes at most what it says: see MULTIPLE.
    """
    text = neurons.strip()
    try:
        share = float(text[:-1]) / 100 if text.endswith("%") else None
        gone = int(text) if share is None else 0
    except ValueError:
        raise RecipeError(f"--neurons is {neurons!r}: give a share such as 10%, or how many neurons of each MLP go") from None
    if share is None:
        after = before - gone
    elif not 0 < share < 1:
        raise RecipeError(f"--neurons is {neurons!r}: give a share between 0% and 100%")
    else:
        unit = MULTIPLE if before % MULTIPLE == 0 else 1
        after = unit * ceil(round(before * (1 - share) / unit, 9))
    if not 0 < after < before:
        raise RecipeError(f"--neurons {neurons} leaves {after} of the {before} neurons of each MLP: give another share or number")
    return after


def planned(checkpoint: Checkpoint, recipe: Recipe, neurons: str) -> PrunePlan:
    """The plan, from shapes alone; RecipeError and UnsupportedModel as `prune`."""
    ck = checkpoint
    mlps = [_mlp(ck, i) for i in range(len(ck.stack))]
    before = mlps[0].neurons
    config = getattr(ck.config.get_text_config(), WIDTH, None)
    if any(mlp.neurons != before for mlp in mlps) or config != before:
        widths = ", ".join(str(width) for width in sorted({mlp.neurons for mlp in mlps}))
        raise UnsupportedModel(
            f"{ck.path.name} has MLPs of {widths} neurons, {WIDTH} of its config is {config}: only models whose MLPs are all of "
            "that size can be pruned"
        )
    after = kept_neurons(neurons, before)
    sizes = {name: ck.count(name) for name in ck.view.names()}
    total = sum(sizes.values())
    stored = sum(size * ck.stored_dtype(name).itemsize for name, size in sizes.items())
    gone = freed = 0
    for i, mlp in enumerate(mlps):
        for layer in (*mlp.rows, mlp.down):
            for key, parameter in mlp.module.get_submodule(layer).named_parameters(recurse=False):
                if layer != mlp.down or key == "weight":
                    name = ".".join(filter(None, (ck.prefix, str(i), mlp.name, layer, key)))
                    count = parameter.numel() * (before - after) // before
                    gone, freed = gone + count, freed + count * ck.stored_dtype(name).itemsize
    memory, seconds = _cost(ck, recipe, before, after)
    return PrunePlan((before, after), len(mlps), (total, total - gone), (stored, stored - freed), memory, seconds)


def _mlp(checkpoint: Checkpoint, index: int) -> GatedMLP:
    """The one gated MLP of a block, or UnsupportedModel."""
    found = gated_mlps(checkpoint.stack[index])
    if len(found) == 1:
        return found[0]
    kind = getattr(checkpoint.config, "model_type", "unknown")
    if not found:
        raise UnsupportedModel(
            f"{checkpoint.path.name} ({kind}): block {index + 1} has no gated MLP (layers gate_proj, up_proj, down_proj, or "
            "gate_up_proj, down_proj): choose a model of the Llama, Mistral, Qwen, Gemma or Phi-3 kind"
        )
    raise UnsupportedModel(
        f"{checkpoint.path.name} ({kind}): block {index + 1} has {len(found)} gated MLPs, a mixture of experts: choose a model "
        "with one for each block"
    )


@dataclass(frozen=True)
class _Choice:
    """How a block is pruned: to `after` neurons, and the share of earlier changes that down makes up for."""

    select: Selection
    correct: bool
    after: int
    propagation: float

    def apply(self, mlp: GatedMLP, H: Tensor | None, step: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, float | None]:
        """Narrow an MLP in place, down as `dtype` will hold it; neurons removed, and the error relative to what was wanted."""
        W = weight_of(mlp.module.get_submodule(mlp.down))
        wanted = W if step is None else W + self.propagation * W @ step
        gone = self.select(mlp, H, wanted, mlp.neurons - self.after)
        kept = others(gone, mlp.neurons)
        down = refitted(H, wanted, kept) if self.correct and H is not None else W[:, kept]
        down = down.to(dtype).float()
        error = None if H is None else output_error(H, wanted, kept, down)
        mlp.narrow(kept, down)
        return gone.sort().values, error


def _write(
    checkpoint: Checkpoint, choice: _Choice, tokens: Tensor | None, folder: Path, device: torch.device, step: Progress
) -> list[BlockPruned]:
    """Every file of the pruned model but the record, into `folder`."""
    ck, shards = checkpoint, len(checkpoint.stack) + 1
    weight_map: dict[str, str] = {}
    total, found = 0, []

    def write(index: int, tensors: Any) -> None:
        nonlocal total
        layout = (
            tensors.layout if isinstance(tensors, Stored) else {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
        )
        file = shard_name(index, shards)
        write_shard(folder / file, tensors, layout=layout)
        weight_map.update(dict.fromkeys(layout, file))
        total += sum(prod(shape) * dtype.itemsize for shape, dtype in layout.values())

    with torch.inference_mode():
        for i, (tensors, pruned) in enumerate(_blocks(ck, choice, tokens, folder, device, step)):
            write(i, tensors)
            found.append(pruned)
        write(shards - 1, Stored(ck, ck.other_tensors()))
    write_index(folder, weight_map, total)
    for name, content in tokenizer_files(ck.path).items():
        write_atomic(folder / name, content)
    write_text_atomic(folder / "config.json", _config_text(ck, choice.after))
    return found


def _blocks(
    checkpoint: Checkpoint, choice: _Choice, tokens: Tensor | None, folder: Path, device: torch.device, step: Progress
) -> Iterator[tuple[dict[str, Tensor], BlockPruned]]:
    """Each block's tensors as they are stored, pruned behind the pruned ones before it, and what was done."""
    ck, count = checkpoint, len(checkpoint.stack)
    inputs: Activations | None = None
    originals: Activations | None = None
    kwargs: list[dict[str, Any]] = [{}] * count
    try:
        if tokens is not None:
            step(0.0, count, "embedding the calibration text")
            inputs, kwargs = embed(ck, tokens, folder, device)
            originals = inputs.copy(folder) if choice.propagation else None
        for i in range(count):
            step(float(i), count, f"block {i + 1} of {count}")
            with loaded(ck, i, device) as block:
                mlp, H, away = gated_mlps(block)[0], None, None
                if inputs is not None:
                    H, away = neuron_moments(block, mlp, inputs, kwargs[i], device, originals)
                dtype = ck.stored_dtype(".".join(filter(None, (ck.prefix, str(i), mlp.name, mlp.down, "weight"))))
                gone, error = choice.apply(mlp, H, away, dtype)
                if inputs is not None and i + 1 < count:
                    advance(block, inputs, kwargs[i], device)
                yield _stored(ck, i, block), BlockPruned(i, error, gone.tolist())
    finally:
        for states in (inputs, originals):
            if states is not None:
                states.close()


@torch.no_grad()
def neuron_moments(
    block: nn.Module,
    mlp: GatedMLP,
    inputs: Activations,
    kwargs: Mapping[str, Any],
    device: torch.device,
    originals: Activations | None = None,
) -> tuple[Tensor, Tensor | None]:
    """H = E[h h^T] of the neurons' activations, tokens weighted as above, and the step that makes up for what is pruned already.

    originals: the block's inputs behind original blocks; they become its outputs there.  Without them there is no step.
    """
    down = ".".join(filter(None, (mlp.name, mlp.down)))
    original = None if originals is None else Original.of(block, originals)
    hessian, drift = Hessian(mlp.neurons, device), Drift(mlp.neurons, device)
    seen: list[Tensor] = []
    handle = block.get_submodule(down).register_forward_pre_hook(lambda _, given: seen.append(given[0].float()))
    try:
        for rows in inputs.batches():
            y = run_block(block, inputs.get(rows).to(device), kwargs).float()
            root = y.square().mean(-1, keepdim=True).clamp_min(torch.finfo(y.dtype).tiny).rsqrt()
            h = seen.pop()
            hessian.add(h * root)
            if original is not None:
                before = original.run(rows, [down], kwargs, device, last=True)[down]
                drift.add(before.float() * root, h * root)
    finally:
        handle.remove()
    H = hessian.mean()
    if H is None:
        raise CheckpointError(f"activations of {down} on the calibration text leave the range of float32: give another --dataset")
    H = shrunk(H, hessian.rows)
    return H, None if original is None else drift.step(H)


def _stored(checkpoint: Checkpoint, index: int, block: nn.Module) -> dict[str, Tensor]:
    """The tensors of a block under the model's names, in the types in which they are stored."""
    prefix, state = f"{checkpoint.prefix}.{index}.", block.state_dict()
    names = checkpoint.block_tensors(index)
    held = {name: state[name.removeprefix(prefix)] for name in names}
    return {name: t.to(checkpoint.stored_dtype(name)) if t.is_floating_point() else t for name, t in held.items()}


def _config_text(checkpoint: Checkpoint, after: int) -> str:
    """config.json of the narrower model."""
    config = deepcopy(checkpoint.config)
    setattr(config.get_text_config(), WIDTH, after)
    fields = json.loads(config.to_json_string(use_diff=True))
    fields = {key: value for key, value in fields.items() if not key.endswith("name_or_path")}
    dtypes = [checkpoint.stored_dtype(name) for name in checkpoint.other_tensors()]
    dtype = max(dtypes, key=lambda t: (t.is_floating_point, t.itemsize))
    return json.dumps({**fields, "dtype": str(dtype).removeprefix("torch.")}, indent=2, sort_keys=True) + "\n"


def _cost(checkpoint: Checkpoint, recipe: Recipe, before: int, after: int) -> tuple[int, float]:
    """Peak bytes in memory and seconds, about: two passes through each block, three beside the original, and the algebra."""
    ck = checkpoint
    tokens = 0 if recipe.dataset == "none" else recipe.nsamples * recipe.seqlen
    block = max(sum(map(ck.count, ck.block_tensors(i))) for i in range(len(ck.stack)))
    gone, hidden = before - after, getattr(ck.config.get_text_config(), "hidden_size", 0)
    passes = 3 if recipe.propagation else 2
    algebra = 4.0 * before**3 + 4.0 * gone * before * (gone + hidden) if tokens else 0.0
    flops = len(ck.stack) * (tokens * (passes * 2.0 * block + before**2) + algebra)
    states = 4 * tokens * hidden * (passes - 1)
    memory = LIBRARIES + 4 * block * (passes - 1) + 8 * 5 * before**2 + states
    outside = max((4 * ck.count(name) for name in ck.other_tensors()), default=0)
    return max(memory, LIBRARIES + outside), OVERHEAD * flops / matmul_rate(usable_device(recipe.device))
