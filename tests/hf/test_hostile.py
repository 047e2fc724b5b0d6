"""Configs and GGUF files that ask for what no machine has, or that other libraries choke on, are refused in a moment."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import checkpoints
import gguf
import numpy as np
import pytest

from lplr.errors import CheckpointError, LplrError, UnsupportedModel
from lplr.factor.factorization import Format
from lplr.hf.gguf import gguf_config
from lplr.hf.gguf_header import read_header
from lplr.hf.hostile import MOST_MODULES, check_counts
from lplr.hf.quantizer import LplrConfig
from lplr.stream.checkpoint import open_checkpoint


@pytest.mark.parametrize(
    "architecture, changes",
    [
        ("llama", {"num_hidden_layers": 10**9}),
        ("llama", {"num_hidden_layers": 1 << 70}),
        ("llama", {"num_hidden_layers": -1}),
        ("llama", {"num_hidden_layers": 2.5}),
        ("llama", {"num_hidden_layers": "3"}),
        ("llama", {"num_attention_heads": 0}),
        ("llama", {"hidden_size": 1 << 40}),
        ("llama", {"head_dim": 1 << 40}),
        ("llama", {"vocab_size": 1 << 62}),
        ("llama", {"vocab_size": None}),
        ("llama", {"rope_parameters": {"rope_type": "x", "rope_theta": "y"}}),
        ("mixtral", {"num_local_experts": 10**9}),
        ("mixtral", {"num_local_experts": 60_000, "num_hidden_layers": 60_000}),
        ("gptj", {"n_positions": 1 << 40}),
        ("gpt2", {"n_layer": 10**8}),
        ("llama", {"quantization_config": {"quant_method": "lplr", "layers": [1]}}),
        ("llama", {"quantization_config": 3}),
    ],
)
def test_a_config_without_measure_is_refused_at_once(architecture: str, changes: dict[str, Any], tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", architecture, tokenizer=False)
    checkpoints.change_config(source, **changes)
    started = time.monotonic()
    with pytest.raises(LplrError) as caught:
        open_checkpoint(str(source))
    assert time.monotonic() - started < 20 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "3", "[]", "null", '{"model_type": 3}', '{"model_type": {}}', ""]
)
def test_a_config_that_is_none(text: str, tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", "llama", tokenizer=False)
    (source / "config.json").write_text(text)
    with pytest.raises(CheckpointError):
        open_checkpoint(str(source))


def test_counts_that_models_have_are_let_pass():
    check_counts(Path("c"), {"num_hidden_layers": 126, "text_config": {"num_layers": 61, "n_routed_experts": 384}, "layers": "x"})
    check_counts(Path("c"), [])
    with pytest.raises(UnsupportedModel, match="1,000,000 layers or experts"):
        check_counts(Path("c"), {"text_config": {"num_layers": 10**6}})
    assert MOST_MODULES > 61 * 384


def write_gguf(path: Path, tensors: dict[str, np.ndarray], **fields: int) -> bytearray:
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in fields.items():
        writer.add_uint32(name.replace("__", "."), value)
    for name, data in tensors.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return bytearray(path.read_bytes())


def test_gguf_tensors_that_overlap_repeat_or_have_no_size(tmp_path: Path):
    path = tmp_path / "m.gguf"
    raw = write_gguf(path, {"aaaa": np.ones((4, 8), np.float32), "bbbb": np.ones((4, 8), np.float32)})
    read_header(path)
    place = raw.index(b"bbbb")
    offset = place + 4 + 4 + 16 + 4  # name; number of dimensions, two of them, type
    assert int.from_bytes(raw[offset : offset + 8], "little") == 128
    for at, new, named in (
        (offset, (64).to_bytes(8, "little"), "aaaa and bbbb overlap"),
        (place, b"aaaa", "aaaa stands twice"),
        (place + 8, (0).to_bytes(8, "little"), r"bbbb has shape \(4, 0\)"),
        (place + 16, (0).to_bytes(8, "little"), r"bbbb has shape \(0, 8\)"),
    ):
        spoiled = raw.copy()
        spoiled[at : at + len(new)] = new
        path.write_bytes(spoiled)
        with pytest.raises(CheckpointError, match=named):
            read_header(path)


def test_gguf_metadata_that_asks_for_a_model_without_end(tmp_path: Path):
    write_gguf(tmp_path / "m.gguf", {"token_embd.weight": np.ones((4, 8), np.float32)}, llama__block_count=1 << 31)
    with pytest.raises(UnsupportedModel, match="2,147,483,648 layers"):
        gguf_config(tmp_path / "m.gguf")


@pytest.mark.parametrize("value", ['{"shape": [1e999, 3]}', '{"shape": 3}', "{}", '{"shape": [3, -3]}'])
def test_layer_entries_that_describe_no_matrix(value: str):
    entry = {**Format((3, 4), q_bits=2.0, scales=(("q_row_scale", 3),)).to_dict(), **json.loads(value)}
    if value == "{}":
        assert Format.from_dict(entry).shape == (3, 4)
        return
    with pytest.raises(CheckpointError):
        Format.from_dict(entry)


def test_tables_of_layers_that_are_none():
    for layers in ([1], "x", {"a": 3}, {"a": [1]}):
        with pytest.raises(CheckpointError, match="table of layers"):
            LplrConfig(layers=layers)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="format version"):
        LplrConfig(format_version="2").formats()  # type: ignore[arg-type]
