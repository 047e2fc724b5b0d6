"""A run that is stopped at any write, or whose disk fails there, goes on to the bytes of an unbroken one.

`eval/scale/crash.py` does this at every write point; here a sample of them.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import checkpoints
import pytest
import torch
from runs import calibrated, fingerprints, no_model, run, settings

from eval.scale.crash import Disk, campaign
from lplr.errors import CheckpointError
from lplr.hf import weight_file
from lplr.stream.entries import Entry

WRONG = ("other bytes", "finished blocks made again", "loads as a wrong model", "refused")


@pytest.mark.parametrize("text, bits, every", [("none", 4, 41), ("calibrated", 2, 101)])
def test_a_sample_of_the_states_that_a_crash_leaves(text: str, bits: int, every: int, tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", "llama", num_hidden_layers=2)
    chosen = settings(source, allocation="uniform") if text == "none" else calibrated(source)
    points, counts = campaign({**chosen, "bits": bits}, tmp_path, every=every, kills=0)
    assert points > 100
    assert all(counts[kind] for kind in ("killed", "powerless", "raised", "full")), counts
    assert not any(counts[name] for name in WRONG), counts


def test_the_simulated_disk_keeps_after_a_loss_of_power_only_what_was_flushed(tmp_path: Path):
    """By hand: a file without a flush of its folder is not there, one without a flush of its own is empty."""
    import random

    disk = Disk(tmp_path, random.Random(0))
    (tmp_path / ".a.partial").write_bytes(b"new")
    disk("write", tmp_path / ".a.partial")
    disk("synced", tmp_path / ".a.partial")
    (tmp_path / ".a.partial").rename(tmp_path / "a")
    disk("renamed", tmp_path / "a")
    (tmp_path / "b").write_bytes(b"not flushed")
    disk("folder synced", tmp_path)
    powerless = [state for _, kind, state in disk.found if kind == "powerless"]
    assert powerless == [{}, {}, {}, {"a": b"new", "b": b""}]


@pytest.mark.parametrize("text", ["none", "calibrated"])
def test_a_disk_that_cannot_be_read_is_one_error_and_the_run_goes_on_later(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = checkpoints.write(tmp_path / "base", "llama", num_hidden_layers=2)
    chosen = settings(source) if text == "none" else calibrated(source)
    run(chosen, tmp_path / "whole")
    true, failures = Entry.read, 0
    for after in (1, 5, 20):
        left = [after]

        def read(self: Entry) -> torch.Tensor:
            with weight_file.reading(self.file, self.stamp):
                left[0] -= 1  # noqa: B023  (used at once)
                if left[0] == 0:  # noqa: B023
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
            return true(self)

        with monkeypatch.context() as patch:
            patch.setattr(Entry, "read", read)
            try:
                run(chosen, tmp_path / str(after))
            except CheckpointError as error:
                assert "model.safetensors: cannot be read (Input/output error)" in str(error) or "model-0000" in str(error)
                failures += 1
                no_model(tmp_path / str(after))
        run(chosen, tmp_path / str(after))
        assert fingerprints(tmp_path / str(after)) == fingerprints(tmp_path / "whole")
    assert failures >= 2


@pytest.mark.parametrize("how", ["written to", "replaced", "cut", "removed"])
def test_a_source_that_changes_while_it_is_read_is_refused(how: str, tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", "llama")
    file = source / "model.safetensors"
    content = file.read_bytes()

    def change(done: float, total: float, text: str) -> None:
        if not text.startswith("block 1 of"):
            return
        match how:
            case "written to":
                checkpoints.flip(file, -1)
            case "replaced":
                file.unlink()
                file.write_bytes(content)
            case "cut":
                file.write_bytes(content[:-8])
            case "removed":
                file.unlink()

    with pytest.raises(CheckpointError, match=r"model\.safetensors: (was changed|shrank|cannot be read)"):
        run(settings(source), tmp_path / "out", progress=change)
    no_model(tmp_path / "out")
    file.write_bytes(content)
    run(settings(source), tmp_path / "out")
    run(settings(source), tmp_path / "whole")
    assert fingerprints(tmp_path / "out") == fingerprints(tmp_path / "whole")
