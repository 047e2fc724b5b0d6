"""The last stage of recovery: all that is free in a compressed model tuned end to end against the original's predictions.

    minimise  E_t KL(p_t || q_t)     over latents, scales, norms and biases of all blocks, and the vectors outside of them

p the original's next-token distributions on the calibration text, as `recover.distill` keeps them: it runs once.  Unlike in every
other stage the whole model is in memory: its weights, their latents, what these are rounded to, the best ones, a gradient and
AdamW's two moments of each, 28 bytes a weight (22 with moments of 8 bits).  After each pass over the text they are written
down, and a killed run goes on behind the last one.  What is tuned begins as the finished folder of the stages before; every
matrix is certified again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint as recomputed

from lplr import records
from lplr.factor import Factorization, Format
from lplr.files import remove
from lplr.hf.optimizers import optimizer_of
from lplr.hf.skeleton import run_head
from lplr.nn import is_conv1d
from lplr.recipe import Recipe
from lplr.recover import Course, Group, Latent, Likeliest, State, Tunable, applied, descend, taught
from lplr.stream.calibrate import Activations, advance, embed, loaded, outside
from lplr.stream.checkpoint import Checkpoint
from lplr.stream.device import autocast, product_dtype
from lplr.stream.ledger import Ledger
from lplr.stream.matrix import seeded, tuned
from lplr.stream.reconstruct import KIND, Called, split, tokens_of
from lplr.stream.shards import shard_name, write_shard
from lplr.stream.source import read_entries

STATE = ".distill.safetensors"
LIKELIEST = 64  # next tokens that are kept of each distribution
TOKENS_A_STEP = 512  # of scales and norms, one row at least: many small steps get further than few large ones
ROUNDED_AFTER = 8192  # tokens between two steps of the latents: rounding a whole model again costs as much as thousands of tokens
KEPT = 4 << 30  # bytes that one batch's pass forward may keep for the pass back; above it blocks are run twice
WIDTHS = 40  # numbers that a block keeps of a token, in units of the hidden width: about
OUTSIDE = "outside."

Say = Callable[[float, str], None]  # (share of the work that is done, what comes next)


@dataclass
class Student:
    """The compressed model as a function of what is tuned: blocks by number, and the vectors outside of them."""

    checkpoint: Checkpoint
    blocks: list[Tunable]
    called: list[Called]
    outside: Tunable
    device: torch.device

    @classmethod
    def of(cls, ck: Checkpoint, folder: Path, kwargs: list[dict[str, Any]], device: torch.device, *, codes: bool) -> Student:
        """What the finished run of `folder` made of a checkpoint, whose outside is in memory."""
        rows = list(records.layers(records.read(folder / records.LEDGER)))
        formats = {name: Format.from_dict(entry) for name, entry in records.formats(rows).items()}
        count = len(ck.stack)
        made = [_tunable(ck, i, folder / shard_name(i, count + 1), formats, device, codes=codes) for i in range(count)]
        called = [Called(applied(b, m.latents), more) for b, m, more in zip(ck.stack, made, kwargs, strict=True)]
        others = set(ck.other_tensors())
        vectors = {n: p for n, p in ck.model.named_parameters(remove_duplicate=False) if n in others and p.dim() == 1}
        rest = {name: nn.Parameter(p.detach().clone().float()) for name, p in vectors.items()}
        return cls(ck, made, called, Tunable({}, rest, {name: ck.stored_dtype(name) for name in rest}), device)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor, differentiable; those of block i under i and a point."""
        out = {f"{OUTSIDE}{name}": tensor for name, tensor in self.outside.tensors().items()}
        for i, block in enumerate(self.blocks):
            out |= {f"{i}.{name}": tensor for name, tensor in block.tensors().items()}
        return out

    def tuned(self) -> list[str]:
        """Names of the dense tensors that may have moved."""
        blocks = [f"{self.checkpoint.prefix}.{i}.{name}" for i, block in enumerate(self.blocks) for name in block.rest]
        return sorted([*self.outside.rest, *blocks])

    def groups(self, lr: float, scale_lr: float, every: int) -> list[Group]:
        """All parameters, a group for the latents, which move once in `every` steps, and one for the rest."""
        found = [part.groups(lr, scale_lr, every=every) for part in (*self.blocks, self.outside)]
        return [replace(kind[0], parameters=[p for group in kind for p in group.parameters]) for kind in zip(*found, strict=True)]

    def hidden(self, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """The outputs of the last block (b, t, d) for the inputs of the first one."""
        again = 4 * WIDTHS * x.numel() * len(self.blocks) > KEPT and torch.is_grad_enabled()
        for i, called in enumerate(self.called):
            names = [name for name in tensors if name.startswith(f"{i}.")]
            own = {name.removeprefix(f"{i}."): tensors[name] for name in names}
            x = recomputed(called.with_tensors, own, x, use_reentrant=False) if again else called.with_tensors(own, x)
        return x

    def head(self, tensors: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
        """Logits (m, v) of last outputs (m, d)."""
        own = {f"model.{name.removeprefix(OUTSIDE)}": t for name, t in tensors.items() if name.startswith(OUTSIDE)}
        module = _Head(self.checkpoint.model)
        return lambda x: functional_call(module, own, (x,))


class _Head(nn.Module):
    """What follows the blocks of a model, as a function of their last outputs (m, d)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        ids = torch.zeros(len(x), 1, dtype=torch.long, device=x.device)  # texts of one token, read by nothing that counts
        return run_head(self.model, ids, x[:, None])[:, 0]


def _tunable(
    ck: Checkpoint, index: int, shard: Path, formats: Mapping[str, Format], device: torch.device, *, codes: bool
) -> Tunable:
    prefix = f"{ck.prefix}.{index}."
    held = {name: entry.read().to(device) for name, entry in read_entries(shard).items()}
    latents = {}
    for name, fmt in formats.items():
        if name.startswith(prefix):
            packed = {part: held.pop(f"{name}.{part}") for part in fmt.layout()}
            f = Factorization.from_tensors(fmt, packed)
            latents[name.removeprefix(prefix)] = Latent(f, fixed=None if codes else product_dtype(device))
    rest, fixed = {}, {}
    for name, tensor in held.items():
        own = name.removeprefix(prefix)
        if tensor.dim() == 1 and tensor.is_floating_point():
            rest[own] = nn.Parameter(tensor.float())
        else:
            fixed[own] = tensor.float() if tensor.is_floating_point() else tensor
    return Tunable(latents, rest, {name: held[prefix + name].dtype for name in rest}, fixed)


def distill(
    ck: Checkpoint, recipe: Recipe, rounded: Path, ledger: Ledger, tokens: Tensor, device: torch.device, say: Say
) -> None:
    """Tune what the finished run in `rounded` made of a checkpoint, and commit it, block by block, to `ledger`.

    tokens (rows, seqlen), the calibration text.  Not for inference mode.
    """
    folder, recovery = ledger.folder, recipe.recovery
    codes = recovery.lr > 0
    say(0.0, "distillation: the original's predictions")
    states, kwargs = embed(ck, tokens, folder, device, at_once=TOKENS_A_STEP)
    inputs = states.copy(folder)
    try:
        for i, more in enumerate(kwargs):
            with loaded(ck, i, device) as block, autocast(device):
                advance(block, states, more, device)
        with outside(ck, device, head=True):
            told = _told(ck, states, device)
            student = Student.of(ck, rounded, kwargs, device, codes=codes)
            course = _descended(student, inputs, told, recipe, folder, say)
            line = {"kind": "distillation", "tokens": tokens_of(course, split(inputs)[0], inputs), **course.entry()}
            _commit(student, {**line, "tuned": student.tuned()}, rounded, ledger, recipe, say)
    finally:
        states.close()
        inputs.close()


def _told(ck: Checkpoint, states: Activations, device: torch.device) -> Likeliest:
    """The original's distributions behind its last block's outputs, a row at a time; not on the device."""
    head = _Head(ck.model)
    with torch.no_grad(), autocast(device):
        rows = (states.get(slice(i, i + 1))[0].to(device) for i in range(states.shape[0]))
        found = [Likeliest.of(head(x), LIKELIEST).to("cpu") for x in rows]
    return Likeliest(torch.stack([f.log_p for f in found]), torch.stack([f.index for f in found]))


def _descended(student: Student, inputs: Activations, told: Likeliest, recipe: Recipe, folder: Path, say: Say) -> Course:
    recovery = recipe.recovery

    def loss(tensors: Mapping[str, Tensor], rows: slice) -> Tensor:
        with autocast(student.device):
            hidden = student.hidden(tensors, inputs.get(rows).to(student.device))
            return taught(hidden, student.head(tensors), told[rows].to(student.device))

    def told_of(epoch: int, value: float) -> None:
        say(
            epoch / recovery.distill_epochs, f"distillation: {epoch} of {recovery.distill_epochs} passes, held-out KL {value:.3g}"
        )

    train, held = split(inputs)
    tokens = (train[0].stop - train[0].start) * inputs.shape[1]
    return descend(
        student.groups(recovery.lr, recovery.scale_lr, max(1, ROUNDED_AFTER // tokens)),
        student.tensors,
        loss,
        train,
        held,
        epochs=recovery.distill_epochs,
        optimizer=optimizer_of(recovery.optimizer),
        generator=seeded(recipe.seed, "distillation"),
        say=told_of,
        keep=lambda state: _write(folder / STATE, state),
        resume=_read(folder / STATE),
    )


def _write(path: Path, state: State) -> None:
    lists = {"parameters": state.parameters, "best": state.best}
    tensors = {f"{kind}.{i}": t for kind, found in lists.items() for i, t in enumerate(found)}
    tensors |= {f"moments.{i}.{name}": t for i, found in enumerate(state.moments) for name, t in found.items()}
    facts = torch.frombuffer(bytearray(json.dumps(state.losses).encode()), dtype=torch.uint8)
    write_shard(path, tensors | {"generator": state.generator, "losses": facts})


def _read(path: Path) -> State | None:
    """What `_write` wrote, None where there is no file."""
    if not path.is_file():
        return None
    held = {name: entry.read() for name, entry in read_entries(path).items()}
    count = sum(name.startswith("best.") for name in held)
    parameters, best = ([held[f"{kind}.{i}"] for i in range(count)] for kind in ("parameters", "best"))
    moments: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for name, tensor in held.items():
        kind, _, rest = name.partition(".")
        if kind == "moments":
            i, _, what = rest.partition(".")
            moments[int(i)][what] = tensor
    losses = json.loads(bytes(held["losses"].tolist()))
    return State(parameters, best, moments, held["generator"], losses)


def _commit(student: Student, line: dict[str, Any], rounded: Path, ledger: Ledger, recipe: Recipe, say: Say) -> None:
    """Write `line`, and every shard that is not there yet with its lines."""
    ck, count = student.checkpoint, len(student.blocks)
    before = records.read(rounded / records.LEDGER)
    if not any(entry["kind"] == "distillation" for entry in ledger.entries):
        known = [entry["kind"] for entry in ledger.entries]
        kept = [entry for entry in before if entry["kind"] in ("allocation", KIND) and entry["kind"] not in known]
        ledger.append([*kept, line])
    rows = {i: [row for row in records.layers(before) if row.block == i] for i in range(count)}
    for i, block in enumerate(student.blocks):
        if i in ledger.blocks:
            continue
        say(1.0, f"block {i + 1} of {count}: certificates")
        prefix = f"{ck.prefix}.{i}."
        tensors = {prefix + name: tensor for name, tensor in block.stored().items()}
        tensors |= {prefix + name: ck.stored(prefix + name) for name in block.fixed}
        lines = []
        for row in rows[i]:
            latent = block.latents.get(row.name.removeprefix(prefix))
            f = None if latent is None else latent.factorization()
            if f is not None:
                tensors |= {f"{row.name}.{part}": t for part, t in f.tensors().items()}
                stored = ck.view.get(f"{row.name}.weight")
                transposed = is_conv1d(ck.model.get_submodule(row.name))
                row = tuned(row, stored, f, transposed=transposed, seed=recipe.seed, device=student.device).record
            lines.append(row.model_dump(mode="json"))
        ledger.commit(i, shard_name(i, count + 1), tensors, lines)
    if count not in ledger.blocks:
        names = [name for name in ck.other_tensors() if name not in student.outside.rest]
        ledger.commit(count, shard_name(count, count + 1), {n: ck.stored(n) for n in names} | student.outside.stored(), [])


def clear(folder: Path, rounded: Path) -> None:
    """Remove what only a run that is not finished needs: the state and the folder of the stages before."""
    remove(folder / STATE)
    if rounded.is_dir():
        for path in rounded.iterdir():
            remove(path)
        rounded.rmdir()
