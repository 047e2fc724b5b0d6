"""load_model and load_tokenizer on folders, compressed folders and GGUF files."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pico
import pytest
import torch
from safetensors.torch import load_file, save_file

from lplr.errors import CheckpointError, HubError, UnsupportedModel, VerificationError
from lplr.hf.load import is_gguf, load_model, load_tokenizer
from lplr.hf.quantizer import compressed_layers


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    pico.model("llama").save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def test_dense(dense: Path) -> None:
    model = load_model(dense)
    with torch.no_grad():
        assert torch.equal(model(pico.tokens()).logits, pico.model("llama")(pico.tokens()).logits)
    assert not model.training and load_model(str(dense), torch.bfloat16).dtype == torch.bfloat16


def test_compressed(tmp_path: Path) -> None:
    made, factors = pico.compress(pico.model("mixtral"))
    model = load_model(pico.write_compressed(made, tmp_path))
    assert set(compressed_layers(model)) == set(factors)
    with torch.no_grad():
        assert torch.equal(model(pico.tokens()).logits, made(pico.tokens()).logits)


def test_compressed_and_incomplete(tmp_path: Path) -> None:
    folder = pico.write_compressed(pico.compress(pico.model("llama"))[0], tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.q_codes"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(VerificationError, match="q_codes is missing"):
        load_model(folder)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.layers.1.mlp.down_proj.weight", None, "missing"),
        ("model.layers.1.mlp.down_proj.weight", torch.zeros(2, 3), "down_proj|mismatch"),
    ],
)
def test_dense_that_does_not_fit_its_config(dense: Path, name: str, value: torch.Tensor | None, message: str) -> None:
    tensors = {**load_file(dense / "model.safetensors"), name: value}
    save_file({k: v for k, v in tensors.items() if v is not None}, dense / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        load_model(dense)


def test_a_needless_tensor_of_a_dense_checkpoint_is_let_pass(dense: Path) -> None:
    tensors = {**load_file(dense / "model.safetensors"), "model.layers.1.attn.bias": torch.zeros(2)}
    save_file(tensors, dense / "model.safetensors", {"format": "pt"})
    assert load_model(dense).num_parameters()


def test_truncated(dense: Path) -> None:
    file = dense / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_model(dense)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        load_model(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"no config.json"):
        load_model(tmp_path)
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is a file"):
        load_tokenizer(tmp_path / "x.bin")
    (tmp_path / "config.json").write_text('{"model_type": "never_heard_of"}')
    with pytest.raises(UnsupportedModel, match="cannot be loaded"):
        load_model(tmp_path)


def test_no_tokenizer_and_no_weights(tmp_path: Path) -> None:
    pico.config("llama").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError):
        load_model(tmp_path)
    with pytest.raises(CheckpointError):
        load_tokenizer(tmp_path)


def test_damaged_tokenizer(dense: Path, shared: Path) -> None:
    for file in (shared / "data/models/stories260k").glob("tokenizer*"):
        (dense / file.name).write_bytes(file.read_bytes())
    assert load_tokenizer(dense)("a")["input_ids"]
    text = (dense / "tokenizer.json").read_bytes()
    (dense / "tokenizer.json").write_bytes(text[: len(text) // 2])
    with pytest.raises(CheckpointError):
        load_tokenizer(dense)


def test_a_hub_id_that_is_not_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="cannot be had from the hub"):
        load_model("nobody/nothing-at-all", local_files_only=True)


def test_is_gguf() -> None:
    assert is_gguf("a/b.gguf") and is_gguf(Path("b.gguf")) and not is_gguf("a/b")


def write_gguf(file: Path, pre: str) -> torch.nn.Module:
    """A pico Llama as GGUF with float32 tensors and a byte-level vocabulary without merges."""
    from gguf import GGUFWriter
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = pico.model(
        "llama",
        vocab_size=len(alphabet) + 3,
        tie_word_embeddings=False,
        hidden_size=32,
        head_dim=8,
        intermediate_size=64,
    )
    config = model.config
    writer = GGUFWriter(file, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(["<s>", "</s>", *alphabet, alphabet[20] + alphabet[21]])
    writer.add_token_types([3, 3] + [1] * (len(alphabet) + 1))
    writer.add_token_merges([f"{alphabet[20]} {alphabet[21]}"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    leaves = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    outer = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    for name, tensor in model.state_dict().items():
        if name in outer:
            writer.add_tensor(outer[name], tensor.numpy())
            continue
        _, _, block, leaf = name.removesuffix(".weight").split(".", 3)
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(leaves[leaf])
        writer.add_tensor(
            f"blk.{block}.{leaves[leaf]}.weight", np.ascontiguousarray(_rotary_order(tensor.numpy(), heads))
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _rotary_order(weight: np.ndarray, heads: int | None) -> np.ndarray:
    """llama.cpp keeps the two halves of a head's rotary pairs interleaved."""
    if heads is None:
        return weight
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def test_gguf(tmp_path: Path) -> None:
    real = write_gguf(tmp_path / "pico.gguf", "smollm")
    model = load_model(tmp_path / "pico.gguf")
    with torch.no_grad():
        torch.testing.assert_close(model(pico.tokens()).logits, real(pico.tokens()).logits, rtol=1e-4, atol=1e-4)
    assert not hasattr(model, "hf_quantizer") and getattr(model.config, "quantization_config", None) is None
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(load_model(tmp_path / "out").lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize(("pre", "splits"), [("smollm", True), ("gpt-2", False)])
def test_gguf_tokenizer_splits_digits(tmp_path: Path, pre: str, splits: bool) -> None:
    write_gguf(tmp_path / "pico.gguf", pre)
    tokenizer = load_tokenizer(tmp_path / "pico.gguf")
    words = [word for word, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("of 1984")]
    assert (words == ["of", "Ġ", "1", "9", "8", "4"]) is splits
    tokenizer.save_pretrained(tmp_path / "out")
    again = load_tokenizer(tmp_path / "out")
    assert again("of 1984")["input_ids"] == tokenizer("of 1984")["input_ids"]


def test_damaged_gguf(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(40))
    for load in (load_model, load_tokenizer):
        with pytest.raises(CheckpointError):
            load(tmp_path / "bad.gguf")
    with pytest.raises(CheckpointError, match="does not exist"):
        load_model(tmp_path / "absent.gguf")


def test_real_folder(shared: Path, tmp_path: Path) -> None:
    folder = shared / "data/models/stories260k"
    assert load_model(folder).num_parameters() == 260_032
    tokenizer = load_tokenizer(folder)
    assert (
        tokenizer.decode(tokenizer("Once upon a time", add_special_tokens=False)["input_ids"]).strip()
        == "Once upon a time"
    )
    shutil.copy(folder / "config.json", tmp_path)
    with pytest.raises(CheckpointError):
        load_model(tmp_path)
