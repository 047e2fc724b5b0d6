"""Loading and saving compressed folders through plain transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pico
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from lplr.errors import CheckpointError, LplrError, RecipeError, VerificationError
from lplr.hf.quantizer import LplrConfig, compressed_layers, file_shapes
from lplr.hf.register import register

ARCHITECTURES = ["llama", "qwen2", "gpt2", "gemma3", "mixtral", "qwen2_moe", "opt"]
CODES = "model.layers.1.mlp.down_proj.q_codes"
SCALE = "model.layers.0.self_attn.q_proj.row_scale"


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    register()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return pico.write_compressed(pico.compress(pico.model("llama"))[0], tmp_path / "in")


def load(folder: Path, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def edit(folder: Path, **changes) -> None:
    """Replace tensors of a folder; None removes one."""
    file = folder / "model.safetensors"
    tensors = {**load_file(file), **changes}
    save_file({k: v for k, v in tensors.items() if v is not None}, file, {"format": "pt"})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_equal_those_of_dequantized_factors(architecture: str, tmp_path: Path) -> None:
    made, factors = pico.compress(pico.model(architecture))
    loaded = load(pico.write_compressed(made, tmp_path))
    assert set(compressed_layers(loaded)) == set(factors) and not loaded.training
    dense = pico.densify(pico.model(architecture), factors)
    with torch.no_grad():
        torch.testing.assert_close(loaded(pico.tokens()).logits, dense(pico.tokens()).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compressed_tensors_survive_load_and_save(architecture: str, dtype: torch.dtype, tmp_path: Path) -> None:
    made, _ = pico.compress(pico.model(architecture))
    source = pico.write_compressed(made, tmp_path / "in")
    model = load(source, dtype=dtype)
    assert model.dtype == dtype
    model.save_pretrained(tmp_path / "out")
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert before.keys() == after.keys()
    packed = [k for k in before if k.endswith(("_codes", "_scale"))]
    assert len(packed) > 6
    for name in before if dtype == torch.float32 else packed:
        assert before[name].dtype == after[name].dtype and torch.equal(before[name], after[name]), name
    configs = [json.loads((tmp_path / d / "config.json").read_text())["quantization_config"] for d in ("in", "out")]
    assert configs[0] == configs[1]
    again = load(tmp_path / "out", dtype=dtype)
    with torch.no_grad():
        assert torch.equal(again(pico.tokens()).logits, model(pico.tokens()).logits)


def test_saved_files_are_byte_identical_from_then_on(folder: Path, tmp_path: Path) -> None:
    load(folder).save_pretrained(tmp_path / "a")
    load(tmp_path / "a").save_pretrained(tmp_path / "b")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits(folder: Path, dtype: torch.dtype) -> None:
    model, want = load(folder, dtype=dtype), load(folder)
    with torch.no_grad():
        got, exact = model(pico.tokens()).logits.float(), want(pico.tokens()).logits
    assert (got - exact).norm() < 0.05 * exact.norm()  # bfloat16 keeps 8 bits through 3 blocks


def test_device_map(folder: Path) -> None:
    model = load(folder, device_map="cpu")
    with torch.no_grad():
        assert torch.equal(model(pico.tokens()).logits, load(folder)(pico.tokens()).logits)


@pytest.mark.parametrize("offload_buffers", [False, True])
def test_disk_offload(folder: Path, tmp_path: Path, offload_buffers: bool) -> None:
    where = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    where |= {f"model.layers.{i}": "disk" if i else "cpu" for i in range(pico.LAYERS)}
    model = load(folder, device_map=where, offload_folder=tmp_path / "off", offload_buffers=offload_buffers)
    with torch.no_grad():
        torch.testing.assert_close(model(pico.tokens()).logits, load(folder)(pico.tokens()).logits)


def test_generate(folder: Path) -> None:
    model = load(folder)
    out = model.generate(pico.tokens(1, 4), max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert out.shape == (1, 10)
    static = model.generate(
        pico.tokens(1, 4),
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=None,
        cache_implementation="static",
        disable_compile=True,
    )
    assert torch.equal(static, out)


def test_whole_model_compiles(folder: Path) -> None:
    model = load(folder)
    with torch.no_grad():
        want = model(pico.tokens()).logits
        got = torch.compile(model, backend="aot_eager", fullgraph=True)(pico.tokens()).logits
    torch.testing.assert_close(got, want)


def test_base_model_and_another_head(folder: Path) -> None:
    base = AutoModel.from_pretrained(folder)
    assert len(compressed_layers(base)) == 7 * pico.LAYERS
    whole = load(folder)
    with torch.no_grad():
        want = whole(pico.tokens(), output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(base(pico.tokens()).last_hidden_state, want)
    head = AutoModelForSequenceClassification.from_pretrained(folder)
    assert len(compressed_layers(head)) == 7 * pico.LAYERS


def test_base_model_saved_and_loaded_with_a_head(folder: Path, tmp_path: Path) -> None:
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "base")
    model = load(tmp_path / "base")
    with torch.no_grad():
        torch.testing.assert_close(model(pico.tokens()).logits, load(folder)(pico.tokens()).logits)


def test_sharded(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    model.save_pretrained(tmp_path / "many", max_shard_size="6KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "many")(pico.tokens()).logits, model(pico.tokens()).logits)


@pytest.mark.parametrize(
    "name", [CODES, SCALE, "model.norm.weight", "model.layers.2.input_layernorm.weight", "model.embed_tokens.weight"]
)
def test_a_missing_tensor_raises(folder: Path, name: str) -> None:
    edit(folder, **{name: None})
    with pytest.raises(VerificationError, match=f"{name} is missing"):
        load(folder)


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.q_codes", "model.extra"]
)
def test_an_unexpected_tensor_raises(folder: Path, name: str) -> None:
    edit(folder, **{name: torch.zeros(3)})
    with pytest.raises(VerificationError, match=f"{name} of the files has no place"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (CODES, torch.zeros(1, 1, dtype=torch.uint8)),
        (SCALE, torch.zeros(1, dtype=torch.bfloat16)),
        (SCALE, torch.ones(pico.HIDDEN)),
        ("model.norm.weight", torch.zeros(3)),
    ],
)
def test_a_misshapen_tensor_raises(folder: Path, name: str, value: torch.Tensor) -> None:
    edit(folder, **{name: value})
    with pytest.raises(VerificationError, match=f"{name} is .* expected"):
        load(folder)


def test_a_missing_tensor_raises_for_another_head_too(folder: Path) -> None:
    edit(folder, **{CODES: None})
    for kind in (AutoModel, AutoModelForSequenceClassification):
        with pytest.raises(VerificationError, match="is missing"):
            kind.from_pretrained(folder)


def test_a_missing_untied_head_raises(tmp_path: Path) -> None:
    source = pico.write_compressed(pico.compress(pico.model("qwen3"))[0], tmp_path)
    edit(source, **{"lm_head.weight": None})
    with pytest.raises(VerificationError, match=r"lm_head\.weight is missing"):
        load(source)


def test_a_missing_tensor_of_a_given_state_dict_raises(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    kind = type(load(folder))
    with torch.no_grad():
        model = kind.from_pretrained(None, config=AutoConfig.from_pretrained(folder), state_dict=state)
        torch.testing.assert_close(model(pico.tokens()).logits, load(folder)(pico.tokens()).logits)
    del state[CODES]
    with pytest.raises(VerificationError, match=f"{CODES} was not loaded"):
        kind.from_pretrained(None, config=AutoConfig.from_pretrained(folder), state_dict=state)


def test_a_truncated_file_raises(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(folder, dtype=torch.float32)
    with pytest.raises(CheckpointError, match=r"nothing\.safetensors"):
        file_shapes([folder / "nothing.safetensors"])


@pytest.mark.parametrize(
    "change",
    [
        lambda q: q["layers"]["model.layers.0.mlp.up_proj"].pop("rank"),
        lambda q: q["layers"].update({"model.layers.9.mlp.up_proj": q["layers"]["model.layers.0.mlp.up_proj"]}),
        lambda q: q["layers"]["model.layers.0.mlp.up_proj"].update(shape=[3, 3]),
        lambda q: q["layers"].pop("model.layers.0.mlp.up_proj"),
        lambda q: q.update(format_version=99),
        lambda q: q.update(layers={}),
    ],
)
def test_a_damaged_table_raises(folder: Path, change) -> None:
    entry = json.loads((folder / "config.json").read_text())
    change(entry["quantization_config"])
    (folder / "config.json").write_text(json.dumps(entry))
    with pytest.raises(LplrError):
        load(folder)


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_one_expert_stays_dense(architecture: str, tmp_path: Path) -> None:
    made, _ = pico.compress(
        pico.model(architecture), skip=("lm_head", "*.experts.1.down_proj", "*.experts.0.gate_up_proj")
    )
    source = pico.write_compressed(made, tmp_path / "in")
    model = load(source)
    with torch.no_grad():
        assert torch.equal(model(pico.tokens()).logits, made(pico.tokens()).logits)
    model.save_pretrained(tmp_path / "out")
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_the_table_drops_a_compressed_head_for_the_base_model(tmp_path: Path) -> None:
    made, factors = pico.compress(pico.model("qwen3"), skip=())
    assert "lm_head" in factors
    source = pico.write_compressed(made, tmp_path)
    assert set(compressed_layers(load(source))) == set(factors)
    assert len(compressed_layers(AutoModel.from_pretrained(source))) == len(factors) - 1


def test_dense_model_cannot_be_compressed_on_the_fly(tmp_path: Path) -> None:
    pico.model("llama").save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="lplr compress"):
        load(tmp_path, quantization_config=LplrConfig())


def test_config_keeps_later_fields_and_round_trips() -> None:
    config = LplrConfig.from_dict({"quant_method": "lplr", "layers": {}, "later_field": [1, 2]})
    assert (
        config.to_dict()["later_field"] == [1, 2]
        and LplrConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    )
    json.dumps(config.to_dict())


def test_dequantize(folder: Path) -> None:
    model = load(folder)
    with torch.no_grad():
        want = model(pico.tokens()).logits
        dense = model.dequantize()
        assert not compressed_layers(dense) and not getattr(dense, "is_quantized", False)
        torch.testing.assert_close(dense(pico.tokens()).logits, want, rtol=1e-4, atol=1e-4)


def test_model_to_dtype_is_allowed_or_refused_but_changes_no_byte(folder: Path) -> None:
    model = load(folder)
    before = {k: v.clone() for k, v in model.state_dict().items() if k.endswith(("_codes", "_scale"))}
    model.to(torch.bfloat16)
    assert all(
        torch.equal(model.state_dict()[k], v) and model.state_dict()[k].dtype == v.dtype for k, v in before.items()
    )


def test_trainer_refuses(folder: Path) -> None:
    assert load(folder).hf_quantizer.is_trainable is False
