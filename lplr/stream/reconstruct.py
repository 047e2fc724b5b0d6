"""A compressed block tuned on the calibration text: the problem of `recover.block` put to the rows that the driver has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lplr.factor import Factorization
from lplr.hf.optimizers import optimizer_of
from lplr.hf.skeleton import run_block
from lplr.recipe import Recovery
from lplr.recover import Course, Latent, Tunable, applied, descend, relative_error
from lplr.stream.calibrate import Activations
from lplr.stream.checkpoint import Checkpoint

KIND = "recovery"
HELD_OUT = 1 / 8  # share of the calibration rows that no step sees


@dataclass(frozen=True)
class Reconstructed:
    """A tuned block: its matrices by name, what else was tuned by tensor name, as it is stored, and how it went."""

    matrices: Mapping[str, Factorization]
    rest: Mapping[str, Tensor]
    course: Course
    tokens: int

    def line(self, block: int) -> dict[str, Any]:
        """The line of run.jsonl."""
        return {"kind": KIND, "block": block, "tokens": self.tokens, "tuned": sorted(self.rest), **self.course.entry()}


@dataclass(frozen=True)
class Block:
    """A block of a checkpoint in memory."""

    checkpoint: Checkpoint
    index: int
    module: nn.Module
    device: torch.device

    @property
    def prefix(self) -> str:
        """Of its tensors' names."""
        return f"{self.checkpoint.prefix}.{self.index}."

    def vectors(self) -> dict[str, nn.Parameter]:
        """Name in the block -> a parameter that begins as the block's vector of that name: norms, biases."""
        vectors = {name: p for name, p in self.module.named_parameters() if p.dim() == 1 and p.is_floating_point()}
        return {name: nn.Parameter(p.detach().clone().float()) for name, p in vectors.items()}


class Called(nn.Module):
    """A block as `run_block` calls it, with tensors that are not its own."""

    def __init__(self, block: nn.Module, kwargs: Mapping[str, Any]) -> None:
        super().__init__()
        self.block, self.kwargs = block, kwargs

    def forward(self, hidden: Tensor) -> Tensor:
        return run_block(self.block, hidden, self.kwargs)

    def with_tensors(self, tensors: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        """The outputs for given inputs, `tensors` (by the block's own names) in place of its parameters."""
        return functional_call(self, {f"block.{name}": tensor for name, tensor in tensors.items()}, (hidden,))


def reconstruct(
    block: Block,
    matrices: Mapping[str, Factorization],
    inputs: Activations,
    targets: Activations,
    kwargs: Mapping[str, Any],
    recovery: Recovery,
    generator: torch.Generator,
    say: Callable[[int, float], None],
) -> Reconstructed:
    """Minimise what `recover.block` says over the matrices (by name) and the vectors of the block; x and y are inputs and
    targets, (rows, seqlen, d).

    The batches of `split` choose the iterate.  say(passes done, held-out error).
    """
    within = {name: name.removeprefix(block.prefix) for name in matrices}
    latents = {within[name]: Latent(f, fixed=None if recovery.lr else torch.float32) for name, f in matrices.items()}
    vectors = block.vectors()
    dtypes = {name: block.checkpoint.stored_dtype(block.prefix + name) for name in vectors}
    chosen = Tunable(latents, vectors, dtypes)
    called = Called(applied(block.module, latents), kwargs)

    def loss(tensors: Mapping[str, Tensor], rows: slice) -> Tensor:
        found = called.with_tensors(tensors, inputs.get(rows).to(block.device))
        return relative_error(found, targets.get(rows).to(block.device))

    train, held = split(inputs)
    groups = chosen.groups(recovery.lr, recovery.scale_lr)
    course = descend(
        groups,
        chosen.tensors,
        loss,
        train,
        held,
        epochs=recovery.epochs,
        optimizer=optimizer_of(recovery.optimizer),
        generator=generator,
        say=say,
    )
    made = {name: latents[within[name]].factorization() for name in matrices}
    rest = {block.prefix + name: tensor for name, tensor in chosen.stored().items()}
    return Reconstructed(made, rest, course, tokens_of(course, train, inputs))


def split(inputs: Activations) -> tuple[list[slice], list[slice]]:
    """The batches that are learnt from, and those that choose the iterate: the last HELD_OUT of them, one at least.

    A single batch is both.
    """
    batches = list(inputs.batches())
    count = max(1, round(HELD_OUT * len(batches)))
    return batches[:-count] or batches, batches[-count:]


def tokens_of(course: Course, train: list[slice], inputs: Activations) -> int:
    """Tokens that gradients were taken on, each as often as it was."""
    return len(course.losses) * sum(rows.stop - rows.start for rows in train) * inputs.shape[1]
