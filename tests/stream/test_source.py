"""Safetensors folders read lazily and suspiciously; checkpoint layouts seen through module names."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lplr.errors import CheckpointError
from lplr.stream.shards import write_index
from lplr.stream.source import ModuleView, SafetensorsSource, check_finite, open_source


def sample(generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "model.a.weight": torch.randn(5, 3, generator=generator),
        "model.b.weight": torch.randn(3, 7, generator=generator).bfloat16(),
        "model.c.codes": torch.randint(0, 256, (3, 3), generator=generator, dtype=torch.uint8),
        "model.d": torch.tensor(2.5),
        "model.e": torch.empty(0, 3),
        "model.f": torch.randn(3, generator=generator).to(torch.float8_e5m2),
    }


def sharded(folder: Path, tensors: dict[str, Tensor], count: int = 2) -> dict[str, str]:
    placed = {name: f"model-{i % count + 1:05d}-of-{count:05d}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(placed.values()):
        save_file({name: t for name, t in tensors.items() if placed[name] == file}, folder / file)
    write_index(folder, placed, 0)
    return placed


def same(a: Tensor, b: Tensor) -> bool:
    bytes_equal = torch.equal(a.reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))
    return a.dtype == b.dtype and a.shape == b.shape and bytes_equal


@pytest.mark.parametrize("many", [False, True])
def test_reads_what_safetensors_wrote(tmp_path: Path, generator: torch.Generator, many: bool):
    tensors = sample(generator)
    if many:
        sharded(tmp_path, tensors)
    else:
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    source = open_source(tmp_path)
    assert source.names() == tuple(sorted(tensors))
    for name, tensor in tensors.items():
        assert source.shape(name) == tuple(tensor.shape) and source.dtype(name) == tensor.dtype
        assert source.nbytes(name) == tensor.numel() * tensor.element_size()
        got = source.get(name)
        assert same(got, tensor) and got.data_ptr() % 16 == 0
        if tensor.dim() and tensor.shape[0]:
            assert same(source.part(name, 2), tensor[2])
            with pytest.raises(IndexError):
                source.part(name, tensor.shape[0])
    with pytest.raises(CheckpointError, match="no tensor nonsense"):
        source.get("nonsense")


def test_real_checkpoint(shared: Path):
    folder = shared / "data/models/stories260k"
    source = SafetensorsSource(folder)
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert same(source.get(name), tensor)


def test_get_is_fresh_and_writable(tmp_path: Path):
    save_file({"w": torch.zeros(4)}, tmp_path / "model.safetensors")
    source = SafetensorsSource(tmp_path)
    source.get("w").fill_(1)
    assert not source.get("w").any()


def test_reading_all_costs_the_memory_of_one(tmp_path: Path):
    """32 tensors of 8 MiB, in a process of its own: the peak grows by at most four of them (one is 8 MiB)."""
    save_file({f"w{i}": torch.full((1 << 21,), float(i)) for i in range(32)}, tmp_path / "model.safetensors")
    code = (
        "import resource, sys\nfrom lplr.stream.source import SafetensorsSource\n"
        "s = SafetensorsSource(sys.argv[1]); s.get('w0')\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\nstart = peak()\n"
        "for name in s.names(): assert s.get(name)[0] == float(name[1:])\nsys.exit(peak() - start > 4 * 8192)"
    )
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=root, check=True)


def test_identity_notices_shapes_names_and_values_but_not_the_folder(tmp_path: Path, generator: torch.Generator):
    def identity(name: str, tensors: dict[str, Tensor]) -> dict[str, object]:
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
        return SafetensorsSource(tmp_path / name).identity()

    w = torch.randn(300, 300, generator=generator)
    first = identity("1", {"w": w})
    assert json.loads(json.dumps(first)) == first and set(first) == {"model.safetensors"}
    assert identity("2", {"w": w}) == first
    assert identity("3", {"v": w}) != first
    assert identity("4", {"w": w.reshape(150, 600)}) != first
    assert identity("5", {"w": w + 1e-3}) != first


def broken(tmp_path: Path, phrase: str) -> None:
    with pytest.raises(CheckpointError, match=phrase) as caught:
        open_source(tmp_path)
    assert "\n" not in str(caught.value) and ":" in str(caught.value)


def test_missing_folder_and_no_weights(tmp_path: Path):
    broken(tmp_path / "none", "no such folder")
    broken(tmp_path / "none.gguf", "no such file")
    broken(tmp_path, "no model.safetensors")
    save_file({"w": torch.zeros(1)}, tmp_path / "consolidated.safetensors")
    broken(tmp_path, "only consolidated.safetensors")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
def test_pickles_are_not_read(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(b"\x80\x04")
    broken(tmp_path, f"pickled weights \\({name}\\).*convert")


def test_two_gguf_files_are_listed(tmp_path: Path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    broken(tmp_path, "2 GGUF files \\(a.gguf, b.gguf\\)")


@pytest.mark.parametrize("keep", [0, 4, 8, 20, -1, -9])
def test_truncated_file(tmp_path: Path, generator: torch.Generator, keep: int):
    path = tmp_path / "model.safetensors"
    save_file(sample(generator), path)
    path.write_bytes(path.read_bytes()[:keep])
    broken(tmp_path, "truncated")


def test_file_with_more_than_its_header_says(tmp_path: Path, generator: torch.Generator):
    path = tmp_path / "model.safetensors"
    save_file(sample(generator), path)
    path.write_bytes(path.read_bytes() + b"x")
    broken(tmp_path, "longer than its header says")


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[1, 2]",
        b'{"w": 3}',
        b'{"w": {"dtype": "F32", "shape": [1]}}',
        b'{"w": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}',
        b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
        b'{"w": {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]}}',
        b'{"w": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}, '
        b'"v": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}',
        b"[" * 100_000,
        b"\xff\xfe",
    ],
)
def test_damaged_header(tmp_path: Path, header: bytes):
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    broken(tmp_path, "damaged")


def test_unknown_type_wrong_file_and_lfs_pointer(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    header = b'{"w": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    broken(tmp_path, "w has type F4")
    path.write_bytes(b"<!doctype html><html></html>")
    broken(tmp_path, "damaged")
    path.write_bytes(b"version https://git-lfs/spec/v1\noid sha256:0\nsize 1\n")
    broken(tmp_path, "git lfs pull")


def test_damaged_index(tmp_path: Path):
    for text in ("{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"w": 3}}', '{"weight_map": ["w"]}'):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        broken(tmp_path, "damaged")


@pytest.mark.parametrize("file", ["../evil.safetensors", "/etc/passwd", "a\\b", "..", "", "C:x", "sub/x.safetensors"])
def test_index_that_leads_out_of_the_folder(tmp_path: Path, file: str):
    (tmp_path / "in").mkdir()
    save_file({"w": torch.zeros(1)}, tmp_path / "evil.safetensors")
    (tmp_path / "in/model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": file}}))
    broken(tmp_path / "in", "leads out")


def test_missing_shard_and_tensor_missing_from_its_shard(tmp_path: Path, generator: torch.Generator):
    placed = sharded(tmp_path, sample(generator))
    write_index(tmp_path, {**placed, "model.ghost": placed["model.d"]}, 0)
    broken(tmp_path, r"model.ghost is missing \(1 such\)")
    (tmp_path / placed["model.d"]).unlink()
    broken(tmp_path, re.escape(placed["model.d"]) + ": shard missing")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_check_finite_counts_and_names(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lplr.stream.source.CHECK_CHUNK", 4)
    w = torch.zeros(3, 5, dtype=dtype)
    check_finite("layer.w", w)
    w[0, 0] = w[2, 4] = float("nan")
    w[1, 1], w[1, 2], w[2, 0] = float("inf"), float("-inf"), float("inf")
    with pytest.raises(CheckpointError, match=r"layer.w: 2 NaN and 3 Inf among 15 values"):
        check_finite("layer.w", w)
    with pytest.raises(CheckpointError, match="2 NaN and 3 Inf"):
        check_finite("layer.w", w.t())


def test_check_finite_on_other_types():
    check_finite("codes", torch.tensor([255], dtype=torch.uint8))
    check_finite("empty", torch.empty(0))
    check_finite("big", torch.full((8,), 6e4, dtype=torch.float16))  # their sum would overflow
    with pytest.raises(CheckpointError, match="1 NaN"):
        check_finite("fp8", torch.tensor([1.0, float("nan")]).to(torch.float8_e4m3fn))


def view_of(folder: Path, tensors: dict[str, Tensor], wanted: object) -> ModuleView:
    save_file(tensors, folder / "model.safetensors")
    return ModuleView(SafetensorsSource(folder), wanted)  # type: ignore[arg-type]


def check_view(view: ModuleView, name: str, expected: Tensor) -> None:
    assert view.shape(name) == tuple(expected.shape) and view.dtype(name) == expected.dtype
    assert view.nbytes(name) == expected.numel() * expected.element_size()
    assert same(view.get(name), expected)
    assert same(view.part(name, 1), expected[1])


def test_view_puts_the_prefix_on_and_takes_it_off(tmp_path: Path, generator: torch.Generator):
    wte, qkv = torch.randn(4, 3, generator=generator), torch.randn(3, 9, generator=generator)
    hub = {"wte.weight": wte, "h.0.attn.c_attn.weight": qkv, "h.0.attn.bias": torch.ones(1, 1, 4, 4)}
    view = view_of(tmp_path, hub, ["transformer.wte.weight", "transformer.h.0.attn.c_attn.weight"])
    check_view(view, "transformer.h.0.attn.c_attn.weight", qkv)
    assert view.names() == ("transformer.h.0.attn.c_attn.weight", "transformer.wte.weight")
    assert view.unused() == () and view.identity() == view.source.identity()
    whole = {"model.layers.0.w": wte, "model.norm.weight": qkv, "lm_head.weight": wte.clone()}
    view = view_of(tmp_path, whole, ["layers.0.w", "norm.weight"])
    check_view(view, "norm.weight", qkv)
    assert view.unused() == ("lm_head.weight",)


def experts(generator: torch.Generator, count: int = 3, d: int = 4, f: int = 5) -> tuple[Tensor, Tensor]:
    up = torch.randn(count, 2 * f, d, generator=generator)
    return up, torch.randn(count, d, f, generator=generator)


NAMES = {
    "mixtral": ("model.layers.0.block_sparse_moe.experts.{}", "w1", "w3", "w2"),
    "mixtral-v5": ("model.layers.0.mlp.experts.{}", "w1", "w3", "w2"),
    "qwen": ("model.layers.0.mlp.experts.{}", "gate_proj", "up_proj", "down_proj"),
    "olmoe-base": ("layers.0.mlp.experts.{}", "gate_proj", "up_proj", "down_proj"),
}


@pytest.mark.parametrize("layout", [*NAMES, "stacked"])
def test_view_puts_experts_together(tmp_path: Path, generator: torch.Generator, layout: str):
    gate_up, down = experts(generator)
    f = down.shape[2]
    if layout == "stacked":
        hub = {"model.layers.0.mlp.experts.gate_up_proj": gate_up, "model.layers.0.mlp.experts.down_proj": down}
    else:
        head, one, three, two = NAMES[layout]
        hub = {}
        for e in range(len(gate_up)):
            hub[f"{head.format(e)}.{one}.weight"] = gate_up[e, :f].contiguous()
            hub[f"{head.format(e)}.{three}.weight"] = gate_up[e, f:].contiguous()
            hub[f"{head.format(e)}.{two}.weight"] = down[e].contiguous()
    wanted = {}
    for e in range(len(gate_up)):
        wanted[f"model.layers.0.mlp.experts.{e}.gate_up_proj.weight"] = gate_up[e].shape
        wanted[f"model.layers.0.mlp.experts.{e}.down_proj.weight"] = down[e].shape
    view = view_of(tmp_path, hub, wanted)
    for e in range(len(gate_up)):
        check_view(view, f"model.layers.0.mlp.experts.{e}.gate_up_proj.weight", gate_up[e])
        check_view(view, f"model.layers.0.mlp.experts.{e}.down_proj.weight", down[e])
    assert view.unused() == ()


def test_view_finds_routers_under_old_names(tmp_path: Path):
    hub = {"model.layers.0.block_sparse_moe.gate.weight": torch.ones(2, 2)}
    for new in ("model.layers.0.mlp.gate.weight", "model.layers.0.mlp.router.weight"):
        check_view(view_of(tmp_path, hub, [new]), new, torch.ones(2, 2))


def test_view_names_what_is_missing_and_what_does_not_fit(tmp_path: Path, generator: torch.Generator):
    gate_up, down = experts(generator, count=2)
    hub = {"m.experts.gate_up_proj": gate_up, "m.experts.down_proj": down}
    wanted = [f"m.experts.{e}.down_proj.weight" for e in range(4)] + ["m.x", "m.y"]
    with pytest.raises(CheckpointError, match=r"4 of 6 .* \(m.experts.2.down_proj.weight, .*, m.x, \.\.\)"):
        view_of(tmp_path, hub, wanted)
    with pytest.raises(CheckpointError, match=r"m.experts.1.down_proj.weight has shape \(4, 5\).*\(5, 4\)"):
        view_of(tmp_path, hub, {"m.experts.1.down_proj.weight": (5, 4)})
    view = view_of(tmp_path, hub, ["m.experts.1.down_proj.weight"])
    assert view.unused() == ("m.experts.gate_up_proj",)
    with pytest.raises(CheckpointError, match="no tensor"):
        view.get("m.experts.gate_up_proj")


def test_gate_without_up_is_missing(tmp_path: Path):
    with pytest.raises(CheckpointError, match="1 of 1"):
        view_of(tmp_path, {"m.experts.0.gate_proj.weight": torch.ones(2, 2)}, ["m.experts.0.gate_up_proj.weight"])


@pytest.mark.parametrize("family", ["Mixtral", "Qwen2Moe", "Qwen3Moe", "Olmoe"])
def test_view_of_what_transformers_saves_is_what_it_holds(tmp_path: Path, family: str):
    """save_pretrained writes the Hub's layout; the view must give back each expert of the model in memory."""
    import transformers

    sizes = {
        "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 16,
    }  # fmt: skip
    more = {} if family in ("Mixtral", "Olmoe") else {"moe_intermediate_size": 24}
    count = {"num_local_experts": 3} if family == "Mixtral" else {"num_experts": 3}
    config = getattr(transformers, f"{family}Config")(**sizes, **more, **count, num_experts_per_tok=2)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    model.save_pretrained(tmp_path)
    expected: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            head, matrix = name.rsplit(".", 1)
            expected.update({f"{head}.{e}.{matrix}.weight": tensor[e] for e in range(3)})
        else:
            expected[name] = tensor
    source = SafetensorsSource(tmp_path)
    assert not any(name.endswith("gate_up_proj") for name in source.names())  # else this test shows nothing
    view = ModuleView(source, {name: tuple(t.shape) for name, t in expected.items()})
    for name, tensor in expected.items():
        assert same(view.get(name), tensor), name
    assert view.unused() == ()
