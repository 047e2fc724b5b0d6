"""Splitting fused experts."""

from __future__ import annotations

import pico
import pytest
import torch

from lplr.errors import UnsupportedModel
from lplr.nn import DefusedExperts, defuse, expert_tensors, fused_experts, linears

MOE = ["mixtral", "qwen2_moe", "qwen3_moe"]


@pytest.mark.parametrize("architecture", MOE)
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_same_numbers(architecture: str, implementation: str) -> None:
    model = pico.model(architecture)
    model.config._experts_implementation = implementation
    ids = pico.tokens(3, 9)
    with torch.no_grad():
        want = model(ids).logits
        names = defuse(model)
        got = model(ids).logits
    assert len(names) == (2 if architecture == "qwen2_moe" else 3)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", MOE)
def test_names_and_weights(architecture: str) -> None:
    model = pico.model(architecture)
    fused = fused_experts(model)
    defuse(model)
    found = linears(model, ["lm_head"])
    for name, old in fused.items():
        for leaf in ("gate_up_proj", "down_proj"):
            views = expert_tensors(f"{name}.{leaf}", getattr(old, leaf))
            assert list(views)[1] == f"{name}.1.{leaf}.weight"
            for key, view in views.items():
                assert torch.equal(found[key.removesuffix(".weight")].weight, view)
    assert not fused_experts(model) and not any(p.dim() == 3 for p in model.parameters())


def test_on_meta_and_again() -> None:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(pico.config("mixtral"), dtype=torch.bfloat16)
    assert defuse(model) and defuse(model) == []
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in model.parameters())
    assert sum("experts" in name for name in linears(model)) == 2 * 4 * pico.LAYERS


def test_tokens_without_an_expert_and_no_tokens(generator: torch.Generator) -> None:
    experts = DefusedExperts(3, 4, 5, torch.nn.SiLU(), torch.empty(0))
    x = torch.randn(2, 4, generator=generator)
    index, weight = torch.tensor([[3, 3], [1, 3]]), torch.ones(2, 2)
    out = experts(x, index, weight)
    assert torch.equal(out[0], torch.zeros(4)) and out[1].abs().sum() > 0
    assert experts(x[:0], index[:0], weight[:0]).shape == (0, 4)


def test_another_layout_is_refused_by_name() -> None:
    model = pico.model("gpt_oss")
    before = set(model.state_dict())
    with pytest.raises(UnsupportedModel, match=r"model.layers.0.mlp.experts \(GptOssExperts\)"):
        defuse(model)
    assert set(model.state_dict()) == before


def test_a_transposed_or_unknown_module_is_refused() -> None:
    class Experts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1 = torch.nn.Parameter(torch.zeros(2, 3, 4))

    with pytest.raises(UnsupportedModel, match="w1"):
        defuse(torch.nn.ModuleDict({"block": Experts()}))


def test_a_dense_model_is_left_as_it_is() -> None:
    assert defuse(pico.model("llama")) == []
