"""lplr.hf.text: every kind of dataset, its failures, and the two ways to make tokens of it."""

from __future__ import annotations

import hashlib
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lplr.errors import DatasetError
from lplr.hf import text as module
from lplr.hf.text import Text, calibration_tokens, evaluation_tokens, read_text


class WordTokenizer:
    """One id a word, in order of first sight; `forces_bos` puts BOS in front whatever it is asked."""

    bos_token_id, eos_token_id, bos_token = 0, 1, "<s>"

    def __init__(self, *, forces_bos: bool = False) -> None:
        self.words: dict[str, int] = {"<s>": 0, "</s>": 1}
        self.forces_bos = forces_bos
        self.calls = 0

    def __call__(self, texts: list[str], *, add_special_tokens: bool, **_: Any) -> dict[str, list[list[int]]]:
        self.calls += 1
        front = [0] if add_special_tokens or self.forces_bos else []
        return {"input_ids": [front + [self.words.setdefault(w, len(self.words)) for w in t.split()] for t in texts]}


def numbered(documents: list[int]) -> Text:
    """Documents of so many words, every word of the text a different one."""
    start = 0
    out = []
    for size in documents:
        out.append(" ".join(f"w{i}" for i in range(start, start + size)))
        start += size
    return Text.of("numbered", out)


# --- builtin -------------------------------------------------------------------------------------------------------


def test_builtin_parts_do_not_share_a_paragraph() -> None:
    train, held = read_text("builtin"), read_text("builtin:heldout")
    assert train == read_text("builtin:train") and held == read_text("builtin", split="heldout")
    paragraphs = [
        {" ".join(p.split()) for d in part.documents for p in d.split("\n\n") if len(" ".join(p.split())) >= 40}
        for part in (train, held)
    ]
    assert paragraphs[0] and paragraphs[1] and not paragraphs[0] & paragraphs[1]
    share = len(held.joined) / (len(held.joined) + len(train.joined))
    assert 0.12 < share < 0.28, share
    assert len(train.joined) > 200_000  # enough for the default 128 windows of 512


def test_builtin_is_deterministic_and_names_the_python_version() -> None:
    version = ".".join(map(str, sys.version_info[:3]))
    for dataset in ("builtin", "builtin:heldout"):
        text = read_text(dataset)
        assert text == read_text(dataset) and version in text.name
        assert text.sha256 == hashlib.sha256(text.joined.encode()).hexdigest()
    assert read_text("builtin:heldout").slug.startswith("builtin-heldout-Python-")


def test_builtin_has_two_parts() -> None:
    with pytest.raises(DatasetError, match="builtin:heldout"):
        read_text("builtin:test")


def test_python_without_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DatasetError, match="without pydoc_data"):
        read_text("builtin")


# --- files ---------------------------------------------------------------------------------------------------------


def test_wikitext_is_joined_as_gptq_does(shared: Path) -> None:
    text = read_text(str(shared / "data/wikitext2/wiki.test.raw"))
    assert text.sha256.startswith("696cca6b") and len(text.joined.encode()) == 1_296_370 and len(text.documents) == 1
    assert text.slug == "wiki.test.raw"


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_wikitext_lines_by_hand(tmp_path: Path, end: str) -> None:
    path = tmp_path / "my_WikiText_part.txt"
    path.write_bytes(b" \n = Title = \n \n One . \n Two ." + end.encode())
    assert read_text(str(path)).documents == ["\n\n = Title = \n\n\n\n\n One . \n\n\n Two .\n"]


def test_text_file_is_whole_or_split_by_its_separator(tmp_path: Path) -> None:
    whole = tmp_path / "a.txt"
    whole.write_bytes(b"\xef\xbb\xbffirst\r\n\n second\n")
    assert read_text(str(whole)).documents == ["first\r\n\n second\n"]
    parts = tmp_path / "b.md"
    parts.write_text("one\ntwo\n<|endoftext|>\n\n<|endoftext|>three")
    assert read_text(str(parts)).documents == ["one\ntwo", "three"]


def test_stories_are_documents(shared: Path) -> None:
    text = read_text(str(shared / "data/calibration/tinystories_1mb.txt"), split="heldout")
    assert len(text.documents) > 1000 and "<|endoftext|>" not in text.joined


