"""A model without its weights: built on meta, filled block by block, run block by block."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lplr.errors import CheckpointError, UnsupportedModel
from lplr.hf.hostile import FAULTS, check_counts, first_line
from lplr.hf.weight_file import reading
from lplr.nn import LowRankLinear, is_linear

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CONFIG_LIMIT = 64 << 20  # bytes of a config.json, with the table of layers of a compressed folder
BUFFER_LIMIT = 1 << 30  # bytes of what no checkpoint holds: rotary tables and the like


def load_config(path: str | Path) -> PretrainedConfig:
    """The configuration in a folder.

    Raises CheckpointError without a readable config.json, UnsupportedModel for an unknown architecture.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        raise CheckpointError(
            f"{file} does not exist: give the folder of a transformers model, a hub id or a GGUF file"
        )
    try:
        with reading(file) as handle:
            fields = json.loads(handle.read(CONFIG_LIMIT))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read ({first_line(error)}): copy the model again") from None
    check_counts(file, fields)
    try:
        return AutoConfig.from_pretrained(Path(path), local_files_only=True, trust_remote_code=False)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({first_line(error)}): copy the model again") from None
    except FAULTS as error:
        raise UnsupportedModel(
            f"{file}: transformers does not know this architecture ({first_line(error)}): upgrade transformers"
        ) from None


def skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """The causal language model of a configuration in eval mode: every parameter on meta, tied ones tied.

    Buffers that no checkpoint holds, such as rotary frequencies, are real and initialised on the CPU: nothing
    else would bring them back.

    Raises UnsupportedModel when transformers has no causal language model for the configuration.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        _check_buffers(model)
        model.tie_weights()
        _restore_buffers(model)
    except (*FAULTS, ImportError) as error:
        kind = getattr(config, "model_type", "unknown")
        raise UnsupportedModel(
            f"model_type {kind!r} has no causal language model ({first_line(error)}): choose another model"
        ) from None
    return model.eval()


def _check_buffers(model: nn.Module) -> None:
    """UnsupportedModel when the buffers that are to be made real would not fit any machine."""
    size = sum(buffer.nbytes for buffer in _loose_buffers(model).values())
    if size > BUFFER_LIMIT:
        raise UnsupportedModel(
            f"the model's config asks for {size:,} bytes of tables beside its weights: do not use this checkpoint"
        )


def _restore_buffers(model: PreTrainedModel) -> None:
    """Give buffers that no checkpoint holds their values as `from_pretrained` does: by the model's own initialisers.

    Parameters stay on meta, where an initialiser does nothing.
    """
    for name, buffer in _loose_buffers(model).items():
        _assign(model, [name], torch.empty_like(buffer, device="cpu"))
    for module in model.modules():
        module.__dict__.pop("_is_hf_initialized", None)  # building on meta has marked everything as done
    with torch.random.fork_rng(devices=[]):
        model.initialize_weights()


def blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """(name, list) of the decoder blocks: of the outermost module lists of the text decoder, the one with most weights.

    Raises UnsupportedModel when no list of modules with linear layers is found.
    """
    decoder = model.get_decoder() if isinstance(model, PreTrainedModel) else model
    names = {id(m): name for name, m in model.named_modules()}
    lists: dict[str, nn.ModuleList] = {}
    for name, module in decoder.named_modules():
        inner = any(name.startswith(f"{outer}.") or outer == "" for outer in lists)
        if isinstance(module, nn.ModuleList) and not inner and any(map(is_linear, module.modules())):
            lists[name] = module
    if not lists:
        kind = type(model).__name__
        raise UnsupportedModel(
            f"{kind} holds no list of decoder blocks with linear layers: choose a decoder-only transformer"
        )
    chosen = max(lists.values(), key=lambda found: sum(p.numel() for p in found.parameters()))
    return names[id(chosen)], chosen


def materialise(module: nn.Module, tensors: Mapping[str, Tensor], *, skip: Collection[str] = ()) -> None:
    """Put given tensors, not copies, in place of the parameters and stored buffers of a module on meta.

    tensors: names relative to `module`.  A tied parameter may be given under any of its names, and stays tied.  What
    lies below a name of `skip` stays as it is.  The module's other buffers follow to the tensors' device.  Raises
    CheckpointError for an unknown, misshapen or missing tensor.
    """
    slots = _slots(module)
    names_of = _names_of(slots)
    filled: set[str] = set()
    for name, tensor in tensors.items():
        if name not in slots:
            raise CheckpointError(
                f"tensor {name} has no place in {type(module).__name__}: check the checkpoint's architecture"
            )
        if tensor.shape != slots[name].shape:
            shapes = f"{tuple(tensor.shape)}, {tuple(slots[name].shape)} expected"
            raise CheckpointError(f"tensor {name} has shape {shapes}: check that config.json belongs to these weights")
        _assign(module, names_of[id(slots[name])], tensor)
        filled.update(names_of[id(slots[name])])
    for name, slot in slots.items():
        if slot.is_meta and name not in filled and not any(name == s or name.startswith(f"{s}.") for s in skip):
            raise CheckpointError(f"tensor {name} is missing: check that the checkpoint is complete")
    for tensor in list(tensors.values())[:1]:
        for name, buffer in _loose_buffers(module).items():
            if not any(name.startswith(f"{s}.") for s in skip):
                _assign(module, [name], buffer.to(tensor.device))


def release(module: nn.Module) -> None:
    """Send a module's parameters and stored buffers back to meta; its other buffers keep their values."""
    slots = _slots(module)
    for names in _names_of(slots).values():
        _assign(module, names, slots[names[0]].detach().to("meta"))
    for layer in module.modules():
        if isinstance(layer, LowRankLinear):
            layer.forget()


