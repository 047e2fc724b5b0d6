"""What the parts of a run cost on this machine in one thread: the inputs of `simulate.py`.

    OMP_NUM_THREADS=1 python eval/scale/costs.py [--quick]

Processor seconds (not wall time: other jobs do not count) of factorizing and of certifying one matrix for a few methods, with
and without second moments, and of its curve; products of activations and second moments; checking, hashing, pickling; and wall
time of reading a file that the system has forgotten and of writing a shard with its checksum.  The seconds of a matrix are fitted
over SHAPES, relative errors squared, by

    a n d  +  b n d^2  +  c n d min(n, d)  +  e d^3,      a, b, c, e >= 0

and `check` says what this predicts for a shape that was left out, over what was measured.  The result goes to
eval/results/scale_costs.json.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from scipy.optimize import nnls  # noqa: E402
from torch import Tensor  # noqa: E402

from lplr.factor import layout, plan  # noqa: E402
from lplr.factor.curves import error_curve  # noqa: E402
from lplr.files import write_text_atomic  # noqa: E402
from lplr.linalg.hessian import Hessian  # noqa: E402
from lplr.recipe import make_recipe  # noqa: E402
from lplr.stream.checkpoint import LayerPlan  # noqa: E402
from lplr.stream.matrix import Seen, compress_matrix, tensor_sha256  # noqa: E402
from lplr.stream.shards import write_shard  # noqa: E402
from lplr.stream.source import check_finite, read_entries  # noqa: E402

SHAPES = [(512, 512), (1024, 1024), (2048, 2048), (1024, 3072), (3072, 1024), (4096, 4096)]
LEFT_OUT = (1536, 4096)
# name -> (method, bits, whether calibrated)
RECIPES = {
    "naive, 4 bits, data-free": ("naive", 4.0, False),
    "auto, 2 bits, data-free": ("auto", 2.0, False),
    "auto, 2 bits, calibrated": ("auto", 2.0, True),
    "double binary, 1 bit, calibrated": ("double_binary", 1.0, True),
}
CURVES = {"curve, data-free": False, "curve, calibrated": True}
TERMS = ("n d", "n d^2", "n d min(n, d)", "d^3")


def terms(n: int, d: int) -> list[float]:
    """The four features of a shape, in units of 1e6 and 1e9."""
    return [n * d / 1e6, n * d * d / 1e9, n * d * min(n, d) / 1e9, d**3 / 1e9]


def spent(work: Callable[[], Any]) -> float:
    """Processor seconds of work()."""
    started = time.process_time()
    work()
    return time.process_time() - started


def drawn(*shape: int) -> Tensor:
    """Normal entries of 0.02."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 0.02


def moments(d: int) -> Tensor:
    """Second moments with a falling spectrum, as inputs of layers have."""
    X = drawn(2 * d, d) * torch.logspace(0, -1, d)
    return X.T @ X / len(X)


def matrix_seconds(method: str, bits: float, calibrated: bool, shape: tuple[int, int]) -> tuple[float, float]:
    """Processor seconds of factorizing and of certifying one matrix."""
    recipe = make_recipe({"model": "m", "method": method, "bits": bits})
    asked = recipe.spec_for("x")
    spec = plan(shape, asked)
    p = LayerPlan("x", 0, shape, False, asked, spec, layout(shape, spec), 16 * shape[0] * shape[1])
    W, seen = drawn(*shape).bfloat16(), Seen(moments(shape[1]) if calibrated else None)
    made: list[Any] = []
    with torch.inference_mode():
        first = spent(lambda: made.append(compress_matrix(recipe, p, W, seen, torch.device("cpu"))))
        return first, spent(made[0].certified)


def curve_seconds(calibrated: bool, shape: tuple[int, int]) -> float:
    """Processor seconds of one curve at 2 bits."""
    H = moments(shape[1]) if calibrated else None
    spec = make_recipe({"model": "m", "bits": 2.0}).spec_for("x")
    return spent(lambda: error_curve(drawn(*shape), spec, H=H, M=H))


