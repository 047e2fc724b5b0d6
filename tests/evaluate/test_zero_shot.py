"""lplr.evaluate.zero_shot against lm-eval's own HFLM and local-dataset configuration, sample by sample."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from lplr.errors import DatasetError, RecipeError
from lplr.evaluate.kept import Kept
from lplr.hf.load import load_model, load_tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "eval/quality"))
import harness_agreement  # noqa: E402
from harness_agreement import METRICS, OWN, own_values  # noqa: E402

# lm_eval warns of what it deprecates in itself
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:lm_eval", "ignore::ResourceWarning")
pytest.importorskip("lm_eval", reason="needs the extra `eval`")

LIMIT = 8


@pytest.fixture(scope="module")
def stories(shared: Path) -> tuple[Path, Any, Any]:
    path = shared / "data/models/stories260k"
    return path, load_model(path), load_tokenizer(path)


@pytest.fixture(scope="module")
def tasks(shared: Path) -> dict[str, Any]:
    from lplr.evaluate.zero_shot import load_tasks

    return load_tasks(list(OWN), shared / "data")


def test_every_sample_is_scored_as_lm_eval_scores_it(
    stories: tuple[Path, Any, Any], tasks: dict[str, Any], shared: Path, tmp_path: Path
) -> None:
    from lplr.evaluate.zero_shot import score

    path, model, tokenizer = stories
    found = {(s.task, s.metric): s for s in score(model, tokenizer, tasks, limit=LIMIT)}
    assert set(found) >= {("lambada_openai", "perplexity"), ("piqa", "acc_norm"), ("arc_easy", "acc_norm"), ("boolq", "acc")}
    for task in OWN:
        theirs = own_values(task, shared / "data", path, LIMIT, tmp_path)
        for metric in METRICS:
            if (task, metric) in found:
                # the same prompts through the same wrapper and model: the very same numbers
                assert len(theirs[metric]) == LIMIT
                assert found[task, metric].values == tuple(theirs[metric]), (task, metric)
    assert found["piqa", "acc"].source.startswith("piqa_valid.jsonl, sha256 ")


def test_a_sample_that_disagrees_is_named() -> None:
    ours = {"acc": [0.0, 1.0, 1.0], "perplexity": [-3.5, -1.25, -0.5]}
    found = harness_agreement.compared(ours, {"acc": [0.0, 1.0, 0.0], "acc_norm": [1.0] * 3, "perplexity": [-3.5, -1.25, -0.5]})
    assert found["samples"] == 3 and "acc_norm" not in found and found["perplexity"]["differ"] == []
    assert found["acc"] == {"agree": 2, "differ": [2], "ours": 2 / 3, "lm_eval": 1 / 3}


def test_the_agreement_script_goes_on_and_writes_what_it_found(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LPLR_CACHE", str(tmp_path / "cache"))
    words = ["--model", shared / "data/models/stories260k", "--data", shared / "data", "--tasks", "piqa"]
    for samples in (2, 4):  # the answers of the first run are found again by the second
        line = ["harness_agreement.py", *words, "--samples", samples, "--output", tmp_path / "found.json"]
        monkeypatch.setattr("sys.argv", [str(word) for word in line])
        with pytest.raises(SystemExit) as end:
            harness_agreement.main()
        assert end.value.code == 0
    found = json.loads((tmp_path / "found.json").read_text())["tasks"]["piqa"]
    assert found["samples"] == 4 and found["acc"]["agree"] == found["acc_norm"]["agree"] == 4
    assert "piqa, acc: 4 of 4 samples agree" in capsys.readouterr().out
    (work,) = (tmp_path / "cache/eval").glob("*.jsonl")
    assert len(work.read_text().splitlines()) == 1 + 4 * 2


def test_a_killed_run_finds_its_answers_again(stories: tuple[Path, Any, Any], tasks: dict[str, Any], tmp_path: Path) -> None:
    from lplr.evaluate.zero_shot import score

    _, model, tokenizer = stories
    some = {name: tasks[name] for name in ("piqa", "boolq")}
    unbroken = score(model, tokenizer, some, limit=4)
    seen: list[tuple[float, float, str]] = []

    def stop(done: float, total: float, what: str) -> None:
        seen.append((done, total, what))
        if len(seen) == 5:
            raise KeyboardInterrupt

    path = tmp_path / "work.jsonl"
    with pytest.raises(KeyboardInterrupt):
        score(model, tokenizer, some, limit=4, kept=Kept(path, "x"), progress=stop)
    assert len(path.read_text().splitlines()) == 6 and seen[-1][:2] == (5.0, 16.0)
    resumed = score(model, tokenizer, some, limit=4, kept=Kept(path, "x"), progress=lambda *step: seen.append(step))
    assert resumed == unbroken and len(seen) == 16

    class Broken:
        config, device = model.config, model.device
        tie_weights = eval = lambda self: None

        def __call__(self, *_: object) -> None:
            raise AssertionError("every answer was kept")

    assert score(Broken(), tokenizer, some, limit=4, kept=Kept(path, "x")) == unbroken  # type: ignore[arg-type]


@pytest.mark.parametrize("task", ["arc_challenge", "hellaswag", "winogrande", "openbookqa"])
def test_tasks_whose_files_are_made_up(stories: tuple[Path, Any, Any], tmp_path: Path, task: str) -> None:
    from lplr.evaluate.zero_shot import load_tasks, score

    rows = {
        "arc_challenge": [{"query": "Question: A?", "choices": ["x", "yes"], "gold": 1}] * 3,
        "hellaswag": [{"activity_label": "Run", "ctx_a": "He", "ctx_b": "runs", "endings": ["[title] a", "b"], "label": 1}] * 3,
        "winogrande": [{"sentence": "The cat saw the dog and _ ran.", "option1": "a", "option2": "b", "answer": "2"}] * 3,
        "openbookqa": [{"question": {"stem": "S", "choices": [{"text": "a", "label": "A"}]}, "answerKey": "A"}] * 3,
    }[task]
    (tmp_path / f"{task}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    _, model, tokenizer = stories
    (acc, *_) = score(model, tokenizer, load_tasks([task], tmp_path), limit=2, batch_size=2)
    assert acc.metric == "acc" and len(acc.values) == 2 and set(acc.values) <= {0.0, 1.0}


def test_unknown_tasks_and_absent_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lplr.evaluate.zero_shot import load_tasks

    with pytest.raises(RecipeError, match="did you mean 'piqa'"):
        load_tasks(["piqaa"])
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.load_dataset", _no_hub)
    with pytest.raises(DatasetError, match="--task-data FOLDER with a jsonl file of piqa"):
        load_tasks(["piqa"], tmp_path)


def _no_hub(*_: object, **__: object) -> None:
    raise ConnectionError("no route")
