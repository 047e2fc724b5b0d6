"""Distillation in the driver: never worse, the folder computes what was measured, a killed run ends in the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpoints
import pico
import pytest
import torch
from runs import calibrated, fingerprints, run, timeless

from lplr import records
from lplr.files import observed
from lplr.hf.load import load_model
from lplr.recipe import make_recipe
from lplr.stream import distill
from lplr.stream.calibrate import calibration_windows
from lplr.stream.checkpoint import open_checkpoint
from lplr.stream.matrix import seeded
from lplr.stream.verify import verify

RECOVERY = {"epochs": 1, "distill_epochs": 2, "lr": 0.05, "scale_lr": 0.01}


def chosen_for(source: Path, **more: Any) -> dict[str, Any]:
    return {**calibrated(source, recovery={**RECOVERY, **more}), "bits": 3}


def line_of(out: Path) -> dict[str, Any]:
    return next(e for e in records.read(out / "run.jsonl") if e["kind"] == "distillation")


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3", "mixtral", "gemma2"])
def test_a_distilled_folder_is_whole_and_not_worse(architecture: str, tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", architecture)
    out = tmp_path / "out"
    run(chosen_for(source), out)
    line = line_of(out)
    assert line["after"] == min([line["before"], *line["losses"]]) <= line["before"]
    assert len(line["losses"]) == 2 and line["steps"] > 0
    assert verify(out, str(source)).worst == pytest.approx(1, abs=1e-4)
    assert not list(out.glob(".*"))  # nothing of the work is left
    kinds = {e["kind"] for e in records.read(out / "run.jsonl")}
    assert kinds == {"run", "allocation", "recovery", "distillation", "layer", "block", "done"}


def test_the_folder_computes_what_was_measured(tmp_path: Path):
    """The loss told is that of the finished folder and the dense one, by transformers' own forward passes in float64."""
    source = checkpoints.write(tmp_path / "base", "llama")
    chosen = chosen_for(source)
    run(chosen, tmp_path / "out")
    recipe = make_recipe(chosen)
    tokens, _ = calibration_windows(recipe, open_checkpoint(str(source)), seeded(recipe.seed, "calibration"), print)
    with torch.no_grad():
        base, made = (load_model(f)(input_ids=tokens, use_cache=False).logits.double() for f in (source, tmp_path / "out"))
    p, q = base.log_softmax(-1), made.log_softmax(-1)
    top = p.topk(distill.LIKELIEST, -1).indices  # 64 of 67 tokens: what the rest adds is small but there
    p_top, q_top = p.gather(-1, top), q.gather(-1, top)
    rest_p, rest_q = (1 - x.exp().sum(-1) for x in (p_top, q_top))
    wanted = ((p_top.exp() * (p_top - q_top)).sum(-1) + rest_p * (rest_p / rest_q).log()).mean()
    # bfloat16 products where the machine has them: 8 bits, averaged over the tokens
    assert line_of(tmp_path / "out")["after"] == pytest.approx(float(wanted), rel=0.02)


def test_codes_stay_with_a_step_size_of_zero(tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", "llama")
    run(chosen_for(source, lr=0.0, epochs=0), tmp_path / "tuned")
    run(chosen_for(source, epochs=0, distill_epochs=0), tmp_path / "plain")
    tuned, plain = (dict(load_model(tmp_path / name).named_buffers()) for name in ("tuned", "plain"))
    codes = [name for name in plain if name.endswith("codes")]
    assert codes and all(torch.equal(tuned[name], plain[name]) for name in codes)
    line = line_of(tmp_path / "tuned")
    assert line["after"] < line["before"]  # norms and scales alone gain


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    ("at", "optimizer"), [("state", "adamw"), ("shard", "adamw"), ("line", "adamw"), ("state", "adamw_8bit")]
)
def test_a_run_killed_anywhere_ends_in_the_same_bytes(at: str, optimizer: str, tmp_path: Path):
    if optimizer == "adamw_8bit":
        pytest.importorskip("bitsandbytes", minversion="0.50")
    source = checkpoints.write(tmp_path / "base", "llama")
    chosen = chosen_for(source, optimizer=optimizer)
    run(chosen, tmp_path / "whole")
    # (file, step, which time it comes): behind the first pass, before the second shard, before the third lines
    file, step, times = {
        "state": (distill.STATE, "rename", 2),
        "shard": ("model-00002-of-00004.safetensors", "rename", 1),
        "line": ("run.jsonl", "append", 3),
    }[at]
    out = tmp_path / "killed"
    seen = 0

    def kill(what: str, path: Path) -> None:
        nonlocal seen
        if path.parent == out and file in path.name and what == step:
            seen += 1
            if seen == times:
                raise Killed

    with pytest.raises(Killed), observed(kill):
        run(chosen, out)
    assert not (out / "config.json").exists()
    run(chosen, out)
    assert fingerprints(out) == fingerprints(tmp_path / "whole")
    assert timeless(out) == timeless(tmp_path / "whole")


def test_blocks_run_twice_where_memory_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = checkpoints.write(tmp_path / "base", "llama")
    run(chosen_for(source), tmp_path / "plain")
    monkeypatch.setattr(distill, "KEPT", 0)
    run(chosen_for(source), tmp_path / "short")
    assert line_of(tmp_path / "short")["losses"] == pytest.approx(line_of(tmp_path / "plain")["losses"], rel=1e-3)


def test_tied_and_untied_heads(tmp_path: Path):
    for tied in (True, False):
        source = checkpoints.write(tmp_path / f"base{tied}", "llama", tie_word_embeddings=tied)
        run(chosen_for(source, epochs=0), tmp_path / f"out{tied}")
        assert line_of(tmp_path / f"out{tied}")["after"] > 0
        model, dense = load_model(tmp_path / f"out{tied}"), load_model(source)
        assert torch.equal(model.lm_head.weight, dense.lm_head.weight)
        assert len(model.model.layers) == pico.LAYERS
