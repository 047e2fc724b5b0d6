"""Compress a model on a local Ray cluster of three nodes, one of them killed in the middle, beside one process.

    python eval/scale/ray_cluster.py [--hidden 768] [--inner 2048] [--layers 8] [--bits 2] [--method auto] [--nodes 3]

Each node is a raylet of one processor.  Three runs of one data-free recipe: in this process with one thread; on the cluster,
whose workers have worked before; and on the cluster with a node killed (SIGKILL to all of its processes) when the third block is
finished.  Every file must have the same SHA-256 in all three, run.jsonl but for its times.  The ideal time is that of one process
over the processors that there are, of the machine or of the cluster; overhead is what the cluster takes beyond it.  The seconds
that the records say were spent on matrices stand beside: more of them than in one process tell how tasks, and other jobs on the
machine, slow each other down.  The result goes to eval/results/ray.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import ray  # noqa: E402
import ray_nodes  # noqa: E402  (of the tests: a cluster on this machine)
import torch  # noqa: E402
from out_of_core import make  # noqa: E402  (of this folder: a Llama drawn from a seed)

from lplr import records  # noqa: E402
from lplr.files import write_text_atomic  # noqa: E402
from lplr.recipe import Recipe, make_recipe  # noqa: E402
from lplr.records import LEDGER, TIME_FIELDS  # noqa: E402
from lplr.stream.compress import compress  # noqa: E402

KILL_AFTER = 3  # finished blocks


def contents(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 of every file, of run.jsonl without its times."""
    found = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.name != LEDGER}
    lines = [{k: v for k, v in e.items() if k not in TIME_FIELDS} for e in records.read(folder / LEDGER)]
    return {**found, LEDGER: hashlib.sha256(json.dumps(lines, sort_keys=True).encode()).hexdigest()}


def timed(recipe: Recipe, out: Path, engine: str, progress: Any = None) -> tuple[float, float]:
    """Wall seconds of a run, and the seconds that its records say were spent on matrices."""
    started = time.perf_counter()
    rows = compress(recipe, out, engine=engine, progress=progress)
    return time.perf_counter() - started, sum(row.seconds for row in rows)


def warmed(nodes: int) -> float:
    """Seconds until a worker of every node has imported the library and compiled what it needs; of the first task of each."""
    started = time.perf_counter()

    @ray.remote(num_cpus=1, scheduling_strategy="SPREAD")
    def warm() -> str:
        from lplr.factor import factorize
        from lplr.recipe import FactorSpec

        torch.set_num_threads(1)
        generator = torch.Generator().manual_seed(0)
        factorize(torch.randn(256, 256, generator=generator), FactorSpec(bits_per_weight=2), generator=generator)
        time.sleep(1)
        return ray.get_runtime_context().get_node_id()

    while len(set(ray.get([warm.remote() for _ in range(2 * nodes)]))) < nodes:
        pass
    return time.perf_counter() - started


def main() -> None:
    """The three runs of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--inner", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--bits", type=float, default=2.0)
    parser.add_argument("--method", default="auto")
    args = parser.parse_args()
    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp())
    base = root / "base"
    base.mkdir()
    block = 4 * args.hidden**2 + 3 * args.hidden * args.inner
    make(base, 2e-9 * (args.layers * block + 32_000 * args.hidden), args.hidden, args.inner)
    recipe = make_recipe({"model": str(base), "dataset": "none", "bits": args.bits, "method": args.method})
    with ray_nodes.joined() as cluster:
        others = [ray_nodes.add(cluster) for _ in range(args.nodes - 1)]
        compress(recipe.model_copy(update={"allocation": "uniform", "method": "naive"}), root / "first")  # what is compiled
        one, work = timed(recipe, root / "one", "local")
        cold = warmed(args.nodes)
        whole, whole_work = timed(recipe, root / "whole", "ray")
        told: list[str] = []

        def kill(done: float, total: float, text: str) -> None:
            if text.startswith(f"block {KILL_AFTER} of") and not told:
                told.append(text)
                cluster.remove_node(others[-1], allow_graceful=False)

        killed, killed_work = timed(recipe, root / "killed", "ray", kill)
        wanted = contents(root / "one")
        same = {name: contents(root / name) == wanted for name in ("whole", "killed")}
    cores = len(os.sched_getaffinity(0))
    ideal = one / min(cores, args.nodes)
    result = {
        "command": " ".join(["python", "eval/scale/ray_cluster.py", *sys.argv[1:]]),
        "nodes": args.nodes, "cores of the machine": cores, "load": os.getloadavg()[0],
        "versions": {"ray": ray.__version__, "torch": torch.__version__},
        "blocks": args.layers, "matrices": 7 * args.layers, "weights": args.layers * block,
        "files": len(wanted), "the same SHA-256": same, "killed after": told,
        "one process": {"seconds": one, "on matrices": work},
        "ideal seconds": ideal,
        "cluster": {"seconds": whole, "on matrices": whole_work, "overhead": whole / ideal - 1, "speed-up": one / whole},
        "cluster, a node killed": {"seconds": killed, "on matrices": killed_work, "beyond the whole cluster": killed - whole},
        "seconds until every worker is ready": cold,
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    write_text_atomic(ROOT / "eval/results/ray.json", json.dumps(result, indent=1) + "\n")
    shutil.rmtree(root, ignore_errors=True)
    sys.exit(not (all(same.values()) and told))


if __name__ == "__main__":
    main()
