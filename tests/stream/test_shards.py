"""Atomic, deterministic, readable by the safetensors library, and honest about a disk that is full."""

from __future__ import annotations

import hashlib
import json
import resource
import signal
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lplr import files
from lplr.errors import OutputError
from lplr.stream import shards


def tensors(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Odd sizes in every width, an empty one, a scalar, a transposed view and one that shares memory."""
    base = torch.randn(5, 7, generator=generator)
    return {
        "z.codes": torch.randint(0, 256, (3, 5), generator=generator, dtype=torch.uint8),
        "a.weight": base,
        "a.view": base.t(),
        "b.scale": torch.randn(3, generator=generator).bfloat16(),
        "c.half": torch.randn(1, 1, generator=generator).half(),
        "d.double": torch.randn(2, generator=generator).double(),
        "e.mask": torch.tensor([True, False, True]),
        "f.empty": torch.empty(0, 4),
        "g.scalar": torch.tensor(3, dtype=torch.int64),
        "h.fp8": torch.randn(3, generator=generator).to(torch.float8_e4m3fn),
    }


def test_write_shard_is_read_by_safetensors_with_every_tensor_aligned(tmp_path: Path, generator: torch.Generator):
    wanted, path = tensors(generator), tmp_path / "model.safetensors"
    digest = shards.write_shard(path, wanted, {"b": "2", "a": "1"})
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest() == files.sha256(path)
    found = load_file(path)
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.contiguous().reshape(-1).view(torch.uint8))
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"a": "1", "b": "2"}
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert length % 8 == 0
    for name, row in json.loads(raw[8 : 8 + length]).items():
        if name != "__metadata__":
            assert (8 + length + row["data_offsets"][0]) % wanted[name].element_size() == 0


def test_same_tensors_give_same_bytes_in_any_order(tmp_path: Path, generator: torch.Generator):
    wanted = tensors(generator)
    first = shards.write_shard(tmp_path / "one", wanted, {"a": "1", "b": "2"})
    second = shards.write_shard(tmp_path / "two", dict(reversed(wanted.items())), {"b": "2", "a": "1"})
    assert first == second
    assert shards.write_shard(tmp_path / "three", {**wanted, "b.scale": torch.ones(3).bfloat16()}) != first


def test_big_tensor_is_written_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shards, "CHUNK", 7)
    tensor = torch.arange(101, dtype=torch.int32)
    shards.write_shard(tmp_path / "s", {"t": tensor})
    assert torch.equal(load_file(tmp_path / "s")["t"], tensor)


def test_a_file_size_limit_is_told_as_a_full_disk(tmp_path: Path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))  # a true failure of write(2)
        with pytest.raises(OutputError, match="bytes are free"):
            shards.write_shard(tmp_path / "s.safetensors", {"t": torch.zeros(1 << 20)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert not list(tmp_path.iterdir())


def test_write_index(tmp_path: Path):
    shards.write_index(tmp_path, {"b": "2.safetensors", "a": "1.safetensors"}, 12)
    text = (tmp_path / "model.safetensors.index.json").read_text()
    index = json.loads(text)
    assert index == {"metadata": {"total_size": 12}, "weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    assert list(index["weight_map"]) == ["a", "b"] and text.endswith("\n")
