"""An input checkpoint opened: its config, the model on meta, its tensors under the model's names, and the plan of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lplr.errors import UnsupportedModel, choose
from lplr.factor import METHODS, Format, layout, plan
from lplr.hf.gguf import gguf_config
from lplr.hf.hub import resolve
from lplr.hf.load import is_gguf
from lplr.hf.skeleton import blocks, load_config, skeleton
from lplr.nn import defuse, linears, weight_of
from lplr.nn.swap import is_conv1d
from lplr.recipe import FactorSpec, Recipe
from lplr.stream.shards import Layout
from lplr.stream.source import ModuleView, TensorSource, check_finite, open_source

if TYPE_CHECKING:
    from lplr.hf.skeleton import PretrainedConfig, PreTrainedModel

QUANTIZED_TO = torch.bfloat16  # what tensors that a GGUF file holds quantized are stored as when they stay dense


@dataclass(frozen=True)
class Checkpoint:
    """What `open_checkpoint` found.  prefix is the name of the list of blocks, such as `model.layers`."""

    path: Path
    source: TensorSource
    view: ModuleView
    config: PretrainedConfig
    model: PreTrainedModel
    defused: bool
    prefix: str
    stack: nn.ModuleList

    def stored_dtype(self, name: str) -> torch.dtype:
        """The type in which a tensor that stays dense is written: its own, or bfloat16 from a GGUF file."""
        dtype = self.view.dtype(name)
        return QUANTIZED_TO if is_gguf(self.path) and dtype == torch.float32 else dtype

    def stored(self, name: str) -> Tensor:
        """A tensor that stays dense as it will be written; CheckpointError when it holds NaN or Inf."""
        tensor = self.view.get(name)
        check_finite(name, tensor)
        return tensor.to(self.stored_dtype(name))

    def count(self, name: str) -> int:
        """Number of entries of a tensor."""
        return prod(self.view.shape(name))

    def block_tensors(self, index: int) -> list[str]:
        """Names of the tensors of one block."""
        return [name for name in self.view.names() if name.startswith(f"{self.prefix}.{index}.")]

    def other_tensors(self) -> list[str]:
        """Names of the tensors outside of the blocks: embeddings, last norm, head."""
        return [name for name in self.view.names() if not name.startswith(f"{self.prefix}.")]


class Stored(Mapping[str, Tensor]):
    """Dense tensors as they will be stored, read when asked for, so that one is in memory at a time."""

    def __init__(self, checkpoint: Checkpoint, names: list[str]) -> None:
        self._checkpoint, self._names = checkpoint, names

    @property
    def layout(self) -> Layout:
        """Name -> (shape, type), without reading a tensor."""
        ck = self._checkpoint
        return {name: (ck.view.shape(name), ck.stored_dtype(name)) for name in self._names}

    def __getitem__(self, name: str) -> Tensor:
        return self._checkpoint.stored(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class LayerPlan:
    """What will be done to one matrix; format None says that it stays dense, for the reason given.

    asked is the recipe's spec, spec its plan, whose format takes all that the budget allows: what is made may be another one of
    no more bits (`factor.rank.exchanges`), told by its record.
    """

    name: str
    block: int
    shape: tuple[int, int]
    transposed: bool  # the checkpoint holds the weight as (in, out)
    asked: FactorSpec
    spec: FactorSpec
    format: Format | None
    dense_bits: int
    reason: str = ""


def open_checkpoint(
    model: str, revision: str | None = None, notify: Callable[[str], None] | None = None, *, allow_pickle: bool = False
) -> Checkpoint:
    """Resolve a folder, GGUF file or Hub id, and open it without reading weights; pickled ones of a folder if allowed.

    Raises the errors of `hf.hub.resolve`, `hf.skeleton` and `stream.source`; UnsupportedModel for a checkpoint that is
    quantized already.
    """
    path = _gguf_inside(resolve(model, revision, notify) if notify else resolve(model, revision))
    config = gguf_config(path) if is_gguf(path) else load_config(path)
    method = (getattr(config, "quantization_config", None) or {}).get("quant_method")
    if method and not is_gguf(path):
        raise UnsupportedModel(f"{model} is quantized already ({method}): start from the full-precision checkpoint")
    net = skeleton(config)
    defused = bool(defuse(net))
    prefix, stack = blocks(net)
    source = open_source(path, allow_pickle=allow_pickle)
    state = net.state_dict()
    tied = {name for name in getattr(net, "all_tied_weights_keys", {}) or {} if name not in source.names()}
    view = ModuleView(source, {name: tuple(t.shape) for name, t in state.items() if name not in tied})
    return Checkpoint(path, source, view, config, net, defused, prefix, stack)


def _gguf_inside(path: Path) -> Path:
    """The GGUF file of a folder that holds one and no config.json, else the path as it is."""
    found = sorted(path.glob("*.gguf")) if path.is_dir() and not (path / "config.json").is_file() else []
    return found[0] if len(found) == 1 else path


def plan_layers(checkpoint: Checkpoint, recipe: Recipe) -> list[LayerPlan]:
    """The plan of every linear layer in the blocks, in the model's order, from shapes alone.

    Raises RecipeError for an unknown method, UnsupportedModel when nothing can be compressed.
    """
    for method in (recipe.method, *(rule.method for rule in recipe.rules if rule.method)):
        choose({"auto": None, **METHODS}, method, "method")
    out = []
    for name, module in linears(checkpoint.model, recipe.modules_to_not_convert).items():
        if not name.startswith(f"{checkpoint.prefix}."):
            continue
        n, d = weight_of(module).shape
        block = int(name[len(checkpoint.prefix) + 1 :].split(".")[0])
        dense_bits = 8 * n * d * checkpoint.stored_dtype(f"{name}.weight").itemsize
        asked = recipe.spec_for(name)
        spec = plan((n, d), asked)
        fmt: Format | None = layout((n, d), spec)
        reason = ""
        if not (fmt.rank or fmt.q_bits):
            fmt, reason = None, f"not even rank 1 fits {spec.bits_per_weight} bits per weight"
        elif fmt.stored_bits() >= dense_bits:
            fmt, reason = None, f"the dense matrix takes {dense_bits / (n * d):g} bits per weight, fewer than compressed"
        out.append(LayerPlan(name, block, (n, d), is_conv1d(module), asked, spec, fmt, dense_bits, reason))
    if not any(layer.format for layer in out):
        raise UnsupportedModel(
            f"no linear layer of {checkpoint.path.name} can be compressed at {recipe.bits:g} bits per weight: raise --bits"
        )
    return out


def unmatched_rules(recipe: Recipe, plans: list[LayerPlan]) -> list[str]:
    """Patterns of the recipe's rules that fit no planned matrix: most likely slips of the pen."""
    return [rule.match for rule in recipe.rules if not any(fnmatchcase(p.name, rule.match) for p in plans)]
