"""How long large models take on many machines: a simulation from what was measured on this one.

    python eval/scale/simulate.py

`lplr compress --engine ray` is followed matrix by matrix: the driver reads and sends in order, no further ahead than its store
holds; workers take what comes; results go back and are written in order; with calibration, a block's stages wait for each other
and for the passes of the text, which are tasks too.  Every assumption is in ASSUMED and every measured input comes from
eval/results/scale_costs.json (`costs.py`); both are printed.  What bounds a run is found by doubling one thing at a time: the one
that shortens it most.  The table goes to eval/results/scale_simulated.json.
"""

from __future__ import annotations

import heapq
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil, prod
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from lplr.files import write_text_atomic  # noqa: E402
from lplr.stream.calibrate import TOKENS_AT_ONCE  # noqa: E402
from lplr.stream.estimate import LIBRARIES, matrix_memory  # noqa: E402

RESULTS = ROOT / "eval/results"
PASSES = 5  # of the text through a block or its original, see ASSUMED
MACHINES = (1, 2, 4, 8, 16, 32, 64)
TERMS = ("n d", "n d^2", "n d min(n, d)", "d^3")

# sizes from the models' public config.json: hidden, inner, blocks, heads, key-value heads, vocabulary; two bytes a parameter
MODELS = {
    "Llama-2-7B": {"hidden": 4096, "inner": 11008, "blocks": 32, "heads": 32, "kv": 32, "vocabulary": 32000},
    "Llama-2-70B": {"hidden": 8192, "inner": 28672, "blocks": 80, "heads": 64, "kv": 8, "vocabulary": 32000},
    "Llama-3.1-405B": {"hidden": 16384, "inner": 53248, "blocks": 126, "heads": 128, "kv": 8, "vocabulary": 128256},
}
# name -> (costs of a matrix, costs of its curve or None, bits a weight, calibrated)
RUNS = {
    "naive, 4 bits, data-free": ("naive, 4 bits, data-free", None, 4.0, False),
    "auto, 2 bits, data-free": ("auto, 2 bits, data-free", "curve, data-free", 2.0, False),
    "auto, 2 bits, calibrated": ("auto, 2 bits, calibrated", "curve, calibrated", 2.0, True),
}
ASSUMED = {
    "cores of a machine": 16,
    "memory of a machine, GiB": 128,
    "network of a machine each way, GB/s": 1.25,
    "price of a machine, USD an hour": 0.64,
    "speed of a core": "that of the measured one, all cores of a machine alike busy",
    "speed-up of the driver's matrix products by all of its cores, in the sensitivities": 12.0,
    "matrix costs": "the fitted terms hold beyond the measured shapes (largest 4096 x 4096)",
    "engine": "every task in one thread; as many on a machine as its cores and memory hold (stream.estimate.matrix_memory)",
    "one machine": "the same engine on one machine: nothing passes the network",
    "driver": "on one of the machines, whose cores work too; its disk is the measured one",
    "sensitivities": "passes of the driver alone, as if with all of its cores; so is a pass that no machine can hold",
    "object store of a machine, share of its memory": 0.3,
    "seconds of a task beside its work": 0.01,
    "calibration tokens": 128 * 512,
    "tokens of the sensitivities": 32 * 512,
    "attention scores, norms, embedding and head": "left out of the passes, but for the head in the sensitivities",
    "passes": "counts of stream.estimate: 3 through a compressed block, 2 more through the original one, moments, drift",
    "text": "a task for each batch of a pass; every machine that works gets the block and the original once a pass",
    "failures": "none",
}