def _slots(module: nn.Module) -> dict[str, Tensor]:
    """Every name under which a state dict holds a tensor of the module."""
    return dict(module.state_dict(keep_vars=True))


def _loose_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that no state dict holds."""
    stored = _slots(module)
    return {name: buffer for name, buffer in module.named_buffers() if name not in stored}


def _names_of(slots: Mapping[str, Tensor]) -> dict[int, list[str]]:
    """Object id -> its names; tied parameters have several."""
    out: dict[int, list[str]] = {}
    for name, slot in slots.items():
        out.setdefault(id(slot), []).append(name)
    return out


def _assign(module: nn.Module, names: list[str], tensor: Tensor) -> None:
    """Put one tensor, as one object, in place of the parameter or buffer that bears these names."""
    parameter: nn.Parameter | None = None
    for name in names:
        owner, _, key = name.rpartition(".")
        parent = module.get_submodule(owner)
        if key in parent._buffers:
            parent._buffers[key] = tensor
        else:
            parameter = parameter if parameter is not None else nn.Parameter(tensor, requires_grad=False)
            parent._parameters[key] = parameter


class _Captured(Exception):
    """Raised by the last stand-in: what follows the blocks need not run."""


class _Passed(Tensor):
    """What a stand-in returns: a tensor, and the tuple (tensor,) for a model that takes element 0 of a block's result."""

    def __getitem__(self, index: Any) -> Any:
        return self if isinstance(index, int) and index == 0 else super().__getitem__(index)


class _StandIn(nn.Module):
    """Stands for a block: answers for its attributes and hands what `act` makes of its input to the next one."""

    def __init__(self, block: nn.Module, act: Callable[[nn.Module, Tensor, dict[str, Any]], Tensor]) -> None:
        super().__init__()
        self.__dict__["_block"] = block  # not registered: the block is no child of its stand-in
        self.__dict__["_act"] = act

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        block = self.__dict__["_block"]
        hidden, rest = _bind(block, args, kwargs)
        return self.__dict__["_act"](block, hidden.as_subclass(Tensor), rest).as_subclass(_Passed)


def _bind(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """The hidden states of a call, and all other arguments by name."""
    signature = inspect.signature(type(block).forward)
    names = [p.name for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD][1:]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if len(args) > len(names) or not isinstance(given.get(names[0]), Tensor):
        raise UnsupportedModel(
            f"{type(block).__name__} is called without its hidden states first: choose another model"
        )
    return given.pop(names[0]), given


@contextmanager
def _standing_in(stack: nn.ModuleList, act: Callable[[nn.Module, Tensor, dict[str, Any]], Tensor]) -> Iterator[None]:
    """Replace every block by a stand-in, and put the blocks back whatever happens."""
    originals = list(stack)
    try:
        for i, block in enumerate(originals):
            stack[i] = _StandIn(block, act)
        yield
    finally:
        for i, block in enumerate(originals):
            stack[i] = block


@torch.no_grad()
def capture_block_inputs(model: PreTrainedModel, input_ids: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
    """The input of block 0, (b, t, d), and the other arguments of every block, for input_ids (b, t).

    Runs what lies before the blocks (embeddings, rotary tables, masks), which must be materialised; the blocks may be
    on meta.
    `run_block(block_i, hidden, kwargs[i])` then gives the input of the next one.  Raises UnsupportedModel for a
    model that does not hand the result of one block, unchanged, to the next.
    """
    _, stack = blocks(model)
    calls: list[tuple[Tensor, dict[str, Any]]] = []
    count = len(stack)

    def note(block: nn.Module, hidden: Tensor, rest: dict[str, Any]) -> Tensor:
        if calls and calls[-1][0].data_ptr() != hidden.data_ptr():
            raise UnsupportedModel(
                f"the model changes the hidden states between its {type(block).__name__} blocks, so it cannot be run "
                "block by block: choose another model"
            )
        calls.append((hidden, rest))
        if len(calls) == count:
            raise _Captured
        return hidden

    with _standing_in(stack, note), suppress(_Captured):
        model(input_ids=input_ids, use_cache=False)
    if len(calls) != count:
        raise UnsupportedModel(
            f"{type(model).__name__} made {len(calls)} calls to its {count} blocks, one each expected: "
            "choose a decoder-only transformer"
        )
    return calls[0][0], [kwargs for _, kwargs in calls]


def run_head(model: PreTrainedModel, input_ids: Tensor, hidden: Tensor) -> Tensor:
    """Logits (b, t, v) of a model whose last block returned `hidden` (b, t, d); the blocks may be on meta.

    Differentiable in `hidden`.  What lies outside of the blocks must be materialised.
    """
    _, stack = blocks(model)
    with _standing_in(stack, lambda *_: hidden):
        return model(input_ids=input_ids, use_cache=False).logits.as_subclass(Tensor)


def run_block(block: nn.Module, hidden: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """The hidden states after one block, whether it returns a tensor or a tuple that starts with one."""
    out = block(hidden, **kwargs)
    return out[0] if isinstance(out, tuple) else out
