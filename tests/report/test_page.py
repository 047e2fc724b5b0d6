"""lplr.report: one page, complete and escaped, from whatever stands in run.jsonl and eval-*.json."""

from __future__ import annotations

import json
import math
import os
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lplr import records
from lplr.errors import OutputError
from lplr.evaluate.result import EvalResult
from lplr.records import LayerRecord
from lplr.report import write_report
from lplr.report.network import kind, network
from lplr.report.page import COLUMNS
from lplr.report.plots import error_limits, errors_of_kind, relative
from lplr.report.text import number, size

VOID = {"meta", "input", "br", "link", "img"}
HOSTILE = [
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "<b>bold</b> & 'quoted' {{ 7 * 7 }} {% raw %}",
    r"model.$\frac{1$.q_proj",
    "模型.层.0.注意力\x01",
    "a" * 400,
    "0.1.2",
    "",
]


class Page(HTMLParser):
    """Tags with their attributes, text, and whether every tag is closed in turn."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def record(name: str, block: int = 0, **changes: Any) -> LayerRecord:
    fields: dict[str, Any] = {
        "name": name, "block": block, "shape": (64, 48), "method": "lplr", "rank": 12, "l_bits": 2, "r_bits": 2,
        "bits": 64 * 48 * 2, "norm": 10.0, "error": 3.0, "certificate": 3.1, "probe_certificate": 3.5,
        "probe_failure": 1e-6, "bound": 25.0, "optimal": 1.0, "weighted_error": 0.2, "seconds": 0.5,
        "spectrum": ((1, 5.0), (4, 2.0), (12, 1.0), (48, 0.1)),
    }  # fmt: skip
    return LayerRecord(**{**fields, **changes})


def full_run() -> list[Any]:
    """Three blocks of three kinds, one matrix left dense."""
    layers = [record(f"model.layers.{b}.self_attn.{k}", b) for b in range(3) for k in ("q_proj", "k_proj")]
    dense = {"stored": "dense", "bits": 64 * 48 * 16, "error": 0.0, "certificate": 0.0, "bound": None, "rank": 0}
    run = {
        "kind": "run", "model": "org/tiny", "source": {"sha256": "ab"}, "lplr": "0.1.0", "fingerprint": "f" * 64,
        "recipe": {"bits": 2.0, "rules": [{"match": "*v_proj", "bits": 4}], "rank": None},
        "calibration": {"name": "builtin (Python 3.12)", "sha256": "c" * 64, "rows": 128, "seqlen": 512},
    }  # fmt: skip
    done = {
        "kind": "done", "weights": 18432, "bits_per_weight": 1.987, "bytes": 83_401_216, "parameters": 134_515_008,
        "bits_per_parameter": 4.96, "seconds": 412.3,
    }  # fmt: skip
    return [run, *layers, record("model.layers.2.mlp.down_proj", 2, **dense, note="costs more than it saves"), done]


EVALUATION = {
    "dataset": "builtin:heldout", "seqlen": 2048, "windows": 8, "tokens": 16376, "perplexity": 31.4, "nll_se": 0.05,
    "dataset_sha256": "d" * 64, "text_tokens": 20000, "nll": 3.4468,
    "base_perplexity": 20.97, "ratio": 1.4974, "kl": 0.4123, "top1": 0.712, "bos": "none: because", "finite": True,
}  # fmt: skip

PROVED = {
    "confidence": 0.95, "windows": 148, "smoothing": 0.01, "kl": 0.40, "kl_bound": 0.912, "ratio": 1.52, "ratio_bound": 2.61,
    "disagreement": 0.29, "disagreement_bound": 0.4321, "lag1": -0.03, "range": 15.5, "vocabulary": 49152,
}  # fmt: skip
TASKS = [
    {
        "task": "arc_easy", "metric": "acc", "samples": 2376, "value": 0.5012, "se": 0.01026, "base_value": 0.5631,
        "base_se": 0.01018, "difference": -0.0619, "low": -0.0812, "high": -0.0431, "changed": 0.1834, "source": "the Hub",
        "samples_sha256": "e" * 64, "version": "1.0", "per_sample": [1.0, 0.0],
    },
    {
        "task": "lambada_openai", "metric": "perplexity", "samples": 5153, "value": 31.25, "se": 1.5, "base_value": None,
        "source": "lambada.jsonl", "samples_sha256": "f" * 64, "version": "1.0", "per_sample": [-3.0, -3.9],
    },
]  # fmt: skip
SPEED = {
    "prompt": 128, "written": 32, "reading": 151.2, "writing": 12.34, "peak_memory": 712_345_678, "idle_memory": 301_000_000,
    "load_seconds": 1.5,
    "dtype": "bfloat16", "device": "cpu", "threads": 2,
}  # fmt: skip


def page_of(folder: Path, entries: list[Any], **evaluations: Any) -> tuple[str, Page]:
    records.append(folder / "run.jsonl", entries)
    for name, evaluation in evaluations.items():
        (folder / f"eval-{name}.json").write_text(json.dumps(evaluation))
    path = write_report(folder)
    assert path == folder / "report.html"
    html = path.read_text(encoding="utf-8")
    return html, Page(html)


def test_page_tells_the_numbers(tmp_path: Path) -> None:
    _, page = page_of(tmp_path, full_run(), heldout=EVALUATION)
    for expected in (
        "org/tiny", "1.987", "4.960", "83.40 MB", "83,401,216 bytes", "134,515,008 parameters",
        "18,432 compressed weights", "20.97 → 31.40", "on builtin:heldout, context 2,048; calibrated on builtin",
        "calibrated on builtin (Python 3.12), 128 windows of 512 tokens",
        "31.40 ± 1.6", "1.497", "0.412", "71.2 %", "6 of 6 within their certificate", "6 compressed, 1 stored as they",
        "costs more than it saves", '[{"bits": 4, "match": "*v_proj"}]', "f" * 64, "Certificate", "Bound", "Optimum",
    ):  # fmt: skip
        assert expected in page.text, expected
    assert "not finished" not in page.text


def test_page_tells_what_is_proved_tasks_and_speed(tmp_path: Path) -> None:
    evaluation = {**EVALUATION, "kl_se": 0.0152, "difference_se": 0.01, "certificate": PROVED, "tasks": TASKS, "speed": SPEED}
    EvalResult.model_validate_json(json.dumps(evaluation))  # the harness would keep this: it refuses a name that it does not know
    _, page = page_of(tmp_path, full_run(), heldout=evaluation)
    for expected in (
        "1.497 ± 0.015", "0.412 ± 0.015",  # 1.4974 * 0.01
        "builtin:heldout 95 % 148 0.400, at most 0.912 1.520, at most 2.610 29.0 %, at most 43.2 % 0.010 -0.030",
        "arc_easy acc 2,376 56.31 % ± 1.02 50.12 % ± 1.03 -6.19 (-8.12 to -4.31) 18.3 % the Hub",
        "lambada_openai perplexity 5,153 – 31.25 ± 1.50 – – lambada.jsonl",
        "12.3 151 712.3 MB 301 MB 1.50 s bfloat16, cpu, 2 threads",
    ):  # fmt: skip
        assert expected in page.text, expected


def test_page_tells_what_its_heads_are_worth(tmp_path: Path) -> None:
    measured = {"accuracy": 0.7534, "standard_error": 0.0146, "nll": 0.5012, "calibration_error": 0.031}
    heads = {
        "sst2": {"text": "test.tsv", "samples": 872, **measured},
        "<b>odd": {"text": HOSTILE[0], "samples": None, "accuracy": [], "nll": 10**400},
    }
    for name, evaluation in heads.items():
        (tmp_path / "heads" / name).mkdir(parents=True)
        (tmp_path / "heads" / name / "eval-x.json").write_text(json.dumps(evaluation))
    html, page = page_of(tmp_path, full_run())
    assert "Head Text Samples Accuracy NLL, nats Calibration error" in page.text
    assert "sst2 test.tsv 872 75.34 % ± 1.46 0.5012 0.0310" in page.text and "<b>odd" in page.text
    assert len(page.all("script")) == 1 and HOSTILE[0] not in html


@pytest.mark.parametrize("odd", [None, [], {}, "x", 3, [None, {}], {"kl": HOSTILE[0], "value": [], "threads": {}}, 10**400])
def test_odd_evaluations_are_shown(tmp_path: Path, odd: Any) -> None:
    evaluation = {"certificate": odd, "tasks": odd, "speed": odd, "kl": odd, "dataset": odd, "seqlen": odd, "finite": odd}
    html, page = page_of(tmp_path, full_run(), x=evaluation)
    assert len(page.all("script")) == 1 and HOSTILE[0] not in html


def test_half_of_a_surrogate_pair_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "run.jsonl").write_text('{"kind": "run", "model": "a\\ud800b"}\n')
    assert "<h1>a?b</h1>" in write_report(tmp_path).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.self_attn.q_proj", "self_attn.q_proj"),
        ("transformer.h.0.attn.c_proj.weight", "attn.c_proj"),
        ("model.layers.3.mlp.experts.7.up_proj", "mlp.experts.up_proj"),
        ("lm_head", "lm_head"),
        ("model.embed_tokens.weight", "embed_tokens"),
        ("0.1.2", "0.1.2"),
        ("", "–"),
    ],
)
def test_kind(name: str, expected: str) -> None:
    assert kind(name) == expected


def test_the_map_has_a_cell_for_every_kind_and_block() -> None:
    """Against a count by hand over random bits, ranks and gaps: the mean of a cell is that of its bits over its weights."""
    chance = random.Random(0)
    layers = [
        record(f"m.{b}.x.{e}.{k}", b, bits=chance.randrange(1, 9) * 3072, rank=chance.randrange(3), shape=(64, 48 * n))
        for b in range(7)
        for k in ("up", "down")
        for e, n in enumerate((1, 2))
        if chance.random() < 0.8
    ]
    found = network(layers)
    assert found is not None and found["blocks"] == sorted({r.block for r in layers})
    means = {}
    for row in found["rows"]:
        for block, cell in zip(found["blocks"], row.cells, strict=True):
            mine = [r for r in layers if r.block == block and r.name.endswith(row.kind.removeprefix("x"))]
            assert (cell is None) == (not mine)
            if cell is not None:
                ranks = [r.rank for r in mine]
                means[cell] = sum(r.bits for r in mine) / sum(r.shape[0] * r.shape[1] for r in mine)
                assert cell.bits == f"{means[cell]:.2g}"
                assert cell.rank == ("" if max(ranks) == 0 else "–".join(map(str, sorted({min(ranks), max(ranks)}))))
    shades = [cell.shade for cell in sorted(means, key=lambda cell: means[cell])]
    assert shades == sorted(shades) and shades[0] == "m0" and shades[-1] == "m5"
    assert network([]) is None


def allocated_run() -> list[Any]:
    """The full run, its q_proj of more bits than its k_proj."""
    run, *layers, dense, done = full_run()
    layers = [r.model_copy(update={"bits": r.bits * (1 + b)}) if r.name.endswith("q_proj") else r for b, r in enumerate(layers)]
    line = {
        "kind": "allocation", "unit": "nats a token", "predicted": 0.123456, "slope": 1e-9,
        "layers": {r.name: {"bits": r.bits, "curve": [[r.bits, 0.02]]} for r in layers},
    }  # fmt: skip
    return [run, line, *layers, dense, done]


def test_page_tells_what_was_allocated(tmp_path: Path) -> None:
    html, page = page_of(tmp_path, allocated_run())
    assert "Total predicted loss: 0.1235 nats a token" in page.text
    # q_proj of 2, 6 and 10 bits at rank 12, k_proj of 2; down_proj is dense and there in the last block alone
    assert "self_attn.q_proj 2 , rank 12 6 , rank 12 10 , rank 12 6 3" in page.text
    assert "self_attn.k_proj 2 , rank 12 2 , rank 12 2 , rank 12 2 3" in page.text and "mlp.down_proj 16 16 1" in page.text
    shades = [cell.get("class") for cell in page.all("td")]
    # log2(6 / 2) of log2(10 / 2) is 0.68, of five steps 3.4
    assert [shades.count(s) for s in ("m0", "m3", "m5", "dense")] == [4, 1, 1, 1]
    assert page.all("figure") and all(th.get("scope") in ("col", "row") for th in page.all("th"))
    (tmp_path / "other").mkdir()
    plain, page = page_of(tmp_path / "other", full_run())
    assert "predicted" not in page.text and 'id="network"' in plain


@pytest.mark.parametrize(
    "line",
    [
        {},
        {"layers": []},
        {"layers": {}, "predicted": None},
        {"layers": {HOSTILE[0]: {}}, "unit": HOSTILE[0], "predicted": HOSTILE[1]},
    ],
)
def test_odd_allocations_are_shown(tmp_path: Path, line: dict[str, Any]) -> None:
    html, page = page_of(tmp_path, [{"kind": "run"}, {"kind": "allocation", **line}, record(HOSTILE[0])])
    assert len(page.all("script")) == 1 and not page.all("img") and HOSTILE[0] not in html


def test_page_needs_nothing_else(tmp_path: Path) -> None:
    html, page = page_of(tmp_path, full_run(), heldout=EVALUATION)
    assert set(re.findall(r"https?://[^\"' ]+", html)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    loads = [(tag, a) for tag, a in page.tags for name in a if name in ("src", "srcset", "href", "data", "action")]
    assert all((attrs.get("href") or "").startswith("#") for _, attrs in loads), loads
    assert not re.search(r"@import|url\((?!#)", html)
    assert not {"img", "iframe", "link", "object", "embed"} & {tag for tag, _ in page.tags}


def test_page_is_accessible(tmp_path: Path) -> None:
    html, page = page_of(tmp_path, full_run(), heldout=EVALUATION)
    assert page.all("html")[0]["lang"] == "en" and page.all("title") and page.all("main")
    assert any(m.get("name") == "viewport" for m in page.all("meta"))
    assert all(th.get("scope") in ("col", "row") for th in page.all("th"))
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    wanted = [a[key] for _, a in page.tags for key in ("aria-labelledby", "for") if key in a]
    assert wanted and set(wanted) <= set(ids)
    references = re.findall(r'(?:href="#|url\(#)([^")]+)', html)
    assert references and set(references) <= set(ids)
    pictures = [a for _, a in page.tags if a.get("role") == "img"]
    assert len(pictures) == 2 + 3 and all(a.get("aria-label") for a in pictures)
    labels = " ".join(str(a["aria-label"]) for a in pictures)
    assert "2 matrices" not in labels and "3 matrices: error 0.300, certificate 0.310, bound 2.50, optimum 0.100" in labels
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1 and all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False))


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_have_contrast(tmp_path: Path) -> None:
    """WCAG 2.2: 4.5 for text, 3 for the lines of a plot, in the light and in the dark page."""
    html, _ = page_of(tmp_path, full_run())
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block)) for block in re.findall(r":root \{(.*?)\}", html, re.DOTALL)
    )
    assert light.keys() == dark.keys()
    text = [("ink", "page"), ("ink", "panel"), ("soft", "page"), ("soft", "panel"), ("warn", "warn-page")]
    inks = ("low-ink", "low-ink", "low-ink", "mid-ink", "high-ink", "high-ink")
    text += [("link", "page"), *((ink, f"m{i}") for i, ink in enumerate(inks))]
    lines = [(name, "page") for name in ("error", "certificate", "bound", "optimal", "link")]
    for theme in (light, dark):
        for pairs, least in ((text, 4.5), (lines, 3.0)):
            for front, back in pairs:
                low, high = sorted((_luminance(theme[front]), _luminance(theme[back])))
                assert (high + 0.05) / (low + 0.05) >= least, (front, back)


def test_names_do_not_break_out(tmp_path: Path) -> None:
    run = {"kind": "run", "model": HOSTILE[0], "recipe": {HOSTILE[1]: HOSTILE[2]}, "calibration": {"name": HOSTILE[0]}}
    entries = [run, *(record(name, i, note=name, method=name, error=4.0) for i, name in enumerate(HOSTILE))]
    evaluation = {
        **EVALUATION,
        "dataset": HOSTILE[0],
        "note": HOSTILE[1],
        "bos": HOSTILE[2],
        "seqlen": HOSTILE[0],
        "top1": "1",
    }
    html, page = page_of(tmp_path, entries, x=evaluation)
    assert len(page.all("script")) == 1 and not page.all("img") and not page.all("b")
    assert not [a for _, a in page.tags for name in a if name.startswith("on")]
    assert "{{ 7 * 7 }}" in page.text  # shown, not evaluated
    for name in HOSTILE[:3]:
        assert name not in html
        assert " ".join(name.split()) in page.text
    assert "mathdefault" not in html
    assert "Measured error above the certificate" in page.text


def test_empty_and_unfinished_runs(tmp_path: Path) -> None:
    _, page = page_of(tmp_path, [{"kind": "run"}])
    assert "not finished" in page.text and "No matrix is compressed" in page.text and "Not evaluated yet" in page.text
    records.append(tmp_path / "run.jsonl", [record("a.b"), {"kind": "block", "file": "x"}])
    html = write_report(tmp_path).read_text()
    assert "matrices so far 1:" in html and Page(html).all("figure")


@pytest.mark.parametrize(
    "changes",
    [
        {"stored": "dense", "bits": 64 * 48 * 32},
        {"norm": 0.0, "error": 0.0, "certificate": 0.0, "optimal": 0.0, "bound": 0.0},
        {"bits": 0},
        {"spectrum": ((1, 0.0),)},
        {"spectrum": ((1, 3.0),), "rank": 0},
        {"error": 1e-30, "certificate": 1e30, "bound": None, "optimal": None, "probe_certificate": None},
        {"spectrum": tuple((i, 1e-300 / i) for i in range(1, 49))},
    ],
)
def test_odd_records_are_drawn(tmp_path: Path, changes: dict[str, Any]) -> None:
    html, page = page_of(tmp_path, [record("a.b", **changes), record("a.c", shape=(1, 1), rank=1)])
    assert len(re.findall("<tr>", html)) >= 3 and "nan" not in re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL)
    assert page.all("svg")


def test_many_kinds_and_many_layers(tmp_path: Path) -> None:
    layers = [record(f"m.{i % 40}.kind{i % 17}.weight", i) for i in range(400)]
    html, page = page_of(tmp_path, layers)
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", html)
    assert captions.count("other") == 2 and len(captions) == 24
    assert sum("data-value" in a for _, a in page.tags if _ == "td") == 400 * sum(c.numeric for c in COLUMNS)


def test_page_is_the_same_again(tmp_path: Path) -> None:
    first, _ = page_of(tmp_path, full_run(), heldout=EVALUATION)
    assert write_report(tmp_path).read_text(encoding="utf-8") == first
    assert sorted(os.listdir(tmp_path)) == ["eval-heldout.json", "report.html", "run.jsonl"]


def test_evaluations_that_are_not_finite_or_alone(tmp_path: Path) -> None:
    damaged = {"dataset": "wiki", "seqlen": 512, "perplexity": None, "finite": False}
    alone = {"dataset": "other", "seqlen": 512, "perplexity": 12.5, "finite": True}
    _, page = page_of(tmp_path, full_run(), a=alone, b=damaged)
    assert "not finite" in page.text and "eval-b.json: a logit was NaN" in page.text and "12.50" in page.text
    assert "Perplexity, base" not in page.text


def test_errors_name_the_file_and_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"has no run.jsonl: name the folder"):
        write_report(tmp_path)
    with pytest.raises(OutputError, match=r"has no run.jsonl"):
        write_report(tmp_path / "absent")
    path = tmp_path / "run.jsonl"
    path.write_text('{"kind": "layer", "name": "x"}\n')
    with pytest.raises(OutputError, match="is damaged"):
        write_report(tmp_path)
    path.write_text('{"kind": "run"}\n{"ki\n{"kind": "done"}\n')
    with pytest.raises(OutputError, match="line 2 is damaged"):
        write_report(tmp_path)
    path.write_text('{"kind": "run"}\n')
    (tmp_path / "eval-x.json").write_text("[1]")
    with pytest.raises(OutputError, match=r"eval-x.json is not the JSON of an evaluation"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_page_that_cannot_be_written(tmp_path: Path) -> None:
    records.append(tmp_path / "run.jsonl", full_run())
    (tmp_path / "report.html").mkdir()
    with pytest.raises(OutputError, match=r"cannot write .*report\.html"):
        write_report(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["report.html", "run.jsonl"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (0.0, "0"), (1.5, "1.500"), (31.4, "31.40"), (1234.5678, "1,235"), (134515008, "134,515,008"),
        (1e-7, "1.000e-07"), (-0.25, "-0.2500"),
        (None, "–"), (math.nan, "–"), (math.inf, "–"), ("x", "–"), (True, "–"), (2e20, "2.000e+20"),
    ],
)  # fmt: skip
def test_number(value: Any, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(("value", "text"), [(12, "12 bytes"), (83_401_216, "83.40 MB"), (7.1e12, "7.100 TB"), (None, "–")])
def test_size(value: Any, text: str) -> None:
    assert size(value) == text


def test_plot_holds_a_point_a_matrix() -> None:
    layers = [record(f"a.{i}.q", i) for i in range(5)]
    svg = errors_of_kind(layers, error_limits(layers), "p")
    assert svg.startswith("<svg") and svg.count("var(--error)") >= 1 and "#0101" not in svg
    assert svg.count("<use ") >= 3 * 5  # error, bound and optimum carry a marker a matrix
    assert relative(layers[0], "error") == 0.3 and relative(record("x", stored="dense"), "error") is None
    assert error_limits([record("x", stored="dense")]) is None
