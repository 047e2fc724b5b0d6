"""Flip single bits of a compressed folder at random, one at a time: `lplr verify` must notice each.

    python eval/scale/flips.py [--flips 10000] [--seed 0] [--folder DIR]

Bits are drawn evenly over the files but the card (README.md, which `lplr push` writes again), and within a file over its bits, so
that small ones (config.json, run.jsonl) are hit as often as the shards.  Without --folder a pico model is compressed for it.  The
result goes to eval/results/flips.json.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import checkpoints  # noqa: E402  (of the tests: pico models on disk)

from lplr.errors import VerificationError  # noqa: E402
from lplr.hf.card import CARD  # noqa: E402
from lplr.recipe import make_recipe  # noqa: E402
from lplr.stream.compress import compress  # noqa: E402
from lplr.stream.verify import verify  # noqa: E402


def flips(folder: Path, count: int, seed: int) -> Iterator[tuple[str, int, str]]:
    """(file, bit, what verify said or "" when it said nothing) for each flip; the folder is as it was afterwards."""
    draw = random.Random(seed)
    unwatched = {CARD}  # `lplr push` writes it again with what was measured later
    names = sorted(p.name for p in folder.iterdir() if p.is_file() and not p.name.startswith(".") and p.name not in unwatched)
    for _ in range(count):
        path = folder / draw.choice(names)
        raw = path.read_bytes()
        bit = draw.randrange(8 * len(raw))
        spoiled = bytearray(raw)
        spoiled[bit // 8] ^= 1 << bit % 8
        path.write_bytes(spoiled)
        try:
            verify(folder)
            said = ""
        except VerificationError as error:
            said = str(error)
        finally:
            path.write_bytes(raw)
        yield path.name, bit, said


def example(root: Path) -> Path:
    """A pico model compressed, allocation and all."""
    source = checkpoints.write(root / "base", "llama")
    settings = {"model": str(source), "dataset": str(source / "text.txt"), "nsamples": 4, "seqlen": 32, "bits": 3}
    compress(make_recipe(settings), root / "out")
    return root / "out"


def main() -> None:
    """The campaign of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="a folder that `lplr compress` wrote; it is written to and put back")
    args = parser.parse_args()
    started = time.perf_counter()
    hit: Counter[str] = Counter()
    missed: list[tuple[str, int]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or example(Path(scratch))
        verify(folder)
        for name, bit, said in flips(folder, args.flips, args.seed):
            hit[name] += 1
            if not said:
                missed.append((name, bit))
        verify(folder)
    result = {
        "command": " ".join(["python", "eval/scale/flips.py", *sys.argv[1:]]),
        "seed": args.seed,
        "flips": args.flips,
        "detected": args.flips - len(missed),
        "missed": missed,
        "by file": dict(sorted(hit.items())),
        "seconds": round(time.perf_counter() - started, 1),
    }
    print(json.dumps(result, indent=1))
    (ROOT / "eval/results/flips.json").write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
