"""Text for calibration and evaluation: where it comes from, and how it becomes tokens.

A dataset is one of

    builtin, builtin:train     81 % of the English reference text that every Python carries: for calibration
    builtin:heldout            the other 19 % (about 71,000 characters), no paragraph of which is in the train part
    FILE.txt, .raw, ...        a text file, UTF-8; `<|endoftext|>` separates documents
    FILE.jsonl                 one JSON object a line, its text under `text` or `content`
    wikitext2, c4, ...         short names of `HUB_NAMES`
    OWNER/NAME[:CONFIG]        any dataset of the Hub with a field `text` or `content`

WikiText (a file whose name says so, or the Hub's) is joined as GPTQ (arXiv:2210.17323) does: each line with its
newline, a blank line as "", joined by two newlines, one document.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lplr.errors import DatasetError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEPARATOR = "<|endoftext|>"
TEXT_FIELDS = ("text", "content")
TEXT_SUFFIXES = (".txt", ".text", ".md", ".raw", ".tokens")
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
HUB_CHARACTERS = 12_000_000  # read at most this much from the Hub: more than all of WikiText-2
HELD_OUT_SPLITS = ("test", "validation", "valid", "dev", "eval")

# short name -> (repository, config)
HUB_NAMES = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "wikitext103": ("Salesforce/wikitext", "wikitext-103-raw-v1"),
    "c4": ("allenai/c4", "en"),
    "tinystories": ("roneneldan/TinyStories", None),
}
# reference topics about statements, names and the debugger, 19 % of the text
HELD_OUT_TOPICS = frozenset(
    ("calls", "debugger", "dynamic-features", "exceptions", "execmodel", "import")
    + ("naming", "objects", "operator-summary", "raise", "strings")
)
_SHARED_PARAGRAPH = 40  # characters from which a repeated paragraph counts as a copy rather than a common phrase
_SHORTEST_TOPIC = 200  # below that, what is left of a topic is its heading


@dataclass(frozen=True)
class Text:
    """Documents in order, the name to show, and the SHA-256 of `joined`."""

    name: str
    documents: list[str]
    sha256: str

    @classmethod
    def of(cls, name: str, documents: Iterable[str]) -> Text:
        """Text of the documents that are not blank; raises DatasetError when there is none."""
        kept = [document for document in documents if document.strip()]
        if not kept:
            raise DatasetError(f"dataset {name!r} holds no text: give one that does, or `builtin`")
        return cls(name, kept, hashlib.sha256("\n\n".join(kept).encode()).hexdigest())

    @property
    def joined(self) -> str:
        """The documents with a blank line between them."""
        return "\n\n".join(self.documents)

    @property
    def slug(self) -> str:
        """The name as part of a file name."""
        return re.sub(r"[^A-Za-z0-9._]+", "-", self.name).strip("-.") or "text"


def read_text(dataset: str, *, split: str | None = None) -> Text:
    """The text of a dataset (see the head of this file).

    split: None for the part to calibrate on, `heldout` for the part to evaluate on (of `builtin` and of the Hub; a file
    has one part), or the name of a split of the Hub.  Raises DatasetError for a missing file, a file without text, an
    unknown name, or a Hub that cannot be reached.
    """
    name, _, part = dataset.partition(":")
    path = Path(dataset).expanduser()
    if name == "builtin":
        return _builtin(part or split or "train")
    if path.is_file():
        if split not in (None, "heldout", "train"):
            raise DatasetError(f"{dataset} is a file and has no split {split!r}: leave the split out")
        return _file(path)
    if path.is_dir():
        raise DatasetError(f"dataset {dataset} is a folder: name a text or jsonl file in it")
    if path.suffix.lower() in (*TEXT_SUFFIXES, *JSON_SUFFIXES) or dataset.startswith(("/", ".", "~")):
        raise DatasetError(f"dataset file {dataset} does not exist: check the path, or use `builtin`")
    if name not in HUB_NAMES and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        near = get_close_matches(dataset, ("builtin", *HUB_NAMES), n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise DatasetError(f"unknown dataset {dataset!r}{hint}: {_possible()}")
    return _hub(name, part or None, split or "train")


def calibration_tokens(
    tokenizer: PreTrainedTokenizerBase, text: Text, nsamples: int, seqlen: int, generator: torch.Generator
) -> Tensor:
    """Windows of the text, int64 (rows, seqlen), drawn at random without overlap.

    Documents are packed one after another, the end-of-text token between them if the tokenizer has one.  rows is
    nsamples, or as many windows as the text holds if these are fewer.  Raises DatasetError when it holds none.
    """
    encoded = _encode(tokenizer, text.documents)
    eos = getattr(tokenizer, "eos_token_id", None)
    stream: list[int] = []
    for ids in encoded:
        if stream and isinstance(eos, int):
            stream.append(eos)
        stream.extend(ids)
    windows = len(stream) // seqlen
    if not windows:
        raise DatasetError(
            f"dataset {text.name!r} has {len(stream)} tokens, fewer than one window of {seqlen}: "
            "give a shorter --seqlen or more text"
        )
    # the first window starts anywhere within the tokens that are left over
    start = int(torch.randint(len(stream) - windows * seqlen + 1, (), generator=generator))
    rows = torch.tensor(stream[start : start + windows * seqlen], dtype=torch.long).view(windows, seqlen)
    return rows[torch.randperm(windows, generator=generator)[:nsamples]]


def evaluation_tokens(tokenizer: PreTrainedTokenizerBase, text: Text) -> Tensor:
    """The whole text tokenised once, int64 (n,), without BOS or any other token that the text does not hold.

    Raises DatasetError when the tokenizer makes nothing of it.
    """
    (ids,) = _encode(tokenizer, [text.joined])
    if not ids:
        raise DatasetError(f"dataset {text.name!r} gives no token: give other text")
    return torch.tensor(ids, dtype=torch.long)


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of each text without special tokens, even from a tokenizer that puts BOS in front regardless."""
    # verbose=False: the note that a text is longer than the model's context is no news here
    rows: Any = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    bos, token = getattr(tokenizer, "bos_token_id", None), getattr(tokenizer, "bos_token", None)
    out = []
    for ids, source in zip(rows, texts, strict=True):
        forced = bos is not None and ids[:1] == [bos] and not (token and source.startswith(token))
        out.append(list(ids[1:] if forced else ids))
    return out


