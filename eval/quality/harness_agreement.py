"""`lplr eval --tasks` beside lm-eval by itself, example by example.

    python eval/quality/harness_agreement.py --model FOLDER --data FOLDER [--samples 100] [--tasks lambada_openai piqa arc_easy]
        [--output FILE]

FOLDER of --data holds lambada/, piqa/ and arc/ as in the project's data folder.  Each task is scored twice, on its first samples
in order:

    ours      `lplr.evaluate.zero_shot`: the model as `lplr` loads it, samples through lplr's reader of local files
    lm-eval   its HFLM loads the folder, its local-dataset configuration (OWN) reads the same file

Both in float32, one request at a time, so that the numbers of a sample depend on nothing but the sample.  A value of one sample
agrees if it is the very same number: right or wrong, and of LAMBADA the log-likelihood too.  Answers are kept as they come, in
lm-eval's own cache and in ours, so that a killed run goes on with what is left.  Figures go to
eval/results/harness_agreement.json after each task; the exit status is 1 if a sample disagrees.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

TARGET = Path(__file__).parents[1] / "results" / "harness_agreement.json"
METRICS = ("acc", "acc_norm", "perplexity")
BOTH = [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in METRICS[:2]]
# the tasks written out for the rows as they lie in the folder, for lm-eval's own loading of json files
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

Values = dict[str, list[float]]  # metric -> a value for each sample, in order


def own_values(
    task: str, data: Path, model: Path, samples: int, scratch: Path, wrap: Callable[[Any], Any] = lambda lm: lm
) -> Values:
    """As lm-eval scores by itself: HFLM loads the model, datasets the file."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    file, fields = OWN[task]
    kwargs = {"data_files": {"test": str(data / file)}, "cache_dir": str(scratch)}
    config = {"task": f"own_{task}", "dataset_path": "json", "dataset_kwargs": kwargs, "test_split": "test", "num_fewshot": 0}
    config |= {"output_type": "multiple_choice", "metric_list": BOTH, **fields}
    tasks = TaskManager(include_defaults=False).load([config])
    lm = HFLM(pretrained=str(model), dtype="float32", device="cpu", batch_size=1)
    found = evaluate(wrap(lm), tasks, limit=samples, bootstrap_iters=0, log_samples=True)
    assert found is not None
    rows = sorted(found["samples"][f"own_{task}"], key=lambda s: s["doc_id"])
    return {m: [float(row[m]) for row in rows] for m in METRICS if m in rows[0]}


def our_values(task: str, data: Path, model: Any, tokenizer: Any, samples: int, kept: Any = None) -> Values:
    from lplr.evaluate.zero_shot import load_tasks, score

    started, shown = time.monotonic(), [0.0]

    def progress(done: float, total: float, what: str) -> None:
        if time.monotonic() - shown[0] > 20:
            shown[0] = time.monotonic()
            print(f"{task}, ours: {what}, {shown[0] - started:.0f} s", flush=True)

    found = score(model, tokenizer, load_tasks([task], data), limit=samples, kept=kept, progress=progress)
    return {scores.metric: list(scores.values) for scores in found}


def compared(ours: Values, theirs: Values) -> dict[str, Any]:
    """Samples, and for each metric that both have: agreeing samples, which ones do not, and both means."""
    found: dict[str, Any] = {"samples": len(next(iter(ours.values())))}
    for metric in (m for m in METRICS if m in ours and m in theirs):
        pairs = list(zip(ours[metric], theirs[metric], strict=True))
        differ = [i for i, (a, b) in enumerate(pairs) if a != b]
        means = {who: sum(values) / len(values) for who, values in (("ours", ours[metric]), ("lm_eval", theirs[metric]))}
        found[metric] = {"agree": len(pairs) - len(differ), "differ": differ, **means}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the dense model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=100, help="of each task; 0 for all")
    parser.add_argument("--tasks", nargs="+", default=list(OWN)[:3], choices=list(OWN))
    parser.add_argument("--output", type=Path, default=TARGET)
    args = parser.parse_args()
    from lm_eval.api.model import CachingLM

    from lplr import load, load_tokenizer
    from lplr.evaluate.facts import model_facts
    from lplr.evaluate.kept import Kept, work_file

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    model, tokenizer = load(args.model).float(), load_tokenizer(args.model)
    facts = model_facts(args.model, model)
    packages = {p: metadata.version(p) for p in ("torch", "transformers", "lm_eval")}
    about = {"model": facts.name, "sha256": facts.sha256, "versions": packages, "machine": platform.machine()}
    held = json.loads(args.output.read_text()) if args.output.is_file() else {}
    results = held if {k: held.get(k) for k in about} == about else {**about, "tasks": {}}
    agreed = True
    for task in args.tasks:
        path, fingerprint = work_file("harness agreement", about, task)
        path.parent.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        limit = args.samples or sum(1 for line in (args.data / OWN[task][0]).open() if line.strip())
        ours = our_values(task, args.data, model, tokenizer, limit, Kept(path, fingerprint))
        cache = str(path.with_suffix(".db"))
        theirs = own_values(task, args.data, args.model, limit, path.parent, lambda lm, cache=cache: CachingLM(lm, cache))
        found = compared(ours, theirs)
        results["tasks"][task] = found | {"seconds": round(time.monotonic() - started, 1)}
        args.output.write_text(json.dumps(results, indent=1) + "\n")
        for metric, row in ((m, found[m]) for m in METRICS if m in found):
            agreed &= not row["differ"]
            told = f"ours {row['ours']:.6f}, lm-eval {row['lm_eval']:.6f}"
            print(f"{task}, {metric}: {row['agree']} of {found['samples']} samples agree; means {told}", flush=True)
    sys.exit(0 if agreed else 1)


if __name__ == "__main__":
    main()
