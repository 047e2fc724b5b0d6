"""Stop a run of a small model at every write point, in every way that a disk can be left, and go on: the bytes must be the same.

    python eval/scale/crash.py [--every 1] [--kills 20] [--calibrated]

At each step of the file layer (`lplr.files.observed`) of one run the output folder is taken down as it would be found

    killed    after SIGKILL at this moment: what the system calls so far have written
    powerless after a loss of power: only what was flushed, under the names of the last flush of the folder
    torn      in the middle of an append: a prefix of the new bytes, or a prefix and zeros to the full length
    raised    an exception at this step, in the process, with the clean-up that it brings
    full      ENOSPC at this step

and a run with the same recipe goes on from it.  `--kills` more runs are ended by a true SIGKILL of a forked process.  Counted:
states, runs that ended with other bytes, finished blocks that were made again, states that a loader takes but that are not the
finished model, and refusals.  The result goes to eval/results/crash.json.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import checkpoints  # noqa: E402  (of the tests: pico models on disk)
import torch  # noqa: E402

from lplr import files, records  # noqa: E402
from lplr.errors import LplrError, OutputError  # noqa: E402
from lplr.recipe import make_recipe  # noqa: E402
from lplr.records import LEDGER, TIME_FIELDS  # noqa: E402
from lplr.stream.compress import compress  # noqa: E402

State = dict[str, bytes]  # name -> content of every file of an output folder


class Stop(BaseException):
    """What ends a run at a step; no handler of the library knows it."""


def state_of(folder: Path) -> State:
    """Every file of a folder; nothing where there is none."""
    return {p.name: p.read_bytes() for p in folder.iterdir()} if folder.is_dir() else {}


@dataclass
class Disk:
    """Watches one output folder: `found` holds (point, kind, state) of every state in which it could be left."""

    folder: Path
    draw: random.Random
    points: int = 0
    found: list[tuple[int, str, State]] = field(default_factory=list)
    _synced: State = field(default_factory=dict)  # content of names now, as far as it was flushed
    _durable: State = field(default_factory=dict)  # names and contents that a loss of power leaves

    def __call__(self, step: str, path: Path) -> None:
        if self.folder not in (path, path.parent):
            return
        self.points += 1
        now = state_of(self.folder)
        if step == "synced":
            self._synced[path.name] = now[path.name]
            if path.name in self._durable:  # the name was there before: its content alone had to be flushed
                self._durable[path.name] = now[path.name]
        elif step == "renamed":
            self._synced[path.name] = self._synced.pop(f".{path.name}.partial")
        elif step == "folder synced":
            self._durable = {name: self._synced.get(name, b"") for name in now}
        self.found.append((self.points, "killed", now))
        self.found.append((self.points, "powerless", dict(self._durable)))
        if step == "sync" and path.name == LEDGER:
            whole, old = now[LEDGER], self._durable.get(LEDGER, b"")
            if whole.startswith(old) and len(whole) > len(old) and LEDGER in self._durable:
                for cut in sorted(self.draw.sample(range(len(old), len(whole)), min(4, len(whole) - len(old)))):
                    self.found.append((self.points, "torn", {**now, LEDGER: whole[:cut]}))
                    self.found.append((self.points, "torn", {**now, LEDGER: whole[:cut].ljust(len(whole), b"\0")}))


@dataclass
class Outcome:
    """What a finished run left: the files, and run.jsonl without its times."""

    files: dict[str, str]
    ledger: list[dict[str, Any]]

    @classmethod
    def of(cls, folder: Path) -> Outcome:
        """Of a folder."""
        hashes = {n: hashlib.sha256(c).hexdigest() for n, c in state_of(folder).items() if n != LEDGER and not n.startswith(".")}
        ledger = [{k: v for k, v in e.items() if k not in TIME_FIELDS} for e in records.read(folder / LEDGER)]
        return cls(hashes, ledger)


@dataclass
class Campaign:
    """The recipe, the folder for outputs, what an unbroken run gave, and the counts so far."""

    settings: dict[str, Any]
    root: Path
    whole: Outcome
    counts: Counter[str] = field(default_factory=Counter)
    seen: set[str] = field(default_factory=set)
    number: int = 0

    def go_on(self, folder: Path, kind: str) -> None:
        """Resume in a folder that was left in some state, and compare."""
        before = state_of(folder)
        self.counts[kind] += 1
        if "config.json" in before:
            alike = all(hashlib.sha256(before.get(n, b"")).hexdigest() == h for n, h in self.whole.files.items())
            self.counts["loads as a wrong model"] += not alike
        finished = {line["file"] for line in self._lines(before) if line["kind"] == "block"}
        made: set[str] = set()
        try:
            with files.observed(lambda step, path: made.add(path.name) if step == "rename" else None):
                compress(make_recipe(self.settings), folder)
        except LplrError:
            self.counts["refused"] += 1
            return
        self.counts["finished blocks made again"] += len(finished & made)
        self.counts["other bytes"] += Outcome.of(folder) != self.whole

    def restore(self, state: State, kind: str) -> None:
        """A folder in that state, unless one like it was tried; then `go_on`."""
        key = hashlib.sha256(repr(sorted(state.items())).encode()).hexdigest()
        if key in self.seen:
            self.counts["the same as another state"] += 1
            return
        self.seen.add(key)
        folder = self.next_folder()
        if state:
            folder.mkdir()
        for name, content in state.items():
            (folder / name).write_bytes(content)
        self.go_on(folder, kind)

    def interrupted(self, point: int, error: Callable[[], BaseException], kind: str) -> None:
        """A run in which the step `point` fails; then `go_on`."""
        folder, seen = self.next_folder(), [0]

        def fail(step: str, path: Path) -> None:
            seen[0] += folder in (path, path.parent)
            if seen[0] == point and folder in (path, path.parent):
                raise error()

        try:
            with files.observed(fail):
                compress(make_recipe(self.settings), folder)
            return  # the run has fewer points
        except (Stop, OutputError):
            pass
        self.go_on(folder, kind)

    def killed(self, point: int) -> None:
        """A run in a forked process that SIGKILL ends at the step `point`; then `go_on`."""
        folder = self.next_folder()
        child = os.fork()
        if not child:
            seen = [0]

            def die(step: str, path: Path) -> None:
                seen[0] += folder in (path, path.parent)
                if seen[0] == point:
                    os.kill(os.getpid(), signal.SIGKILL)

            try:
                with files.observed(die):
                    compress(make_recipe(self.settings), folder)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"the run has fewer than {point} points"
        self.go_on(folder, "SIGKILL")

    def next_folder(self) -> Path:
        """The path of a folder that is not there yet; the last one is removed."""
        last = self.root / f"out-{self.number}"
        for path in last.iterdir() if last.is_dir() else ():
            path.unlink()
        if last.is_dir():
            last.rmdir()
        self.number += 1
        return self.root / f"out-{self.number}"

    @staticmethod
    def _lines(state: State) -> Iterator[dict[str, Any]]:
        for line in state.get(LEDGER, b"").split(b"\n")[:-1]:
            yield json.loads(line)


def campaign(settings: dict[str, Any], root: Path, *, every: int, kills: int, seed: int = 0) -> tuple[int, Counter[str]]:
    """Points of one run, and the counts over every `every`-th state and point of it, and `kills` true kills."""
    draw = random.Random(seed)
    disk = Disk(root / "whole", draw)
    with files.observed(disk):
        compress(make_recipe(settings), disk.folder)
    trial = Campaign(settings, root, Outcome.of(disk.folder))
    for _, kind, state in disk.found[draw.randrange(every) :: every]:
        trial.restore(state, kind)
    for point in range(1 + draw.randrange(every), disk.points + 1, every):
        trial.interrupted(point, Stop, "raised")
        trial.interrupted(point, lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "full")
    for point in draw.sample(range(1, disk.points + 1), kills):
        trial.killed(point)
    return disk.points, trial.counts


def main() -> None:
    """The campaign of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="take every N-th state and point")
    parser.add_argument("--kills", type=int, default=20, help="true SIGKILLs")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--calibrated", action="store_true", help="with text, so that the allocation and its files are there too")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # a forked child has no pool of threads
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        source = checkpoints.write(Path(scratch) / "base", "llama", num_hidden_layers=args.layers)
        settings = {"model": str(source), "dataset": "none", "bits": 4, "alternations": 0, "power_iterations": 0}
        if args.calibrated:
            settings |= {"dataset": str(source / "text.txt"), "nsamples": 2, "seqlen": 32, "bits": 2, "recovery": "fast"}
        else:
            settings["allocation"] = "uniform"
        points, counts = campaign(settings, Path(scratch), every=args.every, kills=args.kills, seed=args.seed)
    result = {"command": " ".join(["python", "eval/scale/crash.py", *sys.argv[1:]]), "points": points, **counts}
    result = {**result, "seconds": round(time.perf_counter() - started, 1)}
    print(json.dumps(result, indent=1))
    name = "crash_calibrated.json" if args.calibrated else "crash.json"
    (ROOT / "eval/results" / name).write_text(json.dumps(result, indent=1) + "\n")
    failures = ("other bytes", "finished blocks made again", "loads as a wrong model", "refused")
    sys.exit(any(counts[name] for name in failures))


if __name__ == "__main__":
    main()
