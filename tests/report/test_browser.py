"""The pages in headless Chromium: nothing that axe-core, the console, the network or the layout complains of; search and sort.

Needs chromium, node, and two packages, which are found as node finds modules, for example after

    npm install --prefix FOLDER playwright-core axe-core; export NODE_PATH=FOLDER/node_modules

LPLR_PICTURES=FOLDER keeps pictures of every page, wide and narrow, light and dark.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from test_neurons import facts
from test_page import EVALUATION, HOSTILE, PROVED, SPEED, TASKS, full_run, record
from test_report_curves import pruned

from lplr import records
from lplr.report import write_report
from lplr.report.curves import write_pruning
from lplr.report.neurons import EXPLANATION, write_explanation

SCRIPT = Path(__file__).with_name("browser.cjs")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
BAD = """<!doctype html><title>x</title><p style="color: #bbb; width: 3000px">pale</p><img src="http://127.0.0.1:9/x.png">
<script>console.error("told"); absent()</script>"""
PACKAGES = "require('playwright-core'), require('axe-core')"


def _missing() -> str | None:
    """What the machine lacks."""
    if CHROMIUM is None:
        return "chromium is not installed"
    if shutil.which("node") is None:
        return "node is not installed"
    if subprocess.run(["node", "-e", PACKAGES], cwd=SCRIPT.parent, capture_output=True, timeout=60).returncode:
        return "playwright-core and axe-core are not in node_modules or NODE_PATH"
    return None


def _report(folder: Path, entries: list[Any], **evaluations: Any) -> Path:
    folder.mkdir()
    records.append(folder / "run.jsonl", entries)
    for name, evaluation in evaluations.items():
        (folder / f"eval-{name}.json").write_text(json.dumps(evaluation))
    return write_report(folder).rename(folder.with_suffix(".html"))


def _experts() -> list[Any]:
    """24 blocks of four experts, bits and ranks of every size, names that are markup, and no end."""
    found = []
    for block in range(24):
        for kind in ("q_proj", *(f"experts.{e}.up_proj" for e in range(4))):
            size = {"bits": 64 * 48 * (1 + (5 * block + len(kind)) % 7), "rank": 7 * (block % 3)}
            found.append(record(f"model.layers.{block}.mlp.{kind}", block, **size))
    hostile = [record(name, 24 + i, note=name * 3, error=4.0) for i, name in enumerate(HOSTILE)]
    return [{"kind": "run", "model": HOSTILE[0], "recipe": {HOSTILE[1]: HOSTILE[5]}}, *found, *hostile]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the browser found of every page at every width in every theme."""
    missing = _missing()
    if missing:
        pytest.skip(missing)
    folder = tmp_path_factory.mktemp("pages")
    (folder / EXPLANATION).write_text(json.dumps(facts(HOSTILE[1])))
    pages = [
        _report(folder / "full", full_run(), heldout={**EVALUATION, "certificate": PROVED, "tasks": TASKS, "speed": SPEED}),
        _report(folder / "hard", _experts(), a={"dataset": HOSTILE[5], "finite": False}, b={"note": HOSTILE[2], "tasks": TASKS}),
        _report(folder / "empty", [{"kind": "run"}]),
        write_pruning(pruned(folder)),
        write_explanation(folder),
        folder / "bad.html",
    ]
    pages[-1].write_text(BAD)
    assert CHROMIUM is not None
    command = ["node", str(SCRIPT), CHROMIUM, os.environ.get("LPLR_PICTURES", ""), *map(str, pages)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    assert len(found) == 4 * len(pages)
    return found


def test_nothing_is_complained_of(seen: list[dict[str, Any]]):
    ours = [f for f in seen if f["page"] != "bad.html"]
    assert not [(f["page"], f["width"], f["theme"], what) for f in ours for what in f["found"]]
    assert all(f["passed"] > 10 for f in ours)  # axe-core had something to check


def test_a_bad_page_is_complained_of(seen: list[dict[str, Any]]):
    for f in (f for f in seen if f["page"] == "bad.html"):
        told = " ".join(f["found"])
        for expected in ("console error: told", "absent is not defined", "request: http", "wider than the screen"):
            assert expected in told
        assert "axe color-contrast" in told and "axe image-alt" in told and "axe html-has-lang" in told


def test_search_and_sort(seen: list[dict[str, Any]]):
    found = [f["behaviour"] for f in seen if f["page"] == "full.html"]
    assert len(found) == 4
    for b in found:
        # six matrices of error 0.3, and the dense one, which has none and stands last in both directions
        assert b["up"] == b["down"] == [0.3] * 6 + [None]
        assert b["names"] == ["model.layers.1.self_attn.q_proj"] and b["count"] == "1 of 7 shown"
    hard = next(f["behaviour"] for f in seen if f["page"] == "hard.html")
    assert hard["up"] == sorted(hard["up"]) and hard["down"] == hard["up"][::-1] and len(set(hard["up"])) > 1
