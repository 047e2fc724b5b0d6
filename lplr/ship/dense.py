"""A plain transformers folder of dense weights, written one tensor at a time."""

from __future__ import annotations

import json
from pathlib import Path

from lplr.files import write_atomic, write_text_atomic
from lplr.hf.export import tokenizer_files
from lplr.ship.unpacked import Unpacked
from lplr.stream.shards import shard_name, write_index, write_shard

SHARD_BYTES = 4 << 30


def write_dense(tensors: Unpacked, output: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """config.json, tokenizer and safetensors shards of at most `shard_bytes` (or one tensor) into an existing folder."""
    layout = tensors.layout
    shards: list[list[str]] = [[]]
    size = total = 0
    for name, (shape, dtype) in layout.items():
        count = dtype.itemsize
        for length in shape:
            count *= length
        if shards[-1] and size + count > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size, total = size + count, total + count
    names = [shard_name(i, len(shards)) for i in range(len(shards))]
    for file, held in zip(names, shards, strict=True):
        write_shard(output / file, tensors, layout={name: layout[name] for name in held})
    write_index(output, {name: file for file, held in zip(names, shards, strict=True) for name in held}, total)
    for file, content in tokenizer_files(tensors.folder).items():
        write_atomic(output / file, content)
    config = json.loads((tensors.folder / "config.json").read_text(encoding="utf-8"))
    fields = {key: value for key, value in config.items() if key not in ("quantization_config", "auto_map")}
    fields["dtype"] = str(tensors.dtype).removeprefix("torch.")
    write_text_atomic(output / "config.json", json.dumps(fields, indent=2, sort_keys=True) + "\n")
