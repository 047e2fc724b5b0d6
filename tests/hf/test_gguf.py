"""GGUF tensors against the transformers weights they were made from, and against transformers' own import."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from lplr.errors import CheckpointError, UnsupportedModel
from lplr.hf.gguf import GgufSource, gguf_config, gguf_tokenizer, read_header

Q = gguf.GGMLQuantizationType
HEADS, KV_HEADS, WIDTH, LAYERS = 4, 2, 64, 2
SMOL = "SmolLM2-135M-Instruct.Q4_1.gguf"


def permuted(w: Tensor, heads: int) -> Tensor:
    """The order of rows in which llama.cpp keeps q and k: within each head, row 2 i + s is row s (dim / 2) + i."""
    dim = w.shape[0] // heads
    order = [h * dim + s * (dim // 2) + i for h in range(heads) for i in range(dim // 2) for s in range(2)]
    return w[order]


def write(path: Path, arch: str, fields: dict[str, object], tensors: dict[str, tuple[Tensor, Q]], **extra: object) -> Path:
    """A GGUF file; fields are put under the architecture's prefix, extra ones (a__b) as a.b."""
    writer = gguf.GGUFWriter(path, arch)
    every = {f"{arch}.{key}": value for key, value in fields.items()}
    every.update({key.replace("__", "."): value for key, value in extra.items()})
    for key, value in every.items():
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case str():
                writer.add_string(key, value)
            case list():
                writer.add_array(key, value)
    for name, (tensor, kind) in tensors.items():
        data = tensor.detach().float().numpy()
        if kind in (Q.F32, Q.F16):
            writer.add_tensor(name, data.astype(np.float16 if kind == Q.F16 else np.float32))
        else:
            writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def rounded(w: Tensor, kind: Q) -> Tensor:
    """What storing does to a matrix whose rows keep their order of columns."""
    if kind == Q.F16:
        return w.half()
    return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(w.detach().numpy(), kind), kind))


def randomize(model: torch.nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


LLAMA_KINDS = {"attn_q": Q.F16, "attn_k": Q.Q8_0, "attn_v": Q.Q4_1, "attn_output": Q.BF16, "ffn_gate": Q.F32}
LLAMA_NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
FIELDS = {
    "context_length": 32, "block_count": LAYERS, "embedding_length": WIDTH, "feed_forward_length": 96,
    "rope.freq_base": 10000.0, "rope.dimension_count": WIDTH // HEADS, "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS, "attention.layer_norm_rms_epsilon": 1e-5, "vocab_size": 40,
}  # fmt: skip


def llama(path: Path, *, tied: bool = False, **extra: object) -> tuple[Path, dict[str, Tensor]]:
    """A tiny Llama as a GGUF file and what each of its tensors must come back as."""
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, max_position_embeddings=32, tie_word_embeddings=tied,
    )  # fmt: skip
    state = randomize(transformers.LlamaForCausalLM(config))
    table = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if not tied:
        table["output.weight"] = "lm_head.weight"
    for i in range(LAYERS):
        table.update({f"blk.{i}.{a}.weight": f"model.layers.{i}.{b}.weight" for a, b in LLAMA_NAMES.items()})
    stored, expected = {}, {}
    for name, hf in table.items():
        part, w = name.split(".")[-2], state[hf]
        kind = LLAMA_KINDS.get(part, Q.F32 if w.dim() == 1 else Q.Q8_0)
        heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(part)
        stored[name] = (permuted(w, heads) if heads else w, kind)
        expected[hf] = rounded(w, kind).to({Q.F16: torch.float16, Q.BF16: torch.bfloat16}.get(kind, torch.float32))
    stored["rope_freqs.weight"] = (torch.ones(8), Q.F32)  # no place in the model: passed over
    return write(path, "llama", FIELDS, stored, **extra), expected


