"""What is made may differ from its plan, within its budget: shards, records, config.json and a resumed run take what was made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch

from lplr import records
from lplr.errors import VerificationError
from lplr.factor import Format
from lplr.hf.load import load_model
from lplr.recipe import WIDTHS, make_recipe
from lplr.stream.checkpoint import open_checkpoint, plan_layers
from lplr.stream.compress import compress
from lplr.stream.ledger import digest
from lplr.stream.verify import verify


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a matrix near rank one in each block: there L R is worth its bits."""
    folder = checkpoints.write(tmp_path_factory.mktemp("formats") / "base", "llama")
    for block in range(3):
        name = f"model.layers.{block}.mlp.up_proj.weight"
        checkpoints.change_tensor(folder, name, lambda W: 3 * torch.outer(W[:, 0], W[0]) + 0.05 * W)
    return folder


def settings(source: Path, **changes: Any) -> dict[str, Any]:
    text = {"dataset": str(source / "text.txt"), "nsamples": 4, "seqlen": 32}
    return {"model": str(source), "bits": 4, "alternations": 1, "allocation": "uniform", "recovery": "fast", **text, **changes}


def formats(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]["layers"]


def test_a_resumed_run_takes_the_formats_that_were_made(source: Path, tmp_path: Path) -> None:
    recipe = make_recipe(settings(source, method="caldera"))
    rows = compress(recipe, tmp_path / "whole")

    def stop(done: float, total: float, text: str) -> None:
        if text.startswith("block 2 of"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(recipe, tmp_path / "broken", progress=stop)
    compress(recipe, tmp_path / "broken")
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "broken" / file.name).read_bytes()
    assert formats(tmp_path / "whole") == formats(tmp_path / "broken") == records.formats(rows)
    plans = {p.name: p.format for p in plan_layers(open_checkpoint(str(source)), recipe)}
    differ = {row.name for row in rows if row.format and Format.from_dict(row.format) != plans[row.name]}
    assert {f"model.layers.{block}.mlp.up_proj" for block in range(3)} <= differ and len(differ) < len(rows)
    for row in rows:
        planned = plans[row.name]
        assert planned and row.format and row.bits == Format.from_dict(row.format).stored_bits() <= planned.stored_bits()
    assert verify(tmp_path / "whole", str(source)).worst == pytest.approx(1, abs=1e-4)
    loaded = load_model(tmp_path / "whole")
    assert {name: m.format.to_dict() for name, m in loaded.named_modules() if hasattr(m, "format")} == formats(tmp_path / "whole")


@pytest.mark.parametrize("grid", [None, *WIDTHS])
def test_every_grid_from_end_to_end(grid: str | None, source: Path, tmp_path: Path) -> None:
    rows = compress(make_recipe(settings(source, grid=grid, dataset="none")), tmp_path)
    entries = formats(tmp_path)
    assert {e["q_grid"] for e in entries.values()} == {grid or "trellis"}
    assert all(e["scales"] == {"q_row_scale": 1} and e["rotation"] and e["output_rotation"] for e in entries.values())
    assert all(row.bits <= 4 * row.shape[0] * row.shape[1] and row.grids == ("", "", grid or "trellis") for row in rows)
    assert verify(tmp_path, str(source)).worst == pytest.approx(1, abs=1e-4)
    weight = load_model(source).get_submodule("model.layers.0.mlp.gate_proj").weight.detach()
    found = load_model(tmp_path).get_submodule("model.layers.0.mlp.gate_proj").weight
    row = next(r for r in rows if r.name == "model.layers.0.mlp.gate_proj")
    assert float((found - weight).norm()) == pytest.approx(row.error, rel=1e-4) and row.relative_error < 0.3


@pytest.mark.parametrize("method", ["lplr_feedback", "double_binary"])
def test_methods_with_feedback_in_both_factors(method: str, source: Path, tmp_path: Path) -> None:
    rows = compress(make_recipe(settings(source, method=method)), tmp_path)
    assert {row.method for row in rows} == {method} and all(row.rank and row.weighted_error for row in rows)
    assert verify(tmp_path, str(source)).worst == pytest.approx(1, abs=1e-4)


def test_a_record_that_tells_another_format_is_found(source: Path, tmp_path: Path) -> None:
    compress(make_recipe(settings(source, dataset="none")), tmp_path)
    entries = records.read(tmp_path / "run.jsonl")
    entry = next(e for e in entries if e["kind"] == "layer")
    entry["format"]["rotation"] = 77
    done = {k: v for k, v in entries[-1].items() if k not in ("ledger_sha256", "seal")}  # as a folder older than the seal
    entries[-1] = {**done, "ledger_sha256": digest([*entries[:-1], done])}
    (tmp_path / "run.jsonl").unlink()
    records.append(tmp_path / "run.jsonl", entries)
    with pytest.raises(VerificationError, match=f"layer {entry['name']} has one format in config.json and another in run.jsonl"):
        verify(tmp_path)
