"""lplr.evaluate.zero_shot against lm-eval's own HFLM and local-dataset configuration, sample by sample."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lplr.errors import DatasetError, RecipeError
from lplr.evaluate.kept import Kept
from lplr.hf.load import load_model, load_tokenizer

# lm_eval warns of what it deprecates in itself
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:lm_eval", "ignore::ResourceWarning")
pytest.importorskip("lm_eval", reason="needs the extra `eval`")

LIMIT = 8
# the same tasks written out for the rows as they lie in the folder, with lm-eval's own loading of json files
OWN: dict[str, tuple[str, dict[str, Any]]] = {
    "lambada_openai": (
        "lambada/lambada_test.jsonl",
        {
            "output_type": "loglikelihood",
            "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
            "doc_to_target": "{{' '+text.split(' ')[-1]}}",
            "metric_list": [
                {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
                {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            ],
        },
    ),
    "piqa": (
        "piqa/piqa_valid.jsonl",
        {"doc_to_text": "Question: {{goal}}\nAnswer:", "doc_to_target": "label", "doc_to_choice": "{{[sol1, sol2]}}"},
    ),
    "arc_easy": (
        "arc/arc_easy_test.jsonl",
        {"doc_to_text": "{{query}}\nAnswer:", "doc_to_target": "gold", "doc_to_choice": "choices"},
    ),
    "boolq": (
        "boolq/boolq_val.jsonl",
        {"doc_to_text": "{{query.removeprefix('Passage: ')}}\nAnswer:", "doc_to_target": "gold", "doc_to_choice": "choices"},
    ),
}
BOTH = [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")]


def own_answers(task: str, folder: Path, model: Path, scratch: Path) -> list[dict[str, Any]]:
    """Samples as lm-eval scores them by itself: HFLM loads the model, datasets the file."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    file, fields = OWN[task]
    kwargs = {"data_files": {"test": str(folder / file)}, "cache_dir": str(scratch)}
    config = {"task": f"own_{task}", "dataset_path": "json", "dataset_kwargs": kwargs, "test_split": "test", "num_fewshot": 0}
    config |= {"output_type": "multiple_choice", "metric_list": BOTH, **fields}
    tasks = TaskManager(include_defaults=False).load([config])
    lm = HFLM(pretrained=str(model), dtype="float32", device="cpu", batch_size=1)
    found = evaluate(lm, tasks, limit=LIMIT, bootstrap_iters=0, log_samples=True)
    assert found is not None
    return sorted(found["samples"][f"own_{task}"], key=lambda s: s["doc_id"])


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
        samples = own_answers(task, shared / "data", path, tmp_path)
        assert len(samples) == LIMIT
        for metric in ("acc", "acc_norm", "perplexity"):
            if (task, metric) in found:
                # the same prompts through the same wrapper and model: the very same numbers
                assert found[task, metric].values == tuple(float(s[metric]) for s in samples), (task, metric)
    assert found["piqa", "acc"].source.startswith("piqa_valid.jsonl, sha256 ")


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
