"""What a dry run promises is what the run makes, to the byte, or no more where bits are allocated; and it touches nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpoints
import pico
import pytest
import torch

from lplr import records
from lplr.errors import RecipeError
from lplr.factor import Format
from lplr.recipe import make_recipe
from lplr.stream.allocation import ROWS, taking_part
from lplr.stream.checkpoint import open_checkpoint, plan_layers
from lplr.stream.compress import compress
from lplr.stream.device import memory_of
from lplr.stream.estimate import estimate, flops

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
    recipe = make_recipe({"model": str(source), "dataset": "none", "alternations": 0, "allocation": "uniform", **chosen})
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
    assert promised.memory_bytes > 4 * max(p.shape[0] * p.shape[1] for p in plans) and promised.allocated == 0


@pytest.mark.parametrize("architecture, made, chosen", CASES)
def test_where_bits_are_allocated_it_promises_no_less_than_is_made(
    architecture: str, made: dict[str, Any], chosen: dict[str, Any], tmp_path: Path
):
    source = checkpoints.write(tmp_path / "base", architecture, **made)
    recipe = make_recipe({"model": str(source), "dataset": "none", "alternations": 0, **chosen})
    checkpoint = open_checkpoint(recipe.model)
    plans = plan_layers(checkpoint, recipe)
    promised, shared = estimate(checkpoint, plans, recipe), taking_part(plans, recipe)
    compress(recipe, tmp_path / "out")
    done = records.read(tmp_path / "out/run.jsonl")[-1]
    assert promised.allocated == len(shared) and (not shared) == (chosen.get("method") == "lplr")
    assert promised.weights == done["weights"]
    # a matrix takes whole bytes a column, and the last one allocated is cut off there
    assert 0.97 * promised.bits_per_weight < done["bits_per_weight"] <= promised.bits_per_weight
    assert done["bytes"] <= promised.output_bytes and done["bits_per_parameter"] <= promised.bits_per_parameter
    assert set(promised.files) == {p.name for p in (tmp_path / "out").glob("*.safetensors")}


def planned(source: Path, **changes: Any) -> Any:
    recipe = make_recipe({"model": str(source), "bits": 4, **changes})
    checkpoint = open_checkpoint(str(source))
    plans = plan_layers(checkpoint, recipe)
    return checkpoint, plans, recipe


def test_the_allocation_takes_time_and_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = checkpoints.write(tmp_path / "base", "llama")
    uniform, given = (planned(source, allocation=a, nsamples=2 * ROWS, seqlen=64) for a in ("uniform", "sensitivity"))
    tokens = ROWS * 64
    weights = sum(p.shape[0] * p.shape[1] for p in given[1])
    passes = 4 * tokens * 2 * (weights + pico.VOCAB * pico.HIDDEN)
    moments = sum(2 * tokens * p.shape[1] ** 2 + 6 * p.shape[1] ** 3 for p in given[1])  # two, half of each computed
    curves = 3 * 3e4 * weights  # no matrix has more than 64 rows
    assert flops(*given) - flops(*uniform) == pytest.approx(passes + moments + curves)
    free = planned(source, dataset="none"), planned(source, dataset="none", allocation="uniform")
    assert flops(*free[0]) - flops(*free[1]) == pytest.approx(curves)
    assert estimate(*free[0]).disk_bytes == 0
    states = 4 * tokens * pico.HIDDEN
    # all in memory; each block's inputs on disk; the running ones, and those of the calibration (twice the rows, and once more
    # those of the original model), too
    for limit, disk in ((3 * states, 0), (2 * states, 3 * states), (states - 1, 4 * states)):
        monkeypatch.setattr("lplr.stream.estimate.ACTIVATION_LIMIT", limit)
        assert estimate(*given).disk_bytes == max(disk, 4 * states if 2 * states > limit else 0)
    assert estimate(*given).memory_bytes >= estimate(*uniform).memory_bytes


def test_recovery_takes_time_and_room(tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", "llama")
    checkpoint = open_checkpoint(str(source))
    found = []
    blocks, whole = {"epochs": 4, "lr": 0.02}, {"epochs": 4, "distill_epochs": 4, "lr": 0.02}
    for recovery in ({}, blocks, whole, {**whole, "lr": 0}):
        recipe = make_recipe({"model": str(source), "bits": 2, "dataset": "builtin", "recovery": recovery})
        plans = plan_layers(checkpoint, recipe)
        found.append((flops(checkpoint, plans, recipe), estimate(checkpoint, plans, recipe).memory_bytes))
    none, blocks, whole, fixed = (work for work, _ in found)
    assert none < blocks < whole and fixed < whole  # codes that stay need no encoder
    # gradients of the blocks alone: 6 operations for a weight and token
    weights = sum(p.shape[0] * p.shape[1] for p in plans)
    assert blocks - none >= 4 * recipe.nsamples * recipe.seqlen * 6 * weights
    assert found[0][1] <= found[1][1] <= found[2][1] and found[3][1] <= found[2][1]
    none, tuned = (make_recipe({"model": str(source), "dataset": "none", "recovery": r}) for r in ("fast", "best"))
    assert flops(checkpoint, plan_layers(checkpoint, none), none) == flops(checkpoint, plan_layers(checkpoint, tuned), tuned)


def test_a_model_that_distillation_cannot_hold_is_refused_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = checkpoints.write(tmp_path / "base", "llama")
    chosen = {"model": str(source), "bits": 4, "dataset": str(source / "text.txt"), "nsamples": 6, "seqlen": 32}
    monkeypatch.setattr("lplr.stream.estimate.memory_of", lambda _: 1000)
    with pytest.raises(RecipeError, match=r"holds the whole model, about .* GiB, and cpu has .*: take --preset fast"):
        compress(make_recipe(chosen), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for smaller in ({"recovery": {"epochs": 1}}, {"dataset": "none"}):
        compress(make_recipe({**chosen, **smaller}), tmp_path / "-".join(smaller))
    monkeypatch.undo()
    compress(make_recipe(chosen), tmp_path / "out")
    monkeypatch.setattr("lplr.stream.estimate.memory_of", lambda _: 1000)
    assert compress(make_recipe(chosen), tmp_path / "out")  # finished: left as it is


def test_the_memory_of_a_container_is_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cpu, own = torch.device("cpu"), tmp_path / "own"
    monkeypatch.setattr("lplr.stream.device.GROUPS", tmp_path)
    monkeypatch.setattr("lplr.stream.device.OWN_GROUPS", own)
    whole = memory_of(cpu)
    assert whole > 1 << 28
    files = {"0::/job/step": "{}/memory.max", "3:cpu:/\n9:memory:/job/step": "memory/{}/memory.limit_in_bytes"}
    for line, file in files.items():
        own.write_text(f"{line}\n")
        assert memory_of(cpu) == whole
        for group in ("job/step", "job", "."):  # the outer groups count as well
            told = tmp_path / file.format(group)
            told.parent.mkdir(parents=True, exist_ok=True)
            for text, there in (("max\n", whole), ("123456\n", 123456), (f"{1 << 62}\n", whole)):
                told.write_text(text)
                assert memory_of(cpu) == there
            told.unlink()


def test_long_calibration_goes_to_the_disk(tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", "llama")
    checkpoint = open_checkpoint(str(source))
    found = []
    for samples in (8, 200_000):
        recipe = make_recipe({"model": str(source), "nsamples": samples, "seqlen": 64, "bits": 4, "allocation": "uniform"})
        found.append(estimate(checkpoint, plan_layers(checkpoint, recipe), recipe))
    assert found[0].disk_bytes == 0 and found[1].disk_bytes == 2 * 4 * 200_000 * 64 * 24  # and the original's
    assert found[1].memory_bytes <= found[0].memory_bytes and found[1].seconds > found[0].seconds


def test_a_device_that_is_not_there(tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", "llama")
    recipe = make_recipe({"model": str(source), "bits": 4, "device": "cuda:99"})
    checkpoint = open_checkpoint(recipe.model)
    with pytest.raises(RecipeError, match="cuda:99"):
        estimate(checkpoint, plan_layers(checkpoint, recipe), recipe)
