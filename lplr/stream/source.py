"""Where weights come from: a lazy source of tensors, whatever the files are, under the names of the module tree.

    SafetensorsSource   a folder with model.safetensors, or an index over many shards
    GgufSource          a GGUF file (`lplr.hf.gguf`)
    ModuleView          any of them, seen through the names that a model's modules have

Nothing is mapped into memory: reading one tensor costs the memory of that tensor, and none after it is dropped.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lplr.errors import CheckpointError
from lplr.hf.gguf import GgufSource
from lplr.hf.weight_file import file_identity, reading
from lplr.stream.entries import MAX_HEADER, Entry, read_entries, read_header
from lplr.stream.pickles import PICKLE, PICKLE_INDEX, PickleSource
from lplr.stream.shards import INDEX

__all__ = ["ModuleView", "SafetensorsSource", "TensorSource", "check_finite", "open_source", "read_entries"]

SINGLE = "model.safetensors"
CHECK_CHUNK = 1 << 22
_PICKLES = ("*.bin", "*.pth", "*.pt", "*.ckpt")
# tensors of old checkpoints that modules compute for themselves: rotary tables, causal masks, position numbers
_BUFFERS = re.compile(r"(^|\.)(inv_freq|(attn|attention)\.(masked_)?bias|masked_bias|position_ids)$")


class TensorSource(Protocol):
    """Named tensors, read one at a time.  An unknown name is a CheckpointError."""

    def names(self) -> tuple[str, ...]:
        """Every name, sorted."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape, without reading the data."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """Type, without reading the data."""
        ...

    def nbytes(self, name: str) -> int:
        """Bytes of what `get` returns."""
        ...

    def get(self, name: str) -> Tensor:
        """A fresh CPU tensor that belongs to the caller."""
        ...

    def part(self, name: str, index: int) -> Tensor:
        """Entry `index` along the first dimension, fresh; only it is read where the layout allows."""
        ...

    def identity(self) -> dict[str, Any]:
        """JSON that changes when the checkpoint does; see `file_identity`."""
        ...


def open_source(path: str | Path, *, allow_pickle: bool = False) -> TensorSource:
    """The source for a safetensors folder, a GGUF file, a folder with exactly one GGUF file, or with pickles if allowed.

    Raises CheckpointError for anything else.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        return GgufSource(path)
    if path.is_dir() and not any(path.glob("*.safetensors")) and not (path / INDEX).exists():
        found = sorted(path.glob("*.gguf"))
        if len(found) == 1:
            return GgufSource(found[0])
        if found:
            listing = ", ".join(f.name for f in found)
            raise CheckpointError(f"{path}: holds {len(found)} GGUF files ({listing}): give the path of one of them")
        if allow_pickle and (path / PICKLE).is_file():
            return PickleSource(path, [PICKLE])
        if allow_pickle and (path / PICKLE_INDEX).is_file():
            return PickleSource(path, sorted(set(_read_index(path / PICKLE_INDEX).values())))
    return SafetensorsSource(path)


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise CheckpointError, with counts, when a floating-point tensor holds NaN or Inf."""
    if not tensor.is_floating_point():
        return
    nan = inf = 0
    for piece in tensor.reshape(-1).split(CHECK_CHUNK):
        piece = piece.float() if piece.element_size() == 1 else piece  # float8 has no isfinite
        if not bool(torch.isfinite(piece).all()):
            nan += int(piece.isnan().sum())
            inf += int(piece.isinf().sum())
    if nan or inf:
        raise CheckpointError(
            f"{name}: {nan} NaN and {inf} Inf among {tensor.numel()} values, all must be finite: "
            "download the checkpoint again or repair that tensor"
        )


