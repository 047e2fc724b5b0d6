"""GGUF files against the gguf package and transformers, and their tokenizers against llama.cpp itself."""

from __future__ import annotations

import json
import math
import urllib.request
from pathlib import Path
from typing import Any

import gguf
import pico
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from lplr.errors import UnsupportedModel
from lplr.hf.gguf_vocabulary import _REST, _WORDS
from lplr.hf.gguf_write import permuted, read_adapter, restored, write_adapter, write_model

TEXT = "It's 12345 o'clock; Ünï-code 漢字 🙂  two  spaces\n\n\tdef f(x):\n    return x**2 # ok\r\n we'll SEE'S 3.14  "
TRAINING = [TEXT, "the cat sat on the mat and it's the hat that they'll see", "number 10 20 30 2026", "漢字 漢字 für"] * 3


def byte_level(*steps: Any, own_split: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with some steps in front of the bytes, trained here."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own_split)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=["<s>", "</s>", "<pad>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TRAINING, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def split(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """BPE with byte fallback and a space in front, as a converted Llama 2 tokenizer is."""
    training = Tokenizer(models.BPE())
    training.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    training.train_from_iterator(TRAINING[:2], trainers.BpeTrainer(vocab_size=330, special_tokens=specials))
    stored = json.loads(training.to_str())["model"]
    merges = [tuple(m) for m in stored["merges"]]
    tokenizer = Tokenizer(models.BPE(stored["vocab"], merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer, tokenizer.decoder = training.normalizer, decoders.ByteFallback()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {
    "gpt-2": lambda: byte_level(own_split=True),
    "smollm": lambda: byte_level(pre_tokenizers.Digits(individual_digits=True), own_split=True),
    "llama-bpe": lambda: byte_level(split(_WORDS + r"\p{N}{1,3}" + _REST), own_split=False),
    "qwen2": lambda: byte_level(split(_WORDS + r"\p{N}" + _REST), own_split=False),
    "default": sentencepiece_like,
}


def written(path: Path, tokenizer: Any, architecture: str = "llama", **changes: Any) -> Path:
    """A random model of 340 tokens as a GGUF file."""
    model = pico.model(architecture, vocab_size=340, **changes)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    tensors = {name: t for name, t in model.state_dict().items() if name not in tied}
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    write_model(path, model.config, tokenizer, tensors, shapes, matrices=set(), kind="f16")
    return path


def field(path: Path, key: str) -> Any:
    return gguf.GGUFReader(path).fields[key].contents()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_llama_cpp_makes_the_same_tokens(name: str, tmp_path: Path):
    xllamacpp = pytest.importorskip("xllamacpp")
    tokenizer = TOKENIZERS[name]()
    # heads of 32: the narrowest that the attention of llama.cpp takes with every kernel
    path = written(tmp_path / "m.gguf", tokenizer, hidden_size=64, head_dim=32, num_attention_heads=2, num_key_value_heads=1)
    assert field(path, "tokenizer.ggml.pre") == name
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup, params.verbosity = str(path), 256, 1, False, 0
    params.cpuparams.n_threads = 1
    running = xllamacpp.Server(params)
    for text in (TEXT, "the cat", " leading", "1234567", "we'll've", "a\n\n\nb", "</s> is special <s>"):
        body = json.dumps({"content": text, "add_special": False, "parse_special": True}).encode()
        request = urllib.request.Request(running.listening_address + "/tokenize", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            theirs = json.load(answer)["tokens"]
        assert theirs == tokenizer(text, add_special_tokens=False)["input_ids"], text


@pytest.mark.parametrize("heads", [1, 3, 4])
def test_permuted_is_what_transformers_undoes(heads: int):
    W = torch.randn(heads * 8, 5, generator=torch.Generator().manual_seed(0))
    processor = LlamaTensorProcessor(config={"num_attention_heads": heads, "num_key_value_heads": heads})
    undone = processor._reverse_permute_weights(permuted(W, heads).numpy(), heads, heads)
    assert torch.equal(torch.from_numpy(undone), W) and torch.equal(restored(permuted(W, heads), heads), W)
    assert permuted(W, 0) is W and restored(W, 0) is W
    if heads > 1:
        assert not torch.equal(permuted(W, heads), W)


def test_the_frequencies_of_llama_3(tmp_path: Path):
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones are not, those between are blended (arXiv:2407.21783)."""
    rope = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 32
    path = written(tmp_path / "m.gguf", TOKENIZERS["llama-bpe"](), rope_parameters=rope)
    found = next(t.data for t in gguf.GGUFReader(path).tensors if t.name == "rope_freqs.weight")
    wanted = []
    for i in range(3):
        frequency = 500.0 ** (-2 * i / 6)
        wavelength = 2 * math.pi / frequency
        share = (32 / wavelength - 1.0) / (4.0 - 1.0)
        if wavelength < 32 / 4.0:
            scaled = frequency
        elif wavelength > 32 / 1.0:
            scaled = frequency / 8
        else:
            scaled = (1 - share) * frequency / 8 + share * frequency
        wanted.append(frequency / scaled)
    assert wanted[0] == 1 and wanted[-1] == pytest.approx(8)
    assert found.tolist() == pytest.approx(wanted, rel=1e-5)


def test_an_adapter_is_read_back(tmp_path: Path):
    config = pico.config("llama")
    generator = torch.Generator().manual_seed(0)
    pairs = [
        (f"model.layers.1.{name}", torch.randn(n, r, generator=generator), torch.randn(r, d, generator=generator))
        for name, n, d, r in (("self_attn.q_proj", 24, 24, 3), ("self_attn.k_proj", 12, 24, 1), ("mlp.down_proj", 24, 40, 7))
    ]
    assert write_adapter(tmp_path / "a.gguf", config, pairs) == 3
    assert field(tmp_path / "a.gguf", "general.type") == "adapter" and field(tmp_path / "a.gguf", "adapter.type") == "lora"
    read = read_adapter(tmp_path / "a.gguf", config, [layer for layer, _, _ in pairs] + ["model.layers.0.mlp.up_proj"])
    assert set(read) == {layer for layer, _, _ in pairs}
    for layer, left, right in pairs:
        # F16: 2**-11 of each factor
        torch.testing.assert_close(read[layer], left @ right, rtol=4e-3, atol=1e-2)
    names = {t.name: tuple(t.shape) for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert names["blk.1.attn_k.weight.lora_a"] == (24, 1) and names["blk.1.attn_k.weight.lora_b"] == (1, 12)


def test_what_cannot_be_told_is_refused(tmp_path: Path):
    odd = byte_level(split(r"\w+"), own_split=False)
    with pytest.raises(UnsupportedModel, match="none of gpt-2, smollm, llama-bpe, qwen2"):
        written(tmp_path / "m.gguf", odd)
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(UnsupportedModel, match="WordLevel"):
        written(tmp_path / "m.gguf", words)
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32}
    with pytest.raises(UnsupportedModel, match="yarn"):
        written(tmp_path / "m.gguf", TOKENIZERS["gpt-2"](), rope_parameters=rope)
    with pytest.raises(UnsupportedModel, match="do not belong together"):
        model = pico.model("llama", vocab_size=100)
        tensors = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
        shapes = {k: tuple(v.shape) for k, v in tensors.items()}
        write_model(tmp_path / "m.gguf", model.config, TOKENIZERS["gpt-2"](), tensors, shapes, matrices=(), kind="f16")
