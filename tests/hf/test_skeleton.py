"""Skeletons: structure on meta, filling in, and running block by block."""

from __future__ import annotations

from pathlib import Path

import pico
import pytest
import torch
from torch import nn

from lplr.errors import CheckpointError, UnsupportedModel
from lplr.hf.skeleton import blocks, capture_block_inputs, load_config, materialise, release, run_block, skeleton
from lplr.nn import defuse

LISTS = {
    "gpt2": "transformer.h",
    "gptj": "transformer.h",
    "bloom": "transformer.h",
    "opt": "model.decoder.layers",
    "gpt_neox": "gpt_neox.layers",
}
ARCHITECTURES = [name for name in pico.CONFIGS if name != "gpt_oss"]


@pytest.mark.parametrize("architecture", pico.CONFIGS)
def test_parameters_on_meta_and_other_buffers_real(architecture: str) -> None:
    model = skeleton(pico.config(architecture))
    real = pico.model(architecture)
    assert all(p.is_meta for p in model.parameters()) and not model.training
    want = dict(real.named_buffers())
    stored = set(real.state_dict())
    loose = {name: b for name, b in model.named_buffers() if name not in stored}
    assert set(loose) == set(want) - stored
    for name, buffer in loose.items():
        torch.testing.assert_close(buffer, want[name], rtol=0, atol=0)


@pytest.mark.parametrize("architecture", pico.CONFIGS)
def test_blocks(architecture: str) -> None:
    name, stack = blocks(skeleton(pico.config(architecture)))
    assert name == LISTS.get(architecture, "model.layers") and len(stack) == pico.LAYERS


def test_no_blocks() -> None:
    with pytest.raises(UnsupportedModel, match="no list of decoder blocks"):
        blocks(nn.Sequential(nn.Linear(2, 2)))


def fill(architecture: str, split: bool = False):
    """A skeleton filled from a real pico model, and that model."""
    real = pico.model(architecture)
    model = skeleton(pico.config(architecture))
    if split:
        defuse(real), defuse(model)
    materialise(model, real.state_dict())
    return model, real


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_filled_skeleton_is_the_model(architecture: str, split: bool) -> None:
    model, real = fill(architecture, split)
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    with torch.no_grad():
        torch.testing.assert_close(model(pico.tokens()).logits, real(pico.tokens()).logits, rtol=0, atol=0)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_block_by_block_equals_the_model(architecture: str, split: bool, batch: int) -> None:
    model, real = fill(architecture, split)
    ids = pico.tokens(batch, 13)
    hidden, kwargs = capture_block_inputs(model, ids)
    name, stack = blocks(model)
    assert tuple(hidden.shape) == (batch, 13, pico.HIDDEN) and len(kwargs) == len(stack)
    assert type(hidden) is torch.Tensor and not any(k.get("past_key_values") for k in kwargs)
    for block, arguments in zip(stack, kwargs, strict=True):
        hidden = run_block(block, hidden, arguments)
        assert type(hidden) is torch.Tensor and tuple(hidden.shape) == (batch, 13, pico.HIDDEN)
    with torch.no_grad():
        got = finish(model, name, hidden)
        torch.testing.assert_close(got, real(ids).logits, rtol=1e-5, atol=1e-5)


def finish(model: nn.Module, name: str, hidden: torch.Tensor) -> torch.Tensor:
    """Final norm, projection where there is one, head, and Gemma's soft cap."""
    parent = model.get_submodule(name.rpartition(".")[0])
    for norm in ("norm", "ln_f", "final_layer_norm"):
        hidden = getattr(parent, norm)(hidden) if getattr(parent, norm, None) is not None else hidden
    hidden = parent.project_out(hidden) if getattr(parent, "project_out", None) is not None else hidden
    logits = model.get_output_embeddings()(hidden)
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3", "opt", "bloom", "mixtral"])
def test_inputs_are_captured_with_the_blocks_on_meta(architecture: str) -> None:
    _, real = fill(architecture)
    model = skeleton(pico.config(architecture))
    name, stack = blocks(model)
    originals = list(stack)
    outer = {k: v for k, v in real.state_dict().items() if not k.startswith(f"{name}.")}
    materialise(model, outer, skip=[name])
    hidden, kwargs = capture_block_inputs(model, pico.tokens())
    want, want_kwargs = capture_block_inputs(real, pico.tokens())
    torch.testing.assert_close(hidden, want, rtol=0, atol=0)
    assert [k.keys() for k in kwargs] == [k.keys() for k in want_kwargs]
    assert list(stack) == originals and next(stack.parameters()).is_meta


