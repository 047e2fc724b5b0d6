"""Every export is read back by the library of its format and compared with the model that lplr runs."""

from __future__ import annotations

import json
import math
import urllib.request
from pathlib import Path
from typing import Any

import checkpoints
import pico
import pytest
import runs
import torch
from safetensors.torch import load_file
from torch.nn.functional import kl_div
from typer.testing import CliRunner

from lplr import cli
from lplr.errors import CheckpointError, OutputError, RecipeError, UnsupportedModel
from lplr.hf.gguf_write import read_adapter
from lplr.hf.load import load_model, load_tokenizer
from lplr.hf.text import evaluation_tokens, read_text
from lplr.ship.dense import write_dense
from lplr.ship.export import export
from lplr.ship.unpacked import Backbone, Unpacked


def random_folder(folder: Path, architecture: str, **changes: Any) -> tuple[Path, Any]:
    """A pico model with random packed layers, ranks 5, 3 and 0, and what it gives."""
    made, _ = pico.compress(pico.model(architecture, **changes))
    written = pico.write_compressed(made, folder)
    return written, load_model(written)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(pico.tokens()).logits


@pytest.fixture(scope="module")
def stories(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real language model with Q and L R: 5 bits by CALDERA."""
    out = tmp_path_factory.mktemp("stories") / "out"
    text = str(shared / "data/calibration/tinystories_1mb.txt")
    chosen = {"dataset": text, "nsamples": 4, "seqlen": 64, "alternations": 0, "power_iterations": 0, "bits": 5, "rank": 4}
    runs.run({"model": str(shared / "data/models/stories260k"), "method": "caldera", "allocation": "uniform", **chosen}, out)
    return out


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "mixtral", "qwen3_moe", "gemma2"])
def test_a_dense_folder_in_full_precision_gives_the_same_logits(architecture: str, tmp_path: Path):
    folder, packed = random_folder(tmp_path / "packed", architecture)
    dense = tmp_path / "dense"
    dense.mkdir()
    write_dense(Unpacked(folder, torch.float32), dense, shard_bytes=20_000)
    assert len(list(dense.glob("*.safetensors"))) > 1
    config = json.loads((dense / "config.json").read_text())
    assert "quantization_config" not in config and "auto_map" not in config
    from transformers import AutoModelForCausalLM

    plain, info = AutoModelForCausalLM.from_pretrained(dense, output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    # the same matrices multiplied at once instead of part by part, all in float32
    torch.testing.assert_close(logits(plain.eval()), logits(packed), rtol=1e-4, atol=1e-4)


def test_the_backbone_and_the_low_rank_part_add_up(tmp_path: Path):
    folder, packed = random_folder(tmp_path / "packed", "llama")
    backbone, whole = Backbone(folder, torch.float32), Unpacked(folder, torch.float32)
    products = {layer: left.double() @ right.double() for layer, left, right in backbone.low_rank()}
    assert 0 < len(products) < len(backbone.formats)
    for layer in backbone.formats:
        total = backbone[f"{layer}.weight"].double() + products.get(layer, 0.0)
        torch.testing.assert_close(total.float(), whole[f"{layer}.weight"], rtol=1e-5, atol=1e-6)


def test_an_export_states_the_divergence_that_it_has(stories: Path, tmp_path: Path):
    found = export(stories, "dense", tmp_path / "dense")
    told = json.loads((tmp_path / "dense/export.json").read_text())
    assert told["kl"] == found.kl and told["lost"] == found.lost and "bfloat16" in found.lost
    tensors = load_file(tmp_path / "dense/model-00001-of-00001.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    ids = evaluation_tokens(load_tokenizer(stories), read_text("builtin", split="heldout"))[:512].view(2, 256)
    with torch.no_grad():
        p = load_model(stories)(ids).logits.double().log_softmax(-1)
        q = load_model(tmp_path / "dense")(ids).logits.double().log_softmax(-1)
    assert found.kl == pytest.approx(float(kl_div(q, p, log_target=True, reduction="none").sum(-1).mean()), rel=1e-3)
    assert found.top1 == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    # a rounding of 2**-9 of every weight costs far less than a thousandth of a nat
    assert found.tokens == 512 and found.kl is not None and found.kl < 1e-3


# peft asks transformers by a name that transformers has given up
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_loads_it_and_it_is_as_far_as_it_says(stories: Path, tmp_path: Path):
    peft, bitsandbytes = pytest.importorskip("peft"), pytest.importorskip("bitsandbytes")
    found = export(stories, "peft", tmp_path / "out")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out/base")
    for module in base.modules():  # bitsandbytes 0.50 fails on processors with bfloat16: 172 is no multiple of 32, nor of 64
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    model = peft.PeftModel.from_pretrained(base, tmp_path / "out/adapter").eval()
    assert sum(isinstance(m, bitsandbytes.nn.Linear4bit) for m in model.modules()) == 35
    ids = evaluation_tokens(load_tokenizer(stories), read_text("builtin", split="heldout"))[:512].view(2, 256)
    with torch.no_grad():
        p, q = (m(ids).logits.double().log_softmax(-1) for m in (load_model(stories), model))
        without = base.eval()
        with model.disable_adapter():
            bare = without(ids).logits.double().log_softmax(-1)
    measured = float(kl_div(q, p, log_target=True, reduction="none").sum(-1).mean())
    # bfloat16 logits of windows run together or one by one
    assert found.kl == pytest.approx(measured, rel=0.02)
    assert measured < 0.5 * float(kl_div(bare, p, log_target=True, reduction="none").sum(-1).mean()), "the adapter does nothing"
    layer = "model.layers.1.self_attn.q_proj"
    left, right = next((left, right) for name, left, right in Backbone(stories).low_rank() if name == layer)
    module = model.get_submodule(f"base_model.model.{layer}")
    assert module.scaling["default"] == 1.0
    assert torch.equal(module.lora_A["default"].weight.float(), right.bfloat16().float())
    assert torch.equal(module.lora_B["default"].weight.float(), left.bfloat16().float())
    Q = Backbone(stories)[f"{layer}.weight"].float()
    packed = bitsandbytes.functional.dequantize_4bit(module.base_layer.weight.data, module.base_layer.weight.quant_state).float()
    # the widest gap of NF4 is 0.304 of a block's largest entry, so an error is at most half of it
    assert (packed - Q).abs().max() <= 0.153 * Q.abs().max()


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_gguf_read_by_transformers_gives_the_weights(architecture: str, kind: str, stories: Path, tmp_path: Path):
    """Names, the order of rows and biases, by code of transformers that knows nothing of ours."""
    changes = {"head_dim": 128} if architecture == "qwen3" else {}  # transformers reads no other from the GGUF file of a Qwen 3
    folder, packed = random_folder(tmp_path / "packed", architecture, vocab_size=512, **changes)
    for file in stories.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    export(folder, "gguf", tmp_path / "out", gguf_type=kind)
    model = load_model(tmp_path / "out/model.gguf")
    whole = packed.state_dict()
    formats = Backbone(folder).formats
    added = read_adapter(tmp_path / "out/lora.gguf", model.config, formats)
    assert set(added) == {layer for layer, fmt in formats.items() if fmt.rank and fmt.q_bits}
    for name, found in model.state_dict().items():
        layer = name.removesuffix(".weight")
        if layer in formats:
            wanted = packed.get_submodule(layer).factorization.dequantize()
            got = found + added.get(layer, 0.0)
            # Q8_0: half a step of 1/127 of the largest entry of a block of 32; rows of 24 or 40 are no whole blocks: F16
            torch.testing.assert_close(got, wanted, rtol=2e-3, atol=float(wanted.abs().max()) / 250)
        elif name in whole:
            torch.testing.assert_close(found, whole[name], rtol=1e-3, atol=1e-6)


def server(model: Path, adapter: Path | None) -> Any:
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup, params.verbosity = str(model), 512, 1, False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    return xllamacpp.Server(params)


def ask(running: Any, path: str, question: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        running.listening_address + path, json.dumps(question).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def nll(running: Any, ids: list[int], size: int) -> float:
    """Mean -log p of each token after those before it, from llama.cpp's own distribution over all tokens."""
    total = 0.0
    for i in range(1, len(ids)):
        question = {"prompt": ids[:i], "n_predict": 1, "n_probs": size, "cache_prompt": True}
        entries = ask(running, "/completion", question)["completion_probabilities"][0]["top_logprobs"]
        total -= {entry["id"]: entry["logprob"] for entry in entries}[ids[i]]
    return total / (len(ids) - 1)


def test_llama_cpp_runs_the_pair(stories: Path, shared: Path, tmp_path: Path):
    pytest.importorskip("xllamacpp")
    found = export(stories, "gguf", tmp_path / "out")
    assert found.kl is not None and found.kl < 0.01
    text = (shared / "data/calibration/tinystories_1mb.txt").read_text()[200_000:201_500]
    running = server(tmp_path / "out/model.gguf", tmp_path / "out/lora.gguf")
    ids = load_tokenizer(stories)(text, add_special_tokens=False)["input_ids"]
    assert ask(running, "/tokenize", {"content": text, "add_special": False})["tokens"] == ids
    ids = ids[:200]
    with torch.no_grad():
        lp = load_model(stories)(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    ours = -float(lp[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].mean())
    assert math.exp(nll(running, ids, 512) - ours) == pytest.approx(1.0, abs=0.01)
    said = ask(running, "/completion", {"prompt": "Once upon a time", "n_predict": 16, "temperature": 0})["content"]
    assert "there was" in said
    bare = server(tmp_path / "out/model.gguf", None)
    assert nll(bare, ids[:40], 512) > ours + 1, "without the adapter it is another model"


def test_of_a_folder_without_a_tokenizer_nothing_is_measured(tmp_path: Path):
    folder, _ = random_folder(tmp_path / "packed", "llama")
    found = export(folder, "dense", tmp_path / "out")
    assert found.kl is None and found.tokens == 0
    with pytest.raises(CheckpointError):
        export(folder, "gguf", tmp_path / "other")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "packed"], "half an export is left"


def test_what_cannot_be_exported_is_told(stories: Path, tmp_path: Path, shared: Path):
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputError, match="is there already"):
        export(stories, "dense", tmp_path / "there")
    with pytest.raises(RecipeError, match="unknown format 'onnx'.*dense, peft, gguf"):
        export(stories, "onnx", tmp_path / "out")
    with pytest.raises(RecipeError, match="type of a GGUF matrix"):
        export(stories, "gguf", tmp_path / "out", gguf_type="iq1_s")
    with pytest.raises(CheckpointError, match="no model that lplr compressed"):
        export(shared / "data/models/stories260k", "dense", tmp_path / "out")
    folder, _ = random_folder(tmp_path / "packed", "gemma2")
    checkpoints.write_tokenizer(folder)
    with pytest.raises(UnsupportedModel, match="gemma2 cannot be written to GGUF"):
        export(folder, "gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()


def test_the_command(stories: Path, tmp_path: Path):
    done = CliRunner().invoke(cli.app, ["export", str(stories), "--to", "dense", "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "nats a token" in done.stdout and (tmp_path / "out/config.json").is_file()
    again = CliRunner().invoke(cli.app, ["export", str(stories), "--to", "dense", "-o", str(tmp_path / "out")])
    assert again.exit_code == 2 and "is there already" in again.stderr