class SafetensorsSource:
    """A folder that holds model.safetensors, or model.safetensors.index.json and the shards it names.

    Raises CheckpointError when opened on a folder that is missing, without weights, or whose files are truncated,
    damaged or incomplete.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder}: no such folder: check the path, or give a Hub id such as owner/name")
        if (self.folder / SINGLE).is_file():
            placed, files = None, [SINGLE]
        elif (self.folder / INDEX).is_file():
            placed = _read_index(self.folder / INDEX)
            files = sorted(set(placed.values()))
        else:
            raise _no_weights(self.folder)
        self._headers: dict[str, int] = {}
        self._entries: dict[str, Entry] = {}
        for file in files:
            entries, self._headers[file] = read_header(self.folder / file)
            wanted = [name for name in entries if placed is None or placed.get(name) == file]
            self._entries.update({name: entries[name] for name in wanted})
        absent = sorted(set(placed or ()) - set(self._entries))
        if placed and absent:
            raise CheckpointError(
                f"{self.folder / placed[absent[0]]}: tensor {absent[0]} is missing ({len(absent)} such), "
                f"{INDEX} says it is there: download the checkpoint again"
            )

    def names(self) -> tuple[str, ...]:
        """Every tensor, sorted."""
        return tuple(sorted(self._entries))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape, from the header."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Type, from the header."""
        return self._entry(name).dtype

    def nbytes(self, name: str) -> int:
        """Bytes in the file."""
        return self._entry(name).nbytes

    def get(self, name: str) -> Tensor:
        """Read one tensor."""
        return self._entry(name).read()

    def part(self, name: str, index: int) -> Tensor:
        """Read entry `index` along the first dimension."""
        return self._entry(name).entry(index).read()

    def identity(self) -> dict[str, Any]:
        """File name -> `file_identity`."""
        return {file: file_identity(self.folder / file, end) for file, end in sorted(self._headers.items())}

    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            raise CheckpointError(f"{self.folder}: holds no tensor {name}: is it a checkpoint of this model?")
        return self._entries[name]


