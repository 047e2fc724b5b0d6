"""Fewer neurons in the MLPs of a transformer: perplexity at 5, 10 and 20 % fewer, for each way to choose them.

    OMP_NUM_THREADS=1 python eval/quality/prune_mlp.py --model DIR --wikitext wiki.test.raw --calibration FILE [--only WAY ...]

DIR is a dense folder; a compressed one becomes one by `lplr export DIR --to dense`.  Each row is `lplr.stream.neurons.prune`
into a scratch folder, loaded by plain transformers, on the first --windows windows of the text (lplr/evaluate/perplexity.py).

    elimination  the neuron that costs least once the others have made up for it, one after the other (linalg/eliminate.py)
    activation   least E[h_j^2] ||w_j||^2, as Wanda scores weights
    magnitude    least norm of a neuron's weights in gate, up and down
    +ls          the down projection refitted by least squares, behind the pruned blocks
    +ls+P        the same, to outputs that are the original model's by a share of P (propagation)

Rows go to eval/results/prune_mlp.json as they are made; a run with the same settings goes on with what is there.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from pathlib import Path
from typing import Any

from lplr import load, load_tokenizer
from lplr.evaluate.facts import versions
from lplr.evaluate.perplexity import evaluate
from lplr.hf.text import evaluation_tokens, read_text
from lplr.recipe import make_recipe
from lplr.stream.neurons import SELECTIONS, prune

TARGET = Path(__file__).parents[1] / "results/prune_mlp.json"
SHARES = ("10%", "20%", "5%")
WAYS = (
    "elimination+ls+0.5", "elimination+ls", "activation+ls", "magnitude+ls", "magnitude", "activation", "elimination",
)  # fmt: skip


def parsed(way: str) -> tuple[str, bool, float]:
    """(selection, whether down is refitted, propagation)."""
    selection, _, rest = way.partition("+")
    if selection not in SELECTIONS or not re.fullmatch(r"|ls|ls\+[\d.]+", rest):
        raise SystemExit(
            f"unknown way {way!r}: SELECTION, SELECTION+ls or SELECTION+ls+SHARE; selections: {', '.join(SELECTIONS)}"
        )
    return selection, bool(rest), float(rest.removeprefix("ls").removeprefix("+") or 0)


def row_of(args: argparse.Namespace, way: str, share: str, measure: Any) -> dict[str, Any]:
    selection, correct, propagation = parsed(way)
    free = selection == "magnitude" and not correct
    settings = {"model": args.model, "dataset": "none" if free else args.calibration, "propagation": propagation}
    recipe = make_recipe({**settings, "nsamples": args.rows, "seqlen": args.seqlen})
    with tempfile.TemporaryDirectory() as scratch:
        started, cpu = time.perf_counter(), time.process_time()
        made = prune(recipe, share, Path(scratch) / "out", selection=selection, correct=correct)
        spent = {"seconds": round(time.perf_counter() - started, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}
        result = measure(Path(scratch) / "out")
    errors = [block.error for block in made.blocks if block.error is not None]
    return {
        "neurons": list(made.plan.neurons), "parameters": list(made.plan.parameters), **spent, "perplexity": result.perplexity,
        "nll": result.nll, "per_window": list(result.per_window["nll"]), "mlp_errors": errors,
    }  # fmt: skip


def table(results: dict[str, Any]) -> None:
    base = results["full"]["perplexity"]
    print(f"\n{results['model']}: full {base:.4f}; perplexity (ratio)")
    shares = [s for s in sorted(SHARES, key=lambda s: float(s[:-1])) if any(key.endswith(f" {s}") for key in results["rows"])]
    print(f"{'way':24}" + "".join(f"{s + ' fewer':>22}" for s in shares))
    for way in dict.fromkeys(key.rpartition(" ")[0] for key in results["rows"]):
        cells = [results["rows"].get(f"{way} {share}") for share in shares]
        print(
            f"{way:24}" + "".join(f"{c['perplexity']:13.3f} ({c['perplexity'] / base:.4f})" if c else f"{'-':>22}" for c in cells)
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--name", help="what to call the model (the name of its folder)")
    parser.add_argument("--wikitext", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512, help="of the calibration windows")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--shares", nargs="+", default=list(SHARES))
    parser.add_argument("--only", nargs="+", default=list(WAYS), metavar="WAY")
    args = parser.parse_args()
    text, calibration = read_text(args.wikitext), read_text(args.calibration)
    tokens = evaluation_tokens(load_tokenizer(args.model), text)

    def measure(folder: str | Path) -> Any:
        return evaluate(load(folder), tokens, seqlen=2048, max_windows=args.windows, text=text)

    name = f"{args.name or Path(args.model).resolve().name}, {args.rows} x {args.seqlen}"
    header = {
        "model": name,
        "text": {"name": text.name, "sha256": text.sha256, "seqlen": 2048, "windows": args.windows},
        "calibration": {"name": calibration.name, "sha256": calibration.sha256, "rows": args.rows, "seqlen": args.seqlen},
        "versions": versions(),
    }
    every = json.loads(TARGET.read_text()) if TARGET.is_file() else {}
    results = every.get(name, {})
    if {k: results.get(k) for k in header} != header:
        full = measure(args.model)
        results = {**header, "full": {"perplexity": full.perplexity, "nll": full.nll}, "rows": {}}
    for share in args.shares:
        for way in args.only:
            if f"{way} {share}" not in results["rows"]:
                row = results["rows"][f"{way} {share}"] = row_of(args, way, share, measure)
                print(f"{way} {share}: {row['neurons'][1]} neurons, {row['perplexity']:.4f}, {row['seconds']} s", flush=True)
                TARGET.write_text(json.dumps({**every, name: results}, indent=1) + "\n")
    table(results)


if __name__ == "__main__":
    main()
