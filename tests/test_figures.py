"""The figures of the README's tables are those of eval/results.  A row that names the commit it was made on is older."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def results(name: str) -> Any:
    return json.loads((ROOT / "eval/results" / name).read_text())


def table(section: str, number: int = 0) -> list[list[str]]:
    """The rows of a table of a section, as cells without emphasis, its head first; a row with a commit is left out."""
    text = README.partition(f"## {section}\n")[2].partition("\n## ")[0]
    found = re.findall(r"((?:^\|.*\|\n)+)", text, re.MULTILINE)[number]
    rows = [[cell.strip().replace("*", "") for cell in line.strip().strip("|").split("|")] for line in found.splitlines()]
    return [row for row in rows if not set("".join(row)) <= {"-"} and "commit" not in row[0]]


def shows(cell: str, value: float) -> bool:
    """Whether a cell is the value rounded to the digits that it has (four significant ones above 1,000)."""
    digits = cell.replace(",", "")
    if not re.fullmatch(r"\d*\.?\d+", digits):
        return False
    half = max(0.5 * 10.0 ** -len(digits.partition(".")[2]), 5e-4 * value if value >= 1000 else 0.0)
    return abs(float(digits) - value) <= half * (1 + 1e-9)


def test_a_cell_shows_a_number_to_its_digits():
    assert shows(".762", 0.76235) and not shows(".762", 0.7631) and shows("2,253", 2253.2) and shows("553,900", 553925.6)
    assert not shows("2,263", 2253.2) and not shows("", 0.0) and not shows("no", 1.0)
    assert shows("19", 19.4) and not shows("19", 19.6)


def test_the_peers():
    rows = [row for row in results("peers.json")["rows"].values() if "error" not in row]
    base = next(row["perplexity"] for row in rows if row["name"] == "full precision")
    told = re.search(r"full precision ([\d.]+)", README)
    assert told and shows(told[1], base)
    shown = table("Measured")[1:]
    assert len(shown) >= 8
    for label, bits, perplexity, ratio in shown:
        assert any(
            all(map(shows, (bits, perplexity, ratio), (row["bits_per_weight"], row["perplexity"], row["perplexity"] / base)))
            for row in rows
        ), label


def test_the_products():
    (_, *shapes), *shown = table("Speed")
    rows = [row for row in results("kernels_cpu.json")["rows"] if row["tokens"] == 1]
    for label, *cells in shown:
        for shape, cell in zip(shapes, cells, strict=True):
            times = [row["ms"] for row in rows if f"{row['n']} x {row['d']}" == shape]
            for figure in cell.split(", "):
                assert any(shows(figure, ms) for ms in times), (label, shape, figure)


def test_the_products_of_many_tokens():
    (_, *columns), *shown = table("Speed", 1)
    rows = results("kernels_cpu.json")["rows"]
    assert len(shown) >= 6
    for label, *cells in shown:
        for column, cell in zip(columns, cells, strict=True):
            shape, _, tokens = column.partition(", ")
            there = [r for r in rows if f"{r['n']} x {r['d']}" == shape and r["tokens"] == int(tokens)]
            named = [r for r in there if all(word in r["format"] for word in re.findall(r"[\w.]+", label.split(" (")[0]))]
            assert any(shows(cell, r["times_bfloat16"]) for r in named), (label, column)


def test_the_stages_of_recovery():
    rows = results("recovery.json")["rows"]
    _, *shown = table("Measured", 2)
    assert [re.findall(r"`(\w+)`", label) for label, *_ in shown] == [["none"], ["absorbed"], ["blocks"], ["distilled"]]
    for label, *cells in shown:
        for bits, three in ((1, cells[:3]), (2, cells[3:])):
            row = rows[f"{label.split('`')[1]} {bits} wikitext2_train_1mb.txt 32 rows"]
            assert all(map(shows, three, (row["perplexity"], row["ratio"], row["cpu_seconds"]))), (label, bits)


def test_generate_and_one_matrix():
    number = r"([\d.]+)"
    at = rf"tokens a second\): {number} at 1 bit, double binary, against {number} .* trellis, {number} against {number}"
    told = re.search(at, README)
    found = [run[kind]["tokens_per_second"] for run in results("generate_cpu.json").values() for kind in ("compressed", "dense")]
    assert told and all(map(shows, told.groups(), found))
    for line in results("one_matrix.json")["lines"]:
        told = re.search(rf"`{line['method']}`[^`]*? ([\d.]+) s, (\d+) %", README)
        assert told and shows(told[1], line["seconds"]) and shows(told[2], 100 * line["share"]), line["method"]


def test_the_products_of_a_gpu():
    found = results("kernels_gpu.json")["lines"]
    (_, _, *formats), *shown = table("Speed", 2)
    assert len(shown) >= 5
    for label, cublas, *cells in shown:
        shape, _, tokens = label.partition(", ")
        lines = [line for line in found if f"{line['n']} x {line['d']}" == shape and line["tokens"] == int(tokens)]
        assert all(shows(cublas, line["cublas_us"]) for line in lines), label
        for name, cell in zip(formats, cells, strict=True):
            us = [line["us"] for line in lines if f"{line['grid']} {line['bits']:g} bit" == name]
            assert not cell or shows(cell, *us), (label, name)


def test_the_heads():
    sets = results("convex_heads.json")["sets"]
    measures = ("accuracy", "nll", "seconds")
    _, *shown = table("Heads")
    assert len(shown) >= 4
    for label, *cells in shown:
        for name, three in (("sst2/2bit", cells[:3]), ("agnews/2bit", cells[3:])):
            means = [[fmean(row[m] for row in rows) for m in measures] for rows in sets[name]["methods"].values()]
            assert any(all(map(shows, three, found)) for found in means), (label, name, three)


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "eval/results").glob("*.json")))
def test_a_file_of_results_names_no_place_of_a_machine(name: str):
    text = (ROOT / "eval/results" / name).read_text()
    assert not re.search(r'"(/|[A-Z]:\\\\)(home|root|tmp|work|Users)\b', text)
