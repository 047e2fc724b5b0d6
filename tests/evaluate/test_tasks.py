"""lplr.evaluate.tasks: standard errors as lm-eval's, paired intervals against simulation, and files of tasks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lplr.errors import DatasetError
from lplr.evaluate.task_data import FORMS, read_task
from lplr.evaluate.tasks import PERPLEXITY, TaskScores, compared, paired_interval


def scores(values: list[float], metric: str = "acc", digest: str = "d") -> TaskScores:
    return TaskScores("task", metric, tuple(values), "the Hub", digest, "1.0")


def test_value_error_difference() -> None:
    model, base = [1.0, 0, 0, 1, 1, 0, 1, 0], [1.0, 1, 0, 1, 0, 1, 1, 1]
    found = compared(scores(model), scores(base))
    assert (found.value, found.base_value, found.difference, found.changed) == (0.5, 0.75, -0.25, 0.5)
    assert found.se == pytest.approx(np.std(model, ddof=1) / math.sqrt(8))
    assert found.low is not None and found.high is not None and found.low < -0.25 < found.high
    alone = compared(scores(model))
    assert alone.difference is None and "difference" not in alone.table()[0][1]
    with pytest.raises(ValueError, match="other samples"):
        compared(scores(model), scores(base, digest="e"))
    with pytest.raises(ValueError, match="other samples"):
        compared(scores(model), scores(base[:-1]))


def test_perplexity_of_targets() -> None:
    lls = [-1.0, -2.0, -6.0]
    found = compared(scores(lls, PERPLEXITY), scores(lls, PERPLEXITY))
    assert found.value == pytest.approx(math.exp(3)) and found.difference is None and found.base_value == found.value
    assert found.se == pytest.approx(math.exp(3) * np.std(lls, ddof=1) / math.sqrt(3))
    assert compared(scores([-1e6], PERPLEXITY)).value == math.inf and compared(scores([1.0])).se is None


@pytest.mark.parametrize("n, both, model, base", [(30, 0.4, 0.1, 0.05), (100, 0.6, 0.02, 0.02), (400, 0.3, 0.2, 0.1)])
def test_the_paired_interval_covers(n: int, both: float, model: float, base: float) -> None:
    rng = np.random.default_rng(0)
    hit = 0
    for _ in range(2000):
        kind = rng.choice(4, size=n, p=[both, model, base, 1 - both - model - base])
        low, high = paired_interval((kind <= 1).astype(float), ((kind == 0) | (kind == 2)).astype(float))
        hit += low <= model - base <= high
    # 95 % and what 2,000 trials err by at three standard errors
    assert hit / 2000 >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / 2000)


def test_the_paired_interval_of_equal_answers_is_not_a_point() -> None:
    low, high = paired_interval([1.0] * 10, [1.0] * 10)
    assert low < 0 < high and paired_interval([1.0], [0.0])[1] <= 1


HUB = {
    "arc": {"question": "Why?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"},
    "boolq": {"passage": "P.", "question": "is it", "label": 1},
}
SHAPES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("arc_easy", HUB["arc"] | {"id": "1"}, HUB["arc"]),
    ("arc_challenge", {"query": "Question: Why?", "choices": ["a", "b"], "gold": 1}, HUB["arc"]),
    (
        "arc_easy",
        {"question": {"stem": "Why?", "choices": [{"text": "a", "label": "A"}, {"text": "b", "label": "B"}]}, "answerKey": "B"},
        HUB["arc"],
    ),
    (
        "openbookqa",
        {"question": {"stem": "Why?", "choices": [{"text": "a", "label": "1"}]}, "answerKey": "1"},
        {"question_stem": "Why?", "choices": {"text": ["a"], "label": ["1"]}, "answerKey": "1"},
    ),
    ("boolq", {"query": "Passage: P.\nQuestion: is it?", "choices": ["no", "yes"], "gold": 1}, HUB["boolq"]),
    ("boolq", {"query": "Passage: P.\nQuestion: is it?", "choices": ["yes", "no"], "gold": 0}, HUB["boolq"]),
    ("boolq", {"title": "T", "passage": "P.", "question": "is it", "answer": True}, HUB["boolq"] | {"passage": "T -- P."}),
    ("boolq", HUB["boolq"], HUB["boolq"]),
    ("piqa", {"goal": "g", "sol1": "x", "sol2": "y", "label": "1"}, {"goal": "g", "sol1": "x", "sol2": "y", "label": 1}),
    (
        "hellaswag",
        {"ind": 4, "activity_label": "A", "ctx_a": "a", "ctx_b": "b", "endings": ["x"], "label": 0},
        {"activity_label": "A", "ctx_a": "a", "ctx_b": "b", "endings": ["x"], "label": "0"},
    ),
    (
        "winogrande",
        {"sentence": "_ is", "option1": "x", "option2": "y", "answer": 2},
        {"sentence": "_ is", "option1": "x", "option2": "y", "answer": "2"},
    ),
    ("lambada_openai", {"text": "a b"}, {"text": "a b"}),
]


@pytest.mark.parametrize("task, row, expected", SHAPES)
def test_rows_of_every_publisher(tmp_path: Path, task: str, row: dict[str, Any], expected: dict[str, Any]) -> None:
    (tmp_path / "deep").mkdir()
    stem = {"arc_easy": "ARC-Easy-Test", "arc_challenge": "arc_challenge", "lambada_openai": "lambada_test"}.get(
        task, f"{task}_val"
    )
    (tmp_path / f"deep/{stem}.jsonl").write_text(json.dumps(row) + "\n\n")
    (tmp_path / f"deep/{stem}_train.jsonl").write_text("not read")
    found = read_task(task, tmp_path)
    assert found is not None and found.rows == [expected] and found.name == f"{stem}.jsonl"
    assert read_task("mmlu", tmp_path) is None


def test_files_that_are_no_tasks(tmp_path: Path) -> None:
    assert read_task("piqa", tmp_path) is None
    with pytest.raises(DatasetError, match="is no folder"):
        read_task("piqa", tmp_path / "missing")
    path = tmp_path / "piqa.jsonl"
    for text, what in [("{", "line 1"), ("[]", "line 1"), ('{"goal": "g"}', "fields: goal"), ("\n", "no sample")]:
        path.write_text(text)
        with pytest.raises(DatasetError, match=what):
            read_task("piqa", tmp_path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DatasetError, match="UTF-8"):
        read_task("piqa", tmp_path)
    (tmp_path / "piqa_valid.jsonl").write_text("")
    with pytest.raises(DatasetError, match="leave one"):
        read_task("piqa", tmp_path)
    assert set(FORMS) >= {"lambada_openai", "piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande", "boolq", "openbookqa"}
