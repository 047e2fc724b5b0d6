"""run.jsonl: lines in, lines out; torn and damaged ones."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lplr import records
from lplr.errors import OutputError
from lplr.records import LayerRecord


def record(**changes: object) -> LayerRecord:
    fields = {"name": "a.b", "block": 0, "shape": (4, 6), "method": "lplr", "rank": 2, "bits": 48, "norm": 2.0, "error": 1.0}
    return LayerRecord.model_validate({**fields, **changes})


def test_append_and_read_give_the_same_entries_back(tmp_path: Path):
    path = tmp_path / "run.jsonl"
    records.append(path, [{"kind": "run", "x": 1.5}, record(spectrum=((1, 2.0), (3, 0.1)))])
    records.append(path, [{"kind": "done"}])
    entries = records.read(path)
    assert [e["kind"] for e in entries] == ["run", "layer", "done"]
    assert list(records.layers(entries)) == [record(spectrum=((1, 2.0), (3, 0.1)))]


def test_append_reaches_the_disk_in_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size))
    records.append(tmp_path / "run.jsonl", [{"kind": "a"}, {"kind": "b"}])
    assert synced == [(tmp_path / "run.jsonl").stat().st_size]


def test_a_torn_last_line_is_left_out(tmp_path: Path):
    path = tmp_path / "run.jsonl"
    records.append(path, [{"kind": "run"}, {"kind": "block"}])
    raw = path.read_bytes()
    for cut in range(len(raw)):
        path.write_bytes(raw[:cut])
        assert len(records.read(path)) == raw[:cut].count(b"\n")


@pytest.mark.parametrize("line", ["{", "[]", "3", '"kind"', '{"x": 1}', '{"kind": ["run"]}', '{"kind": {}}', "", "\0\0"])
def test_a_damaged_line_elsewhere_is_named(tmp_path: Path, line: str):
    path = tmp_path / "run.jsonl"
    path.write_text(json.dumps({"kind": "run"}) + "\n" + line + "\n" + json.dumps({"kind": "done"}) + "\n")
    with pytest.raises(OutputError, match=r"line 2 is damaged: delete"):
        records.read(path)


def test_a_damaged_record_is_named_with_the_field():
    entry = {**record().model_dump(mode="json"), "bits": "many"}
    with pytest.raises(OutputError, match=r"record of a\.b is damaged at bits"):
        list(records.layers([entry]))


def test_nan_never_reaches_the_file(tmp_path: Path):
    with pytest.raises(ValueError, match="JSON"):
        records.append(tmp_path / "run.jsonl", [{"kind": "x", "value": float("nan")}])
    assert not (tmp_path / "run.jsonl").exists()


def test_bits_per_weight_counts_compressed_layers_only():
    rows = [record(), record(bits=24), record(stored="dense", bits=10_000)]
    assert records.bits_per_weight(rows) == (48 + 24) / 48
    assert records.bits_per_weight([]) == 0.0
    assert record().bits_per_weight == 2.0
    assert record().relative_error == 0.5 and record(norm=0.0, error=0.0).relative_error == 0.0


def test_a_record_is_frozen_and_refuses_unknown_fields():
    with pytest.raises(ValueError, match="frozen"):
        record().bits = 3
    with pytest.raises(ValueError, match="Extra inputs"):
        record(colour="red")
