"""The page of a head's neurons: complete, escaped, and an error for a file that is something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_page import HOSTILE, Page

from lplr.errors import OutputError
from lplr.report.neurons import EXPLANATION, made_of, render, write_explanation


def facts(text: str = "fine", neurons: int = 2) -> dict[str, Any]:
    shown = {"row": 0, "label": text, "text": text, "distance": -0.25}
    neuron = {
        "number": 3, "effect": 0.5, "when_open": -0.125, "share": 0.5, "on": 0, "agreement": 0.98, "correlation": 0.999,
        "favours": text, "samples": [shown, shown], "open": [shown], "closed": [],
        "points": {"distances": [-1.0, 0.5, 2.0], "added": [0, 1, 2.5], "along": [0.1, 0.2, 0.3], "samples": [[0.1, 0.2, 0.3]]},
    }  # fmt: skip
    return {
        "head": f"/x/{text}", "dataset": text, "samples": 3, "accuracy": 0.5, "classes": [text, "other"], "kind": "gated",
        "network_neurons": 9, "linear_effect": 0.1, "labels": [0, 1, 0],
        "neurons": [{**neuron, "number": 3 + i} for i in range(neurons)],
    }  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_texts_are_data(text: str):
    html = render(facts(text))
    page = Page(html)
    assert "script" not in {tag for tag, _ in page.tags} and "img" not in {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert text in page.texts or not text.strip()


def test_every_neuron_has_its_texts_and_two_pictures():
    page = Page(render(facts(neurons=3)))
    tags = [tag for tag, _ in page.tags]
    assert tags.count("svg") == 6 and tags.count("table") == 9 and tags.count("h2") == 3
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    said = " ".join(page.texts)
    assert "lowers the logit" in said and "98.0 % of all texts" in said and "Linear part" in said


def test_a_network_without_linear_part_or_neurons():
    assert "Linear part" not in render({**facts(neurons=0), "linear_effect": None})


def test_how_well_a_neuron_is_made_of_its_texts():
    neuron = facts()["neurons"][0]
    assert made_of({**neuron, "on": 16}) == "goes through 16 texts; 2 of them, far apart:"
    assert made_of({**neuron, "on": 2}) == "goes through these 2 texts:"
    assert "no hyperplane" in made_of({**neuron, "agreement": 0.0})


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"classes": []}', "\xff"])
def test_a_damaged_file(content: str, tmp_path: Path):
    (tmp_path / EXPLANATION).write_text(content, encoding="latin-1")
    with pytest.raises(OutputError, match="is damaged"):
        write_explanation(tmp_path)
    (tmp_path / EXPLANATION).write_text(json.dumps(facts()))
    assert write_explanation(tmp_path).read_text().startswith("<!doctype html>")