def _builtin(part: str) -> Text:
    """One part of `pydoc_data.topics`, in an order that does not depend on the dictionary's.

    Its content changes with the Python version, so the name says which.  Many topics repeat paragraphs of longer ones;
    each paragraph is kept once, the held-out part choosing first and then the longest topic.
    """
    if part not in ("train", "heldout"):
        raise DatasetError(f"builtin has no part {part!r}: `builtin` (to calibrate) or `builtin:heldout` (to evaluate)")
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DatasetError("this Python comes without pydoc_data, the builtin text: give a text file instead") from None
    seen: set[str] = set()
    documents: dict[str, str] = {}
    for topic in sorted(topics, key=lambda t: (t not in HELD_OUT_TOPICS, -len(topics[t]), t)):
        kept = []
        for paragraph in topics[topic].split("\n\n"):
            key = " ".join(paragraph.split())
            if len(key) < _SHARED_PARAGRAPH or key not in seen:
                kept.append(paragraph)
                seen.add(key)
        documents[topic] = "\n\n".join(kept).strip()
    label = "builtin" if part == "train" else "builtin:heldout"
    chosen = (documents[t] for t in sorted(documents) if (t in HELD_OUT_TOPICS) == (part == "heldout"))
    name = f"{label} (Python {platform.python_version()})"
    return Text.of(name, (document for document in chosen if len(document) >= _SHORTEST_TOPIC))


def _file(path: Path) -> Text:
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DatasetError(f"dataset file {path} cannot be read ({error.strerror}): check its permissions") from None
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path} is not UTF-8 text (byte {error.start}): convert it to UTF-8 first") from None
    if path.suffix.lower() in JSON_SUFFIXES:
        return Text.of(path.name, _json_lines(path, content))
    if re.search(r"wikitext|^wiki\..*\.(raw|tokens)$", path.name.lower()):
        lines = content.replace("\r\n", "\n").removesuffix("\n").split("\n")
        return Text.of(path.name, [_gptq_join(line + "\n" for line in lines)])
    documents = content.split(SEPARATOR)
    return Text.of(path.name, (d.strip("\r\n") for d in documents) if len(documents) > 1 else documents)


