"""Feed damaged and hostile files to every reader: each must be read rightly, or refused by an error of lplr/errors.py, in time.

    python eval/scale/fuzz.py [--cases 1000000] [--seed 0] [--readers safetensors index recipe gguf folder]
    python eval/scale/fuzz.py --readers gguf --seed 0 --case 4711      # one case again; its bytes go to /tmp

A case is a sound file changed at random: bits, bytes, slices, numbers (edges of every width), names, nesting, two files spliced.
It depends on (seed, reader, number) alone.  A finding is any other exception, more than LIMIT seconds, or a file that is accepted
while an independent reader (the safetensors library, gguf-py) sees something else.  The result goes to eval/results/fuzz.json.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import gguf  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402
from safetensors import SafetensorError  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from lplr import records  # noqa: E402
from lplr.errors import LplrError  # noqa: E402
from lplr.hf.gguf_header import read_header  # noqa: E402
from lplr.hf.quantizer import LplrConfig  # noqa: E402
from lplr.recipe import Recipe, load_recipe, make_recipe  # noqa: E402
from lplr.stream.source import SafetensorsSource  # noqa: E402

LIMIT = 10.0  # seconds of one case
EDGES = [0, 1, -1, 2, 7, 8, 31, 32, 127, 128, 255, 256, 65535, 1 << 31, (1 << 31) - 1, 1 << 32, (1 << 63) - 1, 1 << 63, 1 << 64]
WORDS = [b"null", b"true", b"NaN", b"1e999", b"-0", b"1.5", b"[]", b"{}", b'""', b'"\\u0000"', b"9" * 5000, b'"../x"', b"&a"]
WORDS += [b"*a", b"<<: *a", b"!!python/object:os.x", b"[" * 3000, b'{"a":' * 3000, b"\0", b"\n", b"\xff\xfe", b"'", b"2001-99-99"]


class Late(BaseException):
    """A case took longer than LIMIT."""


def mutate(raw: bytes, other: bytes, draw: random.Random) -> bytes:
    """A sound file changed in one to four places; `other` is what may be spliced in."""
    data = bytearray(raw)
    for _ in range(draw.choice((1, 1, 1, 2, 3, 4))):
        at, end = sorted(draw.randrange(len(data) + 1) for _ in range(2))
        end = min(end, at + draw.choice((1, 4, 16, 4096)))
        match draw.randrange(10):
            case 0 if data:
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            case 1 if data:
                data[draw.randrange(len(data))] = draw.randrange(256)
            case 2:
                del data[at:end]
            case 3:
                data[at:at] = data[at:end]
            case 4:
                data[at:end] = draw.randbytes(end - at)
            case 5:
                data[at:at] = draw.choice(WORDS)
            case 6 if numbers := list(re.finditer(rb"-?\d+", bytes(data[:100_000]))):
                found = draw.choice(numbers)
                data[found.start() : found.end()] = str(draw.choice(EDGES)).encode()
            case 7:
                width = draw.choice((1, 2, 4, 8))
                data[at : at + width] = (draw.choice(EDGES) % (1 << 8 * width)).to_bytes(width, "little")
            case 8 if values := list(re.finditer(rb'"[^"]*"|\[[^\[\]]*\]|\{[^{}]*\}', bytes(data[:100_000]))):
                found, taken = draw.choice(values), draw.choice(values)
                data[found.start() : found.end()] = draw.choice((taken.group(), draw.choice(WORDS)))
            case _:
                cut = draw.randrange(len(other) + 1)
                data[at:] = other[cut:]
    return bytes(data)


def fixed(raw: bytes, draw: random.Random) -> bytes:
    """A safetensors file whose first eight bytes tell, half of the time, where its header ends, so that the JSON is looked at."""
    end = raw.rfind(b"}") + 1
    return max(end - 8, 0).to_bytes(8, "little") + raw[8:] if draw.random() < 0.5 else raw


class Wrong(AssertionError):
    """A file was accepted and understood otherwise than an independent reader does."""


def expect(sound: bool, why: str) -> None:
    """Wrong unless `sound`."""
    if not sound:
        raise Wrong(why)


def safetensors(folder: Path, raw: bytes) -> None:
    """What is accepted, the library reads too, to the same bytes."""
    path = folder / "model.safetensors"
    path.write_bytes(raw)
    source = SafetensorsSource(folder)
    ours = {name: source.get(name) for name in source.names()}
    try:
        theirs = load_file(path)
    except SafetensorError as error:
        raise Wrong(f"the library refuses it: {error}") from None
    expect(set(ours) == set(theirs), "other names")
    for name, tensor in ours.items():
        same = tensor.dtype == theirs[name].dtype and tensor.shape == theirs[name].shape
        ours_bytes, their_bytes = (t.reshape(-1).view(torch.uint8) for t in (tensor, theirs[name]))
        expect(same and torch.equal(ours_bytes, their_bytes), f"other values of {name}")


def index(folder: Path, raw: bytes) -> None:
    """What is accepted lies in shards of the folder and has every name of the map."""
    (folder / "model.safetensors.index.json").write_bytes(raw)
    source = SafetensorsSource(folder)
    placed = json.loads(raw)["weight_map"]
    expect(set(source.names()) == set(placed), "other names")
    for name in source.names():
        expect((folder / placed[name]).resolve().parent == folder.resolve(), f"{name} comes from elsewhere")
        expect(torch.equal(source.get(name), load_file(folder / placed[name])[name]), f"other values of {name}")


def recipe(folder: Path, raw: bytes) -> None:
    """What is accepted is a recipe that is written and read again as it is."""
    path = folder / "recipe.yaml"
    path.write_bytes(raw)
    found = make_recipe(load_recipe(path))
    path.write_text(found.to_yaml())
    expect(make_recipe(load_recipe(path)) == found, "not the same when read again")


def gguf_file(folder: Path, raw: bytes) -> None:
    """What is accepted, gguf-py reads too, with the same names, shapes and places."""
    path = folder / "model.gguf"
    path.write_bytes(raw)
    header = read_header(path)
    for stored in header.tensors.values():
        expect(header.data_start <= stored.offset and stored.offset + stored.nbytes <= len(raw), "outside of the file")
    reader = gguf.GGUFReader(path)
    theirs = {t.name: (tuple(reversed(t.shape.tolist())), int(t.data_offset)) for t in reader.tensors}
    expect({name: (s.shape, s.offset) for name, s in header.tensors.items()} == theirs, "other tensors")


def run_folder(folder: Path, raw: bytes) -> None:
    """run.jsonl, then the table of layers of config.json: what is accepted describes matrices of a positive number of bits."""
    ledger, _, config = raw.partition(b"\x1e")
    path = folder / "run.jsonl"
    path.write_bytes(ledger)
    entries = records.read(path)
    records.check_files(path, entries)
    for row in records.layers(entries):
        expect(min(row.shape) > 0 and row.bits >= 0, f"{row.name} has no entries")
    try:
        entry = json.loads(config)["quantization_config"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return
    if isinstance(entry, dict):
        for name, fmt in LplrConfig(**{str(k): v for k, v in entry.items()}).formats().items():
            expect(fmt.stored_bits() > 0 and min(fmt.shape) > 0, f"{name} has no bits")


def seeds_safetensors(folder: Path) -> list[bytes]:
    """Two sound files."""
    out = []
    for tensors in (
        {"a": torch.arange(6.0).reshape(2, 3), "model.b": torch.ones(4, dtype=torch.bfloat16), "c": torch.tensor(3)},
        {f"w{i}": torch.full((i, 2), i, dtype=torch.uint8) for i in range(5)},
    ):
        save_file(tensors, folder / "seed", {"format": "pt"})
        out.append((folder / "seed").read_bytes())
    return out


def seeds_index(folder: Path) -> list[bytes]:
    """Two indices over the same two shards, which stay in the folder; a file beside them is not one of it."""
    save_file({"a": torch.ones(2), "b": torch.zeros(3)}, folder / "one.safetensors")
    save_file({"c": torch.ones(1)}, folder / "two.safetensors")
    save_file({"a": torch.zeros(2)}, folder.parent / "x")
    placed = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}
    return [json.dumps({"metadata": {"total_size": 24}, "weight_map": m}).encode() for m in (placed, {"c": "two.safetensors"})]


def seeds_recipe(folder: Path) -> list[bytes]:
    """The recipes of the repository, and one with every setting."""
    full = Recipe(model="m", bits=2, rules=({"match": "*.q_proj", "bits": 3},)).model_dump(mode="json")  # type: ignore[arg-type]
    return [path.read_bytes() for path in sorted((ROOT / "recipes").glob("*.yaml"))] + [yaml.safe_dump(full).encode()]


def seeds_gguf(folder: Path) -> list[bytes]:
    """A file with every kind of value, and a plain one."""
    out = []
    for rich in (True, False):
        writer = gguf.GGUFWriter(folder / "seed.gguf", "llama")
        writer.add_uint32("llama.block_count", 2)
        if rich:
            writer.add_string("general.name", "x")
            writer.add_float32("llama.eps", 1e-5)
            writer.add_bool("llama.flag", True)
            writer.add_array("tokenizer.ggml.tokens", ["a", "bc"])
            writer.add_array("tokenizer.ggml.scores", [1.0, 2.0])
        writer.add_tensor("token_embd.weight", np.ones((4, 32), np.float32))
        writer.add_tensor("b", np.ones(8, np.float16))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        out.append((folder / "seed.gguf").read_bytes())
    return out


def seeds_folder(folder: Path) -> list[bytes]:
    """run.jsonl and config.json of a compressed pico model, with a record separator between them."""
    from flips import example

    made = example(folder)
    return [(made / "run.jsonl").read_bytes() + b"\x1e" + (made / "config.json").read_bytes()]


Reader = Callable[[Path, bytes], None]
READERS: dict[str, tuple[Reader, Callable[[Path], list[bytes]]]] = {
    "safetensors": (safetensors, seeds_safetensors),
    "index": (index, seeds_index),
    "recipe": (recipe, seeds_recipe),
    "gguf": (gguf_file, seeds_gguf),
    "folder": (run_folder, seeds_folder),
}


def case(name: str, seeds: list[bytes], seed: int, number: int) -> bytes:
    """The bytes of one case."""
    draw = random.Random(f"{seed}:{name}:{number}")
    raw = mutate(draw.choice(seeds), draw.choice(seeds), draw)
    return fixed(raw, draw) if name == "safetensors" else raw


def attempt(read: Reader, folder: Path, raw: bytes) -> str:
    """accepted, refused, or what went wrong."""

    def late(*_: object) -> None:
        raise Late

    old = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    try:
        read(folder, raw)
        return "accepted"
    except LplrError as error:
        return "refused" if "\n" not in str(error) else f"more than one line: {error}"
    except Late:
        return f"longer than {LIMIT:g} s"
    except Exception as error:  # noqa: BLE001  (any other exception is what is looked for)
        return f"{type(error).__name__}: {error}"[:300]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def fuzz(name: str, cases: int, seed: int, root: Path) -> tuple[Counter[str], dict[int, str]]:
    """How many cases were accepted and refused, and the findings by number."""
    read, make = READERS[name]
    folder = root / name
    (folder / "in").mkdir(parents=True)
    seeds = make(folder / "in")
    counts: Counter[str] = Counter()
    findings: dict[int, str] = {}
    for number in range(cases):
        said = attempt(read, folder / "in", case(name, seeds, seed, number))
        if said in ("accepted", "refused"):
            counts[said] += 1
        else:
            findings[number] = said
    return counts, findings


def main() -> None:
    """The campaign of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1_000_000, help="in all, shared by the readers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="one case of one reader again")
    parser.add_argument("--readers", nargs="+", choices=list(READERS), default=list(READERS))
    args = parser.parse_args()
    started = time.perf_counter()
    command = " ".join(["python", "eval/scale/fuzz.py", *sys.argv[1:]])
    result: dict[str, Any] = {"command": command, "seed": args.seed, "readers": {}}
    with tempfile.TemporaryDirectory() as scratch:
        if args.case is not None:
            read, make = READERS[args.readers[0]]
            raw = case(args.readers[0], make(Path(scratch)), args.seed, args.case)
            Path(tempfile.gettempdir(), "lplr-fuzz-case").write_bytes(raw)
            read(Path(scratch), raw)
            return
        for name in args.readers:
            counts, findings = fuzz(name, args.cases // len(args.readers), args.seed, Path(scratch))
            shown = dict(list(findings.items())[:50])
            result["readers"][name] = {**dict(sorted(counts.items())), "findings": len(findings), "first findings": shown}
            print(name, result["readers"][name], flush=True)
    result["seconds"] = round(time.perf_counter() - started, 1)
    (ROOT / "eval/results/fuzz.json").write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(any(facts["findings"] for facts in result["readers"].values()))


if __name__ == "__main__":
    main()
