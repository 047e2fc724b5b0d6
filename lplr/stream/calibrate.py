"""Calibration block by block: the text, the true inputs of each block, and H = E[x x^T] of each distinct input of its layers.

The hidden states of all calibration rows are kept between blocks, on disk when they exceed ACTIVATION_LIMIT bytes.
"""

from __future__ import annotations

import copy
import errno
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lplr.errors import CheckpointError, DatasetError, LplrError
from lplr.files import write_error
from lplr.hf.gguf import gguf_tokenizer
from lplr.hf.load import is_gguf, load_tokenizer
from lplr.hf.skeleton import capture_block_inputs, materialise, release, run_block
from lplr.hf.text import calibration_tokens, read_text
from lplr.recipe import Recipe
from lplr.stream.checkpoint import Checkpoint
from lplr.stream.source import check_finite
from lplr.stream.workers import Spread, here

ACTIVATION_LIMIT = 256 << 20
TOKENS_AT_ONCE = 4096
A_PASS = "a batch of the calibration text in one block"


def calibration_windows(
    recipe: Recipe, checkpoint: Checkpoint, generator: torch.Generator, notify: Callable[[str], None]
) -> tuple[Tensor | None, dict[str, Any] | None]:
    """Calibration windows (rows, seqlen) and what they are, or None twice with `dataset: none`.

    Raises DatasetError for a text that cannot be used with this model, CheckpointError for a model without tokenizer.
    """
    if recipe.dataset == "none":
        return None, None
    text = read_text(recipe.dataset)
    config = checkpoint.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None) or recipe.seqlen
    seqlen = min(recipe.seqlen, context)
    tokens = calibration_tokens(_tokenizer(checkpoint.path), text, recipe.nsamples, seqlen, generator)
    if seqlen < recipe.seqlen:
        notify(f"the model's context is {context} tokens: calibrating on windows of {seqlen}, not {recipe.seqlen}")
    if len(tokens) < recipe.nsamples:
        notify(f"{text.name} holds {len(tokens)} windows of {seqlen} tokens, not {recipe.nsamples}: calibrating on these")
    if int(tokens.max()) >= config.vocab_size:
        raise DatasetError(
            f"the tokenizer of {checkpoint.path.name} gives token {int(tokens.max())}, the model has "
            f"{config.vocab_size}: they do not belong together; mend the folder or use --dataset none"
        )
    return tokens, {"name": text.name, "sha256": text.sha256, "rows": len(tokens), "seqlen": seqlen}


def _tokenizer(path: Path) -> Any:
    if is_gguf(path):
        return gguf_tokenizer(path)
    try:
        return load_tokenizer(path)
    except LplrError as error:
        raise type(error)(f"{error}; calibration needs a tokenizer: add its files, or use --dataset none") from None


class Activations:
    """Hidden states (rows, seqlen, d), float32, read and written a few rows at a time; in a file when large.

    Raises OutputError when the disk is full.
    """

    def __init__(
        self, rows: int, seqlen: int, d: int, folder: Path | None = None, *, share: int = 1, at_once: int = TOKENS_AT_ONCE
    ) -> None:
        """In `folder` when more than 1 / share of ACTIVATION_LIMIT; `at_once` tokens in a batch, one row at least."""
        self.shape = (rows, seqlen, d)
        self._at_once = at_once
        self._row_bytes = 4 * seqlen * d
        self._folder = folder or Path(tempfile.gettempdir())
        self._memory: Tensor | None = None
        self._file: Any = None
        if rows * self._row_bytes <= ACTIVATION_LIMIT // share:
            self._memory = torch.empty(self.shape)
        else:
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  (closed by `close`)

    def get(self, rows: slice) -> Tensor:
        """A copy of some rows."""
        if self._memory is not None:
            return self._memory[rows].clone()
        out = torch.empty(rows.stop - rows.start, *self.shape[1:])
        self._file.seek(rows.start * self._row_bytes)
        self._transfer(out, self._file.readinto)
        return out

    def set(self, rows: slice, value: Tensor) -> None:
        """Replace some rows; CheckpointError when the new ones are not finite."""
        if not bool(torch.isfinite(value).all()):
            raise CheckpointError(
                "the hidden states of the calibration text are not finite: the model leaves the range of float32 in a pass "
                "forward; repair its weights, or use --dataset none"
            )
        if self._memory is not None:
            self._memory[rows] = value
        else:
            self._file.seek(rows.start * self._row_bytes)
            self._transfer(value.float().cpu().contiguous(), self._file.write)

    def _transfer(self, tensor: Tensor, move: Callable[[memoryview], int]) -> None:
        """Read or write all bytes of a tensor; one call moves 2 GiB at most."""
        view, done = tensor.reshape(-1).view(torch.uint8).numpy().data, 0
        try:
            while done < len(view):
                count = move(view[done:])
                if not count:
                    raise OSError(errno.EIO, "the file of activations is cut short")
                done += count
        except OSError as error:
            raise write_error(self._folder / "activations", tensor.nbytes, error) from error

    def copy(self, folder: Path | None = None) -> Activations:
        """The same states once more."""
        other = Activations(*self.shape, folder, at_once=self._at_once)
        for rows in self.batches():
            other.set(rows, self.get(rows))
        return other

    def batches(self) -> Iterator[slice]:
        """Slices of equal size that cover all rows: the masks and positions of one batch then serve every other."""
        size = batch_rows(*self.shape[:2], self._at_once)
        return (slice(i, i + size) for i in range(0, self.shape[0], size))

    def part(self, rows: slice) -> Activations:
        """A copy, in memory, of one of the batches."""
        made = copy.copy(self)
        made._memory, made._file = self.get(rows), None
        made.shape = (rows.stop - rows.start, *self.shape[1:])
        return made

    def close(self) -> None:
        """Give the file back."""
        if self._file is not None:
            self._file.close()


