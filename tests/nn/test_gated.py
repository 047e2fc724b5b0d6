"""Gated MLPs: found in blocks of several architectures, and narrowed to what the whole one does without the other neurons."""

from __future__ import annotations

import pico
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from lplr.hf.skeleton import blocks
from lplr.nn import defuse
from lplr.nn.gated import gated_mlps


def block(architecture: str, **changes: object) -> nn.Module:
    if architecture == "phi3":
        sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 67}
        made = AutoModelForCausalLM.from_config(
            AutoConfig.for_model("phi3", **sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)
        )
        return made.eval().requires_grad_(False).model.layers[0]
    made = pico.model(architecture, **changes)
    defuse(made)
    return blocks(made)[1][0]


@pytest.mark.parametrize(
    ("architecture", "changes"), [("llama", {}), ("llama", {"mlp_bias": True}), ("qwen3", {}), ("gemma2", {}), ("phi3", {})]
)
def test_narrowing_leaves_what_the_others_did(architecture: str, changes: dict[str, bool], generator: torch.Generator) -> None:
    (mlp,) = gated_mlps(block(architecture, **changes).double())
    assert mlp.neurons == 40 and mlp.squares().shape == (40,)
    down = mlp.module.get_submodule(mlp.down)
    x = torch.randn(5, 24, generator=generator).double()
    kept = torch.randperm(40, generator=generator)[:13].sort().values

    def only_kept(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (torch.zeros_like(given[0]).index_copy(-1, kept, given[0][..., kept]),)

    handle = down.register_forward_pre_hook(only_kept)
    expected = mlp.module(x)
    handle.remove()
    mlp.narrow(kept, down.get_parameter("weight")[:, kept])
    assert mlp.neurons == 13
    torch.testing.assert_close(mlp.module(x), expected, rtol=1e-12, atol=1e-12)


def test_the_weight_of_down_is_the_one_given(generator: torch.Generator) -> None:
    (mlp,) = gated_mlps(block("llama"))
    new = torch.randn(24, 3, generator=generator).double()
    mlp.narrow(torch.tensor([1, 5, 39]), new)
    weight = mlp.module.get_submodule("down_proj").get_parameter("weight")
    assert weight.dtype == torch.float32 and torch.equal(weight, new.float())


def test_squares_are_those_of_all_weights_of_a_neuron() -> None:
    for architecture in ("llama", "phi3"):
        (mlp,) = gated_mlps(block(architecture))
        total = sum(p.square().sum() for p in mlp.module.parameters())
        torch.testing.assert_close(mlp.squares().sum(), total)
    j = 7
    gate_up, down = (mlp.module.get_submodule(name).get_parameter("weight") for name in ("gate_up_proj", "down_proj"))
    expected = gate_up[j].square().sum() + gate_up[40 + j].square().sum() + down[:, j].square().sum()
    torch.testing.assert_close(mlp.squares()[j], expected)


@pytest.mark.parametrize(("architecture", "count"), [("gpt2", 0), ("opt", 0), ("mixtral", 4), ("qwen3_moe", 5)])
def test_other_blocks_have_none_or_several(architecture: str, count: int) -> None:
    assert len(gated_mlps(block(architecture))) == count
