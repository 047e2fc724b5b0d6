"""lplr beside GPTQ, HQQ, bitsandbytes, auto-round, torchao, quanto and llama.cpp, each at its true bits: one model, one text.

    python eval/quality/peers.py --model FOLDER --wikitext wiki.test.raw --calibration c4_en_600.jsonl
        [--only nf4 hqq-2 ...] [--python hqq=PYTHON gptqmodel=PYTHON ...] [--windows 8] [--seqlen 2048]

FOLDER holds the dense model.  Every library runs in a process of its own, with its own interpreter if `--python` names one (they
pin versions that exclude each other; `make bench` makes an environment for each).  That process (peer_libraries.py) quantizes the
linear layers of the blocks with the library's own code and hands back the weights that the library's own format decodes to, and
the bytes of every tensor of that format: codes, scales, zero points, orders, code tables.
This process puts the weights into the dense model:

    bits per weight = 8 * bytes of these tensors / number of weights of these layers
    perplexity      = of the GPTQ protocol (lplr.evaluate.perplexity): windows of `seqlen` tokens, no BOS, float32 throughout

The rows of lplr are `lplr compress FOLDER --bits B --dataset CALIBRATION --preset fast`, every other setting at its default,
whatever the model: no training, no list of layers.  It, GPTQ (arXiv:2210.17323), auto-round and the importance matrices of
llama.cpp are calibrated with 128 rows of 512 tokens (auto-round: the first 32 of them), packed from the calibration text by
`lplr.hf.text`.
Groups are of 64, where a library lets us choose: 576, the width of SmolLM2-135M, is no multiple of 128.  Rows are merged into
eval/results/peers.json by name; the exit status is 1 if a row failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from peer_libraries import PEERS, Weights, work
from safetensors.torch import load_file, save_file
from torch import Tensor

ROWS, ROW_LENGTH, SEED = 128, 512, 0
TARGET = Path(__file__).parents[1] / "results" / "peers.json"


def quantize(name: str, python: str, folder: str, rows: Tensor, calibration: str) -> tuple[Weights, dict[str, Any]]:
    """Weights and facts of a peer from a process of its own; raises RuntimeError with the end of what it said if it fails."""
    with tempfile.TemporaryDirectory() as scratch:
        save_file({"rows": rows.contiguous()}, Path(scratch) / "rows.safetensors")
        here, model = str(Path(__file__).resolve()), str(Path(folder).resolve())
        command = [os.path.abspath(python), here, "--worker", name, "--model", model, "--scratch", scratch]
        command += ["--calibration", str(Path(calibration).resolve())]
        # in the scratch folder, because llmcompressor and gptqmodel leave logs where they run
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, cwd=scratch)
        if done.returncode:
            raise RuntimeError("\n".join((done.stderr or done.stdout).strip().splitlines()[-8:]))
        return load_file(Path(scratch) / "weights.safetensors"), json.loads((Path(scratch) / "facts.json").read_text())


def merge(header: dict[str, Any], row: dict[str, Any] | None = None) -> dict[str, Any]:
    """The results with one more row; rows of another model, text or calibration are dropped."""
    found = json.loads(TARGET.read_text()) if TARGET.is_file() else {}
    rows = found.get("rows", {}) if {k: found.get(k) for k in header} == header else {}
    if row is not None:
        rows[row["name"]] = row
    results = {**header, "rows": {name: rows[name] for name in ("full precision", *PEERS) if name in rows}}
    TARGET.write_text(json.dumps(results, indent=1) + "\n")
    return results


def table(results: dict[str, Any]) -> None:
    rows = results["rows"]
    base = rows["full precision"]["perplexity"]
    print(f"\n{'peer':18} {'library':22} {'bits/weight':>11} {'perplexity':>12} {'ratio':>10} {'seconds':>8}  parts")
    for name, row in rows.items():
        library = f"{row['library']} {row['versions'].get(row['library'], '')}"
        if "error" in row:
            print(f"{name:18} {library:22} failed: {row['error'].splitlines()[-1]}")
            continue
        parts = ", ".join(f"{k} {v:.3f}" for k, v in row["parts"].items() if v >= 5e-4)
        figures = f"{row['bits_per_weight']:11.4f} {row['perplexity']:12.4g} {row['perplexity'] / base:10.4g}"
        print(f"{name:18} {library:22} {figures} {row['seconds']:8.0f}  {parts}")


def run(args: argparse.Namespace) -> bool:
    """Every row asked for; whether all of them came."""
    from lplr import load, load_tokenizer
    from lplr.evaluate.perplexity import evaluate
    from lplr.hf.text import calibration_tokens, evaluation_tokens, read_text
    from lplr.nn import linears

    pythons = dict(p.split("=", 1) if "=" in p else ("", p) for p in args.python)
    tokenizer, model = load_tokenizer(args.model), load(args.model)
    text, calibration = read_text(args.wikitext), read_text(args.calibration)
    tokens = evaluation_tokens(tokenizer, text)
    rows = calibration_tokens(tokenizer, calibration, ROWS, ROW_LENGTH, torch.Generator().manual_seed(SEED))
    layers = linears(model, ("lm_head",))
    dense = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    count_of_weights = sum(w.numel() for w in dense.values())

    def measure(weights: Weights) -> float:
        if weights.keys() != dense.keys():
            raise RuntimeError(f"the library handed back {len(weights)} layers, {len(dense)} expected")
        for name, layer in layers.items():
            layer.weight.data.copy_(weights[name])
        return evaluate(model, tokens, seqlen=args.seqlen, max_windows=args.windows, text=text).perplexity

    header = {
        "text": {"name": text.name, "sha256": text.sha256, "seqlen": args.seqlen, "windows": args.windows},
        "calibration": {"name": calibration.name, "sha256": calibration.sha256, "rows": list(rows.shape), "seed": SEED},
        "weights": count_of_weights,
    }
    results = merge(header)
    if "full precision" not in results["rows"]:
        versions = {p: metadata.version(p) for p in ("torch", "transformers")}
        base = {"name": "full precision", "library": "torch", "settings": {}, "versions": versions, "seconds": 0.0}
        results = merge(header, base | {"perplexity": measure(dense), "bits_per_weight": 32.0, "parts": {}})
    full = results["rows"]["full precision"]["perplexity"]
    print(f"full precision: {full:.4f}", flush=True)
    for name in args.only or PEERS:
        library, settings = PEERS[name]
        row: dict[str, Any] = {"name": name, "library": library, "settings": settings, "versions": {}}
        try:
            python = pythons.get(library, pythons.get("", sys.executable))
            weights, facts = quantize(name, python, args.model, rows, args.calibration)
            parts = {k: 8 * v / count_of_weights for k, v in facts.pop("sizes").items()}
            off = sum((weights[k] - w).square().sum().item() for k, w in dense.items())
            row |= facts | {"bits_per_weight": sum(parts.values()), "parts": parts}
            row |= {"weight_error": off / sum(w.square().sum().item() for w in dense.values()), "perplexity": measure(weights)}
            row["ratio"] = row["perplexity"] / full
            print(f"{name}: {row['bits_per_weight']:.4f} bits, perplexity {row['perplexity']:.4f}", flush=True)
        except RuntimeError as failure:
            row["error"] = str(failure)
            print(f"{name} failed:\n{failure}", flush=True)
        results = merge(header, row)
    table(results)
    return not any("error" in results["rows"][name] for name in args.only or PEERS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the dense model")
    parser.add_argument("--wikitext", help="wiki.test.raw")
    parser.add_argument("--calibration", help="text that GPTQ is calibrated on")
    parser.add_argument("--only", nargs="+", choices=list(PEERS), help="some of the peers")
    parser.add_argument("--python", nargs="+", default=[], metavar="[LIBRARY=]PYTHON", help="interpreter of a library's process")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.model, args.scratch, args.calibration)
    elif args.wikitext and args.calibration:
        sys.exit(0 if run(args) else 1)
    else:
        parser.error("--wikitext and --calibration are needed")


if __name__ == "__main__":
    main()
