"""Checkpoints on disk, made from pico models: any architecture, type, sharding, with a tokenizer; and how to spoil them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pico
import torch
from safetensors.torch import load_file, save_file

WORDS = [f"w{i}" for i in range(pico.VOCAB - 4)]


def text(words: int = 3000, seed: int = 0) -> str:
    """Random words of the pico vocabulary."""
    chosen = random.Random(seed).choices(WORDS, k=words)
    return " ".join(chosen)


def write_tokenizer(folder: Path) -> None:
    """A tokenizer that makes one token of each word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {name: i for i, name in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)


def write(
    folder: Path,
    architecture: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    tokenizer: bool = True,
    seed: int = 0,
    **changes: Any,
) -> Path:
    """A pico model as `save_pretrained` writes it, in `shards` files of about equal size."""
    made = pico.model(architecture, seed, **changes).to(dtype)
    made.config.dtype = dtype
    size = sum(t.nbytes for t in made.state_dict().values())
    made.save_pretrained(folder, max_shard_size=size // shards + 1 if shards > 1 else "5GB")
    if tokenizer:
        write_tokenizer(folder)
    (folder / "text.txt").write_text(text())
    return folder


def change_tensor(folder: Path, name: str, change: Any) -> None:
    """Put change(tensor) in place of a tensor of model.safetensors; None takes it out."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    new = change(tensors.pop(name))
    save_file({**tensors, **({} if new is None else {name: new})}, file, {"format": "pt"})


def change_config(folder: Path, **changes: Any) -> None:
    """Replace entries of config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def flip(path: Path, at: int) -> None:
    """Change one byte of a file."""
    raw = bytearray(path.read_bytes())
    raw[at] ^= 0x5A
    path.write_bytes(raw)
