"""Atomic, durable, observed at every step, and honest about a disk that is full."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from lplr import files
from lplr.errors import OutputError


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize(
    "code, phrase", [(errno.ENOSPC, "full"), (errno.EDQUOT, "full"), (errno.EIO, "another"), (errno.EROFS, "may write")]
)
def test_failure_keeps_the_old_file_and_leaves_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, code: int, phrase: str
):
    path = tmp_path / "run.txt"
    files.write_text_atomic(path, "old")

    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OutputError, match=phrase) as caught:
        files.write_text_atomic(path, "new")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert [f.name for f in tmp_path.iterdir()] == ["run.txt"] and path.read_text() == "old"


def test_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        files.write_text_atomic(tmp_path / "t", "x")
    assert not list(tmp_path.iterdir())


def test_missing_folder(tmp_path: Path):
    with pytest.raises(OutputError, match="does not exist"):
        files.write_text_atomic(tmp_path / "none" / "t", "x")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="another output folder"):
        files.write_text_atomic(tmp_path / "file" / "t", "x")


def test_remains_of_a_killed_run_are_overwritten(tmp_path: Path):
    (tmp_path / ".t.partial").write_text("torn")
    files.write_text_atomic(tmp_path / "t", "whole")
    assert [f.name for f in tmp_path.iterdir()] == ["t"] and (tmp_path / "t").read_text() == "whole"


def test_every_step_is_told_in_the_order_that_makes_a_file_durable(tmp_path: Path):
    seen: list[tuple[str, str]] = []
    with files.observed(lambda step, path: seen.append((step, path.name))):
        files.write_text_atomic(tmp_path / "t", "x")
        files.append(tmp_path / "l", b"1\n")
        files.truncate(tmp_path / "l", 0)
        files.remove(tmp_path / "t")
    folder = tmp_path.name
    assert seen == [
        ("create", ".t.partial"), ("write", ".t.partial"), ("sync", ".t.partial"), ("synced", ".t.partial"),
        ("rename", "t"), ("renamed", "t"), ("sync folder", folder), ("folder synced", folder),
        ("append", "l"), ("sync", "l"), ("synced", "l"), ("truncate", "l"), ("sync", "l"), ("synced", "l"), ("remove", "t"),
    ]  # fmt: skip
    assert {step for step, _ in seen} | {"make"} == set(files.STEPS)
    files.write_text_atomic(tmp_path / "t", "x")
    assert len(seen) == 15


def test_a_new_folder_is_made_durable_with_those_above_it(tmp_path: Path):
    seen: list[tuple[str, Path]] = []
    with files.observed(lambda step, path: seen.append((step, path))):
        files.make_folder(tmp_path / "a/b")
        files.make_folder(tmp_path / "a/b")
    made = [("make", "a"), ("sync folder", "."), ("folder synced", "."), ("make", "a/b"), ("sync folder", "a")]
    made.append(("folder synced", "a"))
    assert [(step, str(path.relative_to(tmp_path))) for step, path in seen] == made
    assert (tmp_path / "a/b").is_dir()


def test_what_an_observer_raises_ends_the_step(tmp_path: Path):
    def full(step: str, path: Path) -> None:
        if step == "write":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with files.observed(full), pytest.raises(OutputError, match="full"):
        files.write_text_atomic(tmp_path / "t", "x")
    assert not list(tmp_path.iterdir())
