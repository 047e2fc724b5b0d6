"""Pickled weights are read only where they are allowed, to the same bytes, and never run code."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import checkpoints
import pytest
import torch
from runs import fingerprints, run, settings
from safetensors.torch import load_file
from typer.testing import CliRunner

from lplr.cli import app
from lplr.errors import CheckpointError
from lplr.stream.pickles import PICKLE, PICKLE_INDEX, PickleSource
from lplr.stream.verify import verify


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> object:
        return os.mkdir, (str(self.mark),)


def pickled(source: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(source / "model.safetensors")
    torch.save(tensors, source / PICKLE)
    (source / "model.safetensors").unlink()
    return tensors


def test_pickles_are_refused_unless_allowed_and_then_give_the_same_model(tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", "llama", num_hidden_layers=1)
    run(settings(source), tmp_path / "safe")
    tensors = pickled(source)
    with pytest.raises(CheckpointError, match="pickled weights .*--allow-pickle"):
        run(settings(source), tmp_path / "out")
    notes: list[str] = []
    run(settings(source), tmp_path / "out", allow_pickle=True, notify=notes.append)
    assert any("can run code" in note for note in notes)
    with pytest.raises(CheckpointError, match="--allow-pickle"):
        verify(tmp_path / "out", str(source))
    assert verify(tmp_path / "out", str(source), allow_pickle=True).worst is not None
    assert fingerprints(tmp_path / "out") == fingerprints(tmp_path / "safe")
    found = PickleSource(source, [PICKLE])
    assert found.names() == tuple(sorted(tensors))
    for name, tensor in tensors.items():
        assert torch.equal(found.get(name), tensor) and torch.equal(found.part(name, 0), tensor[0])
        assert found.shape(name) == tuple(tensor.shape) and found.nbytes(name) == tensor.nbytes
    with pytest.raises(CheckpointError, match="no tensor x"):
        found.get("x")


@pytest.mark.parametrize("asked", [("--dry-run", "--bits", "4"), ("--size", "1MiB", "--dry-run")])
def test_the_command_allows_them_in_a_dry_run_and_for_a_size_too(asked: tuple[str, ...], tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", "llama", num_hidden_layers=1)
    pickled(source)
    arguments = ["compress", str(source), *asked]
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 2 and "--allow-pickle" in refused.output
    assert CliRunner().invoke(app, [*arguments, "--allow-pickle"]).exit_code == 0


def test_a_pickle_that_would_run_code_does_not(tmp_path: Path):
    for content in (pickle.dumps(Evil(tmp_path / "mark")), b"", b"\x80\x04K\x01.", b"PK\x03\x04" + b"x" * 99):
        (tmp_path / PICKLE).write_bytes(content)
        with pytest.raises(CheckpointError, match="no file of plain tensors"):
            PickleSource(tmp_path, [PICKLE])
    torch.save({"w": torch.ones(1), "x": Evil(tmp_path / "mark")}, tmp_path / PICKLE)
    with pytest.raises(CheckpointError, match="no file of plain tensors"):
        PickleSource(tmp_path, [PICKLE])
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("content", [[torch.ones(2)], {"w": 3}, {3: torch.ones(1)}, {"w": torch.eye(2).to_sparse()}])
def test_what_is_no_table_of_dense_tensors(content: object, tmp_path: Path):
    torch.save(content, tmp_path / PICKLE)
    with pytest.raises(CheckpointError, match="convert it to safetensors"):
        PickleSource(tmp_path, [PICKLE])


def test_an_index_of_pickles_stays_in_its_folder(tmp_path: Path):
    from lplr.stream.source import open_source

    torch.save({"w": torch.ones(2)}, tmp_path / "a.bin")
    (tmp_path / PICKLE_INDEX).write_text('{"weight_map": {"w": "a.bin"}}')
    assert open_source(tmp_path, allow_pickle=True).names() == ("w",)
    (tmp_path / PICKLE_INDEX).write_text('{"weight_map": {"w": "../a.bin"}}')
    with pytest.raises(CheckpointError, match="leads out"):
        open_source(tmp_path, allow_pickle=True)
