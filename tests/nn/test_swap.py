"""Finding, reading and replacing linear layers."""

from __future__ import annotations

import pico
import pytest
import torch
from torch import nn

from lplr.errors import CheckpointError
from lplr.factor.factorization import Format
from lplr.nn import LowRankLinear, is_linear, is_skipped, linears, swap, weight_of

FORMAT = {"rank": 2, "l_bits": 1, "r_bits": 1}


@pytest.mark.parametrize(
    ("pattern", "skipped"),
    [
        ("model.layers.1.mlp.down_proj", True),
        ("down_proj", True),
        ("model.layers.1", True),
        ("model.layers.1.mlp", True),
        ("*.1.mlp.*", True),
        ("model.layers.*.mlp.down_proj", True),
        ("model.layers", True),
        ("layers.1", False),
        ("mlp", False),
        ("proj", False),
        ("model.layers.1.mlp.down", False),
        ("model.layers.2", False),
    ],
)
def test_is_skipped(pattern: str, skipped: bool) -> None:
    assert is_skipped("model.layers.1.mlp.down_proj", [pattern]) is skipped


def test_prefix_is_by_whole_components() -> None:
    assert not is_skipped("model.layers.10.mlp", ["model.layers.1"])


def test_linears_of_llama() -> None:
    model = pico.model("llama")
    found = linears(model, ["lm_head"])
    assert len(found) == 7 * pico.LAYERS and next(iter(found)) == "model.layers.0.self_attn.q_proj"
    assert "lm_head" not in linears(model), "a head that shares the embedding's weight is not compressed"
    assert "lm_head" in linears(pico.model("qwen3"))


def test_linears_of_gpt2_and_their_transpose() -> None:
    model = pico.model("gpt2")
    found = linears(model, ["lm_head"])
    assert len(found) == 4 * pico.LAYERS
    c_fc = found["transformer.h.0.mlp.c_fc"]
    assert tuple(weight_of(c_fc).shape) == (4 * pico.HIDDEN, pico.HIDDEN)
    x = torch.randn(3, pico.HIDDEN, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(c_fc(x), x @ weight_of(c_fc).T + c_fc.bias)


def test_a_linear_with_its_own_forward_is_left_alone() -> None:
    class Doubling(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    assert not is_linear(Doubling(2, 3)) and is_linear(nn.Linear(2, 3))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
def test_swap_on_meta(architecture: str) -> None:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(pico.config(architecture), dtype=torch.bfloat16)
    old = linears(model, ["lm_head"])
    biased = {name for name, m in old.items() if getattr(m, "bias", None) is not None}
    formats = {name: Format(tuple(weight_of(m).shape), **FORMAT) for name, m in old.items()}
    new = swap(model, formats)
    assert set(new) == set(old) and not linears(model, ["lm_head"])
    for name, module in new.items():
        assert model.get_submodule(name) is module
        assert (module.bias is not None) == (name in biased) and all(t.is_meta for t in module.state_dict().values())
        assert module.dtype == torch.bfloat16


def test_a_shared_module_is_replaced_everywhere() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 4), "c": nn.Sequential()})
    model["c"].append(model["a"])
    assert list(linears(model)) == ["a"]
    new = swap(model, {"a": Format((4, 3), **FORMAT)})
    assert model["a"] is model["c"][0] is new["a"]


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [("b", (4, 3), "no such module"), ("r", (4, 3), "ReLU"), ("a", (3, 4), r"\(4, 3\) in the model")],
)
def test_swap_refuses(name: str, shape: tuple[int, int], message: str) -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 4), "r": nn.ReLU()})
    with pytest.raises(CheckpointError, match=message):
        swap(model, {name: Format(shape, **FORMAT)})


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "gemma3"])
def test_logits_equal_those_of_dequantized_factors(architecture: str) -> None:
    model, factors = pico.compress(pico.model(architecture))
    dense = pico.densify(pico.model(architecture), factors)
    assert any(isinstance(m, LowRankLinear) for m in model.modules())
    with torch.no_grad():
        got, want = model(pico.tokens()).logits, dense(pico.tokens()).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
