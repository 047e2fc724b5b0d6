"""Tasks of lm-eval from jsonl files: rows as publishers write them become rows as the Hub has them.

lm-eval's own definition of the task (prompt, choices, metric) reads them unchanged.  Rows may have the fields of the Hub's
dataset, those of the publisher's own release, or, for ARC, OpenBookQA and BoolQ, `query`, `choices` and `gold`.
The Hub's BoolQ puts the title of the article before the passage ("Title -- passage"); a file without titles cannot, and its
accuracy is not to be compared with one from the Hub.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lplr.errors import DatasetError
from lplr.files import sha256

Row = dict[str, Any]


@dataclass(frozen=True)
class TaskFile:
    """The samples of a task: rows as the Hub has them, the file's name and its SHA-256."""

    name: str
    sha256: str
    rows: list[Row]


def read_task(task: str, folder: Path) -> TaskFile | None:
    """The samples of `task` in the jsonl file of `folder`, at any depth, whose name begins with the task's; None without one.

    A file whose name says train is passed over.  Raises DatasetError for several files, a damaged line or a row without the
    task's fields.
    """
    if task not in FORMS:
        return None
    if not folder.is_dir():
        raise DatasetError(f"{folder} is no folder: give one that holds jsonl files of tasks")
    stem, form = FORMS[task]
    files = [p for p in sorted(folder.rglob("*.jsonl")) if _plain(p.stem).startswith(stem) and "train" not in p.stem.lower()]
    if len(files) > 1:
        raise DatasetError(f"{task}: {folder} holds {', '.join(p.name for p in files[:4])}: leave one of them")
    return TaskFile(files[0].name, sha256(files[0]), _rows(files[0], form)) if files else None


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


def _rows(path: Path, form: Callable[[Row], Row]) -> list[Row]:
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} cannot be read as UTF-8 text ({error}): check the file") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row: Any = None
        try:
            row = json.loads(line)
            rows.append(form(row))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            fields = ", ".join(row) if isinstance(row, dict) else "not an object"
            what = f"{type(error).__name__} {error}; fields: {fields}"
            raise DatasetError(f"{path}: line {number} is no sample of this task ({what}): give the publisher's rows") from None
    if not rows:
        raise DatasetError(f"{path} holds no sample: give a file that does")
    return rows


def _taken(row: Row, *fields: str) -> Row:
    return {field: row[field] for field in fields}


def _question(field: str) -> Callable[[Row], Row]:
    """ARC and OpenBookQA: the question under `field`, {"text": [..], "label": [..]}, the label of the right one."""

    def form(row: Row) -> Row:
        if "gold" in row:
            labels = [chr(ord("A") + i) for i in range(len(row["choices"]))]
            question = row["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
            return {field: question, "choices": {"text": row["choices"], "label": labels}, "answerKey": labels[row["gold"]]}
        if isinstance(row.get("question"), dict):
            inner = row["question"]
            choices = {key: [choice[key] for choice in inner["choices"]] for key in ("text", "label")}
            return {field: inner["stem"], "choices": choices, "answerKey": row["answerKey"]}
        return _taken(row, field, "choices", "answerKey")

    return form


def _boolq(row: Row) -> Row:
    if "gold" in row:
        passage, _, question = row["query"].removesuffix("\nAnswer:").rpartition("\nQuestion: ")
        label = ["no", "yes"].index(row["choices"][row["gold"]])
        return {"passage": passage.removeprefix("Passage: "), "question": question.removesuffix("?"), "label": label}
    passage = f"{row['title']} -- {row['passage']}" if "title" in row else row["passage"]
    label = row["label"] if "label" in row else row["answer"]
    return {"passage": passage, "question": row["question"], "label": int(label)}


def _hellaswag(row: Row) -> Row:
    return _taken(row, "activity_label", "ctx_a", "ctx_b", "endings") | {"label": str(int(row["label"]))}


# task -> (how the name of its file begins, letters and digits alone; what makes the Hub's row of a row)
FORMS: dict[str, tuple[str, Callable[[Row], Row]]] = {
    "lambada_openai": ("lambada", lambda row: _taken(row, "text")),
    "piqa": ("piqa", lambda row: _taken(row, "goal", "sol1", "sol2") | {"label": int(row["label"])}),
    "arc_easy": ("arceasy", _question("question")),
    "arc_challenge": ("arcchallenge", _question("question")),
    "openbookqa": ("openbookqa", _question("question_stem")),
    "boolq": ("boolq", _boolq),
    "hellaswag": ("hellaswag", _hellaswag),
    "winogrande": ("winogrande", lambda row: _taken(row, "sentence", "option1", "option2") | {"answer": str(row["answer"])}),
}