def _gptq_join(lines: Iterable[str]) -> str:
    return "\n\n".join(line if line.strip() else "" for line in lines)


def _json_lines(path: Path, content: str) -> Iterator[str]:
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError:
                raise DatasetError(f"{path}: line {number} is not JSON: one JSON object a line expected") from None
            yield _field(row, f"{path}, line {number}")


def _field(row: Any, where: str) -> str:
    """The text of one row, or a DatasetError that lists its fields."""
    if not isinstance(row, dict):
        raise DatasetError(f"{where}: {type(row).__name__} found, an object with the field `text` expected")
    for field in TEXT_FIELDS:
        if isinstance(row.get(field), str):
            # a lone surrogate, which JSON can spell, is no text and no tokenizer takes it
            return row[field].encode("utf-8", "replace").decode()
    fields = ", ".join(map(str, row)) or "none"
    raise DatasetError(f"{where}: no text under `text` or `content` (fields: {fields}): rename the field that holds it")


def _possible() -> str:
    names = ", ".join(HUB_NAMES)
    return f"give builtin, builtin:heldout, a text or jsonl file, {names}, or OWNER/NAME[:CONFIG] of the Hub"


@contextmanager
def reading_hub(name: str, possible: str) -> Iterator[Any]:
    """The library `datasets`; what fails while it reads the dataset `name` becomes a DatasetError that says what is possible."""
    try:
        import datasets
        from datasets.exceptions import DatasetsError
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        remedy = "pip install datasets, or give a file of text"
        raise DatasetError(f"dataset {name!r} of the Hub needs the package `datasets`: {remedy}") from None
    # the root of the HTTP client's errors, whichever client this version of the Hub's library uses
    transport: type[BaseException] = HfHubHTTPError.__bases__[0]
    try:
        yield datasets
    except (OSError, ValueError, RuntimeError, DatasetsError, transport) as error:
        reason = " ".join(str(error).split())[:300]
        remedy = f"check name and network, or {possible}"
        raise DatasetError(f"dataset {name!r} cannot be had from the Hub ({reason}): {remedy}") from None


def _hub(name: str, config: str | None, split: str) -> Text:
    """Stream a dataset of the Hub; the first HUB_CHARACTERS of it, and the name says so when that cuts it."""
    repository, default = HUB_NAMES.get(name, (name, None))
    with reading_hub(name, _possible()) as datasets:
        found = datasets.load_dataset(repository, config or default, streaming=True)
        part = choose_split(name, [str(key) for key in found], split)
        rows, cut = _take(found[part], f"dataset {name}, split {part}")
    if repository == "Salesforce/wikitext":
        rows = [_gptq_join(rows)]
    return Text.of(f"{hub_label(name, config)} ({part}{f', first {cut:,} characters' if cut else ''})", rows)


def hub_label(name: str, config: str | None) -> str:
    """The name to show of a dataset of the Hub."""
    return ":".join([name, config] if config else [name])


def choose_split(name: str, available: list[str], wanted: str) -> str:
    """The split that is wanted, `heldout` being any of HELD_OUT_SPLITS; DatasetError when there is none."""
    if wanted in available:
        return wanted
    if wanted == "heldout":
        for candidate in HELD_OUT_SPLITS:
            if candidate in available:
                return candidate
    raise DatasetError(f"dataset {name!r} has no split {wanted!r}: choose one of {', '.join(available)}")


def _take(rows: Iterable[Any], where: str) -> tuple[list[str], int]:
    """Rows up to HUB_CHARACTERS, and how many characters were read if some are left, else 0."""
    out: list[str] = []
    size = 0
    for number, row in enumerate(rows, 1):
        if size >= HUB_CHARACTERS:
            return out, size
        out.append(_field(row, f"{where}, row {number}"))
        size += len(out[-1])
    return out, 0