def test_jsonl_takes_text_or_content(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    rows = [{"text": "a\nb"}, {"id": 3, "content": "c\u2028d"}, {"text": "  "}]
    path.write_text("\n\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n" + '{"text": "lone \\ud800"}\n')
    assert read_text(str(path)).documents == ["a\nb", "c\u2028d", "lone ?"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "holds no text"),
        ("blank.txt", b" \n<|endoftext|>\n", "holds no text"),
        ("empty.jsonl", b"\n", "holds no text"),
        ("latin.txt", b"caf\xe9", "not UTF-8 text .byte 3."),
        ("fields.jsonl", b'{"title": "x", "body": "y"}', "fields: title, body"),
        ("number.jsonl", b'{"text": 3}', "fields: text"),
        ("list.jsonl", b'["x"]', "list found"),
        ("broken.jsonl", b'{"text": "x"}\n{"text": ', "line 2 is not JSON"),
        ("pretty.json", b'[\n{"text": "x"}\n]', "line 1 is not JSON"),
    ],
)
def test_bad_file_is_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DatasetError, match=message) as caught:
        read_text(str(tmp_path / name))
    assert "\n" not in str(caught.value) and name in str(caught.value)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("missing.txt", "does not exist"),
        ("/no/such/place", "does not exist"),
        ("wikitex2", "did you mean 'wikitext2'.*tinystories"),
        ("", "is a folder"),
        ("none", "unknown dataset 'none'.*builtin:heldout"),
    ],
)
def test_unknown_dataset_lists_what_is_possible(dataset: str, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        read_text(dataset)


def test_file_has_no_splits(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x")
    with pytest.raises(DatasetError, match="no split 'validation'"):
        read_text(str(path), split="validation")


# --- the Hub -------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A `datasets` whose load_dataset returns state['found'] or raises state['error']."""
    state: dict[str, Any] = {"found": {}, "error": None}

    def load_dataset(path: str, name: str | None, *, streaming: bool) -> dict[str, list[dict[str, Any]]]:
        assert streaming
        state["asked"] = (path, name)
        if state["error"] is not None:
            raise state["error"]
        return state["found"]

    fake, exceptions = types.ModuleType("datasets"), types.ModuleType("datasets.exceptions")
    exceptions.DatasetsError = type("DatasetsError", (Exception,), {})  # type: ignore[attr-defined]
    fake.load_dataset, fake.exceptions = load_dataset, exceptions  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.setitem(sys.modules, "datasets.exceptions", exceptions)
    yield state


def test_hub_short_names_and_splits(hub: dict[str, Any]) -> None:
    hub["found"] = {"train": [{"text": "a"}], "validation": [{"text": "b"}, {"text": ""}, {"text": "c"}]}
    assert read_text("c4").documents == ["a"] and hub["asked"] == ("allenai/c4", "en")
    held = read_text("c4", split="heldout")
    assert held.documents == ["b", "c"] and held.name == "c4 (validation)" and held.slug == "c4-validation"
    assert read_text("some.one/thing-2:conf").name == "some.one/thing-2:conf (train)"
    assert hub["asked"] == ("some.one/thing-2", "conf")
    with pytest.raises(DatasetError, match="no split 'test': choose one of train, validation"):
        read_text("c4", split="test")


def test_hub_wikitext_equals_the_file(hub: dict[str, Any], shared: Path) -> None:
    path = shared / "data/wikitext2/wiki.test.raw"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    hub["found"] = {"test": [{"text": line + "\n" if line.strip() else ""} for line in lines]}
    text = read_text("wikitext2", split="test")
    assert hub["asked"] == ("Salesforce/wikitext", "wikitext-2-raw-v1")
    assert text.sha256 == read_text(str(path)).sha256


def test_hub_reads_a_bounded_part(hub: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HUB_CHARACTERS", 10)

    def endless() -> Iterator[dict[str, str]]:
        while True:
            yield {"text": "four"}

    hub["found"] = {"train": endless()}
    text = read_text("c4")
    assert text.documents == ["four"] * 3 and text.name == "c4 (train, first 12 characters)"


def test_hub_row_without_text_lists_its_fields(hub: dict[str, Any]) -> None:
    hub["found"] = {"train": [{"sentence": "x", "label": 1}]}
    with pytest.raises(DatasetError, match="fields: sentence, label"):
        read_text("nyu-mll/glue")


@pytest.mark.parametrize(
    "error", [ConnectionError("no\nroute"), ValueError("Config name is missing"), RuntimeError("script")]
)
def test_hub_failure_is_one_line_with_a_remedy(hub: dict[str, Any], error: Exception) -> None:
    hub["error"] = error
    with pytest.raises(DatasetError, match="cannot be had from the Hub .*check name and network") as caught:
        read_text("wikitext2")
    assert "\n" not in str(caught.value)


def test_hub_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DatasetError, match="pip install datasets"):
        read_text("c4")


# --- tokens --------------------------------------------------------------------------------------------------------


def test_calibration_windows_do_not_overlap(generator: torch.Generator) -> None:
    text = numbered([7, 1, 30, 13, 50])
    tokenizer = WordTokenizer()
    tokens = calibration_tokens(tokenizer, text, 9, 11, generator)  # type: ignore[arg-type]
    assert tokens.dtype == torch.long and tokens.shape == (9, 11) and tokenizer.calls == 1
    words = tokens[tokens != 1]
    assert len(words.unique()) == len(words)  # each word of the text is at most in one window
    assert (tokens == 1).sum() >= 3  # 105 tokens hold 4 separators; 99 are drawn, at most 6 words at the ends are not
    inside = (tokens[:, 1:] - tokens[:, :-1] == 1) | (tokens[:, 1:] == 1) | (tokens[:, :-1] == 1)
    assert inside.all()  # windows keep the order of the text


def test_calibration_windows_follow_the_generator() -> None:
    text = numbered([500])
    draw = [calibration_tokens(WordTokenizer(), text, 5, 16, torch.Generator().manual_seed(s)) for s in (0, 0, 1)]  # type: ignore[arg-type]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])


def test_short_text_gives_fewer_rows_then_an_error(generator: torch.Generator) -> None:
    tokenizer: Any = WordTokenizer()
    assert calibration_tokens(tokenizer, numbered([33]), 128, 16, generator).shape == (2, 16)
    assert calibration_tokens(tokenizer, numbered([16]), 128, 16, generator).shape == (1, 16)
    with pytest.raises(DatasetError, match="has 15 tokens, fewer than one window of 16.*--seqlen"):
        calibration_tokens(tokenizer, numbered([15]), 128, 16, generator)


def test_tokenizer_without_end_of_text(generator: torch.Generator) -> None:
    tokenizer: Any = WordTokenizer()
    tokenizer.eos_token_id = None
    tokens = calibration_tokens(tokenizer, numbered([5, 5]), 1, 10, generator)
    assert tokens.tolist() == [list(range(2, 12))]


def test_evaluation_tokens_hold_no_bos() -> None:
    text = Text.of("two", ["a b", "c <s> a"])
    for forces_bos in (False, True):
        tokens = evaluation_tokens(WordTokenizer(forces_bos=forces_bos), text)  # type: ignore[arg-type]
        assert tokens.dtype == torch.long and tokens.tolist() == [2, 3, 4, 0, 2]
    kept = evaluation_tokens(WordTokenizer(), Text.of("own", ["<s> a"]))  # type: ignore[arg-type]
    assert kept.tolist() == [0, 2]


def test_tokens_of_a_real_tokenizer(shared: Path, generator: torch.Generator) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "data/models/stories260k")
    text = read_text(str(shared / "data/calibration/tinystories_1mb.txt"))
    part = Text.of("part", text.documents[:40])
    tokens = evaluation_tokens(tokenizer, part)
    assert tokens[0] != tokenizer.bos_token_id
    assert tokenizer.decode(tokens).strip() == part.joined.strip()
    windows = calibration_tokens(tokenizer, part, 8, 64, generator)
    assert windows.shape == (8, 64) and (windows == tokenizer.eos_token_id).any()
    assert not (windows == tokenizer.bos_token_id).any()
