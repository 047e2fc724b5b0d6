"""A few hundred cases of each reader of `eval/scale/fuzz.py`, which runs a million; and the cases that broke a reader once."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval.scale.fuzz import READERS, attempt, case, fuzz


@pytest.mark.parametrize("name", [name for name in READERS if name != "folder"])
def test_no_reader_crashes_hangs_or_misreads(name: str, tmp_path: Path):
    counts, findings = fuzz(name, 600, 7, tmp_path)
    assert not findings
    assert counts["refused"] > 100 and counts["accepted"] > 1


def test_a_case_is_what_its_seed_and_number_say(tmp_path: Path):
    seeds = [b'{"a": 1}', b'{"b": [2, 3]}']
    assert [case("index", seeds, 1, n) for n in range(9)] == [case("index", seeds, 1, n) for n in range(9)]
    assert len({case("index", seeds, 1, n) for n in range(9)}) > 5


def test_what_is_no_error_of_ours_is_a_finding(tmp_path: Path):
    def broken(folder: Path, raw: bytes) -> None:
        raise IndexError("x")

    assert attempt(broken, tmp_path, b"") == "IndexError: x"
    assert attempt(lambda folder, raw: None, tmp_path, b"") == "accepted"


HEADERS = {
    "type that is a list": b'{"w": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}',
    "one offset": b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}',
    "three offsets": b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}',
    "true for one": b'{"w": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}',
    "a name twice": b'{"w": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}, "w": {"dtype": "I8", "shape": [4], '
    b'"data_offsets": [0, 4]}}',
    "a huge shape of nothing": b'{"w": {"dtype": "F32", "shape": [0, 18446744073709551616], "data_offsets": [0, 0]}, '
    b'"v": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
    "too many dimensions": b'{"w": {"dtype": "F32", "shape": [%s], "data_offsets": [0, 4]}}' % b",".join([b"1"] * 99),
}


@pytest.mark.parametrize("what", HEADERS)
def test_headers_that_broke_the_reader_of_safetensors(what: str, tmp_path: Path):
    header = HEADERS[what]
    raw = len(header).to_bytes(8, "little") + header + b"\0" * 4
    assert attempt(READERS["safetensors"][0], tmp_path, raw) == "refused"


@pytest.mark.parametrize("file", ["x" * 5000, "x" * 256])
def test_names_that_broke_the_reader_of_the_index(file: str, tmp_path: Path):
    assert attempt(READERS["index"][0], tmp_path, b'{"weight_map": {"w": "%s"}}' % file.encode()) == "refused"
    assert attempt(READERS["index"][0], tmp_path, b'{"weight_map": ' + b"[" * 100_000) == "refused"


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [BOMB, f"{BOMB}model: *i\n", "x: " + "[" * 50_000, "a: 2001-99-99", "a: 0xff", "m: 1" + "0" * 9000, "#" * (1 << 21)],
)
def test_recipes_that_are_bombs(text: str, tmp_path: Path):
    assert attempt(READERS["recipe"][0], tmp_path, text.encode()) == "refused"
