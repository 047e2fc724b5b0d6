"""Every GPU kernel and configuration compiled without a GPU, and what the machine code says.

    python eval/kernels/ahead_of_time.py [--targets 80 90] [--types bf16] [--output eval/results/kernels_aot.json]

For each: registers, spills (local loads and stores in the machine code), shared memory, how wide the codes are loaded,
instructions of the inner loop a weight, the share of a processor's warps that fit (occupancy), and a roofline on A100, H100 and
RTX 4090: what memory, instruction issue and table look-ups allow.  `llama` predicts tokens per second of Llama-2-7B at batch 1.
All of that is computed; nothing here was run on a GPU.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lplr.kernels.hadamard import gpu as hadamard
from lplr.kernels.levels import WIDTHS
from lplr.kernels.matmul import gpu
from lplr.kernels.trellis import gpu as trellis

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
GRIDS = [(grid, bits) for grid, widths in WIDTHS.items() for bits in widths]
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
CASES = (
    (1, torch.bfloat16),
    (1, torch.float32),
    (16, torch.bfloat16),
    (512, torch.bfloat16),
    (512, torch.float16),
    (512, torch.float32),
)
SHOWN = ("kernel", "grid", "bits", "tokens", "type", "target", "registers", "spills", "shared", "load_bytes")
SHOWN += ("instructions_per_weight", "occupancy", "bound_by", "share_of_bandwidth")
# bytes/s, processors, clock in Hz, shared memory and threads a processor: the makers' data sheets
CARDS = {
    "A100": (2.039e12, 108, 1.41e9, 164 << 10, 2048),
    "H100": (3.35e12, 132, 1.755e9, 228 << 10, 2048),
    "RTX 4090": (1.008e12, 128, 2.52e9, 100 << 10, 1536),
}
CARD_OF = {80: "A100", 89: "RTX 4090", 90: "H100"}
LANES = 128  # results a clock and processor on all three
LAUNCH = 2e-6  # seconds from one kernel of a CUDA graph to the next: an assumption
# clocks a look-up of 32 threads takes on average: 32 random banks of shared memory; 32 random rows of 16 bytes in the first-level
# cache, each wave of 8 threads about 7 lines; one line
LOOKUPS = {"trellis": 3.5, "lattice": 28.0, "normal_float": 1.0, "uniform": 0.0}


@dataclass(frozen=True)
class Machine:
    """What the machine code of one configuration says."""

    registers: int
    stack: int
    spills: int
    shared: int
    loads: dict[str, int]
    loop: int
    instructions: int


def compiled(
    kernel: Any, signature: dict[str, str], constants: dict[str, Any], aligned: set[str], target: int, **options: Any
) -> Machine:
    """A kernel compiled for sm_<target>; `aligned` are the arguments that 16 divides."""
    names = kernel.arg_names
    types = {name: "constexpr" if name in constants else signature[name] for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in names if name in aligned}
    done = triton.compile(
        ASTSource(kernel, types, constants, attributes),
        target=GPUTarget("cuda", target, 32),
        options={"enable_fp_fusion": True, **options},
    )
    return read(done.asm["cubin"], done.metadata.shared)


def read(cubin: bytes, shared: int) -> Machine:
    """Registers, spills and loads of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        code, usage = (
            subprocess.run([str(TOOLS / "cuobjdump"), flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-sass", "-res-usage")
        )
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);", code)
    operations = collections.Counter(name for _, name, _ in lines)
    loops = [
        (int(at, 16) - int(goal.group(1), 16)) // 16 + 1
        for at, name, rest in lines
        if name.startswith("BRA") and (goal := re.search(r"0x([0-9a-f]+)", rest)) and int(goal.group(1), 16) < int(at, 16)
    ]
    found = {key: int(re.search(rf"{key}:(\d+)", usage).group(1)) for key in ("REG", "STACK")}  # type: ignore[union-attr]
    spills = sum(count for name, count in operations.items() if name.startswith(("STL", "LDL")))
    loads = {name: count for name, count in sorted(operations.items()) if name.startswith(("LDG", "LDGSTS", "UTMALDG"))}
    return Machine(found["REG"], found["STACK"], spills, shared, loads, max(loops, default=0), len(lines))


def matmul(
    grid: str, bits: float, tokens: int, dtype: torch.dtype, target: int, n: int = 4096, d: int = 4096
) -> tuple[gpu.Plan, Machine]:
    """The product kernel of a configuration as `gpu.launch` would ask for it."""
    plan = gpu.plan(n, d, grid, bits, tokens, dtype)
    unit, parts = plan.constants["UNIT"], gpu.split(plan, n, d, tokens)
    table = {"trellis": "*i32", "lattice": "*bf16"}.get(grid, "*fp32")
    signature = dict.fromkeys(("m", "n", "d", "stride", "units", "blocks", "part"), "i32")
    signature |= {"x": f"*{TYPES[dtype]}", "out": "*fp32" if parts > 1 else f"*{TYPES[dtype]}", "table": table, "ratio": "fp32"}
    signature |= {"codes": "*u8" if unit == 1 else "*i32", "row_scale": "*bf16", "col": "*bf16"}
    aligned = {"x", "out", "table", "codes", "row_scale", "col"}
    aligned |= {name for name, size in (("n", n), ("d", d), ("stride", d)) if size % 16 == 0}
    constants = plan.constants | {"COL": 1, "ROW": 1, "PARTS": parts}
    constants |= {"m": 1} if tokens == 1 and plan.tokens > 1 else {}  # a size of one is compiled in, as a launch does it
    return plan, compiled(plan.kernel, signature, constants, aligned, target, num_warps=plan.warps, num_stages=plan.stages)


def points(grid: str, bits: float, dtype: torch.dtype, target: int, n: int = 4096, d: int = 4096) -> tuple[gpu.Plan, Machine]:
    """The kernel that writes points for the product with a prompt."""
    plan = gpu.points_plan(n, d, grid, bits)
    table = {"trellis": "*i32", "lattice": "*bf16"}.get(grid, "*fp32")
    signature = dict.fromkeys(("first", "last", "d", "stride", "units"), "i32") | {"table": table}
    signature |= {"codes": "*u8" if plan.constants["UNIT"] == 1 else "*i32", "out": f"*{TYPES[dtype]}"}
    aligned = {"codes", "table", "out", "first", "last", "d", "stride"}
    options = {"num_warps": plan.warps, "num_stages": plan.stages}
    return plan, compiled(plan.kernel, signature, plan.constants, aligned, target, **options)


def points_row(grid: str, bits: float, target: int) -> dict[str, Any]:
    """Its line of the report: bytes read and written a weight."""
    plan, machine = points(grid, bits, torch.bfloat16, target)
    line = {"kernel": plan.kernel.__name__, "grid": grid, "bits": bits, "type": "bf16", "target": f"sm_{target}"}
    line |= {**asdict(machine), "load_bytes": load_bytes(plan, bits, machine), "bytes_per_weight": bits / 8 + 2}
    if target in CARD_OF:
        line["occupancy"] = round(occupancy(machine, plan.warps, CARD_OF[target]), 3)
    return line


def load_bytes(plan: gpu.Plan, bits: float, machine: Machine) -> int:
    """How many bytes of codes a load reads: the plan's, if as many loads as the codes take are so wide, else 4."""
    wide = 8 if plan.constants.get("ENTRIES") == 2 else 4 * plan.constants.get("WIDE", 4)
    needed = plan.rows * plan.inputs * bits / 8 / (32 * plan.warps) / wide
    there = sum(count for name, count in machine.loads.items() if str(8 * wide) in name)
    return wide if there >= needed else 4


def occupancy(machine: Machine, warps: int, card: str) -> float:
    """The share of a processor's warps that its registers and shared memory leave room for."""
    _, _, _, shared, threads = CARDS[card]
    of_registers = 65536 // (-(-machine.registers // 8) * 8 * 32 * warps)
    of_shared = shared // (machine.shared + 1024)
    return min(of_registers, of_shared, threads // (32 * warps)) * 32 * warps / threads


def seconds_a_weight(grid: str, bits: float, plan: gpu.Plan, machine: Machine, card: str) -> dict[str, float]:
    """What a weight costs at one token: the bytes of its code, the instructions of the inner loop, its look-ups."""
    bandwidth, processors, clock, _, _ = CARDS[card]
    instructions = machine.loop * 32 * plan.warps / (plan.rows * plan.inputs)
    # weights a look-up
    together = {"lattice": 8 / (1 if bits == 2 else 2), "trellis": plan.constants.get("ENTRIES", 1)}.get(grid, 1)
    return {
        "bytes": bits / 8 / bandwidth,
        "issue": instructions / LANES / processors / clock,
        "lookups": LOOKUPS[grid] / 32 / together / processors / clock,
    }


def row(grid: str, bits: float, tokens: int, dtype: torch.dtype, target: int, n: int = 4096, d: int = 4096) -> dict[str, Any]:
    """One line of the report."""
    plan, machine = matmul(grid, bits, tokens, dtype, target, n, d)
    line: dict[str, Any] = {
        "kernel": plan.kernel.__name__, "grid": grid, "bits": bits, "tokens": tokens, "type": TYPES[dtype],
        "target": f"sm_{target}", "n": n, "d": d, **asdict(machine),
        "load_bytes": load_bytes(plan, bits, machine),
        "bytes_per_weight": bits / 8 + 2 / d + 2 / n,
        "instructions_per_weight": round(machine.loop * 32 * plan.warps / (plan.rows * plan.inputs), 2),
    }  # fmt: skip
    if target in CARD_OF:
        line["occupancy"] = round(occupancy(machine, plan.warps, CARD_OF[target]), 3)
        if tokens == 1:
            costs = seconds_a_weight(grid, bits, plan, machine, CARD_OF[target])
            line["bound_by"] = max(costs, key=lambda k: costs[k])
            line["share_of_bandwidth"] = round(costs["bytes"] / max(costs.values()), 3)
    return line


def transform(p: int, target: int) -> dict[str, Any]:
    """The Walsh-Hadamard transform of rows of p entries."""
    constants = hadamard.constants(p)
    machine = compiled(
        hadamard.transform_rows,
        {"x": "*bf16", "out": "*bf16", "m": "i32"},
        constants,
        {"x", "out"},
        target,
        num_warps=hadamard.warps(p),
    )
    return {"kernel": "transform_rows", "entries": p, "type": "bf16", "target": f"sm_{target}", **asdict(machine)}


def encoder(bits: float, target: int) -> Machine:
    """The search of the trellis encoder for a width."""
    types = {"X": "*fp32", "weights": "*fp32", "start": "*i64", "book": "*fp32", "back": "*u8", "last": "*i32", "steps": "i32"}
    constants, options = trellis.constants(bits), {"num_warps": trellis.WARPS, "enable_fp_fusion": False}
    return compiled(trellis.search_rows, types, constants, set(types) - {"steps"}, target, **options)


def encoder_row(bits: float, target: int) -> dict[str, Any]:
    """Its line of the report: what instruction issue alone allows."""
    machine = encoder(bits, target)
    line = {"kernel": "search_rows", "grid": "trellis", "bits": bits, "type": "fp32", "target": f"sm_{target}", **asdict(machine)}
    if target in CARD_OF:
        _, processors, clock, _, _ = CARDS[CARD_OF[target]]
        entries = trellis.constants(bits)["ENTRIES"] * processors * clock * LANES / (32 * trellis.WARPS * machine.loop)
        line |= {"occupancy": round(occupancy(machine, trellis.WARPS, CARD_OF[target]), 3), "weights_per_second": round(entries)}
    return line


def llama(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Predicted tokens per second of Llama-2-7B, batch 1, no context: its 224 linear layers on one grid, a bfloat16 head."""
    weights, head = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008), 32000 * 4096 * 2
    out = []
    for card in CARDS:
        dense = 1 / ((2 * weights + head) / CARDS[card][0] + 225 * LAUNCH)
        out.append({"card": card, "format": "bf16 dense", "bits": 16, "tokens_per_second": round(dense), "bound_by": "bytes"})
        target = next(t for t, name in CARD_OF.items() if name == card)
        for line in lines:
            if line["tokens"] == 1 and line["type"] == "bf16" and line["target"] == f"sm_{target}" and line["bits"] in (1, 2, 4):
                plan = gpu.plan(line["n"], line["d"], line["grid"], line["bits"], 1, torch.bfloat16)
                machine = Machine(**{key: line[key] for key in Machine.__dataclass_fields__})
                cost = seconds_a_weight(line["grid"], line["bits"], plan, machine, card)
                time = weights * max(cost.values()) + head / CARDS[card][0] + (2 * 224 + 1) * LAUNCH
                found = {"card": card, "format": line["grid"], "bits": line["bits"], "tokens_per_second": round(1 / time)}
                out.append(found | {"bound_by": line["bound_by"]})
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", type=int, nargs="+", default=[80, 89, 90, 100], help="89 and 100: one token in bf16 alone")
    parser.add_argument("--types", nargs="+", default=list(TYPES.values()), choices=list(TYPES.values()))
    parser.add_argument("--output", type=Path, default=Path("eval/results/kernels_aot.json"))
    args = parser.parse_args()
    lines = []
    for target in args.targets:
        for grid, bits in GRIDS:
            for tokens, dtype in CASES if target in (80, 90) else CASES[:1]:
                if TYPES[dtype] not in args.types:
                    continue
                lines.append(row(grid, bits, tokens, dtype, target))
                print(*(f"{key}={lines[-1].get(key)}" for key in SHOWN), flush=True)
        lines += [points_row(grid, bits, target) for grid, bits in GRIDS]
        lines += [transform(p, target) for p in (64, 1024, 4096, 16384)]
        lines += [encoder_row(bits, target) for bits in WIDTHS["trellis"]]
    report: dict[str, Any] = {"note": "computed from machine code; nothing was run on a GPU", "triton": triton.__version__}
    report |= {"cards": {name: numbers[:3] for name, numbers in CARDS.items()}, "launch_seconds": LAUNCH}
    report |= {"kernels": lines, "llama_2_7b_predicted": llama([line for line in lines if "tokens" in line])}
    args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
