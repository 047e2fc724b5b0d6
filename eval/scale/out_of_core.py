"""Compress a checkpoint that is larger than the memory allowed for it, data-free, beside the same matrices held in memory.

    python eval/scale/out_of_core.py [--gigabytes 20] [--hidden 4096] [--inner 11008] [--bits 4] [--method naive] [--folder DIR]

The checkpoint (a Llama of as many blocks as the size asks for, bfloat16, one shard a block) is made on the fly from a seed.
Each of the two runs is a process of its own, whose peak of resident memory the system tells.  The one in memory holds the
weights of `--sample` blocks and calls `stream.matrix.compress_matrix` on each: its weights a second are the yardstick.  The
pages that the system keeps of the files are dropped beforehand where it lets us.  The result goes to
eval/results/out_of_core.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from math import prod
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from lplr.files import write_text_atomic  # noqa: E402
from lplr.recipe import Recipe, make_recipe  # noqa: E402
from lplr.stream.shards import shard_name, write_index, write_shard  # noqa: E402

VOCABULARY, HEADS = 32_000, 32


def shapes(hidden: int, inner: int) -> dict[str, tuple[int, ...]]:
    """Tensors of one block of a Llama."""
    square, wide = (hidden, hidden), (inner, hidden)
    attention = {f"self_attn.{name}_proj": square for name in "qkvo"}
    rest = {"mlp.gate_proj": wide, "mlp.up_proj": wide, "mlp.down_proj": (hidden, inner)}
    norms = {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    return {**attention, **rest, **norms}


def make(folder: Path, gigabytes: float, hidden: int, inner: int) -> int:
    """Write the checkpoint, a tensor in memory at a time; the number of its blocks."""
    block = shapes(hidden, inner)
    outside = {"model.embed_tokens": (VOCABULARY, hidden), "model.norm": (hidden,)}
    blocks = max(1, round((gigabytes * 1e9 / 2 - VOCABULARY * hidden) / sum(map(prod, block.values()))))
    files = [{f"model.layers.{i}.{name}": shape for name, shape in block.items()} for i in range(blocks)] + [outside]
    placed, total = {}, 0
    for i, tensors in enumerate(files):
        lazy = Drawn({f"{name}.weight": shape for name, shape in tensors.items()})
        file = shard_name(i, len(files))
        write_shard(folder / file, lazy, layout={name: (shape, torch.bfloat16) for name, shape in lazy.shapes.items()})
        placed.update(dict.fromkeys(lazy.shapes, file))
        total += 2 * sum(map(prod, lazy.shapes.values()))
    write_index(folder, placed, total)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": blocks, "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "vocab_size": VOCABULARY,
        "tie_word_embeddings": True, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "dtype": "bfloat16",
    }  # fmt: skip
    write_text_atomic(folder / "config.json", json.dumps(config))
    return blocks


class Drawn(dict[str, torch.Tensor]):
    """Random tensors that are drawn when they are asked for, each from its name."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.shapes = shapes

    def __missing__(self, name: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(sum(map(ord, name)) % (1 << 31))
        return (torch.randn(self.shapes[name], generator=generator) * 0.02).bfloat16()


def streamed(recipe: Recipe, out: Path) -> int:
    """The driver; weights that were compressed."""
    from lplr.stream.compress import compress

    return sum(prod(row.shape) for row in compress(recipe, out) if row.stored == "compressed")


def held(recipe: Recipe, blocks: int) -> tuple[int, float]:
    """The matrices of some blocks, read first; (weights, seconds of compressing them)."""
    from lplr.stream.checkpoint import open_checkpoint, plan_layers
    from lplr.stream.matrix import Seen, compress_matrix

    checkpoint = open_checkpoint(recipe.model)
    plans = [p for p in plan_layers(checkpoint, recipe) if p.block < blocks]
    weights = {p.name: checkpoint.view.get(f"{p.name}.weight") for p in plans}
    device = torch.device("cpu")
    with torch.inference_mode():
        compress_matrix(recipe, plans[0], weights[plans[0].name], Seen(), device).certified()  # compiled code is made ready
        started = time.perf_counter()
        for p in plans:
            compress_matrix(recipe, p, weights[p.name], Seen(), device).certified()
    return sum(prod(p.shape) for p in plans), time.perf_counter() - started


def drop_pages(folder: Path) -> None:
    """Let the system forget what it keeps of the files in memory."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def worker(args: argparse.Namespace) -> None:
    """One run in a process of its own: prints its facts as JSON."""
    settings = {"model": str(args.folder), "dataset": "none", "allocation": "uniform", "bits": args.bits, "method": args.method}
    recipe = make_recipe({**settings, "power_iterations": 0, "alternations": 0})
    started = time.perf_counter()
    if args.worker == "streamed":
        weights, seconds = streamed(recipe, args.out), 0.0
        seconds = time.perf_counter() - started
    else:
        weights, seconds = held(recipe, args.sample)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"weights": weights, "seconds": seconds, "weights a second": weights / seconds, "peak bytes": peak}))


def run(kind: str, args: argparse.Namespace, folder: Path, out: Path) -> dict[str, Any]:
    """The facts of a worker."""
    plain = [f"--{name}={getattr(args, name)}" for name in ("bits", "method", "sample")]
    command = [sys.executable, __file__, f"--worker={kind}", f"--folder={folder}", f"--out={out}", *plain]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Make the checkpoint, run both, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=20.0)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=11_008)
    parser.add_argument("--bits", type=float, default=4.0)
    parser.add_argument("--method", default="naive")
    parser.add_argument("--sample", type=int, default=1, help="blocks of the run in memory")
    parser.add_argument("--folder", type=Path, help="where the checkpoint goes (a temporary folder)")
    parser.add_argument("--worker", choices=["streamed", "held"], help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        folder = Path(scratch) / "base"
        folder.mkdir()
        blocks = make(folder, args.gigabytes, args.hidden, args.inner)
        size = sum(p.stat().st_size for p in folder.iterdir())
        memory = run("held", args, folder, Path(scratch) / "none")
        drop_pages(folder)
        streaming = run("streamed", args, folder, Path(scratch) / "out")
    result = {
        "command": " ".join(["python eval/scale/out_of_core.py", *("DIR" if a == str(args.folder) else a for a in sys.argv[1:])]),
        "checkpoint bytes": size, "blocks": blocks, "threads": torch.get_num_threads(),
        "streamed": streaming, "in memory": memory,
        "speed against memory": streaming["weights a second"] / memory["weights a second"],
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    (ROOT / "eval/results/out_of_core.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
