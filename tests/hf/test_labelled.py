"""Labelled text: every form of file, limits, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lplr.errors import DatasetError
from lplr.hf.labelled import read_labelled


def write(folder: Path, name: str, content: str) -> str:
    (folder / name).write_text(content, encoding="utf-8")
    return str(folder / name)


def test_jsonl_tsv_and_csv_give_the_same_rows(tmp_path: Path):
    rows = [('a "quoted" one, with a comma', 0), ("zweite Zeile ü", 1), ("", 0)]
    lines = "".join(json.dumps({"text": t, "label": c}) + "\n" for t, c in rows)
    tsv = "sentence\tlabel\n" + "".join(f"{t}\t{c}\n" for t, c in rows)
    doubled = '"a ""quoted"" one, with a comma"'
    csv = f"label,review\n0,{doubled}\n1,zweite Zeile ü\n0,\n"
    found = [read_labelled(write(tmp_path, n, c)) for n, c in (("a.jsonl", lines + "\n"), ("a.tsv", tsv), ("a.csv", csv))]
    for data in found:
        assert data.texts == [t for t, _ in rows] and data.labels == ["0", "1", "0"]
    assert len({data.sha256 for data in found}) == 1
    assert found[0].name == "a.jsonl"


def test_words_are_labels_and_a_limit_is_told(tmp_path: Path):
    lines = (json.dumps({"content": f"t{i}", "class": "yes" if i % 2 else "no"}) for i in range(9))
    file = write(tmp_path, "a.jsonl", "\n".join(lines))
    data = read_labelled(file, limit=4)
    assert data.labels == ["no", "yes", "no", "yes"] and data.name == "a.jsonl (first 4)"
    assert read_labelled(file, limit=9).name == "a.jsonl" and len(read_labelled(file).texts) == 9


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", "{}\n", r"a\.jsonl, row 1: no text under"),
        ("a.jsonl", '{"text": "x"}\n', "no label under"),
        ("a.jsonl", '{"text": "x", "label": 0.5}\n', "no label under"),
        ("a.jsonl", '{"text": "x", "label": null}\n', "no label under"),
        ("a.jsonl", "[1]\n", "list found"),
        ("a.jsonl", '{"text": "x", "label": 1}\n{"text"\n', "line 2 is not JSON"),
        ("a.jsonl", "\n", "holds no labelled text"),
        ("a.tsv", "sentence\tscore\nx\t1\n", r"no label under .* \(fields: sentence, score\)"),
        ("a.csv", "text,label\nx\n", "no label under"),
        ("a.csv", "text,label\n", "holds no labelled text"),
        ("a.txt", "x", "holds no labels"),
    ],
)
def test_what_holds_no_labelled_text_is_refused(name: str, content: str, message: str, tmp_path: Path):
    with pytest.raises(DatasetError, match=message):
        read_labelled(write(tmp_path, name, content))


def test_files_that_cannot_be_read_and_unknown_names(tmp_path: Path):
    (tmp_path / "latin.tsv").write_bytes("text\tlabel\nü\t1\n".encode("latin-1"))
    for dataset, message in (
        (str(tmp_path / "latin.tsv"), "not UTF-8"),
        (str(tmp_path / "none.jsonl"), "no file of labelled text"),
        (str(tmp_path), "no file of labelled text"),
        ("nothing", "unknown dataset 'nothing'"),
    ):
        with pytest.raises(DatasetError, match=message):
            read_labelled(dataset)
