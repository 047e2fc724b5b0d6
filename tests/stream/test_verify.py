"""verify finds every single thing that is wrong with a folder, names it, and nothing is wrong with a good one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from safetensors.torch import load_file, save_file

from eval.scale.flips import flips
from lplr import records
from lplr.errors import CheckpointError, VerificationError
from lplr.files import sha256
from lplr.recipe import make_recipe
from lplr.stream.compress import compress
from lplr.stream.ledger import digest
from lplr.stream.verify import verify

FIRST = "model-00001-of-00004.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base` and `out` in one folder; copied by each test."""
    root = tmp_path_factory.mktemp("verify")
    base = checkpoints.write(root / "base", "llama")
    fast = {"dataset": "none", "alternations": 0, "bits": 4, "method": "lplr", "factor_bits": 3}
    rules = [{"match": "*.k_proj", "bits": 0.01}]
    compress(make_recipe({"model": str(base), **fast, "rules": rules}), root / "out")
    return root


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made / "out", tmp_path / "out")
    return tmp_path / "out"


def rewrite(out: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    """Alter the ledger as someone who knows how would do it: every checksum is made to fit again."""
    entries = records.read(out / "run.jsonl")
    change(entries)
    done = entries[-1]
    for name, facts in done["files"].items():
        if (out / name).is_file():
            facts.update(bytes=(out / name).stat().st_size, sha256=sha256(out / name))
    done.pop("ledger_sha256")
    done["ledger_sha256"] = digest([*entries[:-1], done])
    done["seal"] = records.UNSEALED
    done["seal"] = records.seal(records.encoded(entries))
    (out / "run.jsonl").write_bytes(records.encoded(entries))


def layer(entries: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(e for e in entries if e.get("name") == name)


def test_a_good_folder(out: Path, made: Path):
    found = verify(out)
    written = {p.name for p in out.iterdir()} - {"run.jsonl", "README.md"}
    assert (found.files, found.layers, found.worst) == (len(written), 21, None)
    steps: list[str] = []
    found = verify(out, str(made / "base"), progress=lambda done, total, text: steps.append(text))
    assert found.worst is not None and 0.99 < found.worst <= 1 + 1e-5 and found.worst_layer.startswith("model.layers.")
    assert any("checksum of" in s for s in steps) and any("q_proj" in s for s in steps)


def test_reports_evaluations_and_hidden_files_may_lie_beside_it(out: Path):
    for name in ("report.html", "eval-wiki.json", ".gitattributes", "README.md"):  # the card is written again by `lplr push`
        (out / name).write_text("x")
    verify(out)


@pytest.mark.parametrize(
    "name", [FIRST, "config.json", "tokenizer.json", "recipe.yaml", "modeling_lplr.py", "model.safetensors.index.json"]
)
@pytest.mark.parametrize("how", ["deleted", "truncated", "first byte", "last byte", "longer"])
def test_every_file_is_watched(name: str, how: str, out: Path):
    path = out / name
    raw = path.read_bytes()
    match how:
        case "deleted":
            path.unlink()
        case "truncated":
            path.write_bytes(raw[:-1])
        case "longer":
            path.write_bytes(raw + b"\0")
        case _:
            checkpoints.flip(path, 0 if how == "first byte" else -2)
    with pytest.raises(VerificationError, match=f"{name} (is missing|has|was altered)"):
        verify(out)


def test_every_byte_of_a_shard_is_watched(out: Path):
    size = (out / FIRST).stat().st_size
    for at in range(0, size, size // 20):
        checkpoints.flip(out / FIRST, at)
        with pytest.raises(VerificationError, match=f"{FIRST} was altered"):
            verify(out)
        checkpoints.flip(out / FIRST, at)
    verify(out)


def test_every_line_of_the_ledger_is_watched(out: Path):
    raw = (out / "run.jsonl").read_bytes()
    for at in range(3, len(raw) - 1, len(raw) // 30):
        changed = raw[:at] + (b"7" if raw[at : at + 1] != b"7" else b"3") + raw[at + 1 :]
        (out / "run.jsonl").write_bytes(changed)
        with pytest.raises(VerificationError, match=r"run\.jsonl|is not finished"):
            verify(out)


def test_a_time_that_was_altered_and_a_seal_that_was_taken_out(out: Path):
    raw = (out / "run.jsonl").read_text()
    for old, new in (('"seconds": ', '"seconds": 1'), ('"seal"', '"seat"')):
        (out / "run.jsonl").write_text(raw.replace(old, new, 1))
        with pytest.raises(VerificationError, match=r"run\.jsonl was altered"):
            verify(out)
    seal = json.loads(raw.splitlines()[-1])["seal"]
    (out / "run.jsonl").write_text(raw.replace(f'"seal": "{seal}", ', ""))  # a folder older than the seal
    verify(out)


def test_random_bits_of_every_file_are_watched(out: Path):
    """The campaign of `eval/scale/flips.py`, which flips 10,000."""
    found = list(flips(out, 200, seed=1))
    assert all(said for _, _, said in found) and len({name for name, _, _ in found}) > 8
    verify(out)


def test_strangers_are_named(out: Path):
    shutil.copy(out / FIRST, out / "model.safetensors")
    with pytest.raises(VerificationError, match=r"holds model\.safetensors, which the run did not write: remove it"):
        verify(out)
    (out / "model.safetensors").rename(out / "adapter_config.json")
    with pytest.raises(VerificationError, match=r"holds adapter_config\.json"):
        verify(out)


def test_swapped_shards(out: Path):
    second = out / "model-00002-of-00004.safetensors"
    (out / FIRST).rename(out / "x")
    second.rename(out / FIRST)
    (out / "x").rename(second)
    with pytest.raises(VerificationError, match="was altered"):
        verify(out)
    with pytest.raises(VerificationError, match=r"stands elsewhere in model\.safetensors\.index\.json"):
        rewrite(out, lambda entries: None)
        verify(out)


def test_no_folder_no_run_no_end(out: Path, tmp_path: Path):
    with pytest.raises(VerificationError, match="is no folder"):
        verify(tmp_path / "nothing")
    with pytest.raises(VerificationError, match=r"holds no run\.jsonl"):
        verify(tmp_path)
    lines = (out / "run.jsonl").read_text().splitlines(keepends=True)
    (out / "run.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(VerificationError, match="is not finished: run the same"):
        verify(out)
    (out / "run.jsonl").write_text("")
    with pytest.raises(VerificationError, match="is not finished"):
        verify(out)


def test_tensors_against_the_table_of_layers(out: Path):
    path = out / "config.json"
    config = json.loads(path.read_text())
    name = "model.layers.0.mlp.up_proj"

    def refused(change: Callable[[dict[str, Any]], None], named: str) -> None:
        spoiled = json.loads(json.dumps(config))
        change(spoiled)
        path.write_text(json.dumps(spoiled))
        rewrite(out, lambda entries: None)
        with pytest.raises(VerificationError, match=named):
            verify(out)

    refused(lambda c: c["quantization_config"]["layers"].pop(name), f"layer {name} stands in only one of")
    other = {"rank": 3, "scales": {"rank_scale": 3}}
    refused(lambda c: c["quantization_config"]["layers"][name].update(other), rf"tensor {name}\.l_codes is")
    refused(lambda c: c["quantization_config"]["layers"][name].update(rank=3), "layer entry .* is out of range")
    refused(lambda c: c["quantization_config"]["layers"][name].pop("rank"), "layer entry")
    refused(lambda c: c.pop("quantization_config"), "holds no table of layers")


def test_missing_and_unexpected_tensors(out: Path):
    tensors = load_file(out / FIRST)
    name = "model.layers.0.mlp.up_proj.r_codes"
    save_file({k: v for k, v in tensors.items() if k != name}, out / FIRST, {"format": "pt"})
    rewrite(out, lambda entries: None)
    with pytest.raises(VerificationError, match=f"tensor {name} is missing"):
        verify(out)
    save_file({**tensors, "stray": torch.zeros(1)}, out / FIRST, {"format": "pt"})
    rewrite(out, lambda entries: None)
    with pytest.raises(VerificationError, match="tensor stray of"):
        verify(out)


def test_bits_that_are_not_those_of_the_files(out: Path):
    def lie(entries: list[dict[str, Any]]) -> None:
        layer(entries, "model.layers.0.mlp.up_proj")["bits"] -= 8

    rewrite(out, lie)
    with pytest.raises(VerificationError, match=r"layer model\.layers\.0\.mlp\.up_proj takes \d+ bits"):
        verify(out)
    rewrite(out, lambda entries: layer(entries, "model.layers.0.mlp.up_proj").update(
        bits=layer(entries, "model.layers.0.mlp.up_proj")["bits"] + 8))
    verify(out)
    rewrite(out, lambda entries: entries[-1].update(bits_per_weight=entries[-1]["bits_per_weight"] * (1 - 1e-12)))
    with pytest.raises(VerificationError, match="bits per weight, its record says"):
        verify(out)


@pytest.mark.parametrize("field, factor", [("certificate", 0.99), ("error", 0.9), ("error", 1.1)])
def test_a_record_that_lies_is_caught_with_the_base_model(field: str, factor: float, out: Path, made: Path):
    name = "model.layers.1.self_attn.v_proj"

    def lie(entries: list[dict[str, Any]]) -> None:
        row = layer(entries, name)
        row[field] *= factor

    rewrite(out, lie)
    verify(out)  # alone the folder is consistent
    with pytest.raises(VerificationError, match=f"{name} has error .*(above its certificate|its record says)"):
        verify(out, str(made / "base"))


def test_codes_that_were_altered_with_all_checksums(out: Path, made: Path):
    name = "model.layers.0.mlp.up_proj"
    tensors = load_file(out / FIRST)
    tensors[f"{name}.l_codes"][0] ^= 255
    save_file(tensors, out / FIRST, {"format": "pt"})
    rewrite(out, lambda entries: None)
    verify(out)
    with pytest.raises(VerificationError, match=f"{name} has error"):
        verify(out, str(made / "base"))


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.self_attn.k_proj.weight"])
def test_dense_tensors_that_were_altered_with_all_checksums(name: str, out: Path, made: Path):
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = load_file(out / index[name])
    tensors[name].view(-1)[0] += 1e-3
    save_file(tensors, out / index[name], {"format": "pt"})
    rewrite(out, lambda entries: None)
    verify(out)
    with pytest.raises(VerificationError, match=f"tensor {name} is not the base model's"):
        verify(out, str(made / "base"))


def test_another_base_model(out: Path, made: Path, tmp_path: Path):
    checkpoints.write(tmp_path / "sibling", "llama", seed=1)
    with pytest.raises(VerificationError, match="has norm .* in the base model"):
        verify(out, str(tmp_path / "sibling"))
    checkpoints.write(tmp_path / "wide", "llama", intermediate_size=48)
    with pytest.raises(VerificationError, match=r"down_proj is \(24, 48\) in .*, \(24, 40\) here"):
        verify(out, str(tmp_path / "wide"))
    checkpoints.write(tmp_path / "kind", "gpt2")
    with pytest.raises(VerificationError, match="has no tensor .*: give the model that was compressed"):
        verify(out, str(tmp_path / "kind"))
    with pytest.raises(CheckpointError):
        verify(out, str(tmp_path / "nothing"))


def test_a_base_model_with_nan(out: Path, made: Path, tmp_path: Path):
    shutil.copytree(made / "base", tmp_path / "base")
    checkpoints.change_tensor(tmp_path / "base", "model.layers.0.self_attn.q_proj.weight", lambda t: t.fill_(float("nan")))
    with pytest.raises(VerificationError, match="q_proj has norm nan"):
        verify(out, str(tmp_path / "base"))
