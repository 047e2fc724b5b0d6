"""Zero-shot tasks through lm-eval (EleutherAI): its definitions, its model wrapper HFLM, its metrics.  The one door to lm_eval.

What is ours: where samples come from (`task_data` or the Hub), answers that a killed run finds again, and scores of each
sample.  lm-eval's defaults are left as they are: no examples before the question, no chat template, BOS as the tokenizer has it.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import datasets
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import nn

from lplr.errors import RecipeError
from lplr.evaluate.kept import Kept
from lplr.evaluate.task_data import FORMS, read_task
from lplr.evaluate.tasks import PERPLEXITY, TaskScores
from lplr.hf.text import reading_hub

METRICS = ("acc", "acc_norm", "exact_match", PERPLEXITY)  # that have one number a sample
FEWSHOT_SEED = 1234  # lm-eval's own

Step = Callable[[float, float, str], None]


def load_tasks(names: Sequence[str], folder: Path | None = None) -> dict[str, Any]:
    """Task name -> task of lm-eval; groups and tags give all theirs.  Samples of a local file where `folder` has one of the task.

    Raises RecipeError for an unknown name, DatasetError for files that cannot be read or a dataset that cannot be had.
    """
    with _quiet():
        manager, found = TaskManager(), {}
        for name in names:
            if name not in manager.task_index:
                near = get_close_matches(name, manager.all_tasks, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"among others there are {', '.join(FORMS)}"
                raise RecipeError(f"unknown task {name!r}: {hint}")
            local = read_task(name, folder) if folder is not None else None
            if local is not None:
                samples = datasets.Dataset.from_list(local.rows)
                # the way of lm-eval to change fields of a task that it knows is a group of one
                own = {"task": name, "dataset_path": None, "dataset_name": None, "training_split": None}
                own |= {"validation_split": None, "test_split": "test", "custom_dataset": lambda s=samples, **_: {"test": s}}
                loaded = manager.load({"group": f"local {name}", "task": [own]})["tasks"]
                source = f"{local.name}, sha256 {local.sha256[:16]}"
            else:
                where = f"give --task-data FOLDER with a jsonl file of {name}" if name in FORMS else "check the connection"
                with reading_hub(name, where):
                    loaded = manager.load(name)["tasks"]
                source = "the Hub"
            for task in loaded.values():
                if task.get_config("num_fewshot") is None:
                    task.set_config(key="num_fewshot", value=0)
                task.set_fewshot_seed(seed=FEWSHOT_SEED)
                task.set_config(key="metadata", value={**(task.get_config("metadata") or {}), "source": source})
            found |= loaded
    return found


def score(
    model: nn.Module,
    tokenizer: Any,
    tasks: dict[str, Any],
    *,
    limit: int | None = None,
    batch_size: int = 1,
    kept: Kept | None = None,
    progress: Step | None = None,
) -> list[TaskScores]:
    """Scores of every sample (the first `limit` of each task), one entry a task and metric.

    kept holds the answers that are there already, and gets those that are not.  Raises RecipeError for a task whose metrics are
    not of single samples.
    """
    with _quiet():
        wrapper: Any = _Answers  # lm-eval hides its own methods from type checkers by a decorator
        lm = wrapper(model, tokenizer, batch_size, kept or Kept(), progress or (lambda *_: None))
        with redirect_stderr(io.StringIO()):  # the bars that lm-eval draws while it builds requests cannot be turned off
            found: Any = evaluate(lm, {"tasks": tasks}, limit=limit, bootstrap_iters=0, log_samples=True)
    assert found is not None
    out = []
    for name, task in tasks.items():
        samples = sorted(found["samples"][name], key=lambda s: s["doc_id"])
        first = samples[0]["filter"]  # a task may look at its answers in several ways: the first one counts
        samples = [s for s in samples if s["filter"] == first]
        metrics = [m for m in METRICS if m in samples[0]]
        if not metrics:
            told = ", ".join(samples[0]["metrics"])
            raise RecipeError(f"task {name} has no metric of single samples ({told}): leave it out")
        digest = hashlib.sha256(json.dumps([s["arguments"] for s in samples], default=str).encode()).hexdigest()
        about = task.get_config("metadata") or {}
        for metric in metrics:
            values = tuple(float(s[metric]) for s in samples)
            out.append(TaskScores(name, metric, values, about["source"], digest, str(about.get("version", ""))))
    return out


class _Answers(HFLM):
    """HFLM whose log-likelihoods are kept as they come; what is kept already is not computed again."""

    def __init__(self, model: nn.Module, tokenizer: Any, batch_size: int, kept: Kept, progress: Step) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)  # type: ignore[arg-type]
        self._kept, self._progress, self._done, self._all = kept, progress, 0, 0
        self._stderr = sys.stderr
        self.set_cache_hook(self)  # type: ignore[arg-type]

    def add_partial(self, attribute: str, request: Any, answer: Any) -> None:
        """What HFLM calls with each answer: a cache hook is all that has this method."""
        if attribute == "loglikelihood":
            self._kept.put(_key(request), answer)
            self._done += 1
            self._progress(float(self._done), float(self._all), f"answer {self._done} of {self._all}")

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        left = [request for request in requests if _key(request.args) not in self._kept]
        self._all, self._done = len(requests), len(requests) - len(left)
        if left:
            with redirect_stderr(self._stderr):  # our own progress is shown
                HFLM.loglikelihood(self, left, disable_tqdm=True)  # type: ignore[call-arg]
        answers = (self._kept[_key(request.args)] for request in requests)
        return [(float(value), bool(greedy)) for value, greedy in answers]


def _key(request: Any) -> str:
    return hashlib.sha256(json.dumps(list(request)).encode()).hexdigest()


@contextmanager
def _quiet() -> Iterator[None]:
    """Neither bars nor remarks of lm-eval and datasets: what matters is raised, or stands in the result."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in loggers]
    bars = datasets.is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