def _no_weights(folder: Path) -> CheckpointError:
    """What to do with a folder that has no weights that can be read."""
    pickles = sorted(f.name for pattern in _PICKLES for f in folder.glob(pattern))
    if pickles:
        return CheckpointError(
            f"{folder}: holds only pickled weights ({pickles[0]}), which can run code when read: convert them to "
            "safetensors (from_pretrained, then save_pretrained), give the repository's safetensors version, or --allow-pickle"
        )
    others = sorted(f.name for f in folder.glob("*.safetensors"))
    seen = f", only {others[0]}" if others else ""
    return CheckpointError(f"{folder}: no {SINGLE} and no {INDEX}{seen}: give the folder of a transformers checkpoint")


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name of an index, each a plain name of a file that is there."""
    try:
        with reading(path) as file:
            placed = json.loads(file.read(MAX_HEADER))["weight_map"]
        sound = bool(placed) and all(isinstance(file, str) for file in placed.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        placed, sound = {}, False
    if not sound:
        raise CheckpointError(f"{path}: damaged, no weight_map of names: download it again")
    for file in sorted(set(placed.values())):
        if file in ("", ".", "..") or len(file) > 255 or any(mark in file for mark in ("/", "\\", ":", "\0")):
            raise CheckpointError(f"{path}: shard name {file[:99]!r} leads out of the folder: do not use this checkpoint")
        if not (path.parent / file).is_file():
            raise CheckpointError(f"{path.parent / file}: shard missing, {path.name} names it: download it again")
    return placed


# What a source calls a module -> what transformers 5 calls it (`conversion_mapping.py`: mixtral, phimoe; GPT-NeoX's head).
_RENAMES = (
    ("embed_out.", "lm_head."),
    (".block_sparse_moe.", ".mlp."),
    (".block_sparse_moe.gate.", ".mlp.router."),
)
_EXPERT = re.compile(r"(?P<head>.*\.experts)\.(?P<index>\d+)\.(?P<matrix>gate_up_proj|down_proj)\.weight")
# matrix of an expert -> the names of the matrices it is made of, stacked in this order: Mixtral's, Qwen's and OLMoE's
_APART = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("w2",),),
}

Piece = tuple[str, int | None]  # a source's tensor, or one entry along its first dimension


class ModuleView:
    """A source seen through the names of a model's modules; itself a TensorSource.

    A wanted name is served by the tensor of that name, with the base model's prefix put on or taken off where the
    checkpoint has it otherwise (GPT-2's has no `transformer.`), or under an older name of its module.  An expert's
    `experts.{e}.gate_up_proj.weight` (2f, d), gate rows first, and `experts.{e}.down_proj.weight` (d, f) are put
    together from matrices stored apart, or cut from stacked ones (E, 2f, d), (E, d, f).

    wanted: names, or name -> shape, then shapes are checked too.  Raises CheckpointError when a name cannot be served.
    """

    def __init__(self, source: TensorSource, wanted: Iterable[str] | Mapping[str, tuple[int, ...]]):
        self.source = source
        self._held = frozenset(source.names())
        heads = Counter(name.split(".", 1)[0] for name in source.names() if "." in name)
        self._head = heads.most_common(1)[0][0] if heads else ""  # the base model's, where the checkpoint has one
        plans = {name: self._plan(name) for name in wanted}
        missing = [name for name, plan in plans.items() if plan is None]
        if missing:
            first = ", ".join(missing[:3]) + (", .." if len(missing) > 3 else "")
            raise CheckpointError(
                f"{len(missing)} of {len(plans)} tensors are missing from the checkpoint ({first}): "
                "it is incomplete or of another model: download it again"
            )
        self._plans = {name: plan for name, plan in plans.items() if plan is not None}
        for name, shape in wanted.items() if isinstance(wanted, Mapping) else ():
            if self.shape(name) != tuple(shape):
                raise CheckpointError(
                    f"{name} has shape {self.shape(name)}, the model's config wants {tuple(shape)}: "
                    "weights and config.json do not belong together"
                )

    def names(self) -> tuple[str, ...]:
        """The wanted names, sorted."""
        return tuple(sorted(self._plans))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of what `get` returns."""
        pieces = [self._piece_shape(piece) for piece in self._pieces(name)]
        if len(pieces) == 1:
            return pieces[0]
        return (sum(shape[0] for shape in pieces), *pieces[0][1:])

    def dtype(self, name: str) -> torch.dtype:
        """Type of what `get` returns: that of the pieces, the wider one where they differ."""
        first, *rest = (self.source.dtype(piece[0]) for piece in self._pieces(name))
        for other in rest:
            first = torch.promote_types(first, other) if other != first else first
        return first

    def nbytes(self, name: str) -> int:
        """Bytes of what `get` returns."""
        return prod(self.shape(name)) * self.dtype(name).itemsize

    def get(self, name: str) -> Tensor:
        """Read one tensor; a tensor of several pieces needs the memory of its largest piece beside its own."""
        pieces = self._pieces(name)
        if len(pieces) == 1:
            return self._read(pieces[0])
        out, row = torch.empty(self.shape(name), dtype=self.dtype(name)), 0
        for piece in pieces:
            value = self._read(piece)
            if value.shape[1:] != out.shape[1:]:
                raise CheckpointError(f"{piece[0]} has {tuple(value.shape)}, not as wide as its sibling: download it again")
            out[row : row + value.shape[0]] = value
            row += value.shape[0]
        return out

    def part(self, name: str, index: int) -> Tensor:
        """Entry `index` along the first dimension."""
        pieces = self._pieces(name)
        if len(pieces) == 1 and pieces[0][1] is None:
            return self.source.part(pieces[0][0], index)
        return self.get(name)[index].clone()

    def identity(self) -> dict[str, Any]:
        """The source's."""
        return self.source.identity()

    def unused(self) -> tuple[str, ...]:
        """Tensors of the checkpoint that no wanted name needs, but for rotary tables and masks of old checkpoints."""
        used = {piece[0] for plan in self._plans.values() for piece in plan}
        return tuple(sorted(name for name in self._held - used if not _BUFFERS.search(name)))

    def _pieces(self, name: str) -> tuple[Piece, ...]:
        if name not in self._plans:
            raise CheckpointError(f"no tensor {name} among those that were asked for: check the model's config.json")
        return self._plans[name]

    def _piece_shape(self, piece: Piece) -> tuple[int, ...]:
        shape = self.source.shape(piece[0])
        return shape if piece[1] is None else shape[1:]

    def _read(self, piece: Piece) -> Tensor:
        return self.source.get(piece[0]) if piece[1] is None else self.source.part(piece[0], piece[1])

    def _plan(self, name: str) -> tuple[Piece, ...] | None:
        """The pieces of a wanted tensor, or None when the checkpoint does not hold them."""
        whole = self._find(name)
        if whole is not None:
            return ((whole, None),)
        match = _EXPERT.fullmatch(name)
        if match is None:
            return None
        head, index, matrix = match["head"], int(match["index"]), match["matrix"]
        for parts in _APART[matrix]:
            found = [self._find(f"{head}.{index}.{part}.weight") for part in parts]
            if None not in found:
                return tuple((name, None) for name in found if name is not None)
        stacked = self._find(f"{head}.{matrix}")
        if stacked is not None and len(shape := self.source.shape(stacked)) == 3 and index < shape[0]:
            return ((stacked, index),)
        return None

    def _find(self, name: str) -> str | None:
        """The checkpoint's name for a tensor: its own, an older one, either with a prefix put on or taken off."""
        names = [name, *(name.replace(new, old, 1) for old, new in _RENAMES if new in name)]
        for candidate in names:
            bare = candidate.split(".", 1)[-1]
            for form in (candidate, bare, f"{self._head}.{candidate}"):
                if form in self._held:
                    return form
        return None
