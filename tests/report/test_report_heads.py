"""The heads of a folder on its page, from whatever stands beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from report.test_page import HOSTILE, full_run, page_of

from lplr.errors import OutputError

FACTS = {
    "dataset": "sst2/train.tsv", "held_out": "20% of it", "samples": 400, "neurons": 61, "relative_gap": 8.1e-5,
    "accuracy": 0.7654, "probe_accuracy": 0.7432, "nll": 0.4712, "probe_nll": 0.5021,
}  # fmt: skip
MEASURED = {"text": "dev.tsv", "samples": 872, "accuracy": 0.7534, "standard_error": 0.0146, "nll": 0.5}
MEASURED |= {"calibration_error": 0.041}


def head(folder: Path, name: str, facts: Any, **files: Any) -> None:
    made = folder / "heads" / name
    made.mkdir(parents=True)
    (made / "head.json").write_text(json.dumps(facts))
    for file, content in files.items():
        (made / f"{file}.json").write_text(json.dumps(content))


def test_heads_and_what_was_measured_of_them(tmp_path: Path) -> None:
    head(tmp_path, "sst2", FACTS, **{"eval-dev": MEASURED})
    head(tmp_path, "sst2-pruned", {**FACTS, "neurons": 5}, prune={"before": 61})
    html, page = page_of(tmp_path, full_run())
    for expected in ("sst2-pruned", "76.54 %", "74.32 %", "0.4712", "0.5021", "0.7534 ± 0.015", "0.041", "20% of it", "dev.tsv"):
        assert expected in page.text, expected
    assert "Not evaluated yet" in page.text  # the model itself
    assert html.count('id="heads"') == 1 and html.count('id="head-evaluations"') == 1


def test_a_folder_without_heads_has_no_such_tables(tmp_path: Path) -> None:
    (tmp_path / "heads/empty").mkdir(parents=True)
    html, _ = page_of(tmp_path, full_run())
    assert 'id="heads"' not in html


@pytest.mark.parametrize("text", HOSTILE)
def test_names_and_texts_are_data(text: str, tmp_path: Path) -> None:
    head(tmp_path, "one", dict.fromkeys(FACTS, text), **{"eval-x": dict.fromkeys(MEASURED, text)}, prune={"before": [text]})
    page_of(tmp_path, full_run())  # every tag is closed in turn, and none is a script from outside
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in html and "<img" not in html and "<b>bold" not in html


@pytest.mark.parametrize("content", ["[]", "{", ""])
def test_a_damaged_file_of_a_head_is_named(content: str, tmp_path: Path) -> None:
    head(tmp_path, "one", FACTS)
    (tmp_path / "heads/one/head.json").write_text(content)
    with pytest.raises(OutputError, match=r"head\.json is not the JSON"):
        page_of(tmp_path, full_run())