@pytest.mark.parametrize("tied", [False, True])
def test_every_tensor_of_a_llama(tmp_path: Path, tied: bool):
    path, expected = llama(tmp_path / "tiny.gguf", tied=tied)
    source = GgufSource(path)
    assert source.names() == tuple(sorted(expected))
    for name, tensor in expected.items():
        assert source.dtype(name) == tensor.dtype, name
        assert source.shape(name) == tuple(tensor.shape) and source.nbytes(name) == tensor.numel() * tensor.element_size()
        got = source.get(name)
        assert got.dtype == tensor.dtype and got.is_contiguous() and torch.equal(got, tensor), name
        assert torch.equal(source.part(name, 1), tensor[1])
    config = gguf_config(path)
    assert (config.model_type, config.tie_word_embeddings, config.num_key_value_heads) == ("llama", tied, KV_HEADS)
    with pytest.raises(CheckpointError, match="no tensor rope_freqs"):
        source.get("rope_freqs.weight")
    with pytest.raises(IndexError):
        source.part("model.norm.weight", WIDTH)


def imported(path: Path) -> dict[str, Tensor]:
    """The weights as transformers itself imports the file."""
    unpack = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, quantization_config=unpack, dtype=torch.float32
    )
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def check_against_transformers(path: Path) -> GgufSource:
    source, theirs = GgufSource(path), imported(path)
    assert set(source.names()) <= set(theirs)
    assert set(theirs) - set(source.names()) <= {"lm_head.weight"}
    for name in source.names():
        assert torch.equal(source.get(name).float(), theirs[name]), name
    return source


def test_llama_equals_what_transformers_imports(tmp_path: Path):
    check_against_transformers(llama(tmp_path / "tiny.gguf")[0])


def test_slabs_of_rows_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, expected = llama(tmp_path / "tiny.gguf")
    monkeypatch.setattr("lplr.hf.gguf.CHUNK_WEIGHTS", 5 * WIDTH)
    source = GgufSource(path)
    assert all(torch.equal(source.get(name), tensor) for name, tensor in expected.items())


def test_gpt2_is_transposed_back(tmp_path: Path):
    config = transformers.GPT2Config(vocab_size=40, n_embd=32, n_layer=1, n_head=2, n_positions=1024)
    state = randomize(transformers.GPT2LMHeadModel(config))
    table = {
        "attn_norm": "ln_1", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj", "ffn_norm": "ln_2",
        "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj",
    }  # fmt: skip
    names = {f"blk.0.{a}": f"transformer.h.0.{b}" for a, b in table.items()} | {"output_norm": "transformer.ln_f"}
    stored, expected = {}, {}
    for name, hf in names.items():
        for leaf in ("weight", "bias"):
            w = expected[f"{hf}.{leaf}"] = state[f"{hf}.{leaf}"]
            stored[f"{name}.{leaf}"] = (w.t().contiguous() if w.dim() == 2 else w, Q.F32)
    for name, hf in {"token_embd": "wte", "position_embd": "wpe"}.items():
        w = expected[f"transformer.{hf}.weight"] = state[f"transformer.{hf}.weight"]
        stored[f"{name}.weight"] = (w, Q.F32)
    fields = {
        "context_length": 1024, "block_count": 1, "embedding_length": 32, "feed_forward_length": 128,
        "attention.head_count": 2, "attention.layer_norm_epsilon": 1e-5,
    }  # fmt: skip
    tokens = [f"t{i}" for i in range(40)]
    path = write(tmp_path / "gpt2.gguf", "gpt2", fields, stored, tokenizer__ggml__tokens=tokens)
    source = GgufSource(path)
    assert source.names() == tuple(sorted(expected))
    for name, tensor in expected.items():
        assert torch.equal(source.get(name), tensor), name


