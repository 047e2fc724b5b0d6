"""lplr.evaluate.kept: what was finished is found again, whatever a kill left of the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lplr.errors import OutputError
from lplr.evaluate.kept import Kept, work_file


def test_pieces_are_found_again(tmp_path: Path) -> None:
    path = tmp_path / "deep/er/work.jsonl"
    first = Kept(path, "a")
    first.put("0", [0.1, 1 / 3])
    first.put("x", float("nan"))
    again = Kept(path, "a")
    assert "0" in again and again["0"] == [0.1, 1 / 3] and again["x"] != again["x"] and "1" not in again
    assert "0" not in Kept(path, "b")  # another run starts a new file
    assert "0" not in Kept(path, "a")


def test_a_torn_line_ends_what_is_read(tmp_path: Path) -> None:
    path = tmp_path / "work.jsonl"
    kept = Kept(path, "a")
    for i in range(3):
        kept.put(str(i), i)
    whole = path.read_text()
    for cut in range(len(whole)):
        path.write_text(whole[:cut])
        found = Kept(path, "a")
        have = [i for i in range(3) if str(i) in found]
        assert have == list(range(len(have)))
        found.put("9", 9)
        assert "9" in Kept(path, "a")


def test_removed_when_done(tmp_path: Path) -> None:
    path = tmp_path / "work.jsonl"
    kept = Kept(path, "a")
    kept.put("0", 1)
    kept.remove()
    kept.remove()
    assert not list(tmp_path.iterdir())
    memory = Kept()
    memory.put("0", 1)
    assert memory["0"] == 1
    memory.remove()


def test_a_place_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="LPLR_CACHE"):
        Kept(tmp_path / "file/work.jsonl", "a")
    monkeypatch.setenv("LPLR_CACHE", str(tmp_path))
    path, fingerprint = work_file("a", {"b": 1})
    assert path.parent == tmp_path / "eval" and fingerprint.startswith(path.stem)
    assert work_file("a", {"b": 2})[0] != path and json.loads(json.dumps(fingerprint)) == fingerprint
