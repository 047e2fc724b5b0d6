"""Recovery in the driver: never worse on held-out rows, records are of what is stored, a killed run ends in the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpoints
import pico
import pytest
import torch
from runs import calibrated, fingerprints, layers_of, run, stopped, timeless

from lplr import records
from lplr.errors import VerificationError
from lplr.hf.load import load_model
from lplr.recipe import make_recipe
from lplr.recover import relative_error
from lplr.stream.calibrate import calibration_windows
from lplr.stream.checkpoint import open_checkpoint
from lplr.stream.matrix import seeded
from lplr.stream.verify import verify

RECOVERY = {"epochs": 2, "lr": 0.05, "scale_lr": 0.01}


def recovery_lines(out: Path) -> list[dict]:
    return [e for e in records.read(out / "run.jsonl") if e["kind"] == "recovery"]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3", "mixtral", "gemma2"])
@pytest.mark.parametrize("method", ["auto", "lplr"])
def test_no_block_ends_worse_than_it_began(architecture: str, method: str, tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", architecture)
    out = tmp_path / "out"
    rows = run({**calibrated(source, recovery=RECOVERY), "bits": 3, "method": method}, out)
    lines = recovery_lines(out)
    assert [line["block"] for line in lines] == list(range(pico.LAYERS))
    for line in lines:
        assert line["after"] == min([line["before"], *line["losses"]]) and len(line["losses"]) == 2
        assert line["steps"] > 0 and line["tokens"] == 2 * 6 * 32  # two passes; six rows are one batch
    # certificates are of what is stored, in the records and against the base model
    assert verify(out, str(source)).worst == pytest.approx(1, abs=1e-4)
    improved = {line["block"] for line in lines if line["after"] < line["before"]}
    for row in rows:
        if row.stored == "compressed":
            assert row.error <= row.certificate
            assert "tuned" in row.note and row.bound is None
    assert improved  # on six rows of noise some block gains, or the step sizes are useless


def test_blocks_compute_what_was_measured(tmp_path: Path):
    """The loss told for the last block is that of the finished folder, from its own forward pass and the dense model's."""
    source = checkpoints.write(tmp_path / "base", "llama")
    chosen = {**calibrated(source, recovery=RECOVERY), "bits": 3}
    run(chosen, tmp_path / "out")
    recipe = make_recipe(chosen)
    tokens, _ = calibration_windows(recipe, open_checkpoint(str(source)), seeded(recipe.seed, "calibration"), print)
    states = []
    for folder in (source, tmp_path / "out"):
        model: Any = load_model(folder)
        model.model.layers[-1].register_forward_hook(lambda _, given, output: states.append(output))
        with torch.no_grad():
            model(input_ids=tokens, use_cache=False)
    # six rows are one batch: it is both what is tuned on and what is held out
    told = recovery_lines(tmp_path / "out")[-1]["after"]
    assert float(relative_error(states[1], states[0])) == pytest.approx(told, rel=1e-3)


def test_norms_are_tuned_stored_and_told(tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", "llama")
    out = tmp_path / "out"
    run({**calibrated(source, recovery={**RECOVERY, "lr": 0.0}), "bits": 3}, out)
    dense, made = load_model(source), load_model(out)
    told = {name for line in recovery_lines(out) for name in line["tuned"]}
    moved = set()
    for name, p in dense.named_parameters():
        if name in dict(made.named_parameters()):
            other = made.get_parameter(name)
            moved |= set() if torch.equal(p, other) else {name}
    assert moved and moved <= told
    # a tensor that no line names is still held against the base model's
    ledger = out / "run.jsonl"
    text = ledger.read_text()
    ledger.write_text(text.replace(f'"{sorted(moved)[0]}"', '"some.other.tensor"'))
    with pytest.raises(VerificationError):
        verify(out, str(source))


def test_a_killed_run_ends_in_the_same_bytes(tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", "llama")
    chosen = {**calibrated(source, recovery=RECOVERY), "bits": 3}
    run(chosen, tmp_path / "whole")
    stopped(chosen, tmp_path / "killed", after=2)
    run(chosen, tmp_path / "killed")
    assert fingerprints(tmp_path / "whole") == fingerprints(tmp_path / "killed")
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "killed")


def test_without_calibration_there_is_nothing_to_tune_on_and_that_is_said(tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", "llama")
    chosen = {**calibrated(source, recovery=RECOVERY), "bits": 3, "dataset": "none"}
    said: list[str] = []
    run(chosen, tmp_path / "out", notify=said.append)
    assert recovery_lines(tmp_path / "out") == []
    assert any("nothing is tuned" in line and "--dataset" in line for line in said)


def test_codes_stay_with_a_step_size_of_zero_and_nothing_is_encoded_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = checkpoints.write(tmp_path / "base", "llama")
    chosen = {**calibrated(source, recovery={**RECOVERY, "lr": 0.0}), "bits": 3, "propagation": 0.0}
    run({**chosen, "recovery": "fast"}, tmp_path / "plain")

    def encoder(*_: Any) -> None:
        raise AssertionError("codes were chosen again")

    monkeypatch.setattr("lplr.recover.latent.nearest_of", encoder)
    run(chosen, tmp_path / "tuned")
    # the first block sees what it saw without tuning; those behind it see a tuned one
    tuned, plain = (dict(load_model(tmp_path / name).model.layers[0].named_buffers()) for name in ("tuned", "plain"))
    codes = [name for name in plain if name.endswith("codes")]
    assert codes and all(torch.equal(tuned[name], plain[name]) for name in codes)


def test_what_a_record_had_to_say_is_kept(tmp_path: Path):
    """An expert that few tokens reach: its note stands in the record of the tuned matrix as well."""
    source = checkpoints.write(tmp_path / "base", "mixtral")
    rows = run({**calibrated(source, recovery=RECOVERY), "bits": 3, "nsamples": 1, "seqlen": 8}, tmp_path / "out")
    told = [row.note for row in rows if "calibration token" in row.note]
    assert told and all(note.startswith("tuned") or "no calibration token" in note for note in told)
    assert any(note.startswith("tuned") for note in told)


def test_no_recovery_is_the_same_as_before(tmp_path: Path):
    """Epochs of zero store what a recipe without the setting stores, and no line of it."""
    source = checkpoints.write(tmp_path / "base", "llama")
    for name, more in (("plain", {}), ("none", {"recovery": {"epochs": 0}})):
        run({**calibrated(source), "bits": 3, **more}, tmp_path / name)
    one, other = (fingerprints(tmp_path / name) for name in ("plain", "none"))
    assert one == other and not recovery_lines(tmp_path / "none")
    assert layers_of(load_model(tmp_path / "none"))
