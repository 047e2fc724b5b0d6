"""The content of a compressed folder's files beside its weights: tokenizer, generation settings, config.json."""

from __future__ import annotations

import json
import tempfile
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lplr.hf.card import SHIM
from lplr.hf.gguf import gguf_tokenizer
from lplr.hf.load import is_gguf
from lplr.hf.quantizer import LplrConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "spiece.model",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def tokenizer_files(source: Path) -> dict[str, bytes]:
    """Name -> content of the tokenizer and generation settings: a folder's own files, or those that a GGUF file describes."""
    if is_gguf(source):
        with tempfile.TemporaryDirectory() as scratch:
            gguf_tokenizer(source).save_pretrained(scratch)
            return {file.name: file.read_bytes() for file in sorted(Path(scratch).iterdir())}
    return {name: (source / name).read_bytes() for name in TOKENIZER_FILES if (source / name).is_file()}


def architecture_of(config: PretrainedConfig) -> str | None:
    """The class of transformers that a config names, the only one; None where it names none of theirs."""
    import transformers

    names = getattr(config, "architectures", None) or ()
    return names[0] if len(names) == 1 and hasattr(transformers, names[0]) else None


def config_text(base: PretrainedConfig, quantization: LplrConfig, dtype: torch.dtype) -> str:
    """config.json: that of the base model, with the type of the stored weights, the table of layers, and the shim's class."""
    config = deepcopy(base)
    config.dtype = dtype
    config.quantization_config = quantization.to_dict()
    fields = json.loads(config.to_json_string(use_diff=True))
    fields = {key: value for key, value in fields.items() if not key.endswith("name_or_path")}
    architecture = architecture_of(base)
    if architecture:
        fields["auto_map"] = {"AutoModelForCausalLM": f"{SHIM.removesuffix('.py')}.{architecture}"}
    return json.dumps(fields, indent=2, sort_keys=True) + "\n"
