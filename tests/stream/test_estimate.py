"""What a dry run promises is what the run makes, to the byte; and it touches nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch

from lplr import records
from lplr.errors import RecipeError
from lplr.factor import Format
from lplr.recipe import make_recipe
from lplr.stream.checkpoint import open_checkpoint, plan_layers
from lplr.stream.compress import compress
from lplr.stream.estimate import estimate

CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama", {}, {"bits": 1.5}),
    ("llama", {"dtype": torch.bfloat16, "tie_word_embeddings": False}, {"bits": 3.3, "method": "caldera"}),
    ("qwen2", {"shards": 2}, {"bits": 2, "modules_to_not_convert": ["o_proj"]}),
    ("gpt2", {}, {"bits": 4, "method": "lplr"}),
    ("mixtral", {}, {"bits": 3, "rules": [{"match": "*.k_proj", "bits": 0.01}, {"match": "*down_proj", "rank": 2}]}),
]


@pytest.mark.parametrize("architecture, made, chosen", CASES)
def test_the_plan_is_what_is_done(architecture: str, made: dict[str, Any], chosen: dict[str, Any], tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", architecture, **made)
    recipe = make_recipe({"model": str(source), "dataset": "none", "alternations": 0, **chosen})
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    checkpoint = open_checkpoint(recipe.model)
    plans = plan_layers(checkpoint, recipe)
    promised = estimate(checkpoint, plans, recipe)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before
    rows = compress(recipe, tmp_path / "out")
    assert [p.name for p in plans] == [row.name for row in rows]
    for p, row in zip(plans, rows, strict=True):
        fmt = p.format or Format(p.shape)
        assert (fmt.rank, fmt.l_bits, fmt.r_bits, fmt.q_bits) == (row.rank, row.l_bits, row.r_bits, row.q_bits)
        assert row.bits == (p.format.stored_bits() if p.format else p.dense_bits)
    done = records.read(tmp_path / "out/run.jsonl")[-1]
    assert promised.bits_per_weight == done["bits_per_weight"] and promised.weights == done["weights"]
    assert promised.bits_per_parameter == done["bits_per_parameter"] and promised.output_bytes == done["bytes"]
    assert promised.files == {p.name: p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors")}
    assert promised.source_bytes > promised.output_bytes and promised.seconds > 0
    assert promised.memory_bytes > 4 * max(p.shape[0] * p.shape[1] for p in plans)


def test_long_calibration_goes_to_the_disk(tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", "llama")
    checkpoint = open_checkpoint(str(source))
    found = []
    for samples in (8, 200_000):
        recipe = make_recipe({"model": str(source), "nsamples": samples, "seqlen": 64, "bits": 4})
        found.append(estimate(checkpoint, plan_layers(checkpoint, recipe), recipe))
    assert found[0].disk_bytes == 0 and found[1].disk_bytes == 4 * 200_000 * 64 * 24
    assert found[1].memory_bytes <= found[0].memory_bytes and found[1].seconds > found[0].seconds


def test_a_device_that_is_not_there(tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", "llama")
    recipe = make_recipe({"model": str(source), "bits": 4, "device": "cuda:99"})
    checkpoint = open_checkpoint(recipe.model)
    with pytest.raises(RecipeError, match="cuda:99"):
        estimate(checkpoint, plan_layers(checkpoint, recipe), recipe)
