"""Rate and distortion of every grid on a Gaussian source, beside the limit 2^(-2b).

    python eval/quality/grids.py [--samples 1048576] [--length 1024] [--seed 0] [--grids trellis lattice]

Prints, for every grid and width, the bits stored for each sample (padding counted; one scale for all samples is not), the mean
squared error, its ratio to the limit at those bits (in decibels too), the figure published for that kind of grid where we could
look it up, and the encoder's speed on one core (in processor time).  With --grids the rows of the others
stay in the results as they are.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lplr.kernels import lattice, trellis
from lplr.kernels.normal_float import normal_scale, round_to_levels
from lplr.quant.uniform import quantize

# Max, IRE Trans. Inf. Theory 1960: table II (equally spaced levels) and table I (the best levels, a bound for any scalar grid)
UNIFORM = {1: 0.3634, 2: 0.1188, 3: 0.03744, 4: 0.01154}
SCALAR = {2: 0.1175, 3: 0.03454, 4: 0.009497}
# 2 bits, 3INST and 1MAD codes, L = 16: the table of Tseng et al., "QTIP", as quoted in turboderp-org/exllamav3, pull request 26
QTIP = 0.069
PUBLISHED: dict[tuple[str, float], tuple[float, str]] = {
    **{("uniform", float(b)): (v, "Max 1960, uniform") for b, v in UNIFORM.items()},
    **{("normal_float", float(b)): (v, "Max 1960, best scalar") for b, v in SCALAR.items()},
    ("trellis", 2.0): (QTIP, "QTIP, L = 16, quoted"),
}

Encoder = Callable[[Tensor], tuple[int, Tensor]]  # x (m, n) -> bits stored, values (m, n)


def uniform(bits: int) -> Encoder:
    """One scale for the whole matrix, of least squared error."""

    def encode(x: Tensor) -> tuple[int, Tensor]:
        q = quantize(x, bits, axis="tensor", clip="mse")
        return 8 * q.codes.numel(), q.dequantize()

    return encode


def normal_float(bits: int) -> Encoder:
    """The scale that is best for a normal variable."""
    scale = normal_scale(bits)

    def encode(x: Tensor) -> tuple[int, Tensor]:
        codes, values = round_to_levels(x / scale, bits)
        return codes.numel() * bits, values * scale

    return encode


def sequences(grid: object, bits: float) -> Encoder:
    """A grid that rounds the entries of a sequence together: each row of x is one; the values are read back from the codes."""

    def encode(x: Tensor) -> tuple[int, Tensor]:
        codes, values = grid.encode(x, bits)  # type: ignore[attr-defined]  # a module
        if not torch.equal(values, grid.decode(codes, bits, x.shape[1])):  # type: ignore[attr-defined]
            raise AssertionError(f"{grid} at {bits} bits: codes do not decode to the values of the encoder")
        return 8 * codes.numel(), values

    return encode


def grids() -> list[tuple[str, float, Encoder]]:
    """(name, width, encoder) of every row of the table."""
    rows: list[tuple[str, float, Encoder]] = [("uniform", float(b), uniform(b)) for b in (1, 2, 3, 4)]
    rows += [("normal_float", float(b), normal_float(b)) for b in (2, 3, 4)]
    rows += [("lattice", b, sequences(lattice, b)) for b in lattice.WIDTHS]
    return rows + [("trellis", b, sequences(trellis, b)) for b in trellis.WIDTHS if 1 <= b <= 4]


def others(target: Path, setting: dict[str, Any], measured: list[str]) -> list[dict[str, Any]]:
    """The rows of the results that are not measured again."""
    old = json.loads(target.read_text())
    if {key: old[key] for key in setting} != setting:
        raise SystemExit(f"{target} was measured with other settings than {setting}: leave --grids out")
    return [row for row in old["rows"] if row["grid"] not in measured]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1 << 20)
    parser.add_argument("--length", type=int, default=1024, help="entries of a sequence")
    parser.add_argument("--seed", type=int, default=0)
    names = list(dict.fromkeys(name for name, _, _ in grids()))
    parser.add_argument("--grids", nargs="+", choices=names, default=names)
    args = parser.parse_args()
    torch.set_num_threads(1)
    x = torch.randn(args.samples // args.length, args.length, generator=torch.Generator().manual_seed(args.seed))
    target = Path(__file__).parents[1] / "results" / "grids.json"
    setting = {"source": "N(0, 1)", "samples": x.numel(), "length": args.length, "seed": args.seed, "threads": 1}
    rows = others(target, setting, args.grids) if len(args.grids) < len(names) else []
    print(f"{'grid':12} {'width':>5} {'bits':>7} {'error':>9} {'limit':>9} {'ratio':>6} {'dB':>5}  {'published':31} {'M/s':>8}")
    for name, width, encode in (row for row in grids() if row[0] in args.grids):
        encode(x[:1])  # tables, and what is compiled at first use
        started = time.process_time()
        stored, values = encode(x)
        speed = x.numel() / (time.process_time() - started) / 1e6
        bits, error = stored / x.numel(), float((x - values).double().square().mean())
        limit = 2.0 ** (-2 * bits)
        value, source = PUBLISHED.get((name, width), (None, None))
        said = f"{value:.4g} ({source})" if value else "-"
        decibels = 10 * torch.log10(torch.tensor(error / limit)).item()
        measured = f"{bits:7.4f} {error:9.5f} {limit:9.5f} {error / limit:6.3f} {decibels:5.2f}"
        print(f"{name:12} {width:5g} {measured}  {said:31} {speed:8.2f}", flush=True)
        rows.append({"grid": name, "width": width, "bits": bits, "error": error, "limit": limit, "ratio": error / limit})
        rows[-1] |= {"published": value, "source": source, "million_weights_per_second": round(speed, 3)}
    rows.sort(key=lambda row: names.index(row["grid"]))
    target.write_text(json.dumps({**setting, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
