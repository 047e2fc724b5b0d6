"""Compress a pico model again and again in one process: memory, files and threads must not grow.

    python eval/scale/soak.py [--runs 200] [--warm 10]

Resident memory, open files and threads are read after every run; the first `--warm` runs fill caches.  Memory counts as flat
when the mean of the last third of the runs is within MIB of that of the third behind the warm ones.  The result goes to
eval/results/soak.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import checkpoints  # noqa: E402  (of the tests: pico models on disk)
import psutil  # noqa: E402

from lplr.recipe import make_recipe  # noqa: E402
from lplr.stream.compress import compress  # noqa: E402

MIB = 8.0  # growth of memory between the two thirds that is put down to the allocator


def soak(runs: int, warm: int, root: Path) -> dict[str, Any]:
    """The readings of `runs` runs, calibrated and data-free in turn, and whether they are flat."""
    source = checkpoints.write(root / "base", "llama")
    plain = {"model": str(source), "dataset": "none", "bits": 4, "alternations": 0, "power_iterations": 0}
    calibrated = {**plain, "dataset": str(source / "text.txt"), "nsamples": 2, "seqlen": 32, "bits": 3, "recovery": "fast"}
    process, readings = psutil.Process(), []
    for i in range(runs):
        compress(make_recipe((plain, calibrated)[i % 2]), root / "out")
        shutil.rmtree(root / "out")
        gc.collect()
        readings.append((process.memory_info().rss / 2**20, process.num_fds(), process.num_threads()))
    memory, handles, threads = zip(*readings[warm:], strict=True)
    third = len(memory) // 3
    grown = mean(memory[-third:]) - mean(memory[:third])
    flat = grown <= MIB and handles[-1] <= handles[0] and threads[-1] <= threads[0]
    return {
        "runs": runs, "flat": flat, "MiB at the first third": mean(memory[:third]), "growth in MiB": grown,
        "files": [handles[0], handles[-1]], "threads": [threads[0], threads[-1]],
    }  # fmt: skip


def main() -> None:
    """The soak of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--warm", type=int, default=10)
    args = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        result = soak(args.runs, args.warm, Path(scratch))
    result = {"command": " ".join(["python", "eval/scale/soak.py", *sys.argv[1:]]), **result}
    result["seconds"] = round(time.perf_counter() - started, 1)
    print(json.dumps(result, indent=1))
    (ROOT / "eval/results/soak.json").write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(not result["flat"])


if __name__ == "__main__":
    main()
