"""Fewer neurons in the MLPs of a transformer: perplexity at 5, 10 and 20 % fewer, for each way to choose them.

    OMP_NUM_THREADS=1 python eval/quality/prune_mlp.py --model DIR --wikitext wiki.test.raw --calibration FILE [--only WAY ...]

DIR is a dense folder; a compressed one becomes one by `lplr export DIR --to dense`.  Perplexity is that of the first --windows
windows of the text (lplr/evaluate/perplexity.py).  Calibration: --rows windows of --seqlen tokens.

    elimination  the neuron that costs least once the others have made up for it, one after the other (linalg/eliminate.py)
    activation   least E[h_j^2] ||w_j||^2, as Wanda scores weights
    magnitude    least norm of a neuron's weights in gate, up and down
    WAY+ls       the down projection refitted by least squares; so far, all on the activations of the whole model
    WAY+ls+P     block by block on the activations behind pruned blocks, with a propagation of P: what `lplr prune` does, loaded
                 from its folder by plain transformers

Rows go to eval/results/prune_mlp.json as they are made; a run with the same settings goes on with what is there.  --moments keeps
the second moments of the whole model in a file between runs.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lplr import load, load_tokenizer
from lplr.evaluate.facts import versions
from lplr.evaluate.perplexity import evaluate
from lplr.hf.skeleton import blocks, load_config
from lplr.hf.text import evaluation_tokens, read_text
from lplr.linalg.eliminate import others, output_error, refitted
from lplr.nn.gated import gated_mlps
from lplr.recipe import Recipe, make_recipe
from lplr.stream.calibrate import advance, calibration_windows, embed, loaded
from lplr.stream.checkpoint import open_checkpoint
from lplr.stream.matrix import seeded
from lplr.stream.neurons import SELECTIONS, kept_neurons, neuron_moments, prune

TARGET = Path(__file__).parents[1] / "results/prune_mlp.json"
SHARES = ("10%", "20%", "5%")
WINDOW = 2048  # tokens that are read at once, or the model's context
WAYS = ("elimination+ls", "activation+ls", "magnitude+ls", "elimination+ls+0", "activation", "magnitude", "elimination")


def parsed(way: str) -> tuple[str, bool, float | None]:
    """(selection, whether down is refitted, propagation; None: no block is run behind pruned ones)."""
    selection, _, rest = way.partition("+")
    if selection not in SELECTIONS or not re.fullmatch(r"|ls|ls\+[\d.]+", rest):
        every = ", ".join(SELECTIONS)
        raise SystemExit(f"unknown way {way!r}: SELECTION, SELECTION+ls or SELECTION+ls+SHARE; selections: {every}")
    return selection, bool(rest), float(rest.removeprefix("ls+")) if "+" in rest else None


@torch.inference_mode()
def moments(recipe: Recipe) -> dict[str, Tensor]:
    """H of the inputs of every block's down in the whole model, by block."""
    ck, cpu = open_checkpoint(recipe.model), torch.device("cpu")
    tokens, _ = calibration_windows(recipe, ck, seeded(recipe.seed, "calibration"), print)
    assert tokens is not None
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        inputs, kwargs = embed(ck, tokens, Path(scratch), cpu)
        for i in range(len(ck.stack)):
            with loaded(ck, i, cpu) as block:
                (mlp,) = gated_mlps(block)
                found[str(i)], _ = neuron_moments(block, mlp, inputs, kwargs[i], cpu)
                advance(block, inputs, kwargs[i], cpu)
        inputs.close()
    return found


def at_once(model: nn.Module, H: dict[str, Tensor], share: str, selection: str, correct: bool) -> tuple[list[int], list[float]]:
    """Prune every block of a model in place; (neurons before and after, relative errors of the MLPs on the moments)."""
    errors, sizes = [], [0, 0]
    for i, block in enumerate(blocks(model)[1]):
        (mlp,) = gated_mlps(block)
        W = mlp.module.get_submodule(mlp.down).get_parameter("weight").detach()
        sizes = [mlp.neurons, kept_neurons(share, mlp.neurons)]
        kept = others(SELECTIONS[selection](mlp, H[str(i)], W, sizes[0] - sizes[1]), sizes[0])
        down = refitted(H[str(i)], W, kept) if correct else W[:, kept]
        errors.append(output_error(H[str(i)], W, kept, down))
        mlp.narrow(kept, down)
    return sizes, errors