def fitted(measured: dict[tuple[int, int], float], check: float) -> dict[str, Any]:
    """The coefficients of TERMS and how far they are from what was measured."""
    A = np.array([terms(*shape) for shape in measured])
    t = np.array(list(measured.values()))
    found, _ = nnls(A / t[:, None], np.ones(len(t)))
    predicted = float(np.dot(terms(*LEFT_OUT), found))
    return {
        "seconds": {f"{n} x {d}": round(s, 4) for (n, d), s in measured.items()},
        "terms (1e6, 1e9, 1e9, 1e9)": dict(zip(TERMS, map(float, found), strict=True)),
        "largest relative error of the fit": float(np.abs(A @ found / t - 1).max()),
        f"predicted over measured at {LEFT_OUT[0]} x {LEFT_OUT[1]}": predicted / check,
    }


def rates() -> dict[str, float]:
    """Operations a second in one thread, and bytes a second."""
    x, W = drawn(4096, 2048), drawn(2048, 2048)
    x @ W
    hessian = Hessian(2048)
    hessian.add(x)
    big = drawn(8192, 8192).bfloat16()
    found = {"float32 products, operations": 2 * 4096 * 2048 * 2048 / spent(lambda: x @ W)}
    found["of a second moment, tokens d^2"] = 4096 * 2048**2 / spent(lambda: hessian.add(x))
    found["checked for NaN, bytes"] = big.nbytes / spent(lambda: check_finite("x", big))
    found["hashed, bytes"] = big.nbytes / spent(lambda: tensor_sha256(big))
    found["pickled, bytes"] = big.nbytes / spent(lambda: pickle.dumps(big, protocol=5))
    return found


def disk(gigabytes: float) -> dict[str, float]:
    """Bytes a second, wall time, of writing a shard with its checksum to the disk and of reading it when it was forgotten."""
    tensors = {str(i): drawn(8192, 8192).bfloat16() for i in range(max(1, round(gigabytes * 1e9 / 2 / 8192**2)))}
    size = sum(t.nbytes for t in tensors.values())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        started = time.perf_counter()
        write_shard(path, tensors)
        written = time.perf_counter() - started
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        started = time.perf_counter()
        for entry in read_entries(path).values():
            entry.read()
        read = time.perf_counter() - started
    return {"written with SHA-256, bytes": size / written, "read, bytes": size / read, "bytes of the file": size}


def main() -> None:
    """Measure and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes only, for a test of the script; nothing is stored")
    args = parser.parse_args()
    torch.set_num_threads(1)
    shapes = SHAPES[:4] if args.quick else SHAPES
    for method, bits, calibrated in RECIPES.values():
        matrix_seconds(method, bits, calibrated, (128, 128))  # compiles
    out: dict[str, Any] = {}
    for name, recipe in RECIPES.items():
        found = {shape: matrix_seconds(*recipe, shape) for shape in [*shapes, LEFT_OUT]}
        check = found.pop(LEFT_OUT)
        for i, part in enumerate(("factorized", "certified")):
            out[f"{name}, {part}"] = fitted({shape: pair[i] for shape, pair in found.items()}, check[i])
        print(name, json.dumps(out[f"{name}, factorized"]["seconds"]), flush=True)
    for name, calibrated in CURVES.items():
        seconds = {shape: curve_seconds(calibrated, shape) for shape in [*shapes, LEFT_OUT]}
        check = seconds.pop(LEFT_OUT)
        out[name] = fitted(seconds, check)
    result = {
        "command": " ".join(["python", "eval/scale/costs.py", *sys.argv[1:]]),
        "threads": 1, "torch": torch.__version__, "load": os.getloadavg()[0],
        "processor seconds of a matrix": out,
        "a second, one thread": rates(),
        "a second, of the disk": disk(0.3 if args.quick else 2.0),
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if not args.quick:
        write_text_atomic(ROOT / "eval/results/scale_costs.json", json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