@dataclass(frozen=True)
class Machine:
    """One of the equal machines; rates in bytes a second; speed that of a core over the measured one."""

    cores: int = int(ASSUMED["cores of a machine"])
    memory: float = float(ASSUMED["memory of a machine, GiB"]) * 2**30
    network: float = float(ASSUMED["network of a machine each way, GB/s"]) * 1e9
    disk: float = 1.0  # over the measured rates
    speed: float = 1.0

    def slots(self, shape: tuple[int, int], calibrated: bool) -> int:
        """Matrices of that shape that it holds at a time."""
        needed = LIBRARIES + matrix_memory(shape, moments=calibrated)
        return min(self.cores, int(self.memory * (1 - ASSUMED["object store of a machine, share of its memory"]) // needed))


@dataclass(frozen=True)
class Matrix:
    """What one matrix costs; seconds in one measured core."""

    shape: tuple[int, int]
    factorized: float
    certified: float
    curve: float
    sent: float  # bytes: itself
    moments: float  # bytes: its H and step where it has them
    back: float  # bytes of the packed result


def seconds(costs: dict[str, Any], shape: tuple[int, int]) -> float:
    """The fitted processor seconds of one matrix."""
    n, d = shape
    sizes = (n * d / 1e6, n * d * d / 1e9, n * d * min(n, d) / 1e9, d**3 / 1e9)
    found = costs["terms (1e6, 1e9, 1e9, 1e9)"]
    return sum(found[name] * size for name, size in zip(TERMS, sizes, strict=True))


def stages(model: dict[str, int]) -> list[list[tuple[int, int]]]:
    """Shapes (out, in) of a block's matrices, those with one input together."""
    h, inner = model["hidden"], model["inner"]
    kv = h // model["heads"] * model["kv"]
    return [[(h, h), (kv, h), (kv, h)], [(h, h)], [(inner, h), (inner, h)], [(h, inner)]]


class Run:
    """One model and recipe, and its time on any machines."""

    def __init__(self, model: dict[str, int], run: tuple[str, str | None, float, bool], measured: dict[str, Any]) -> None:
        self.model, self.measured = model, measured
        name, curve, bits, self.calibrated = run
        costs = measured["processor seconds of a matrix"]
        self.rates, self.disk = measured["a second, one thread"], measured["a second, of the disk"]

        def cost(shape: tuple[int, int]) -> Matrix:
            n, d = shape
            first, then = (seconds(costs[f"{name}, {part}"], shape) for part in ("factorized", "certified"))
            moments = 8.0 * d * d if self.calibrated else 0.0
            measuring = seconds(costs[curve], shape) if curve else 0.0
            return Matrix(shape, first, then, measuring, 2.0 * n * d, moments, bits / 8 * n * d)

        self.block = [[cost(shape) for shape in stage] for stage in stages(model)]
        self.all = [m for stage in self.block for m in stage]
        self.largest = max((m.shape for m in self.all), key=prod)
        self.outside = 4.0 * model["vocabulary"] * model["hidden"]  # bytes: embedding and head

    def slots(self, machine: Machine) -> int:
        """Matrices that a machine works on at a time: the largest shape decides."""
        return machine.slots(self.largest, self.calibrated)

    def reading(self, m: Matrix, machine: Machine) -> float:
        """Seconds until the driver has a matrix, checked and in its store."""
        return m.sent / (self.disk["read, bytes"] * machine.disk) + m.sent / self.rates["pickled, bytes"] / machine.speed

    def stream(self, machine: Machine, count: int, work: list[tuple[Matrix, float, float]], per: int) -> float:
        """Seconds of matrices without calibration, (matrix, seconds of work, bytes back); `per` is what a machine holds.

        In order: read and put in the store, sent, worked on where a place is free first, fetched, written.
        """
        ahead = max(1, min(2 * per * count, self._store(machine) // max(int(m.sent) for m, _, _ in work)))
        free = [(0.0, i % count) for i in range(per * count)]  # (when, on which machine: 0 is the driver's)
        heapq.heapify(free)
        ready = line_out = line_in = fetched = written = 0.0
        ends: list[float] = []
        for i, (m, work_seconds, back) in enumerate(work):
            ready = max(ready, ends[i - ahead] if i >= ahead else 0.0) + self.reading(m, machine)
            when, where = heapq.heappop(free)
            arrives = ready
            if where:
                line_out = max(line_out, ready) + m.sent / machine.network
                arrives = line_out
            end = max(when, arrives) + work_seconds / machine.speed + ASSUMED["seconds of a task beside its work"]
            heapq.heappush(free, (end, where))
            if where:
                line_in = max(line_in, end) + back / machine.network
                end = max(end, line_in)
            fetched = max(fetched, end)
            ends.append(fetched)
            written = max(written, fetched) + back / (self.disk["written with SHA-256, bytes"] * machine.disk)
        return written

    def _store(self, machine: Machine) -> int:
        return int(machine.memory * ASSUMED["object store of a machine, share of its memory"])

    def text(self, tokens: int, machine: Machine, count: int) -> float:
        """Seconds of the passes and second moments of one block: tasks of a batch each, or the network of the driver."""
        weights, inputs = sum(prod(m.shape) for m in self.all), [stage[0].shape[1] for stage in self.block]
        squares, batches = sum(d * d for d in inputs), -(-tokens // TOKENS_AT_ONCE)
        rate, moments = self.rates["float32 products, operations"], self.rates["of a second moment, tokens d^2"]
        batch = TOKENS_AT_ONCE * ((PASSES * 2.0 * weights + 2.0 * squares) / rate + squares / moments) / machine.speed
        task = LIBRARIES + 2 * 4 * (weights + 8 * TOKENS_AT_ONCE * max(inputs)) + 24 * max(inputs) ** 2
        per = min(machine.cores, int(machine.memory * (1 - ASSUMED["object store of a machine, share of its memory"]) // task))
        if not per:
            return batches * batch * machine.speed / self._driver(machine)
        sent = max(self.text_bytes(tokens, count)) / machine.network
        # into the driver's store once a pass, and every result out of it
        states = 2 * 4.0 * TOKENS_AT_ONCE * self.model["hidden"]
        stored = PASSES * (2 * 4.0 * weights + batches * states) + batches * (2 * 4.0 * squares + states)
        return max(ceil(batches / (per * count)) * batch, sent, stored / self.rates["pickled, bytes"] / machine.speed)

    def text_bytes(self, tokens: int, count: int) -> tuple[float, float]:
        """Bytes that leave the driver, and that come back, for the passes of one block."""
        batches = -(-tokens // TOKENS_AT_ONCE)
        away, machines = batches * (count - 1) / count, min(count, batches) - 1
        states = 2 * 4.0 * TOKENS_AT_ONCE * self.model["hidden"]
        out = PASSES * (machines * 2 * 4.0 * sum(prod(m.shape) for m in self.all) + away * states)
        return out, away * (2 * 4.0 * sum(stage[0].shape[1] ** 2 for stage in self.block) + states)

    def sensitivity(self, machine: Machine) -> float:
        """Seconds of the driver's passes that the allocation rests on."""
        tokens, blocks = ASSUMED["tokens of the sensitivities"], self.model["blocks"]
        rate = self.rates["float32 products, operations"] * self._driver(machine)
        moments = self.rates["of a second moment, tokens d^2"] * self._driver(machine)
        weights = blocks * sum(prod(m.shape) for m in self.all) + self.model["vocabulary"] * self.model["hidden"]
        inputs = blocks * (sum(s[0].shape[1] ** 2 for s in self.block) + sum(m.shape[1] ** 2 for m in self.all))
        return 4 * tokens * 2.0 * weights / rate + tokens * inputs / moments

    def _driver(self, machine: Machine) -> float:
        full = float(ASSUMED["speed-up of the driver's matrix products by all of its cores, in the sensitivities"])
        return machine.speed * full * machine.cores / int(ASSUMED["cores of a machine"])

    def seconds(self, machine: Machine, count: int) -> dict[str, float]:
        """Seconds of each phase."""
        per, blocks = self.slots(machine), self.model["blocks"]
        everything = self.all * blocks
        out = {"outside of the blocks": self.outside / (self.disk["written with SHA-256, bytes"] * machine.disk)}
        if not self.calibrated:
            if self.all[0].curve:
                out["curves"] = self.stream(machine, count, [(m, m.curve, 0.0) for m in everything], per)
            jobs = [(m, m.factorized + m.certified, m.back) for m in everything]
            return {**out, "matrices": self.stream(machine, count, jobs, per)}
        out["sensitivities"] = self.sensitivity(machine)
        # a block's curves wait for its gradients; they are worked on while the driver goes on with the next block
        out["curves"] = blocks * self._together(machine, count, [(m, m.curve) for m in self.all], per)
        out["text"] = blocks * self.text(ASSUMED["calibration tokens"], machine, count)
        out["matrices"] = blocks * sum(
            self._together(machine, count, [(m, m.factorized) for m in stage], per) for stage in self.block
        )
        out["certificates of the last stage"] = blocks * self.block[-1][0].certified / machine.speed
        return out

    def _together(self, machine: Machine, count: int, jobs: list[tuple[Matrix, float]], per: int) -> float:
        """Seconds of matrices with their moments, handed out at once, longest first; half of a stage's moments are shared."""
        free = [0.0] * (per * count)
        sent = 0.0
        for i, (m, work) in enumerate(sorted(jobs, key=lambda job: -job[1])):
            if count > 1:
                sent += (m.sent + (m.moments if i == 0 else 0.0) + m.back) / machine.network
            heapq.heapreplace(free, max(free[0], sent) + self.reading(m, machine) + work / machine.speed)
        return max(free)

    def network(self, count: int) -> float:
        """Bytes that pass the driver's network, when every (count - 1) / count of the work is done elsewhere."""
        times = (2 if self.all[0].curve else 1) * self.model["blocks"]
        moments = sum(stage[0].moments for stage in self.block)
        total = times * (sum(m.sent for m in self.all) + moments) + self.model["blocks"] * sum(m.back for m in self.all)
        text = sum(self.text_bytes(ASSUMED["calibration tokens"], count)) if self.calibrated else 0.0
        return total * (count - 1) / count + self.model["blocks"] * text

    def memory(self, machine: Machine, count: int) -> dict[str, float]:
        """Peak GiB of the driver's process and store, and of a worker's machine."""
        per = self.slots(machine)
        task = LIBRARIES + matrix_memory(self.largest, moments=self.calibrated)
        largest = max(m.sent for m in self.all)
        ahead = max(1, min(2 * per * count, int(self._store(machine) // largest)))
        block = sum(m.back for m in self.all)
        driver = LIBRARIES + block + largest
        if self.calibrated:  # two blocks in float32, H, drift and factors of the widest input, those of a batch
            widest = max(m.shape[1] for m in self.all)
            driver += 2 * 4 * sum(prod(m.shape) for m in self.all) + 6 * 4 * widest**2 + 4 * TOKENS_AT_ONCE * 8 * widest
        return {"driver": driver / 2**30, "driver's store": ahead * largest / 2**30, "tasks of a machine": per * task / 2**30}


def bound(run: Run, machine: Machine, count: int) -> tuple[str, dict[str, float]]:
    """What shortens a run most when there is twice as much of it, and the share of the time that each would leave."""
    base = sum(run.seconds(machine, count).values())
    twice = {
        "number of machines": (machine, 2 * count),
        "memory of a machine": (replace(machine, memory=2 * machine.memory), count),
        "network": (replace(machine, network=2 * machine.network), count),
        "disk of the driver": (replace(machine, disk=2 * machine.disk), count),
        "speed of one core (longest matrix, chain of stages, driver)": (replace(machine, speed=2 * machine.speed), count),
    }
    left = {name: sum(run.seconds(*changed).values()) / base for name, changed in twice.items()}
    enough = min(left.values()) + 0.05  # of several that do as much, the first: machines are the cheapest to have
    return next(name for name, share in left.items() if share <= enough), left


def rows(measured: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every model, recipe and number of machines."""
    for model_name, model in MODELS.items():
        for run_name, recipe in RUNS.items():
            run = Run(model, recipe, measured)
            for count in MACHINES:
                machine = Machine()
                if not run.slots(machine):
                    yield {"model": model_name, "run": run_name, "machines": count, "refused": "no machine holds a matrix"}
                    continue
                phases = run.seconds(machine, count)
                total = sum(phases.values())
                name, left = bound(run, machine, count)
                yield {
                    "model": model_name, "run": run_name, "machines": count, "hours": total / 3600,
                    "core hours": sum(m.factorized + m.certified + m.curve for m in run.all) * model["blocks"] / 3600,
                    "tasks at a time on a machine": run.slots(machine),
                    "seconds": phases, "GiB": run.memory(machine, count),
                    "GB sent": run.network(count) / 1e9,
                    "USD": total / 3600 * count * float(ASSUMED["price of a machine, USD an hour"]),
                    "bound by": name, "time left with twice as much": left,
                }  # fmt: skip


def main() -> None:
    """Print inputs, assumptions and the table; store them."""
    measured = json.loads((RESULTS / "scale_costs.json").read_text())
    found = list(rows(measured))
    print("measured here (eval/results/scale_costs.json, " + measured["command"] + ")")
    for name, costs in measured["processor seconds of a matrix"].items():
        print(f"  {name}: " + ", ".join(f"{k} {v:.4g}" for k, v in costs["terms (1e6, 1e9, 1e9, 1e9)"].items() if v))
    for part in ("a second, one thread", "a second, of the disk"):
        print(f"  {part}: " + ", ".join(f"{k} {v:.3g}" for k, v in measured[part].items()))
    print("assumed")
    for name, value in ASSUMED.items():
        print(f"  {name}: {value}")
    head = ("hours", "USD", "GB sent", "driver GiB", "tasks GiB")
    print(f"{'model':15} {'run':25} {'machines':>8} " + " ".join(f"{name:>10}" for name in head) + "  bound by")
    for row in found:
        head = f"{row['model']:15} {row['run']:25} {row['machines']:8}"
        if "refused" in row:
            print(head, row["refused"])
            continue
        driver = row["GiB"]["driver"] + row["GiB"]["driver's store"]
        print(
            f"{head} {row['hours']:10.2f} {row['USD']:10.2f} {row['GB sent']:10.0f} {driver:10.1f} "
            f"{row['GiB']['tasks of a machine']:10.1f}  {row['bound by']}"
        )
    result = {
        "command": "python eval/scale/simulate.py", "measured": measured, "assumed": ASSUMED, "models": MODELS, "rows": found,
    }  # fmt: skip
    write_text_atomic(RESULTS / "scale_simulated.json", json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
