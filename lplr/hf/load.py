"""Load a causal language model and its tokenizer: a dense folder, a compressed folder, a hub id, or a GGUF file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from lplr.errors import CheckpointError, HubError, UnsupportedModel
from lplr.hf.gguf import gguf_tokenizer
from lplr.hf.hostile import first_line
from lplr.hf.quantizer import compressed_layers
from lplr.hf.quiet import quiet
from lplr.hf.register import register

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_GIVE = "give the folder of a transformers model, a hub id or a GGUF file"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def is_gguf(path: str | Path) -> bool:
    """Whether a path names a GGUF file."""
    return str(path).endswith(".gguf")


def _source(path: str | Path, wanted: tuple[str, ...], **kwargs: Any) -> tuple[str, dict[str, Any]]:
    """The name to give to from_pretrained, and its arguments; CheckpointError when nothing is there.

    wanted: files of which a folder must hold one.
    """
    local = Path(path).expanduser()
    if local.is_file() and is_gguf(local):
        return str(local.parent), {**kwargs, "gguf_file": local.name, "local_files_only": True}
    if local.is_dir():
        if not any((local / name).is_file() for name in wanted):
            raise CheckpointError(f"{local} has no {wanted[0]}: {_GIVE}")
        return str(local), {**kwargs, "local_files_only": True}
    if local.exists():
        raise CheckpointError(f"{local} is a file: give a folder, a hub id or a file that ends in .gguf")
    if not is_gguf(path) and _HUB_ID.fullmatch(str(path)):
        return str(path), kwargs
    raise CheckpointError(f"{path} does not exist: {_GIVE}")


def _translated(path: str | Path, error: Exception) -> Exception:
    """What an exception of transformers means here."""
    reason = first_line(error)
    if isinstance(error, OSError) and not Path(path).exists():
        return HubError(f"{path} cannot be had from the hub ({reason}): check the name, or log in with `hf auth login`")
    if isinstance(error, ValueError | KeyError):
        return UnsupportedModel(
            f"{path} cannot be loaded ({reason}): check its files, upgrade transformers, or choose another model"
        )
    return CheckpointError(f"{path} cannot be read ({reason}): copy or download it again")


def load_model(path: str | Path, dtype: torch.dtype = torch.float32, **kwargs: Any) -> PreTrainedModel:
    """The causal language model at `path` in eval mode; a GGUF file is dequantized.  kwargs go to from_pretrained.

    Raises CheckpointError for a file that is absent or damaged and for a tensor that is missing or misshapen,
    VerificationError when that, or an unexpected tensor, is in a compressed folder, UnsupportedModel for an unknown
    architecture, HubError for a repository that cannot be had.
    """
    register()
    name, arguments = _source(path, ("config.json",), dtype=dtype, **kwargs)
    if "gguf_file" in arguments:
        arguments["quantization_config"] = GgufConfig(dequantize=True)
    try:
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                name, output_loading_info=True, trust_remote_code=False, **arguments
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and "mismatch" not in str(error):
            raise  # transformers tells of a misshapen tensor by "mismatch"; anything else is a fault of the program
        raise _translated(path, error) from None
    model, info = loaded
    _check(path, model, info)
    return model.eval()


def _check(path: str | Path, model: PreTrainedModel, info: dict[str, Any]) -> None:
    """Raise CheckpointError when transformers would go on with tensors made up, or, when compressed, left out.

    Dense checkpoints of old hold tensors that the model has no use for, such as GPT-2's masks; those are let pass.
    """
    packed = bool(compressed_layers(model))
    kind = "compressed" if packed else "dense"
    for what in ("missing", "mismatched", "unexpected") if packed else ("missing", "mismatched"):
        keys = sorted(str(key) for key in info[f"{what}_keys"])
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise CheckpointError(
                f"{path} ({kind}): tensor {keys[0]}{more} {what}: does config.json belong to these weights?"
            )
    for key, value in (info.get("conversion_errors") or {}).items():
        raise CheckpointError(f"{path} ({kind}): tensor {key} cannot be converted ({value}): copy or download it again")


def load_tokenizer(path: str | Path, **kwargs: Any) -> PreTrainedTokenizerBase:
    """The tokenizer at `path`: of a folder, a hub id or a GGUF file (`hf.gguf.gguf_tokenizer`).

    Raises what `load_model` raises.
    """
    if is_gguf(path) and Path(path).expanduser().is_file():
        return gguf_tokenizer(Path(path).expanduser())
    name, arguments = _source(path, ("tokenizer_config.json", "tokenizer.json", "config.json"), **kwargs)
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(name, trust_remote_code=False, **arguments)
    except Exception as error:
        if type(error) is not Exception and not isinstance(error, OSError | ValueError | KeyError):
            raise  # the tokenizers package raises the plain class for a damaged file
        raise _translated(path, error) from None