def test_one_block_filled_run_and_released() -> None:
    _, real = fill("gptj")  # its attention holds sinusoids that no checkpoint has
    model = skeleton(pico.config("gptj"))
    name, stack = blocks(model)
    hidden, kwargs = capture_block_inputs(real, pico.tokens())
    block = real.get_submodule(f"{name}.1")
    materialise(stack[1], block.state_dict())
    got = run_block(stack[1], hidden, kwargs[1])
    torch.testing.assert_close(got, run_block(block, hidden, kwargs[1]), rtol=0, atol=0)
    release(stack[1])
    assert all(p.is_meta for p in model.parameters())
    materialise(stack[1], block.state_dict())
    torch.testing.assert_close(run_block(stack[1], hidden, kwargs[1]), got, rtol=0, atol=0)


@pytest.mark.parametrize("given", ["lm_head.weight", "model.embed_tokens.weight"])
def test_tied_weights_stay_one(given: str) -> None:
    real = pico.model("llama")
    model = skeleton(pico.config("llama"))
    tensors = {k: v for k, v in real.state_dict().items() if k not in ("lm_head.weight", "model.embed_tokens.weight")}
    materialise(model, {**tensors, given: real.lm_head.weight})
    assert model.lm_head.weight is model.model.embed_tokens.weight
    release(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.lm_head.weight.is_meta


def test_materialise_refuses() -> None:
    model = skeleton(pico.config("llama"))
    state = pico.model("llama").state_dict()
    with pytest.raises(CheckpointError, match=r"extra\.weight has no place"):
        materialise(model, {**state, "extra.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"model.norm.weight has shape \(3,\)"):
        materialise(model, {**state, "model.norm.weight": torch.zeros(3)})
    short = {k: v for k, v in state.items() if k != "model.layers.2.mlp.up_proj.weight"}
    with pytest.raises(CheckpointError, match=r"model.layers.2.mlp.up_proj.weight is missing"):
        materialise(skeleton(pico.config("llama")), short)


def test_a_model_that_acts_between_its_blocks_is_refused() -> None:
    model, _ = fill("llama")
    forward = type(model.model.layers[1]).forward

    class Outer(type(model)):
        pass

    original = model.model.forward

    def meddling(*args, **kwargs):
        first = model.model.layers[0]
        call = first.forward
        first.forward = lambda *a, **k: call(*a, **k) + 1
        try:
            return original(*args, **kwargs)
        finally:
            first.forward = call

    model.model.forward = meddling
    stack = list(model.model.layers)
    with pytest.raises(UnsupportedModel, match="between its LlamaDecoderLayer blocks"):
        capture_block_inputs(model, pico.tokens())
    assert list(model.model.layers) == stack and type(stack[1]).forward is forward


def test_the_global_generator_is_not_touched() -> None:
    before = torch.random.get_rng_state()
    skeleton(pico.config("gemma3"))
    assert torch.equal(before, torch.random.get_rng_state())


def test_load_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "never_heard_of"}')
    with pytest.raises(UnsupportedModel, match="does not know this architecture"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_config(tmp_path)
    pico.config("llama").save_pretrained(tmp_path)
    assert load_config(tmp_path).hidden_size == pico.HIDDEN


def test_a_model_type_without_a_causal_head_is_refused() -> None:
    from transformers import AutoConfig

    with pytest.raises(UnsupportedModel, match="'clip' has no causal language model"):
        skeleton(AutoConfig.for_model("clip"))


def test_real_model(shared: Path) -> None:
    from lplr.hf.load import load_model

    folder = shared / "data/models/stories260k"
    real = load_model(folder)
    model = skeleton(load_config(folder))
    materialise(model, real.state_dict())
    ids = torch.randint(3, 512, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, real(ids).logits, rtol=0, atol=0)