class Bench:
    """What every row needs: the evaluation, the recipe of the calibration, and the moments of the whole model."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.text = args, read_text(args.wikitext)
        self.tokens = evaluation_tokens(load_tokenizer(args.model), self.text)
        self.recipe = make_recipe(
            {"model": args.model, "dataset": args.calibration, "nsamples": args.rows, "seqlen": args.seqlen, "propagation": 0}
        )
        self.window = min(WINDOW, load_config(args.model).max_position_embeddings)
        self.known: dict[str, Tensor] = {}

    def measured(self, model: nn.Module) -> dict[str, Any]:
        found = evaluate(model, self.tokens, seqlen=self.window, max_windows=self.args.windows, text=self.text)
        return {"perplexity": found.perplexity, "nll": list(found.per_window["nll"])}

    def moments(self) -> dict[str, Tensor]:
        file = self.args.moments
        if not self.known:
            self.known = load_file(file) if file and file.is_file() else moments(self.recipe)
            if file and not file.is_file():
                save_file(self.known, file)
        return self.known

    def row(self, way: str, share: str) -> dict[str, Any]:
        selection, correct, propagation = parsed(way)
        if propagation is None:
            model = load(self.args.model)
            sizes, errors = at_once(model, self.moments(), share, selection, correct)
            return {"neurons": sizes, "mlp_errors": errors, **self.measured(model)}
        with tempfile.TemporaryDirectory() as scratch:
            started = time.process_time()
            recipe = self.recipe.model_copy(update={"propagation": propagation})
            made = prune(recipe, share, Path(scratch) / "out", selection=selection, correct=correct)
            spent = round(time.process_time() - started, 1)
            found = self.measured(load(Path(scratch) / "out"))
        sizes, errors = list(made.plan.neurons), [block.error for block in made.blocks]
        return {"neurons": sizes, "mlp_errors": errors, "cpu_seconds": spent, **found}


def table(results: dict[str, Any]) -> None:
    base, rows = results["full"]["perplexity"], results["rows"]
    print(f"\n{results['model']}: full {base:.4f}; perplexity (ratio)")
    shares = sorted({key.rpartition(" ")[2] for key in rows}, key=lambda s: float(s[:-1]))
    print(f"{'way':20}" + "".join(f"{s + ' fewer':>20}" for s in shares))
    for way in dict.fromkeys(key.rpartition(" ")[0] for key in rows):
        found = [rows.get(f"{way} {share}", {}).get("perplexity") for share in shares]
        print(f"{way:20}" + "".join(f"{x:11.3f} ({x / base:.4f})" if x else f"{'-':>20}" for x in found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--name", help="what to call the model (the name of its folder)")
    parser.add_argument("--wikitext", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512, help="of the calibration windows")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--moments", type=Path, help="a safetensors file, made when it is missing")
    parser.add_argument("--shares", nargs="+", default=list(SHARES))
    parser.add_argument("--only", nargs="+", default=list(WAYS), metavar="WAY")
    args = parser.parse_args()
    bench, calibration = Bench(args), read_text(args.calibration)
    name = f"{args.name or Path(args.model).resolve().name}, {args.rows} x {args.seqlen}"
    header = {
        "model": name,
        "text": {"name": bench.text.name, "sha256": bench.text.sha256, "seqlen": bench.window, "windows": args.windows},
        "calibration": {"name": calibration.name, "sha256": calibration.sha256, "rows": args.rows, "seqlen": args.seqlen},
        "versions": versions(),
    }

    def kept() -> dict[str, Any]:
        return json.loads(TARGET.read_text()) if TARGET.is_file() else {}

    def keep() -> None:
        TARGET.write_text(json.dumps({**kept(), name: results}, indent=1) + "\n")  # another run may have written since

    results = kept().get(name, {})
    if {k: results.get(k) for k in header} != header:
        results = {**header, "full": bench.measured(load(args.model)), "rows": {}}
        print(f"full: {results['full']['perplexity']:.4f}", flush=True)
        keep()
    for share in args.shares:
        for way in args.only:
            if f"{way} {share}" not in results["rows"]:
                row = bench.row(way, share)
                gaps = [a - b for a, b in zip(row.pop("nll"), results["full"]["nll"], strict=True)]
                row |= {"log_ratio": statistics.mean(gaps), "log_ratio_se": statistics.stdev(gaps) / len(gaps) ** 0.5}
                results["rows"][f"{way} {share}"] = row
                print(f"{way} {share}: {row['neurons'][1]} neurons, {row['perplexity']:.4f}", flush=True)
                keep()
    table(results)


if __name__ == "__main__":
    main()
