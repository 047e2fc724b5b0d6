"""The identity of a run, the lock of its folder, and what is cut off a ledger that a crash left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lplr import records
from lplr.errors import OutputError
from lplr.files import sha256
from lplr.stream.ledger import check_folder, digest, fingerprint, open_ledger

HEADER: dict[str, Any] = {"recipe": {"bits": 1.0, "model": "m"}, "source": {"f": {"bytes": 3}}, "files": {}, "calibration": None}


def block(folder: Path, index: int = 0) -> dict[str, Any]:
    """A shard and its line."""
    path = folder / f"{index}.safetensors"
    path.write_bytes(b"abc")
    return {"kind": "block", "index": index, "file": path.name, "bytes": 3, "sha256": sha256(path)}


def test_a_new_folder_gets_a_header(tmp_path: Path):
    with open_ledger(tmp_path / "a/b", HEADER) as ledger:
        assert ledger.done is None and ledger.blocks == {}
    (line,) = records.read(tmp_path / "a/b/run.jsonl")
    assert line["kind"] == "run" and line["fingerprint"] == fingerprint(line)


def test_times_are_no_part_of_the_identity():
    assert fingerprint({"a": 1, "seconds": 2.0}) == fingerprint({"a": 1, "seconds": 3.0}) != fingerprint({"a": 2})
    assert digest([{"a": 1, "started": 1}]) == digest([{"a": 1}]) != digest([{"a": 1}, {}])


def test_lines_come_back(tmp_path: Path):
    with open_ledger(tmp_path, HEADER) as ledger:
        ledger.append([{"kind": "layer", "name": "x"}, block(tmp_path)])
    with open_ledger(tmp_path, HEADER) as ledger:
        assert list(ledger.blocks) == [0] and len(ledger.entries) == 3


@pytest.mark.parametrize(
    "change, named",
    [
        ({"recipe": {"bits": 2.0, "model": "m"}}, r"recipe\.bits was 1\.0, now 2\.0"),
        ({"source": {"f": {"bytes": 4}}}, r"source\.f\.bytes was 3, now 4"),
        ({"calibration": {"name": "x"}, "recipe": {"bits": 1.0, "model": "n"}}, r"recipe\.model was 'm', now 'n'"),
        ({"versions": {"torch": "9"}}, r"versions was None, now \{'torch': '9'\}"),
    ],
)
def test_another_run_is_refused_by_its_first_difference(tmp_path: Path, change: dict[str, Any], named: str):
    open_ledger(tmp_path, HEADER).close()
    with pytest.raises(OutputError, match=named):
        open_ledger(tmp_path, {**HEADER, **change})
    open_ledger(tmp_path, HEADER).close()  # the lock was given back


def test_a_long_value_is_cut_on_the_line(tmp_path: Path):
    open_ledger(tmp_path, HEADER).close()
    with pytest.raises(OutputError) as caught:
        open_ledger(tmp_path, {**HEADER, "calibration": {"text": "x" * 10_000}})
    assert len(str(caught.value)) < 600


def test_what_a_crash_left_behind_the_last_block_is_cut_off(tmp_path: Path):
    with open_ledger(tmp_path, HEADER) as ledger:
        ledger.append([{"kind": "layer", "name": "x"}, block(tmp_path)])
    whole = (tmp_path / "run.jsonl").read_bytes()
    layer = json.dumps({"kind": "layer", "name": "y"}).encode() + b"\n"
    for rest in (layer, layer + layer, layer[:9], layer + layer[:-1], b"\0" * 20):
        (tmp_path / "run.jsonl").write_bytes(whole + rest)
        with open_ledger(tmp_path, HEADER) as ledger:
            assert [e["kind"] for e in ledger.entries] == ["run", "layer", "block"]
        assert (tmp_path / "run.jsonl").read_bytes() == whole


def test_an_empty_or_torn_header_starts_again(tmp_path: Path):
    for content in (b"", b'{"kind": "ru'):
        (tmp_path / "run.jsonl").write_bytes(content)
        with open_ledger(tmp_path, HEADER) as ledger:
            assert [e["kind"] for e in ledger.entries] == ["run"]


def test_a_damaged_line_in_the_middle_is_refused(tmp_path: Path):
    open_ledger(tmp_path, HEADER).close()
    with open(tmp_path / "run.jsonl", "ab") as file:
        file.write(b"rubbish\n" + json.dumps({"kind": "layer"}).encode() + b"\n")
    with pytest.raises(OutputError, match="line 2 is damaged"):
        open_ledger(tmp_path, HEADER)


def test_a_shard_that_is_gone_or_altered_is_refused(tmp_path: Path):
    with open_ledger(tmp_path, HEADER) as ledger:
        ledger.append([block(tmp_path)])
    (tmp_path / "0.safetensors").write_bytes(b"abd")
    with pytest.raises(OutputError, match=r"0\.safetensors is not what run\.jsonl says"):
        open_ledger(tmp_path, HEADER)
    (tmp_path / "0.safetensors").unlink()
    with pytest.raises(OutputError, match=r"0\.safetensors is missing"):
        open_ledger(tmp_path, HEADER)


def test_check_folder_says_what_is_in_the_way(tmp_path: Path):
    check_folder(tmp_path / "new")
    check_folder(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        check_folder(tmp_path / "file")
    with pytest.raises(OutputError, match=r"not empty \(file\)"):
        check_folder(tmp_path)
    (tmp_path / "run.jsonl").write_text("")
    check_folder(tmp_path)
    with pytest.raises(OutputError, match="--no-resume"):
        check_folder(tmp_path, resume=False)


def test_one_process_at_a_time_and_a_killed_one_gives_the_folder_back(tmp_path: Path):
    code = (
        "import json, sys, time; from pathlib import Path; from lplr.stream.ledger import open_ledger\n"
        "held = open_ledger(Path(sys.argv[1]), json.loads(sys.argv[2])); print('held', flush=True); time.sleep(60)"
    )
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), json.dumps(HEADER)], stdout=subprocess.PIPE, env=environment, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(OutputError, match="in use by another lplr process"):
            open_ledger(tmp_path, HEADER)
        other.kill()
        other.wait()
    started = time.monotonic()
    open_ledger(tmp_path, HEADER).close()
    assert time.monotonic() - started < 5
    assert [p.name for p in tmp_path.iterdir()] == ["run.jsonl"]


def test_a_full_disk_is_an_output_error_and_the_lock_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import errno

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match=r"cannot write .*run\.jsonl .*full.*make room"):
            open_ledger(tmp_path, HEADER)
    open_ledger(tmp_path, HEADER).close()
