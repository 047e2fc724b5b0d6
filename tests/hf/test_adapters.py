"""LoRA adapters of plain peft on compressed layers: they train, are saved and loaded; packed weights stay as they are."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import checkpoints
import pico
import pytest
import torch
from runs import run, settings

import lplr

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type", "ignore:`is_gradient_checkpointing`")


def compressed(tmp_path: Path, **chosen: Any) -> Path:
    source = checkpoints.write(tmp_path / "base", "llama")
    run(settings(source, **chosen), tmp_path / "out")
    return tmp_path / "out"


def adapted(folder: Path) -> Any:
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(lplr.load(folder), lplr.adaptable(config))


# only Q; only L and R; both: each has its own gradients
@pytest.mark.parametrize("chosen", [{"grid": "trellis"}, {"method": "lplr"}, {"method": "caldera", "rank": 3}])
def test_adapters_train_on_a_compressed_model_and_come_back(chosen: dict[str, Any], tmp_path: Path):
    folder = compressed(tmp_path, **chosen)
    torch.manual_seed(0)
    model = adapted(folder)
    packed = {name: t.clone() for name, t in model.named_buffers()}
    ids = pico.tokens()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(12):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert all(torch.equal(t, packed[name]) for name, t in model.named_buffers())
    model.save_pretrained(tmp_path / "adapter")
    config = lplr.adaptable(peft.LoraConfig.from_pretrained(tmp_path / "adapter"))
    again = peft.PeftModel.from_pretrained(lplr.load(folder), tmp_path / "adapter", config=config)
    with torch.no_grad():
        assert torch.allclose(again(input_ids=ids).logits, model.eval()(input_ids=ids).logits, atol=1e-5)


def test_gradients_of_adapters_are_those_on_the_dense_weights(tmp_path: Path):
    """The same adapters on the dequantized model: equal gradients, so the packed layers hand the right ones on."""
    folder = compressed(tmp_path, grid="trellis")
    torch.manual_seed(0)
    model = adapted(folder)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.1)
    plain = lplr.load(folder)
    dense = pico.densify(
        lplr.load(tmp_path / "base"), {n: m.factorization for n, m in plain.named_modules() if hasattr(m, "factorization")}
    )
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin = peft.get_peft_model(dense, config)
    values = dict(model.named_parameters())
    ids = pico.tokens()
    with torch.no_grad():
        for name, p in twin.named_parameters():
            if "lora" in name:
                p.copy_(values[name])
    for m in (model, twin):
        m(input_ids=ids, labels=ids).loss.backward()
    for name, p in twin.named_parameters():
        if "lora" in name:
            torch.testing.assert_close(values[name].grad, p.grad, rtol=1e-3, atol=1e-5)
