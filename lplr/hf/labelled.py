"""Labelled text for classification: where it comes from.

A dataset is one of

    FILE.jsonl                 one JSON object a line: the text under a name of TEXTS, the label under one of LABELS
    FILE.tsv, FILE.csv         with a header that has such names
    sst2, imdb, ag_news        short names of HUB_NAMES
    OWNER/NAME[:CONFIG]        any dataset of the Hub with such fields

Labels are words: a number in a file is the word that spells it, a number on the Hub its class's name where there is one.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lplr.errors import DatasetError
from lplr.hf.text import JSON_SUFFIXES, choose_split, hub_label, reading_hub

TEXTS = ("text", "sentence", "content", "review", "description")
LABELS = ("label", "labels", "class", "target")
TABLES = {".tsv": "\t", ".csv": ","}
HUB_NAMES = {
    "sst2": ("stanfordnlp/sst2", None),
    "imdb": ("stanfordnlp/imdb", None),
    "ag_news": ("fancyzhx/ag_news", None),
}
_POSSIBLE = f"give a jsonl, tsv or csv file, {', '.join(HUB_NAMES)}, or OWNER/NAME[:CONFIG] of the Hub"


@dataclass(frozen=True)
class Labelled:
    """Texts and their labels in order, the name to show, and the SHA-256 of the texts."""

    name: str
    texts: list[str]
    labels: list[str]
    sha256: str

    @classmethod
    def of(cls, name: str, rows: Iterable[tuple[str, str]], limit: int | None = None) -> Labelled:
        """Of (text, label) pairs, the first `limit` of them; raises DatasetError when there is none."""
        texts, labels = [], []
        for text, label in rows:
            if limit is not None and len(texts) >= limit:
                name = f"{name} (first {limit:,})"
                break
            texts.append(text)
            labels.append(label)
        if not texts:
            raise DatasetError(f"dataset {name!r} holds no labelled text: give one that does")
        digest = hashlib.sha256("".join(f"{len(text)}:{text}" for text in texts).encode("utf-8", "replace")).hexdigest()
        return cls(name, texts, labels, digest)

    def numbers(self, classes: Sequence[str], owner: str) -> list[int]:
        """The number of each label among the classes of `owner`; DatasetError for a label that is none of them."""
        number = {label: i for i, label in enumerate(classes)}
        if strange := sorted(set(self.labels) - set(number)):
            told = ", ".join(classes)
            raise DatasetError(f"{self.name}: label {strange[0]!r} is none of {owner}, which knows {told}: use the same labels")
        return [number[label] for label in self.labels]


def read_labelled(dataset: str, *, split: str = "train", limit: int | None = None) -> Labelled:
    """The rows of a dataset (see the head of this file), the first `limit` of them.

    split: `train`, `heldout`, or the name of a split of the Hub; a file has one part.  Raises DatasetError for a missing file,
    rows without text or label, an unknown name, or a Hub that cannot be reached.
    """
    path, name = Path(dataset).expanduser(), dataset.partition(":")[0]
    if path.is_file():
        return Labelled.of(path.name, _file(path), limit)
    if path.suffix.lower() in (*JSON_SUFFIXES, *TABLES) or path.is_dir() or dataset.startswith(("/", ".", "~")):
        raise DatasetError(f"{dataset} is no file of labelled text: {_POSSIBLE}")
    if name not in HUB_NAMES and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise DatasetError(f"unknown dataset {dataset!r}: {_POSSIBLE}")
    return _hub(name, dataset.partition(":")[2] or None, split, limit)


def _file(path: Path) -> Iterator[tuple[str, str]]:
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DatasetError(f"dataset file {path} cannot be read ({error.strerror}): check its permissions") from None
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path} is not UTF-8 text (byte {error.start}): convert it to UTF-8 first") from None
    suffix = path.suffix.lower()
    if suffix in JSON_SUFFIXES:
        rows: Iterable[Any] = _json_rows(path, content)
    elif suffix in TABLES:
        # in a file with tabs quotes are part of the text
        quoting = csv.QUOTE_NONE if suffix == ".tsv" else csv.QUOTE_MINIMAL
        rows = csv.DictReader(io.StringIO(content, newline=""), delimiter=TABLES[suffix], quoting=quoting)
    else:
        raise DatasetError(f"{path}: {suffix or 'a file without suffix'} holds no labels: {_POSSIBLE}")
    for number, row in enumerate(rows, 1):
        yield _pair(row, f"{path.name}, row {number}")


def _json_rows(path: Path, content: str) -> Iterator[Any]:
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError:
                raise DatasetError(f"{path}: line {number} is not JSON: one JSON object a line expected") from None


def _pair(row: Any, where: str) -> tuple[str, str]:
    """(text, label) of one row, or a DatasetError that lists its fields."""
    if not isinstance(row, dict):
        raise DatasetError(f"{where}: {type(row).__name__} found, an object with a text and a label expected")
    text = next((row[field] for field in TEXTS if isinstance(row.get(field), str)), None)
    label = next((row[field] for field in LABELS if row.get(field) not in (None, "")), None)
    if text is None or label is None or isinstance(label, list | dict | float):
        fields = ", ".join(map(str, row)) or "none"
        what = f"no text under {', '.join(TEXTS)}" if text is None else f"no label under {', '.join(LABELS)}"
        raise DatasetError(f"{where}: {what} (fields: {fields}): rename the field that holds it")
    return text.encode("utf-8", "replace").decode(), str(label)


def _hub(name: str, config: str | None, split: str, limit: int | None) -> Labelled:
    repository, default = HUB_NAMES.get(name, (name, None))
    with reading_hub(name, _POSSIBLE) as datasets:
        found = datasets.load_dataset(repository, config or default, streaming=True)
        part = choose_split(name, [str(key) for key in found], split)
        classes = {field: getattr(kind, "names", None) for field, kind in (found[part].features or {}).items()}
        rows = (_pair(_spelled(row, classes), f"{name}, {part}, row {i}") for i, row in enumerate(found[part], 1))
        return Labelled.of(f"{hub_label(name, config)} ({part})", rows, limit)


def _spelled(row: dict[str, Any], classes: dict[str, list[str] | None]) -> dict[str, Any]:
    """Class numbers as their names; -1, no label, as none."""
    out = dict(row)
    for field, names in classes.items():
        if names and isinstance(row.get(field), int):
            out[field] = names[row[field]] if row[field] >= 0 else None
    return out
