"""The content of a compressed folder's files beside its weights: tokenizer, generation settings, config.json, model card."""

from __future__ import annotations

import json
import tempfile
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

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

_CARD = """---
library_name: transformers
tags: [lplr, quantized]
{base_line}---

# {name}, {bits:.2f} bits per weight

Compressed with lplr {version}: every weight matrix of the blocks is held as packed low-precision
factors. `run.jsonl` holds the error, the certificate and the bound of each.

```python
import lplr  # lets transformers read the format; without it the weights cannot be read
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH OR ID")
tokenizer = AutoTokenizer.from_pretrained("PATH OR ID")
```

| | |
|---|---|
| bits per weight of the compressed matrices, all overheads counted | {bits:.4f} |
| bits per parameter of the whole model | {whole:.3f} |
| calibration text | {calibration} |
| method | {method} |

Check the folder with `lplr verify DIR --against BASE`; measure it with `lplr eval DIR --against BASE`.
"""


def tokenizer_files(source: Path) -> dict[str, bytes]:
    """Name -> content of the tokenizer and generation settings: a folder's own files, or those that a GGUF file describes."""
    if is_gguf(source):
        with tempfile.TemporaryDirectory() as scratch:
            gguf_tokenizer(source).save_pretrained(scratch)
            return {file.name: file.read_bytes() for file in sorted(Path(scratch).iterdir())}
    return {name: (source / name).read_bytes() for name in TOKENIZER_FILES if (source / name).is_file()}


def config_text(base: PretrainedConfig, quantization: LplrConfig, dtype: torch.dtype) -> str:
    """config.json: that of the base model, with the type of the stored weights and the table of layers."""
    config = deepcopy(base)
    config.dtype = dtype
    config.quantization_config = quantization.to_dict()
    fields = json.loads(config.to_json_string(use_diff=True))
    fields = {key: value for key, value in fields.items() if not key.endswith("name_or_path")}
    return json.dumps(fields, indent=2, sort_keys=True) + "\n"


def card_text(header: dict[str, Any], summary: dict[str, Any]) -> str:
    """README.md, the model card, from the first line of run.jsonl and the totals."""
    calibration = header["calibration"]
    told = f"{calibration['name']}, {calibration['rows']} x {calibration['seqlen']} tokens" if calibration else "none (data-free)"
    base = header["model"]
    return _CARD.format(
        base_line=f"base_model: {json.dumps(base.partition(':')[0])}\n" if base.count("/") == 1 else "",
        name=base,
        bits=summary["bits_per_weight"],
        whole=summary["bits_per_parameter"],
        version=header["versions"]["lplr"],
        calibration=told,
        method=header["recipe"]["method"],
    )
