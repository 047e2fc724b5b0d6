"""The driver end to end: every architecture, any type and size of weights, what depends on the seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import checkpoints
import pico
import pytest
import torch
from runs import calibrated, fingerprints, layers_of, run, settings
from safetensors.torch import load_file, save_file

from lplr.hf.load import load_model
from lplr.stream import shards
from lplr.stream.matrix import seeded
from lplr.stream.verify import verify

ARCHITECTURES = ["llama", "qwen2", "gpt2", "gemma2", "gemma3", "mixtral", "qwen3_moe", "gpt_neox", "opt"]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=pico.tokens()).logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_compressed_model_is_the_dense_one_with_dequantized_weights(architecture: str, tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", architecture, shards=2)
    assert (source / "model.safetensors.index.json").is_file()
    out = tmp_path / "out"
    # transformers reads any tokenizer of a Qwen2 folder as its own kind, which knows none of our words
    chosen = settings(source) if architecture == "qwen2" else calibrated(source)
    rows = run(chosen, out)
    loaded, dense = load_model(out), load_model(source)
    factors = layers_of(loaded)
    assert set(factors) == {row.name for row in rows if row.stored == "compressed"} and factors
    wanted = logits(pico.densify(dense, factors))
    assert (logits(loaded) - wanted).abs().max() < 1e-4
    assert verify(out, str(source)).worst == pytest.approx(1, abs=1e-4)

SQUARE = [("gpt2", "transformer.h.1.attn.c_proj"), ("llama", "model.layers.1.self_attn.o_proj")]


@pytest.mark.parametrize("architecture, matrix", SQUARE)
def test_a_square_matrix_is_not_transposed_by_mistake(architecture: str, matrix: str, tmp_path: Path):
    """GPT-2 holds its weights as (in, out): a square one gives no error when it is read the wrong way round."""
    source = checkpoints.write(tmp_path / "base", architecture)
    rows = {row.name: row for row in run(settings(source, bits=8), tmp_path / "out")}
    from lplr.nn import weight_of

    true = weight_of(load_model(source).get_submodule(matrix))
    found = layers_of(load_model(tmp_path / "out"))[matrix].dequantize()
    assert true.shape[0] == true.shape[1]
    error = float((found - true).norm())
    assert error == pytest.approx(rows[matrix].error, rel=1e-4)
    assert error < 0.05 * float(true.norm()) < float((found.T - true).norm())


def test_bfloat16_stays_bfloat16_and_an_untied_head_is_kept(tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", "llama", dtype=torch.bfloat16, tie_word_embeddings=False)
    run(calibrated(source), tmp_path / "out")
    held = {k: v for file in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(file).items()}
    base = load_file(source / "model.safetensors")
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight", "model.layers.0.input_layernorm.weight"):
        assert torch.equal(held[name], base[name]) and held[name].dtype == torch.bfloat16
    verify(tmp_path / "out", str(source))


def test_biases_are_stored_and_used(tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", "qwen2")
    run(settings(source), tmp_path / "out")
    base = load_file(source / "model.safetensors")
    loaded = load_model(tmp_path / "out")
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.2.self_attn.v_proj"):
        assert torch.equal(loaded.get_submodule(name).bias, base[f"{name}.bias"])


def test_zero_tiny_and_huge_weights(tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", "llama")
    for part, change in (("q", torch.zeros_like), ("k", lambda t: t * 1e-30), ("v", lambda t: t * 1e30)):
        checkpoints.change_tensor(source, f"model.layers.0.self_attn.{part}_proj.weight", change)
    rows = {row.name: row for row in run(settings(source), tmp_path / "out")}
    assert rows["model.layers.0.self_attn.q_proj"].error == 0
    for part in "kv":
        assert 0 < rows[f"model.layers.0.self_attn.{part}_proj"].relative_error < 0.5
    verify(tmp_path / "out", str(source))


def test_a_folder_of_one_gguf_file_is_that_file(tmp_path: Path):
    from lplr.stream.checkpoint import _gguf_inside

    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert _gguf_inside(tmp_path) == tmp_path / "m.gguf"
    (tmp_path / "n.gguf").write_bytes(b"GGUF")
    assert _gguf_inside(tmp_path) == tmp_path


def test_the_generator_of_a_name_depends_on_seed_and_name_alone():
    draw = [torch.rand(3, generator=seeded(seed, name)).tolist() for seed, name in ((0, "a"), (0, "b"), (1, "a"), (0, "a"))]
    assert draw[0] == draw[3] and draw[0] != draw[1] and draw[0] != draw[2]


def test_another_seed_gives_other_bytes_and_the_same_one_the_same(tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", "llama")
    made = [run(settings(source, method="lplr", seed=seed), tmp_path / str(i)) for i, seed in enumerate((0, 0, 1))]
    assert [r.error for r in made[0]] == [r.error for r in made[1]] != [r.error for r in made[2]]
    first, second = fingerprints(tmp_path / "0"), fingerprints(tmp_path / "1")
    assert first == second


def test_outside_tensors_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from lplr.stream.checkpoint import Checkpoint

    source = checkpoints.write(tmp_path / "base", "llama")
    read: list[str] = []
    true = Checkpoint.stored
    monkeypatch.setattr(Checkpoint, "stored", lambda self, name: read.append(name) or true(self, name))
    run(settings(source), tmp_path / "out")
    assert read.count("model.embed_tokens.weight") == 1


def test_a_checkpoint_that_holds_more_than_the_model_is_told(tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", "llama")
    file = source / "model.safetensors"
    save_file({**load_file(file), "extra.weight": torch.ones(2)}, file, {"format": "pt"})
    notes: list[str] = []
    run(settings(source), tmp_path / "out", notify=notes.append)
    assert notes == ["tensor extra.weight of the checkpoint has no place in the model and is left out"]


def test_shard_names_are_those_of_transformers():
    assert shards.shard_name(0, 12) == "model-00001-of-00012.safetensors"
