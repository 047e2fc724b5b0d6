"""Where the time of `lplr compress` goes, and that it grows linearly with the number of blocks.

    python eval/speed/profile_compress.py --model FOLDER --dataset TEXT [--bits 2] [--nsamples 128] [--output DIR]

Runs the real driver once, with a clock around its stages (seconds of the thread that runs it; a stage that calls another counts
its own part alone), and prints each stage's seconds and its share of those of all threads, the encoder's share and its speed, and
the seconds of each block beside their mean: the largest and least ratio say how far the time is from linear.  Matrices of one
input are worked on in threads while the driver waits for them, so the seconds add up to more than the run took.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import lplr
from lplr.kernels import trellis
from lplr.recipe import make_recipe
from lplr.stream import allocation, compress, ledger, matrix, sensitivity

own: dict[str, float] = defaultdict(float)
calls: dict[str, int] = defaultdict(int)
encoded = [0]
here = threading.local()  # .stack: seconds of the stages within each stage that is running, of one thread
lock = threading.Lock()


def clocked(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its wall time, less that of the clocked functions inside it, added to a stage."""

    def timed(*arguments: Any, **named: Any) -> Any:
        stack = here.__dict__.setdefault("stack", [])
        stack.append([0.0])
        started = time.perf_counter()
        try:
            return function(*arguments, **named)
        finally:
            took = time.perf_counter() - started
            inner = stack.pop()[0]
            with lock:
                own[stage] += took - inner
                calls[stage] += 1
            if stack:
                stack[-1][0] += took

    return timed


def watch() -> None:
    """Put clocks around the stages, where the driver looks them up."""
    for module, name, stage in (
        (compress, "calibration_windows", "calibration text, tokenized"),
        (compress, "embed", "embedding"),
        (compress, "stages", "order of the layers"),
        (compress, "collect", "second moments behind the compressed prefix"),
        (matrix, "factorize", "factorization without the encoder"),
        (matrix, "certify", "certificates"),
        (ledger, "write_shard", "writing"),
        (compress, "advance", "running the compressed block"),
        (allocation, "error_curve", "error curves without the encoder"),
        (sensitivity, "run_block", "allocation: blocks, forward and back"),
        (sensitivity, "_head_gradients", "allocation: gradients of the head"),
        (sensitivity, "_backward", "allocation: moments and gradients"),
    ):
        setattr(module, name, clocked(stage, getattr(module, name)))
    encode = trellis.encode

    def counted(x: torch.Tensor, bits: float, *feedback: Any) -> Any:
        with lock:
            encoded[0] += x.numel()
        return encode(x, bits, *feedback)

    trellis.encode = clocked("trellis encoder", counted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", default="builtin")
    parser.add_argument("--bits", type=float, default=2.0)
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--output", type=Path, help="keep the compressed model there")
    args = parser.parse_args()
    watch()
    settings = {"model": args.model, "dataset": args.dataset, "bits": args.bits, "nsamples": args.nsamples, "recovery": "fast"}
    ends: dict[int, float] = {}
    seen: list[str] = []

    def progress(done: float, total: float, what: str) -> None:
        if what.startswith("block ") and what.endswith(tuple("0123456789")) and what not in seen:  # "block i of n": finished
            seen.append(what)
            ends[len(seen)] = time.perf_counter()

    with tempfile.TemporaryDirectory() as scratch:
        started, cpu = time.perf_counter(), time.process_time()
        rows = lplr.compress(make_recipe(settings), args.output or Path(scratch) / "out", progress=progress)
        total, used = time.perf_counter() - started, time.process_time() - cpu
    everything = sum(own.values())
    what = f"{len(rows)} matrices, {args.bits:g} bits, {args.nsamples} rows"
    print(f"{Path(args.model).name}: {what}; {total:.0f} s, {used:.0f} s of processors")
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    for stage, seconds in sorted(own.items(), key=lambda item: -item[1]):
        print(f"{stage:46} {seconds:8.1f} s {seconds / everything:6.1%}  {calls[stage]:7} calls")
    speed = encoded[0] / own["trellis encoder"] / 1e6 if own["trellis encoder"] else 0.0
    print(f"\nencoder: {encoded[0] / 1e6:.0f} M weights at {speed:.2f} M a second and thread")
    times = [ends[i + 1] - ends[i] for i in range(1, len(ends))]
    if times:
        mean = sum(times) / len(times)
        print(f"a block: {mean:.1f} s on average, {min(times) / mean:.2f} to {max(times) / mean:.2f} of it")


if __name__ == "__main__":
    main()
