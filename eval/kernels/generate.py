"""Tokens per second of a compressed model folder through `generate` beside its dense bfloat16 self, with peak memory.

    python eval/kernels/generate.py COMPRESSED DENSE [--tokens 64] [--rounds 2] [--threads 2] [--label NAME] [--output FILE]

Each model runs in a process of its own, in turns, so that peak memory is its own and a change of the machine's load meets both;
the best round of each counts.  Greedy, batch 1; what is timed is `generate` as a user calls it, after one round that is not.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

PROMPT = "The history of the steam engine begins"


def measure(folder: str, tokens: int) -> dict[str, float]:
    """Load in bfloat16, generate, and say how fast and with how much memory."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import lplr  # noqa: F401  (it registers the quantizer)
    from lplr.nn import LowRankLinear

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    prompt = tokenizer(PROMPT, return_tensors="pt")
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    def run() -> float:
        start = time.perf_counter()
        out = model.generate(**prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        assert out.shape[1] == prompt["input_ids"].shape[1] + tokens
        return tokens / (time.perf_counter() - start)

    run()
    return {
        "tokens_per_second": max(run() for _ in range(2)),
        "compressed_layers": sum(isinstance(m, LowRankLinear) for m in model.modules()),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "peak_after_loading_mib": loaded,
    }


def main() -> None:
    """Measure both, in turns, and print and store what was found."""
    parser = argparse.ArgumentParser()
    parser.add_argument("compressed")
    parser.add_argument("dense")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--label", default="compressed")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.only, args.tokens)))
        return
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "OMP_WAIT_POLICY": "PASSIVE"}
    found: dict[str, list[dict[str, float]]] = {"compressed": [], "dense": []}
    for _ in range(args.rounds):
        for name, folder in (("dense", args.dense), ("compressed", args.compressed)):
            command = [sys.executable, __file__, args.compressed, args.dense, "--only", folder, "--tokens", str(args.tokens)]
            done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(name, found[name][-1], flush=True)
    best = {name: max(rounds, key=lambda r: r["tokens_per_second"]) for name, rounds in found.items()}
    ratio = best["compressed"]["tokens_per_second"] / best["dense"]["tokens_per_second"]
    print(f"{args.label}: {ratio:.2f} times the tokens per second of dense bfloat16 ({args.threads} threads)")
    if args.output:
        kept = json.loads(args.output.read_text()) if args.output.exists() else {}
        kept[args.label] = {**best, "ratio": ratio, "threads": args.threads, "tokens": args.tokens}
        args.output.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
