"""What each stage of recovery buys: perplexity, seconds and tokens after factorization, error absorption, blocks, distillation.

    python eval/quality/recovery.py --model FOLDER --wikitext wiki.test.raw --calibration c4_en_600.jsonl
        [--bits 1 2] [--only none absorbed blocks distilled] [--nsamples 128] [--epochs 1] [--distill-epochs 2]
        [--lr 0] [--scale-lr 0.003] [--scratch DIR]

FOLDER holds the dense model.  Every row is `lplr compress` with the settings that it names and every other one at its default,
from the start (after `blocks` in the same call, `distilled` goes on with a copy of its folder, which is what it would make: its
seconds are those of both):

    none        factorization only: every matrix for the inputs that it sees, propagation 0
    absorbed    and matrices make up for what those before them did: propagation at its default, in closed form
    blocks      and each block is tuned against the original block: `recovery.epochs` passes over the calibration text
    distilled   and the whole model is tuned against the original's predictions: `recovery.distill_epochs` passes

    ratio       perplexity of the GPTQ protocol (windows of --seqlen tokens, no BOS, float32) over that of the dense model
    tokens      that gradients were taken on, by blocks and of the whole model
    resumed     whether another process had begun the run: seconds are those of the last one alone
    bits        of the run's own record: every stored bit of the compressed matrices over their weights

Rows are merged by name into eval/results/recovery.json; with --scratch the folders are kept there, and a run that was stopped
goes on.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import tempfile
import time
from contextlib import suppress
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import Any

import torch

import lplr
from lplr import records
from lplr.evaluate.perplexity import evaluate
from lplr.hf.text import evaluation_tokens, read_text
from lplr.recipe import Recipe, make_recipe
from lplr.stream.compress import ROUNDED

TARGET = Path(__file__).parents[1] / "results" / "recovery.json"
STAGES = ("none", "absorbed", "blocks", "distilled")


def settings_of(stage: str, args: argparse.Namespace) -> dict[str, Any]:
    """What a stage changes of a recipe."""
    step = {"lr": args.lr, "scale_lr": args.scale_lr}
    return {
        "none": {"propagation": 0.0, "recovery": "fast"},
        "absorbed": {"recovery": "fast"},
        "blocks": {"recovery": {"epochs": args.epochs, **step}},
        "distilled": {"recovery": {"epochs": args.epochs, "distill_epochs": args.distill_epochs, **step}},
    }[stage]


def tokens_of(entries: list[dict[str, Any]]) -> dict[str, int]:
    """Tokens that gradients were taken on: of each block, and of the whole model."""
    of = {kind: [e["tokens"] for e in entries if e["kind"] == kind] for kind in ("recovery", "distillation")}
    return {"blocks": max(of["recovery"], default=0), "model": sum(of["distillation"])}


class Begun(Exception):
    pass


def go_on_from(blocks: Path, recipe: Recipe, folder: Path) -> None:
    """Begin a run whose stages before the last one are those of the finished folder `blocks`."""

    def stop(*_: Any) -> None:
        raise Begun

    with suppress(Begun):  # a run that is stopped goes on with what it finds
        lplr.compress(recipe, folder, progress=stop)
    shutil.rmtree(folder / ROUNDED, ignore_errors=True)
    shutil.copytree(blocks, folder / ROUNDED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--wikitext", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--bits", type=float, nargs="+", default=[1.0, 2.0])
    parser.add_argument("--only", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--distill-epochs", type=int, default=2)
    parser.add_argument("--lr", type=float, default=0.0)
    parser.add_argument("--scale-lr", type=float, default=0.003)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--scratch", type=Path)
    args = parser.parse_args()
    text, calibration = read_text(args.wikitext), read_text(args.calibration)
    tokens = evaluation_tokens(lplr.load_tokenizer(args.model), text)

    def perplexity(folder: str | Path) -> float:
        return evaluate(lplr.load(folder), tokens, seqlen=args.seqlen, max_windows=args.windows, text=text).perplexity

    header = {
        "model": Path(args.model).name,
        "text": {"name": text.name, "sha256": text.sha256, "seqlen": args.seqlen, "windows": args.windows},
        "versions": {p: metadata.version(p) for p in ("torch", "transformers")},
    }
    found = json.loads(TARGET.read_text()) if TARGET.is_file() else {}
    rows: dict[str, Any] = found.get("rows", {}) if found.get("text") == header["text"] else {}
    base = perplexity(args.model)
    print(f"full precision: {base:.4f}")
    print(f"{'bits':>7} {'stage':10} {'calibration':28} {'perplexity':>10} {'ratio':>8} {'seconds':>8} {'cpu':>8}  tokens")
    spent: dict[Path, tuple[float, float]] = {}  # what the folders that this process made took
    with tempfile.TemporaryDirectory() as temporary:
        for bits, stage in product(args.bits, args.only):
            chosen = {"model": args.model, "dataset": args.calibration, "nsamples": args.nsamples, "bits": bits}
            recipe = make_recipe({**chosen, **settings_of(stage, args)})
            place = args.scratch or Path(temporary)
            folder, blocks = (place / f"{s}-{bits:g}-{Path(args.calibration).stem}" for s in (stage, "blocks"))
            resumed, earlier = folder.exists(), (0.0, 0.0)
            started, cpu = time.perf_counter(), time.process_time()
            if stage == "distilled" and not resumed and blocks in spent:
                go_on_from(blocks, recipe, folder)
                earlier = spent[blocks]
            made = lplr.compress(recipe, folder)
            took, used = time.perf_counter() - started + earlier[0], time.process_time() - cpu + earlier[1]
            if not resumed:
                spent[folder] = took, used
            told = tokens_of(records.read(folder / records.LEDGER))
            value = perplexity(folder)
            row = {
                "bits_per_weight": records.bits_per_weight(made),
                "calibration": {"name": calibration.name, "sha256": calibration.sha256, "rows": args.nsamples},
                "recovery": recipe.recovery.model_dump(),
                "propagation": recipe.propagation,
                "perplexity": value,
                "ratio": value / base,
                "seconds": round(took),
                "cpu_seconds": round(used),
                "resumed": resumed,
                "tokens": told,
                "machine": {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
            }
            rows[f"{stage} {bits:g} {calibration.name} {args.nsamples} rows"] = row
            TARGET.write_text(json.dumps({**header, "perplexity": base, "rows": rows}, indent=1) + "\n")
            figures = f"{row['bits_per_weight']:7.4f} {stage:10} {calibration.name:28} {value:10.3f} {row['ratio']:8.3f}"
            print(f"{figures} {took:8.0f} {used:8.0f}  {told['blocks']:,} + {told['model']:,}", flush=True)


if __name__ == "__main__":
    main()
