"""Everything that eval/ measures, one step after another; a step that is done with the same settings is passed over.

    python eval/bench.py [STEP ...] [--list] [--force] [--data ../shared/data] [--cache .bench]
    make bench [STEPS="peers papers_images"] [FORCE=1] [LIST=1] [DATA=FOLDER]

STEP picks a step by its name, or all steps whose names begin with it and an underscore (`peers`, `papers`).  A name in braces in
a command is a place: a file of the data folder, or something that is made first, once, in the cache (MADE: the dense model, the
sentence encoder, compressed models, and for each library that pins other versions than we do an environment of its own).

Each step is a process.  Its output goes to the screen and to CACHE/logs; CACHE/done remembers with which settings it ended well.
A step that fails does not stop the others; the exit status tells at the end, below a table of all steps and their seconds.
Rows of the result files that a step does not make again stay as they are.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import string
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "eval" / "results"
TORCH = f"torch=={metadata.version('torch').partition('+')[0]}"


@dataclass(frozen=True)
class Step:
    """A measurement: its command (a script of this project or `lplr`), the file of eval/results that it writes its figures into
    ("" for one that only prints), the minutes it takes on two shared cores of an AMD EPYC, and the threads it may use."""

    name: str
    command: str
    result: str
    minutes: float
    threads: int = 1


@dataclass(frozen=True)
class Made:
    """Something in the cache: the command that makes it at {to}, the file below {to} that is there once it is whole, minutes."""

    command: str
    ready: str
    minutes: float


def environment(*packages: str) -> Made:
    """An interpreter with the same torch as ours, which is installed first, and a library with what it pins."""
    return Made(f"eval/prepare.py environment {{to}} {TORCH} accelerate {' '.join(packages)}", "ready", 5)


def compressed(bits: int, *options: str) -> Made:
    command = f"lplr compress {{smol}} --bits {bits} --dataset {{c4}} --preset fast -o {{to}} {' '.join(options)}"
    return Made(command.strip(), "config.json", 40)


MADE: dict[str, Made] = {
    "smol": Made("eval/prepare.py model {to}", "config.json", 1),
    "minilm": Made("eval/prepare.py embedder {to}", "config.json", 1),
    "smol_2bit": compressed(2),
    "smol_1bit": compressed(1, "--method double_binary"),
    "python_hqq": environment("transformers==5.23.0", "hqq==0.2.8.post1"),
    "python_gptqmodel": environment("transformers==5.23.0", "gptqmodel==7.6.0"),
    "python_llmcompressor": environment("transformers==5.17.0", "compressed-tensors==0.19.0", "llmcompressor==0.14.0.1"),
    "python_auto_round": environment("transformers==5.23.0", "auto-round==0.16.1"),
    "python_torchao": environment("transformers==5.24.0", "torchao==0.18.0"),
    "python_quanto": environment("transformers==5.24.0", "optimum-quanto==0.2.7"),
    "python_pyscnn": environment("pyscnn==0.0.10"),
}  # fmt: skip
# files of the data folder
DATA = {
    "data": ".",
    "wikitext": "wikitext2/wiki.test.raw",
    "c4": "calibration/c4_en_600.jsonl",
}
_TEXTS = "--model {smol} --calibration {c4} --heldout {wikitext}"
_PEERS = "eval/quality/peers.py --model {smol} --wikitext {wikitext} --calibration {c4} --only"
_HEADS = "eval/convex/heads.py --data {data} --cache {cache}/features"
_SPLIT_BY_SEED = "uci/ionosphere uci/sonar uci/breast-cancer-wisconsin uci/banknote_authentication uci/german"
_CRONOS = "'CRONOS, as published' 'CRONOS, repaired'"
_PRACTICE = "logistic ridge 'linear SVM' 'kernel SVM' LightGBM 'sklearn MLP' 'AdamW MLP' ours"

STEPS = (
    Step("published", "eval/factor/published.py", "published.json", 1, 2),
    Step("one-matrix", "eval/factor/one_matrix.py", "one_matrix.json", 4, 2),
    Step("grids", "eval/quality/grids.py", "grids.json", 5),
    Step("methods", "eval/quality/methods.py", "methods.json", 40, 2),
    Step("layers", f"eval/quality/layers.py {_TEXTS}", "layers.json", 50),
    Step("peers_lplr_4", f"{_PEERS} lplr-4", "peers.json", 35, 2),
    Step("peers_lplr_3", f"{_PEERS} lplr-3", "peers.json", 35, 2),
    Step("peers_lplr_2", f"{_PEERS} lplr-2", "peers.json", 35, 2),
    Step("peers_lplr_1", f"{_PEERS} lplr-1", "peers.json", 40, 2),
    Step("peers_lplr_uniform", f"{_PEERS} lplr-2-uniform", "peers.json", 30, 2),
    Step("peers_bitsandbytes", f"{_PEERS} nf4", "peers.json", 3, 2),
    Step("peers_hqq", f"{_PEERS} hqq-4 hqq-3 hqq-2 hqq-2-axis0 hqq-2-g16 --python hqq={{python_hqq}}", "peers.json", 10, 2),
    Step("peers_gptqmodel", f"{_PEERS} gptq-4 gptq-3 gptq-2 --python gptqmodel={{python_gptqmodel}}", "peers.json", 50, 2),
    Step(
        "peers_llmcompressor",
        f"{_PEERS} llmc-gptq-4 llmc-gptq-3 llmc-gptq-2 --python llmcompressor={{python_llmcompressor}}",
        "peers.json",
        45,
        2,
    ),
    Step(
        "peers_auto_round", f"{_PEERS} auto-round-4 auto-round-2 --python auto-round={{python_auto_round}}", "peers.json", 30, 2
    ),
    Step(
        "peers_torchao",
        f"{_PEERS} torchao-int8 torchao-int4 torchao-int4-hqq --python torchao={{python_torchao}}",
        "peers.json",
        4,
        2,
    ),
    Step("peers_quanto", f"{_PEERS} quanto-8 quanto-4 quanto-2 --python optimum-quanto={{python_quanto}}", "peers.json", 6, 2),
    Step(
        "peers_llama_cpp",
        f"{_PEERS} llama.cpp-q4_0 llama.cpp-q4_k llama.cpp-iq4_nl llama.cpp-q3_k llama.cpp-q2_k llama.cpp-q2_k-imatrix "
        "llama.cpp-iq2_xxs",
        "peers.json",
        20,
        2,
    ),
    Step(
        "harness_agreement",
        "eval/quality/harness_agreement.py --model {smol} --data {data} --samples 100",
        "harness_agreement.json",
        30,
    ),
    Step(
        "prune_mlp", "eval/quality/prune_mlp.py --model {smol} --wikitext {wikitext} --calibration {c4}", "prune_mlp.json", 40, 2
    ),
    Step("recovery", "eval/quality/recovery.py --model {smol} --wikitext {wikitext} --calibration {c4}", "recovery.json", 300, 2),
    Step("papers_images", "eval/papers/images.py", "papers_images.json", 5),
    Step(
        "papers_embeddings",
        "eval/papers/embeddings.py --data {data} --embedder {minilm} --cache {cache}/features",
        "papers_embeddings.json",
        15,
    ),
    Step("papers_llama_layers", "eval/papers/llama_layers.py --model {smol} --blocks 15", "papers_llama_layers.json", 8),
    Step("papers_caldera_rank", f"eval/papers/caldera_rank.py {_TEXTS} --blocks 15", "papers_caldera_rank.json", 15),
    Step(
        "papers_optimal_sets_figure2", "eval/papers/optimal_sets.py figure2 --data {data}", "papers_optimal_sets_figure2.json", 45
    ),
    Step("papers_optimal_sets_tables", "eval/papers/optimal_sets.py tables --data {data}", "papers_optimal_sets_tables.json", 20),
    Step("papers_wedge_spiral", "eval/papers/wedge.py spiral", "wedge.json", 8),
    Step(
        "papers_wedge_text",
        "eval/papers/wedge.py text --data {data} --embedder {minilm} --cache {cache}/features",
        "wedge.json",
        20,
    ),
    Step("papers_wedge_large", "eval/papers/wedge.py large --data {data}", "wedge.json", 1, 2),
    Step("convex_fixed", "eval/convex/fixed.py --peer-python {python_pyscnn}", "convex_fixed.json", 12),
    Step("convex_relu", "eval/convex/relu.py --peer-python {python_pyscnn}", "convex_relu.json", 8),
    Step("convex_large", "eval/convex/large.py", "convex_large.json", 5, 2),
    Step("convex_scale", "eval/convex/scale.py --folder {cache}", "convex_scale.json", 5, 2),
    Step(
        "convex_heads_compressed",
        f"{_HEADS} --model 2bit={{smol_2bit}} --sets sst2/2bit agnews/2bit --only {_PRACTICE}",
        "convex_heads.json",
        60,
    ),
    Step(
        "convex_heads_cronos",
        f"{_HEADS} --model 2bit={{smol_2bit}} --sets sst2/2bit uci/ionosphere uci/sonar --only {_CRONOS}",
        "convex_heads.json",
        30,
    ),
    Step(
        "convex_heads_minilm",
        f"{_HEADS} --embedder {{minilm}} --sets sst2/minilm agnews/minilm imdb/minilm --only {_PRACTICE}",
        "convex_heads.json",
        25,
    ),
    Step("convex_heads_uci", f"{_HEADS} --sets {_SPLIT_BY_SEED} --only {_PRACTICE}", "convex_heads.json", 8),
    Step(
        "kernels_cpu",
        "eval/kernels/cpu.py --seconds 0.12 --rounds 3 --shapes 'Llama-2-7B attention' 'Llama-2-7B up' --tokens 1 "
        "--ggml xllamacpp --output eval/results/kernels_cpu.json",
        "kernels_cpu.json",
        5,
        2,
    ),
    Step(
        "kernels_generate_1bit",
        "eval/kernels/generate.py {smol_1bit} {smol} --tokens 48 --label 'SmolLM2-135M double_binary 1 bit' "
        "--output eval/results/generate_cpu.json",
        "generate_cpu.json",
        2,
        2,
    ),
    Step(
        "kernels_generate_2bit",
        "eval/kernels/generate.py {smol_2bit} {smol} --tokens 48 --label 'SmolLM2-135M trellis 2 bit' "
        "--output eval/results/generate_cpu.json",
        "generate_cpu.json",
        2,
        2,
    ),
    Step("kernels_ahead_of_time", "eval/kernels/ahead_of_time.py", "kernels_aot.json", 15),
    Step("scale_costs", "eval/scale/costs.py", "scale_costs.json", 10, 2),
    Step("scale_simulated", "eval/scale/simulate.py", "scale_simulated.json", 1),
    Step("scale_ray", "eval/scale/ray_cluster.py", "ray.json", 10, 2),
    Step("scale_crash", "eval/scale/crash.py --layers 4 --kills 20", "crash.json", 12),
    Step("scale_flips", "eval/scale/flips.py --flips 10000", "flips.json", 1),
    Step(
        "scale_fuzz",
        "eval/scale/fuzz.py --cases 12000 --seed 1 --readers safetensors index recipe gguf",
        "fuzz.json",
        1,
    ),
    Step("scale_out_of_core", "eval/scale/out_of_core.py --gigabytes 20 --folder {cache}", "out_of_core.json", 60, 2),
    Step("scale_soak", "eval/scale/soak.py", "soak.json", 15),
    Step("speed_compress", "eval/speed/profile_compress.py --model {smol} --dataset {c4} --nsamples 16", "", 6, 2),
)
# scripts of eval/ that are no step, and why
LEFT_OUT = {
    "eval/bench.py": "this one",
    "eval/prepare.py": "makes the places",
    "eval/kernels/gpu_bench.py": "needs a GPU: make bench-gpu",
    "eval/quality/trellis_search.py": "searched for constants that stand in the code; grids.py measures them",
}


def places(command: str) -> list[str]:
    """The names in braces of a command."""
    return [name for _, name, _, _ in string.Formatter().parse(command) if name]


def chosen(wanted: list[str]) -> list[Step]:
    """The steps that the words pick, in the order of STEPS; SystemExit for a word that picks none."""
    for word in wanted:
        if not any(picks(word, step) for step in STEPS):
            sys.exit(f"no step {word!r}: choose among {', '.join(step.name for step in STEPS)}")
    return [step for step in STEPS if not wanted or any(picks(word, step) for word in wanted)]


def picks(word: str, step: Step) -> bool:
    return step.name == word or step.name.startswith(f"{word}_")


class Bench:
    """Runs steps against one data folder and one cache."""

    def __init__(self, data: Path, cache: Path, force: bool) -> None:
        self.data, self.cache, self.force = data.resolve(), cache.resolve(), force
        self.rows: list[tuple[str, str, float]] = []  # name, how it went, seconds
        self.tried: dict[str, Path | None] = {}  # what was made in this run, None for what could not be

    def line(self, command: str, **more: Path) -> list[str]:
        """The words of a command with its places filled in; raises LookupError for one that cannot be made."""
        found = {"cache": self.cache, **more}
        for name in places(command):
            found[name] = found.get(name) or self.place(name)
        words = [word.format_map(found) for word in shlex.split(command)]
        return [os.fspath(Path(sys.executable).with_name("lplr")), *words[1:]] if words[0] == "lplr" else [sys.executable, *words]

    def place(self, name: str) -> Path:
        if name in DATA:
            path = self.data / DATA[name]
            if not path.exists():
                raise LookupError(f"{path} is not there: say where the data folder is, --data FOLDER or make bench DATA=FOLDER")
            return path
        if name not in self.tried:
            self.tried[name] = self.make(name)
        path = self.tried[name]
        if path is None:
            raise LookupError(f"{name} could not be made: see {self.cache / 'logs' / name}.log")
        return path / "bin" / "python" if name.startswith("python_") else path

    def make(self, name: str) -> Path | None:
        """The path of what is in the cache, made now if need be; other settings have another path."""
        made = MADE[name]
        to = self.cache / f"{name}-{hashlib.sha256(made.command.encode()).hexdigest()[:8]}"
        if self.force and made.command.startswith("lplr ") and to.exists():
            shutil.rmtree(to)
        if not (to / made.ready).exists():
            self.run(name, self.line(made.command, to=to), 2)
        return to if (to / made.ready).exists() else None

    def step(self, step: Step) -> None:
        stamp = self.cache / "done" / f"{step.name}.json"
        kept = json.loads(stamp.read_text()) if stamp.is_file() else {}
        there = not step.result or (RESULTS / step.result).is_file()
        if there and not self.force and kept.get("command") == step.command:
            self.rows.append((step.name, "done before", kept["seconds"]))
            return
        try:
            command = self.line(step.command)
        except LookupError as missing:
            self.rows.append((step.name, f"not run: {missing}", 0.0))
            print(f"{step.name} is not run: {missing}", flush=True)
            return
        if self.run(step.name, command, step.threads):
            stamp.parent.mkdir(parents=True, exist_ok=True)
            stamp.write_text(json.dumps({"command": step.command, "seconds": self.rows[-1][2]}) + "\n")

    def run(self, name: str, command: list[str], threads: int) -> bool:
        """Run a command, its output on the screen and in its log; whether it ended well."""
        log = self.cache / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        surroundings = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
        print(f"--- {name}: {shlex.join(command)}", flush=True)
        started = time.perf_counter()
        how = "failed"
        try:
            with log.open("w") as file, subprocess.Popen(
                command, cwd=ROOT, env=surroundings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
            ) as process:  # fmt: skip
                assert process.stdout is not None
                for line in process.stdout:
                    print(line, end="", flush=True)
                    file.write(line)
            how = "done" if process.returncode == 0 else f"failed with status {process.returncode}: see {log}"
        except KeyboardInterrupt:
            how = "interrupted"
            raise
        finally:
            self.rows.append((name, how, time.perf_counter() - started))
        return how == "done"

    def table(self) -> None:
        width = max((len(name) for name, _, _ in self.rows), default=4)
        print(f"\n{'step':{width}}  {'seconds':>8}")
        for name, how, seconds in self.rows:
            print(f"{name:{width}}  {seconds:8.0f}  {how}")

    def failed(self) -> bool:
        return any(not how.startswith("done") for _, how, _ in self.rows)


def listing(steps: list[Step]) -> None:
    for step in steps:
        needs = [name for name in places(step.command) if name in MADE]
        first = f"  (first {', '.join(f'{name} {MADE[name].minutes:g} min' for name in needs)})" if needs else ""
        print(f"{step.name:28} {step.minutes:5g} min  {step.command.split()[0]} -> {step.result or 'the screen'}{first}")
    made = {name for step in steps for name in places(step.command) if name in MADE}
    minutes = sum(step.minutes for step in steps), sum(MADE[name].minutes for name in made)
    print(f"together about {minutes[0] / 60:.1f} h, and {minutes[1] / 60:.1f} h to make what they need")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", metavar="STEP", help="some of the steps")
    parser.add_argument("--list", action="store_true", help="show the steps with the minutes they take; run nothing")
    parser.add_argument("--force", action="store_true", help="run what is done again")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--cache", type=Path, default=ROOT / ".bench")
    args = parser.parse_args()
    steps = chosen(args.steps)
    if args.list:
        return listing(steps)
    bench = Bench(args.data, args.cache, args.force)
    try:
        for step in steps:
            bench.step(step)
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on with what is left")
    bench.table()
    sys.exit(1 if bench.failed() else 0)


if __name__ == "__main__":
    main()
