"""The part of the page that tells how tuning went: figures of the lines, in words as well, and damaged lines left out."""

from __future__ import annotations

import re
from typing import Any

from lplr.report.page import render
from lplr.report.recovery import recovery

BLOCKS = [
    {"kind": "recovery", "block": 0, "before": 0.5, "after": 0.25, "losses": [0.25, 0.3], "tuned": []},
    {"kind": "recovery", "block": 1, "before": 0.4, "after": 0.4, "losses": [0.5, 0.6], "tuned": []},
]
WHOLE = {"kind": "distillation", "before": 2.0, "after": 0.75, "losses": [1.0, 0.75, 0.8], "tuned": ["<script>alert(1)</script>"]}


def test_the_words_are_the_figures_of_the_lines():
    (blocks, _, of_blocks), (whole, _, of_whole) = recovery([*BLOCKS, WHOLE])
    assert blocks == "blocks" and whole == "the whole model"
    assert "1 of 2 blocks better" in of_blocks and "0.5000 to 1" in of_blocks
    assert "from 2 to 0.75" in of_whole and "3 passes" in of_whole


def test_the_page_holds_a_figure_of_each_stage_and_a_link_to_them():
    page = render([{"kind": "run", "model": "m"}, *BLOCKS, WHOLE], [], [])
    section = page[page.index('<section aria-labelledby="recovery">') :]
    section = section[: section.index("</section>")]
    assert len(re.findall("<svg", section)) == 2 and len(re.findall("<figure>", section)) == 2
    assert '<a href="#recovery">' in page
    assert "<script>alert(1)" not in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_a_run_without_recovery_says_nothing_of_it():
    page = render([{"kind": "run", "model": "m"}], [], [])
    assert "recovery" not in page.replace("recovery_", "").lower() or 'href="#recovery"' not in page


def test_lines_that_hold_no_numbers_are_left_out():
    damaged: list[dict[str, Any]] = [
        {"kind": "recovery", "block": 0, "before": None, "after": 1.0, "losses": []},
        {"kind": "recovery", "block": 0, "before": float("nan"), "after": 1.0, "losses": []},
        {"kind": "distillation", "before": 1.0, "after": 1.0},
    ]
    assert recovery(damaged) == []
    (found,) = recovery([{**WHOLE, "losses": [1.0, None, 0.75]}])
    assert "2 passes" in found[2]


def test_a_block_without_error_divides_by_nothing():
    (found,) = recovery([{"kind": "recovery", "block": 0, "before": 0.0, "after": 0.0, "losses": [0.0]}])
    assert "0 of 1 blocks better" in found[2]
