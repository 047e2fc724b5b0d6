"""The model card: what it says, what it escapes, and where the licence comes from."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from lplr.hf.card import base_licence, card_text, escape
from lplr.records import LayerRecord

SUMMARY = {"bits_per_weight": 1.99996, "bits_per_parameter": 3.25}


def header(**changes: Any) -> dict[str, Any]:
    return {
        "calibration": {"name": "c4.jsonl", "rows": 128, "seqlen": 512},
        "model": "org/base",
        "versions": {"lplr": "0.1.0"},
        "recipe": {"method": "auto"},
        **changes,
    }


def record(name: str, **changes: Any) -> LayerRecord:
    facts = {"block": 0, "shape": (4, 8), "method": "lplr", "rank": 2, "bits": 64, "norm": 2.0, "error": 1.0, "certificate": 1.5}
    return LayerRecord(name=name, **{**facts, **changes})


def front(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60))
def test_every_text_is_shown_as_it_is_and_is_no_markup(text: str):
    shown = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    rendered = MarkdownIt().enable("table").render(f"| a |\n|---|\n| x{escape(text)}x |\n")
    cell = rendered.split("<td>")[1].split("</td>")[0]
    assert html.unescape(cell) == f"x{shown}x"
    assert rendered.count("<td>") == 1 and "\n" not in escape(text)


def test_numbers_and_names():
    rows = [record("model.layers.0.q_proj", bound=None), record("<script>|`x`", stored="dense", error=0.0, certificate=0.0)]
    card = card_text(header(), SUMMARY, rows, licence={"license": "apache-2.0"}, repo="me/small")
    told = front(card)
    assert told["base_model"] == "org/base" and told["base_model_relation"] == "quantized" and told["license"] == "apache-2.0"
    assert told["library_name"] == "transformers" and "lplr" in told["tags"]
    assert 'from_pretrained("me/small")' in card and "| 2.0000 |" in card and "3.250" in card
    assert r"| model.layers.0.q\_proj | 4 x 8 | 2.0000 | 2 | 0.5 | 0.75 | - |" in card
    assert "<script>" not in card and "| dense |" in card
    assert "lplr eval" in card and "c4.jsonl, 128 x 512 tokens" in card


def test_evaluations_stand_with_their_calibration_text():
    one = {"dataset": "wiki", "windows": 8, "seqlen": 2048, "perplexity": 36.188, "base_perplexity": 19.13, "ratio": 1.8913}
    two = {"dataset": "other", "perplexity": 7.0, "calibration": {"name": "c4.jsonl"}, "kl": None}
    card = card_text(header(), SUMMARY, [], evaluations=[one, two, {}, {"perplexity": "x"}])
    lines = [line for line in card.splitlines() if line.startswith(("| wiki", "| other"))]
    assert lines[0] == "| wiki (8 x 2048 tokens) | none (data-free) | 36.19 | 19.13 | 1.891 | - | - |"
    assert lines[1].startswith("| other (- x - tokens) | c4.jsonl | 7 |")


@pytest.mark.parametrize("model", ["folder-on-a-disk", "a/b/c", "with space/x", "m.gguf"])
def test_a_name_that_is_none_of_the_hub_is_no_base_model(model: str):
    assert "base_model" not in front(card_text(header(model=model), SUMMARY, []))


@pytest.mark.parametrize(
    "text, found",
    [
        ("---\nlicense: mit\ntags: [x]\n---\n# x", {"license": "mit"}),
        ("---\r\nlicense: mit\r\n---\r\n", {"license": "mit"}),
        ("---\nlicense: [a, b]\n---\n", {}),
        ("---\n: : [\n---\n", {}),
        ("---\njust a text\n---\n", {}),
        ("# no front matter\n", {}),
    ],
)
def test_the_licence_of_a_folder(tmp_path: Path, text: str, found: dict[str, str]):
    (tmp_path / "README.md").write_text(text, newline="")
    assert base_licence(str(tmp_path)) == found


def test_the_licence_of_nothing_and_of_a_gguf_file(tmp_path: Path):
    import gguf

    assert base_licence(str(tmp_path)) == {} and base_licence("/not/there") == {}
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_license("apache-2.0")
    writer.add_license_link("https://example.org")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert base_licence(str(tmp_path / "m.gguf")) == {"license": "apache-2.0", "license_link": "https://example.org"}