def test_stacked_experts(tmp_path: Path):
    experts, d, f = 3, 64, 32
    config = transformers.Qwen3MoeConfig(
        vocab_size=40, hidden_size=d, intermediate_size=96, moe_intermediate_size=f, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, num_experts=experts, num_experts_per_tok=2,
    )  # fmt: skip
    state = randomize(transformers.Qwen3MoeForCausalLM(config))
    layer = "model.layers.0."
    table = {
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
        "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_gate_inp": "mlp.gate",
    }  # fmt: skip
    stored = {f"blk.0.{a}.weight": (state[f"{layer}{b}.weight"], Q.F32) for a, b in table.items()}
    for a, b in {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}.items():
        stored[f"{a}.weight"] = (state[f"{b}.weight"], Q.F32)
    gate_up, down = state[f"{layer}mlp.experts.gate_up_proj"], state[f"{layer}mlp.experts.down_proj"]
    stored["blk.0.ffn_gate_exps.weight"] = (gate_up[:, :f].contiguous(), Q.Q8_0)
    stored["blk.0.ffn_up_exps.weight"] = (gate_up[:, f:].contiguous(), Q.Q8_0)
    stored["blk.0.ffn_down_exps.weight"] = (down, Q.Q8_0)
    fields = FIELDS | {
        "block_count": 1, "attention.head_count": 2, "attention.head_count_kv": 1, "attention.key_length": 32,
        "expert_count": experts, "expert_used_count": 2, "expert_feed_forward_length": f,
    }  # fmt: skip
    path = write(tmp_path / "moe.gguf", "qwen3moe", fields, stored)
    assert gguf_config(path).moe_intermediate_size == f  # transformers alone says 768
    source = GgufSource(path)
    assert source.names() == tuple(sorted(state))
    expected = dict(state)
    for name in (f"{layer}mlp.experts.gate_up_proj", f"{layer}mlp.experts.down_proj"):
        expected[name] = rounded(state[name], Q.Q8_0)
    for name, tensor in expected.items():
        assert torch.equal(source.get(name), tensor), name
        assert torch.equal(source.part(name, 1), tensor[1]), name


def test_an_architecture_of_the_newer_import(tmp_path: Path):
    """LFM2, whose convolution kernel loses a dimension in GGUF."""
    config = transformers.Lfm2Config(
        vocab_size=40, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False,
    )  # fmt: skip
    state = randomize(transformers.Lfm2ForCausalLM(config))
    leaves = {
        "operator_norm": "attn_norm", "ffn_norm": "ffn_norm", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.out_proj": "attn_output",
        "self_attn.q_layernorm": "attn_q_norm", "self_attn.k_layernorm": "attn_k_norm",
        "feed_forward.w1": "ffn_gate", "feed_forward.w3": "ffn_up", "feed_forward.w2": "ffn_down",
        "conv.in_proj": "shortconv.in_proj", "conv.out_proj": "shortconv.out_proj", "conv.conv": "shortconv.conv",
    }  # fmt: skip
    tops = {"model.embed_tokens": "token_embd", "model.embedding_norm": "token_embd_norm"}
    stored, expected = {}, {}
    for name, w in state.items():
        if name == "lm_head.weight":
            continue  # tied
        stem = name.removesuffix(".weight")
        key = tops.get(stem) or f"blk.{stem.split('.')[2]}.{leaves[stem.split('.', 3)[3]]}"
        kind = Q.Q8_0 if "feed_forward" in name else Q.F32
        stored[f"{key}.weight"] = (w.squeeze(1) if "conv.conv" in name else w, kind)
        expected[name] = rounded(w, kind)
    fields = FIELDS | {
        "attention.head_count": 2, "attention.head_count_kv": [0, 1], "shortconv.l_cache": config.conv_L_cache,
    }  # fmt: skip
    tokens = [f"t{i}" for i in range(40)]
    path = write(tmp_path / "lfm2.gguf", "lfm2", fields, stored, tokenizer__ggml__tokens=tokens)
    source = check_against_transformers(path)
    assert source.names() == tuple(sorted(expected))
    for name, tensor in expected.items():
        assert torch.equal(source.get(name), tensor), name


def test_identity_notices_other_weights(tmp_path: Path):
    path, _ = llama(tmp_path / "tiny.gguf")
    first = GgufSource(path).identity()
    blob = bytearray(path.read_bytes())
    blob[read_header(path).data_start] ^= 1
    path.write_bytes(blob)
    second = GgufSource(path).identity()
    assert set(first) == {"tiny.gguf"} and first["tiny.gguf"]["header"] == second["tiny.gguf"]["header"]
    assert first["tiny.gguf"]["sample"] != second["tiny.gguf"]["sample"]


