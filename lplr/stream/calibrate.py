"""Calibration block by block: the true inputs of each block, and H = E[x x^T] of each distinct input of its layers.

The hidden states of all calibration rows are kept between blocks, on disk when they exceed ACTIVATION_LIMIT bytes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lplr.hf.skeleton import run_block
from lplr.linalg.hessian import Hessian

ACTIVATION_LIMIT = 256 << 20
TOKENS_AT_ONCE = 4096


class Activations:
    """Hidden states (rows, seqlen, d), float32, read and written a few rows at a time; in a file when large."""

    def __init__(self, rows: int, seqlen: int, d: int, folder: Path | None = None) -> None:
        self.shape = (rows, seqlen, d)
        self._row_bytes = 4 * seqlen * d
        self._memory: Tensor | None = None
        self._file: Any = None
        if rows * self._row_bytes <= ACTIVATION_LIMIT:
            self._memory = torch.empty(self.shape)
        else:
            self._file = tempfile.TemporaryFile(dir=folder, prefix=".activations-")  # noqa: SIM115  (closed by `close`)

    def get(self, rows: slice) -> Tensor:
        """A copy of some rows."""
        if self._memory is not None:
            return self._memory[rows].clone()
        self._file.seek(rows.start * self._row_bytes)
        raw = bytearray(self._file.read((rows.stop - rows.start) * self._row_bytes))
        return torch.frombuffer(raw, dtype=torch.float32).view(-1, *self.shape[1:])

    def set(self, rows: slice, value: Tensor) -> None:
        """Replace some rows."""
        if self._memory is not None:
            self._memory[rows] = value
        else:
            self._file.seek(rows.start * self._row_bytes)
            self._file.write(value.contiguous().cpu().numpy().data)

    def batches(self) -> Iterator[slice]:
        """Slices of equal size that cover all rows: the masks and positions of one batch then serve every other."""
        size = batch_rows(*self.shape[:2])
        return (slice(i, i + size) for i in range(0, self.shape[0], size))

    def close(self) -> None:
        """Give the file back."""
        if self._file is not None:
            self._file.close()


def batch_rows(rows: int, seqlen: int) -> int:
    """The largest divisor of `rows` that keeps a batch within TOKENS_AT_ONCE tokens."""
    most = max(1, TOKENS_AT_ONCE // seqlen)
    return max(size for size in range(1, min(rows, most) + 1) if rows % size == 0)


class InputMoments:
    """A context in which each forward pass adds the inputs of the given layers to their Hessians.

    Layers that are handed the same tensor object (q, k and v; gate and up) share one Hessian.  A layer that is never
    called, such as an expert that no token is routed to, has none.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.hessians: dict[str, Hessian] = {}
        self._layers = layers
        self._pass: list[tuple[Tensor, Hessian]] = []  # holds the inputs, so that identity is certain
        self._handles: list[Any] = []

    def __enter__(self) -> InputMoments:
        for name, layer in self._layers.items():
            self._handles.append(layer.register_forward_pre_hook(self._hook(name)))
        return self

    def __exit__(self, *_: object) -> None:
        self.end_pass()
        for handle in self._handles:
            handle.remove()

    def end_pass(self) -> None:
        """Forget the tensors of the last forward pass."""
        self._pass.clear()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            for seen, hessian in self._pass:
                if seen is x and self.hessians.get(name, hessian) is hessian:
                    self.hessians[name] = hessian
                    return
            hessian = self.hessians.setdefault(name, Hessian(x.shape[-1], x.device))
            hessian.add(x)
            self._pass.append((x, hessian))

        return note


@torch.no_grad()
def collect(
    block: nn.Module, layers: Mapping[str, nn.Module], inputs: Activations, kwargs: Mapping[str, Any], device: torch.device
) -> dict[str, Hessian]:
    """Run a block on all calibration rows and return the Hessians of its layers."""
    with InputMoments(layers) as moments:
        for rows in inputs.batches():
            run_block(block, inputs.get(rows).to(device), kwargs)
            moments.end_pass()
    return moments.hessians


@torch.no_grad()
def advance(block: nn.Module, activations: Activations, kwargs: Mapping[str, Any], device: torch.device) -> None:
    """Replace the inputs of a block by its outputs."""
    for rows in activations.batches():
        activations.set(rows, run_block(block, activations.get(rows).to(device), kwargs))
