"""prune.html and the plots of paths, from whatever stands in prune.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lplr.errors import OutputError
from lplr.report.curves import write_pruning
from lplr.report.plots import lengths_of_path


def pruned(folder: Path, **changes: Any) -> Path:
    rows = [
        {"gates": k, "neurons": k, "parameters": 10 * k, "nll": 0.5, "error": 0.1, "accuracy": 0.8, "held_out_accuracy": 0.75}
        for k in (8, 3, 0)
    ]
    found = {"before": 9, "chosen": 3, "head": {"dataset": "<script>x</script>.tsv"}, "sizes": rows}
    (folder / "prune.json").write_text(json.dumps({**found, **changes}))
    return folder


def test_the_page_shows_every_size_and_the_chosen_one(tmp_path: Path):
    html = write_pruning(pruned(tmp_path)).read_text()
    assert html.count("<tr") == 4 and html.count('class="chosen"') == 1 and "0.7500" in html and "<svg" in html
    assert "<script>" not in html and "&lt;script&gt;" in html
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("changes", [{"sizes": [{}]}, {"sizes": []}, {"sizes": None}, {"chosen": "many"}, {"head": []}])
def test_a_damaged_file_is_named(tmp_path: Path, changes: dict[str, Any]):
    with pytest.raises(OutputError, match=r"prune\.json is missing or damaged"):
        write_pruning(pruned(tmp_path, **changes))


def test_no_file_is_named(tmp_path: Path):
    with pytest.raises(OutputError, match="prune-head"):
        write_pruning(tmp_path)


def test_a_path_has_a_curve_for_every_gate_that_is_ever_active():
    svg = lengths_of_path([1.0, 0.1, 0.01], [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [2.0, 1.0, 0.0]], "q")
    assert svg.count("stroke-opacity: 0.6") == 2 and svg.startswith("<svg")