def bpe(pre: str) -> dict[str, object]:
    """A byte-level vocabulary with merges over digits, which a digit-splitting tokenizer must not use."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = sorted(bytes_to_unicode().values())
    return {
        "tokenizer__ggml__model": "gpt2",
        "tokenizer__ggml__pre": pre,
        "tokenizer__ggml__tokens": [*letters, "20", "\u01202", "in"],
        "tokenizer__ggml__merges": ["2 0", "\u0120 2", "i n"],
    }


@pytest.mark.parametrize("pre, pieces", [("smollm", ["in", "Ġ", "2", "0", "2", "0"]), ("gpt-2", ["in", "Ġ", "20", "20"])])
def test_digits_stand_alone_where_the_vocabulary_was_learned_so(tmp_path: Path, pre: str, pieces: list[str]):
    path, _ = llama(tmp_path / "tiny.gguf", **bpe(pre))
    tokenizer = gguf_tokenizer(path)
    assert tokenizer.tokenize("in 2020") == pieces
    assert tokenizer.decode(tokenizer("in 2020")["input_ids"]) == "in 2020"


@pytest.mark.parametrize("keep", [0, 3, 10, 30, 200, -1])
def test_truncated_file(tmp_path: Path, keep: int):
    path, _ = llama(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"truncated|not a GGUF file") as caught:
        GgufSource(path)
    assert "\n" not in str(caught.value)


def edit(change: Callable[[bytearray], None]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        blob = bytearray(path.read_bytes())
        change(blob)
        path.write_bytes(blob)

    return apply


DAMAGE = {
    "version": (edit(lambda b: b.__setitem__(slice(4, 8), struct.pack("<I", 1))), "version 1"),
    "counts": (edit(lambda b: b.__setitem__(slice(8, 24), b"\xff" * 16)), "damaged|truncated"),
    "key": (edit(lambda b: b.__setitem__(slice(32, 36), b"\xff\xff\xff\xff")), "not UTF-8"),
    "value type": (edit(lambda b: b.__setitem__(slice(52, 56), struct.pack("<I", 99))), "unknown value type 99"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_header(tmp_path: Path, case: str):
    path, _ = llama(tmp_path / "tiny.gguf")
    assert path.read_bytes()[32:52] == b"general.architecture"  # where the edits aim
    spoil, phrase = DAMAGE[case]
    spoil(path)
    with pytest.raises(CheckpointError, match=phrase):
        read_header(path)


def test_refusals_that_name_the_remedy(tmp_path: Path):
    with pytest.raises(CheckpointError, match="no such file"):
        gguf_config(tmp_path / "none.gguf")
    path, _ = llama(tmp_path / "split.gguf", split__count=3)
    with pytest.raises(CheckpointError, match="gguf-split --merge"):
        GgufSource(path)
    path = write(tmp_path / "odd.gguf", "perceptron", FIELDS, {"w.weight": (torch.ones(2, 2), Q.F32)})
    with pytest.raises(UnsupportedModel, match="'perceptron'"):
        GgufSource(path)
    path, _ = llama(tmp_path / "mixtral.gguf", llama__expert_count=8)
    with pytest.raises(UnsupportedModel, match="8 experts"):
        GgufSource(path)


def smollm2() -> Path:
    """The real file, where a variable or the cache of `lplr demo` has it."""
    cache = Path(os.environ.get("LPLR_CACHE", "~/.cache/lplr")).expanduser() / SMOL
    path = Path(os.environ.get("LPLR_SMOLLM2", cache))
    if not path.is_file():
        pytest.skip("needs SmolLM2: run `lplr demo` once, or set LPLR_SMOLLM2 to its GGUF file")
    return path


def test_smollm2_equals_what_transformers_imports():
    source = check_against_transformers(smollm2())
    assert len(source.names()) == 272 and source.shape("model.layers.7.self_attn.k_proj.weight") == (192, 576)


def test_smollm2_tokenizer_splits_digits():
    tokenizer = gguf_tokenizer(smollm2())
    assert tokenizer.tokenize("in 2024") == ["in", "Ġ", "2", "0", "2", "4"]