def batch_rows(rows: int, seqlen: int, at_once: int = TOKENS_AT_ONCE) -> int:
    """The largest divisor of `rows` that keeps a batch within `at_once` tokens, 1 at least."""
    most = max(1, at_once // seqlen)
    return max(size for size in range(1, min(rows, most) + 1) if rows % size == 0)


@torch.no_grad()
def stages(
    block: nn.Module, layers: Mapping[str, nn.Module], inputs: Activations, kwargs: Mapping[str, Any], device: torch.device
) -> list[list[str]]:
    """The layers in the order in which the block calls them, those with the same input together (q, k, v; o; gate, up; down).

    What does not see every token (experts), and what is not called at all, comes last, together.
    """
    calls: list[tuple[Tensor, list[str]]] = []  # holds the inputs, so that identity is certain

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def note(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            x = given[0]
            if x.shape[:-1].numel() != hidden.shape[:-1].numel() or any(name in names for _, names in calls):
                return
            if not calls or calls[-1][0] is not x:
                calls.append((x, []))
            calls[-1][1].append(name)

        return note

    hidden = inputs.get(next(iter(inputs.batches()))).to(device)
    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        run_block(block, hidden, kwargs)
    finally:
        for handle in handles:
            handle.remove()
    found = [names for _, names in calls]
    called = {name for names in found for name in names}
    rest = [name for name in layers if name not in called]
    return found + ([rest] if rest else [])


def advance(
    block: nn.Module, activations: Activations, kwargs: Mapping[str, Any], device: torch.device, spread: Spread = here
) -> None:
    """Replace the inputs of a block by its outputs."""
    batches = list(activations.batches())
    parts = ((activations.get(rows),) for rows in batches)
    memory = pass_memory(block, batches[0], activations)
    outputs = spread(_advanced, (block, kwargs, device), parts, memory=memory, what=A_PASS)
    for rows, states in zip(batches, outputs, strict=True):
        activations.set(rows, states)


def pass_memory(block: nn.Module, batch: slice, activations: Activations) -> int:
    """Bytes of a block and of what passes through it of a batch."""
    sides = [s for p in block.parameters() for s in p.shape]
    sides += [getattr(m, side, 0) for m in block.modules() for side in ("in_features", "out_features")]  # of packed matrices
    stored = sum(t.nbytes for t in (*block.parameters(), *block.buffers()))
    return stored + 4 * (batch.stop - batch.start) * activations.shape[1] * 8 * max(sides, default=1)


@torch.no_grad()
def _advanced(block: nn.Module, kwargs: Mapping[str, Any], device: torch.device, states: Tensor) -> Tensor:
    """The outputs of a block for the states of a batch."""
    return run_block(block, states.to(device), kwargs)


def embed(
    checkpoint: Checkpoint, tokens: Tensor, folder: Path, device: torch.device, *, at_once: int = TOKENS_AT_ONCE
) -> tuple[Activations, list[dict[str, Any]]]:
    """The inputs of the first block for all rows of `tokens`, and the other arguments of every block.

    What stands before the blocks is materialised for it and sent back to meta; a file of activations lies in `folder`.  Batches
    are of `at_once` tokens.
    """
    ck = checkpoint
    rows, seqlen = tokens.shape
    size = batch_rows(rows, seqlen, at_once)
    with outside(ck, device):
        hidden, kwargs = capture_block_inputs(ck.model, tokens[:size].to(device))
        activations = Activations(rows, seqlen, hidden.shape[-1], folder, at_once=at_once)
        try:
            activations.set(slice(0, size), hidden)
            for start in range(size, rows, size):
                hidden, kwargs = capture_block_inputs(ck.model, tokens[start : start + size].to(device))
                activations.set(slice(start, start + size), hidden)
        except BaseException:
            activations.close()
            raise
    return activations, kwargs


@contextmanager
def outside(checkpoint: Checkpoint, device: torch.device, *, head: bool = False) -> Iterator[None]:
    """What lies outside of the blocks in memory, with or without the output head, and back on meta afterwards."""
    ck = checkpoint
    skip = [ck.prefix]
    out = ck.model.get_output_embeddings()
    if out is not None and not head:
        skip.append(next(name for name, module in ck.model.named_modules() if module is out))
    names = [name for name in ck.other_tensors() if not any(name.startswith(f"{s}.") for s in skip)]
    materialise(ck.model, {name: computable(ck, name, device) for name in names}, skip=skip)
    try:
        yield
    finally:
        for name in dict.fromkeys(name.rpartition(".")[0] for name in names):
            release(ck.model.get_submodule(name))


@contextmanager
def loaded(checkpoint: Checkpoint, index: int, device: torch.device) -> Iterator[nn.Module]:
    """A block of the original model, in memory for as long as the context lasts."""
    block, prefix = checkpoint.stack[index], f"{checkpoint.prefix}.{index}."
    names = checkpoint.block_tensors(index)
    materialise(block, {name.removeprefix(prefix): computable(checkpoint, name, device) for name in names})
    try:
        yield block
    finally:
        release(block)


def computable(checkpoint: Checkpoint, name: str, device: torch.device) -> Tensor:
    """A tensor of the checkpoint in float32 on the device, checked; integers keep their type."""
    tensor = checkpoint.view.get(name)
    check_finite(name, tensor)
    return tensor.float().to(device) if tensor.is_floating_point() else tensor.to(device)
