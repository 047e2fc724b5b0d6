"""What the driver cannot do is told in one error that names it, and leaves no model behind."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from runs import calibrated, fingerprints, no_model, run, settings

from lplr import records
from lplr.errors import CheckpointError, DatasetError, LplrError, OutputError, RecipeError, UnsupportedModel
from lplr.stream.verify import verify


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.layers.2.input_layernorm.weight", "model.embed_tokens.weight"]
)
@pytest.mark.parametrize("text", ["none", "calibrated"])
def test_a_weight_that_is_not_finite_is_named(value: float, name: str, text: str, tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", "llama")

    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[5] = value
        return tensor

    checkpoints.change_tensor(source, name, spoil)
    with pytest.raises(CheckpointError, match=rf"{name}: . NaN and . Inf among"):
        run(settings(source) if text == "none" else calibrated(source), tmp_path / "out")
    no_model(tmp_path / "out")


def test_a_missing_or_truncated_shard_is_named_before_anything_is_written(tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", "llama", shards=3)
    file = sorted(source.glob("*.safetensors"))[1]
    content = file.read_bytes()
    file.write_bytes(content[:-7])
    with pytest.raises(CheckpointError, match=rf"{file.name}: truncated"):
        run(settings(source), tmp_path / "out")
    file.unlink()
    with pytest.raises(CheckpointError, match=rf"{file.name}: shard missing"):
        run(settings(source), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes, error, named",
    [
        ({"model_type": "nonsense"}, UnsupportedModel, "nonsense"),
        ({"model_type": "vit", "architectures": ["ViTModel"]}, UnsupportedModel, "vit"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, UnsupportedModel, r"quantized already \(gptq\)"),
        ({"hidden_size": 32}, CheckpointError, "config"),
        ({"num_hidden_layers": 4}, CheckpointError, "missing"),
    ],
)
def test_a_config_that_cannot_be_used_is_refused(changes: dict[str, Any], error: type[LplrError], named: str, tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", "llama")
    checkpoints.change_config(source, **changes)
    with pytest.raises(error, match=named):
        run(settings(source), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_compressed_folder_is_not_compressed_again(tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", "llama")
    run(settings(source), tmp_path / "out")
    with pytest.raises(UnsupportedModel, match=r"quantized already \(lplr\)"):
        run(settings(tmp_path / "out"), tmp_path / "again")


def test_a_dataset_that_cannot_be_used(tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", "llama")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "fields.jsonl").write_text('{"words": "a"}\n')
    (tmp_path / "short.txt").write_text("w1 w2 w3")
    for name, named in (
        ("missing.txt", "does not exist"),
        ("empty.txt", "holds no text"),
        ("fields.jsonl", r"fields: words"),
        ("short.txt", "3 tokens, fewer than one window of 32"),
    ):
        with pytest.raises(DatasetError, match=named):
            run({**calibrated(source), "dataset": str(tmp_path / name)}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_window_beyond_the_context_is_cut_and_told(tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", "llama")
    notes: list[str] = []
    run({**calibrated(source), "seqlen": 4096}, tmp_path / "out", notify=notes.append)
    assert any("context is 64 tokens: calibrating on windows of 64, not 4096" in note for note in notes)
    assert records.read(tmp_path / "out/run.jsonl")[0]["calibration"]["seqlen"] == 64


def test_tokens_that_the_model_does_not_have(tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", "llama", vocab_size=40)
    with pytest.raises(DatasetError, match=r"gives token 6\d, the model has 40"):
        run(calibrated(source), tmp_path / "out")


def test_a_model_without_tokenizer(tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", "llama", tokenizer=False)
    with pytest.raises(LplrError, match="use --dataset none"):
        run(calibrated(source), tmp_path / "out")
    notes: list[str] = []
    run(settings(source), tmp_path / "out", notify=notes.append)
    assert any("holds no tokenizer" in note for note in notes)


@pytest.mark.parametrize("name", ["cuda:99", "meta", "nonsense", ""])
def test_a_device_that_is_not_there(name: str, tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", "llama")
    with pytest.raises(RecipeError, match="device .* cannot be used"):
        run(settings(source, device=name), tmp_path / "out")


def test_an_unknown_method_is_refused_before_anything_is_read(tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", "llama")
    for change in ({"method": "lpl"}, {"rules": [{"match": "*", "method": "lpl"}]}):
        with pytest.raises(RecipeError, match="unknown method 'lpl': choose one of auto, lplr.*did you mean 'lplr'"):
            run(settings(source, **change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_the_output(tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", "llama")
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("x")
    run(settings(source), tmp_path / "other")
    with pytest.raises(OutputError, match="file is a file"):
        run(settings(source), tmp_path / "file")
    with pytest.raises(OutputError, match=r"not empty \(notes\.txt\)"):
        run(settings(source), tmp_path / "full")
    with pytest.raises(OutputError, match=r"not empty \(config\.json and"):
        run(settings(source), source)
    with pytest.raises(OutputError, match="holds a run already"):
        run(settings(source), tmp_path / "other", resume=False)
    with pytest.raises(OutputError, match="cannot write"):
        run(settings(source), Path("/proc/lplr-out"))


def test_two_runs_in_one_folder(tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", "llama")
    caught: list[str] = []

    def second(done: float, total: float, text: str) -> None:
        if text.startswith("block 1 of"):
            with pytest.raises(OutputError) as error:
                run(settings(source), tmp_path / "out")
            caught.append(str(error.value))

    run(settings(source), tmp_path / "out", progress=second)
    assert len(caught) == 1 and "in use by another lplr process" in caught[0]
    verify(tmp_path / "out")  # and the lock is given back, without leaving a file
    run(settings(source), tmp_path / "out")


def full_disk(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """From the given flush on, nothing fits the disk."""
    import errno

    true, left = os.fsync, [after]

    def fsync(handle: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        true(handle)

    monkeypatch.setattr(os, "fsync", fsync)


def test_a_full_disk_at_any_flush_is_one_error_and_the_run_goes_on_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = checkpoints.write(tmp_path / "base", "llama", num_hidden_layers=1)
    run(settings(source), tmp_path / "whole")
    flushes, steps = 0, list(range(0, 40, 3))
    for after in steps:
        out = tmp_path / str(after)
        with monkeypatch.context() as patch:
            full_disk(patch, after)
            try:
                run(settings(source), out)
                break
            except OutputError as error:
                assert "the disk or the quota is full" in str(error) and "make room" in str(error) and "\n" not in str(error)
        flushes += 1
        assert not list(out.glob(".*.partial"))
        run(settings(source), out)
        assert fingerprints(out) == fingerprints(tmp_path / "whole")
    assert 5 <= flushes < len(steps)


def test_a_disk_too_full_for_the_activations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import resource

    source = checkpoints.write(tmp_path / "base", "llama")
    monkeypatch.setattr("lplr.stream.calibrate.ACTIVATION_LIMIT", 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (17_000, hard))  # less than 6 x 32 x 24 float32
        with pytest.raises(OutputError, match=r"cannot write .*activations .*full"):
            run(calibrated(source), tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    no_model(tmp_path / "out")
    run(calibrated(source), tmp_path / "out")
    monkeypatch.undo()
    run(calibrated(source), tmp_path / "memory")
    assert fingerprints(tmp_path / "out") == fingerprints(tmp_path / "memory")


def test_a_model_that_leaves_the_range_of_float32_in_its_own_pass_is_refused(tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", "llama")
    for part in ("up_proj", "down_proj"):
        checkpoints.change_tensor(source, f"model.layers.1.mlp.{part}.weight", lambda t: t * 1e30)
    with pytest.raises(CheckpointError, match="hidden states of the calibration text are not finite"):
        run(calibrated(source), tmp_path / "out")
    no_model(tmp_path / "out")
    run(settings(source), tmp_path / "free")
    verify(tmp_path / "free", str(source))
