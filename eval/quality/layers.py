"""One bit a weight, matrix by matrix: `auto` beside double-binary ADMM and a vector quantizer, judged on text of another domain.

    python eval/quality/layers.py --model FOLDER --calibration c4_en_600.jsonl --heldout wiki.test.raw
        [--blocks 0 6 12] [--missing]

FOLDER holds the dense model.  H = E[x x^T] of every layer's inputs is collected on the original model twice: on 64 rows of 512
tokens of the calibration text, which everything is fitted to, and on 16 rows of the held-out text, which judges:

    error = tr(E H E^T) / tr(W H W^T),      E = W - what is stored decodes to

    auto           lplr, every setting at its default
    double_binary  lplr's method of that name
    admm           double-binary ADMM as published: diag(u) S_L diag(m) S_R diag(v), S signs, scales in bfloat16; inputs
                   weighted by sqrt(H_jj); ridge steps and magnitudes of rank one, no descent afterwards (Boza, Macko,
                   "Addition is almost all you need: double binary factorization", 2025; rho rises linearly as in
                   "NanoQuant", 2026)
    vq             8 rows of a column on 256 points, k-means of a normal source; random rotations of both sides, one scale,
                   feedback over the columns (Chee et al., "QuIP", 2023; Tseng et al., "QuIP#", 2024, with a plain
                   codebook); its code table is not counted

Prints the share of matrices on which auto is lower, by type and over all, and mean errors; rows are merged by name into
eval/results/layers.json as they come, so that a run that was stopped goes on with --missing.
Every row is checked before it counts: stored bits against the tensors, signs of the ADMM, the identity of the feedback.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lplr import Recipe, load, load_tokenizer
from lplr.factor import Factorization, factorize
from lplr.factor.factorization import rotated
from lplr.factor.rank import OUTPUT_ROTATION, ROTATION
from lplr.hf.text import calibration_tokens, evaluation_tokens, read_text
from lplr.linalg.hessian import damped
from lplr.nn import linears
from lplr.quant.ldlq import unit_upper
from lplr.stream.moments import InputMoments

ROWS, HELD_ROWS, ROW_LENGTH = 64, 16, 512
TARGET = Path(__file__).parents[1] / "results" / "layers.json"
# rho at the end: the best of 0.1, 0.3, 0.6, 1, 1.5, 2 and 3 on SmolLM2-135M; of several the best is taken for each matrix
ADMM_ITERATIONS, ADMM_RIDGE, ADMM_RHO = 200, 0.03, (1.0,)
DIMENSIONS, CENTROIDS = 8, 256
VQ_SCALES = (1.0, 1.1, 1.2, 1.3)  # of the rms; the best in sample is taken
RIVALS = ("admm", "vq", "double_binary")
WANTED = {"admm": 0.95, "vq": 0.60}  # shares of matrices on which auto is to be lower


# --- double-binary ADMM


def svid(X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Signs, and u, v of the best magnitude of rank one: diag(u) S diag(v) ~ X."""
    S, M = torch.where(X >= 0, 1.0, -1.0), X.abs()
    v = M.mean(0)
    for _ in range(5):
        u = M @ v / v.dot(v).clamp(min=1e-30)
        v = u @ M / u.dot(u).clamp(min=1e-30)
    return S, u, v


def admm(W: Tensor, H: Tensor, bits: float) -> tuple[Tensor, float]:
    """What is decoded, and stored bits; of all iterates the one of least error in the weighted norm."""
    n, d = W.shape
    rank = int((bits * n * d - 16 * (n + d)) // (n + d + 16))
    D = H.diagonal().clamp(min=1e-6 * H.diagonal().mean()).sqrt()
    A = W * D
    U, s, Vt = torch.linalg.svd(A, full_matrices=False)
    best, least = torch.zeros_like(W), float("inf")
    for last in ADMM_RHO:
        L, R = U[:, :rank] * s[:rank].sqrt(), s[:rank].sqrt()[:, None] * Vt[:rank]
        kept = [(Z := product(svid(X)), X - Z) for X in (L, R)]  # the point on the grid, and the dual variable
        for t in range(ADMM_ITERATIONS):
            rho = last * (t + 1) / ADMM_ITERATIONS
            L = ridge(R @ R.T, A @ R.T, *kept[0], rho)
            left = svid(L + kept[0][1])
            kept[0] = product(left), L + kept[0][1] - product(left)
            R = ridge(L.T @ L, A.T @ L, kept[1][0].T, kept[1][1].T, rho).T
            right = svid(R + kept[1][1])
            kept[1] = product(right), R + kept[1][1] - product(right)
            if t % 10 == 9 and (error := float((A - kept[0][0] @ kept[1][0]).norm())) < least:
                best, least = stored_signs(left, right, D), error
    return best, float(rank * (n + d) + 16 * (n + d + rank))


def product(point: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    S, u, v = point
    return u[:, None] * S * v


def ridge(K: Tensor, right: Tensor, Z: Tensor, dual: Tensor, rho: float) -> Tensor:
    """argmin ||A - X R||^2 + rho ||X - Z + dual||^2 + ridge ||X||^2, K = R R^T, right = A R^T; in units of K's mean diagonal."""
    mean = K.diagonal().mean()
    damping = (rho + ADMM_RIDGE) * mean * torch.eye(len(K))
    return torch.cholesky_solve((right + rho * mean * (Z - dual)).T, torch.linalg.cholesky(K + damping)).T


def stored_signs(left: tuple[Tensor, Tensor, Tensor], right: tuple[Tensor, Tensor, Tensor], D: Tensor) -> Tensor:
    """The matrix as its signs and three scales in bfloat16 decode to, inputs scaled back."""
    (SL, ul, vl), (SR, ur, vr) = left, right
    assert bool((SL.abs() == 1).all() & (SR.abs() == 1).all())
    u, m, v = (x.bfloat16().float() for x in (ul, vl * ur, vr / D))
    return (u[:, None] * SL * m) @ SR * v


# --- vector quantizer


def centroids(generator: torch.Generator) -> Tensor:
    """256 points in 8 dimensions by k-means on 2^17 normal samples, 40 rounds."""
    x = torch.randn(1 << 17, DIMENSIONS, generator=generator)
    c = x[:CENTROIDS].clone()
    for _ in range(40):
        at = nearest(x, c)
        counts = torch.bincount(at, minlength=CENTROIDS).clamp(min=1)
        c = torch.zeros_like(c).index_add_(0, at, x) / counts[:, None]
    return c


def nearest(x: Tensor, c: Tensor) -> Tensor:
    return (x @ c.T - c.square().sum(1) / 2).argmax(1)


def vq(W: Tensor, H: Tensor, codebook: Tensor) -> tuple[Tensor, float]:
    """What is decoded, and stored bits."""
    n, d = W.shape
    assert n % DIMENSIONS == 0, "a column has whole groups of 8 rows"
    A = rotated(W, ROTATION, OUTPUT_ROTATION)
    metric = rotated(rotated(damped(H), ROTATION, 0).T, ROTATION, 0)
    U = unit_upper(metric)
    whole = torch.linalg.solve_triangular(U.double(), metric.double(), upper=True)
    D = torch.linalg.solve_triangular(U.double(), whole.T, upper=True).diagonal()  # H = U D U^T
    found = []
    for gain in VQ_SCALES:
        scale = (gain * A.square().mean().sqrt()).bfloat16().float()
        E, rho = A.T.clone(), torch.empty(d, n)  # rows of E: the errors of columns, once they are rounded
        Q = torch.empty(d, n)
        for j in range(d):
            wanted = (A[:, j] + U[:j, j] @ E[:j]) / scale
            Q[j] = codebook[nearest(wanted.view(-1, DIMENSIONS), codebook)].view(-1) * scale
            E[j], rho[j] = A[:, j] - Q[j], wanted * scale - Q[j]
        error = quadratic(E.T, metric)
        identity = float((D * rho.double().square().sum(1)).sum())
        assert abs(error - identity) <= 1e-3 * error, f"the feedback's identity is off: {error} against {identity}"
        found.append((error, gain, Q))
    Q = min(found, key=lambda entry: entry[0])[2]
    return rotated(Q.T.contiguous(), ROTATION, OUTPUT_ROTATION, inverse=True), float(n * d // DIMENSIONS * 8 + 16)


# --- the comparison


def quadratic(X: Tensor, H: Tensor) -> float:
    """tr(X H X^T)."""
    return float(torch.linalg.vecdot((X @ H).double(), X.double()).sum())


def with_lplr(W: Tensor, H: Tensor, bits: float, method: str) -> tuple[Tensor, float, str]:
    spec = Recipe(model="", bits=bits, method=method).spec_for("")
    f = factorize(W, spec, H=H, generator=torch.Generator().manual_seed(0))
    stored = 8 * sum(t.numel() * t.element_size() for t in f.tensors().values())
    assert stored == f.stored_bits() <= bits * W.numel()
    dense = f.dequantize()
    assert torch.equal(Factorization.from_tensors(f.format, f.tensors()).dequantize(), dense)
    return dense, float(stored), "ldlq" if f.q is not None else "double_binary"


@torch.inference_mode()
def moments(model: torch.nn.Module, layers: dict[str, torch.nn.Module], rows: Tensor) -> dict[str, Tensor]:
    """Second moments of the inputs of the layers over token rows."""
    with InputMoments(layers) as collected:
        for row in rows:
            model(input_ids=row[None], use_cache=False)
            collected.end_pass()
    return {name: h.mean() for name, h in collected.hessians.items()}


def compare(name: str, W: Tensor, H: Tensor, held: Tensor, bits: float, codebook: Tensor) -> dict[str, Any]:
    """The row of one matrix."""
    ways: dict[str, Callable[[], tuple[Any, ...]]] = {
        "auto": lambda: with_lplr(W, H, bits, "auto"),
        "double_binary": lambda: with_lplr(W, H, bits, "double_binary"),
        "admm": lambda: admm(W, H, bits),
        "vq": lambda: vq(W, H, codebook),
    }
    row: dict[str, Any] = {"name": name, "shape": list(W.shape)}
    for way, made in ways.items():
        started = time.process_time()
        dense, stored, *by = made()
        E = W - dense
        row[way] = quadratic(E, held) / quadratic(W, held)
        row[f"{way} in sample"] = quadratic(E, H) / quadratic(W, H)
        row[f"{way} bits"] = stored / W.numel()
        row[f"{way} seconds"] = round(time.process_time() - started, 2)
        if by and way == "auto":
            row["made by"] = by[0]
    return row


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By type and over all: count, share of matrices on which auto is lower than each rival, mean errors, seconds of auto."""
    kinds = list(dict.fromkeys(row["name"].split(".")[-1] for row in rows))
    out = []
    for kind in [*kinds, "all"]:
        chosen = [row for row in rows if kind in ("all", row["name"].split(".")[-1])]
        line: dict[str, Any] = {"type": kind, "matrices": len(chosen)}
        for rival in RIVALS:
            line[f"below {rival}"] = sum(row["auto"] < row[rival] for row in chosen) / len(chosen)
        for way in ("auto", *RIVALS):
            line[way] = sum(row[way] for row in chosen) / len(chosen)
            line[f"{way} seconds"] = sum(row[f"{way} seconds"] for row in chosen)
        line["ldlq share"] = sum(row["made by"] == "ldlq" for row in chosen) / len(chosen)
        out.append(line)
    return out


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {"cpu": model, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "system": platform.system()}


def known_rows(header: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Name -> row of the results that are there, if they are of the same model, bits and texts."""
    found = json.loads(TARGET.read_text()) if TARGET.is_file() else {}
    same = all(found.get(key) == value for key, value in header.items())
    return {row["name"]: row for row in found["rows"]} if same else {}


def write(header: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """The results with these rows."""
    versions = {p: metadata.version(p) for p in ("torch", "transformers")} | {"python": platform.python_version()}
    found = {**header, "versions": versions, "machine": machine(), "summary": summary(rows), "rows": rows}
    TARGET.write_text(json.dumps(found, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the dense model")
    parser.add_argument("--calibration", required=True, help="text that everything is fitted to")
    parser.add_argument("--heldout", required=True, help="text of another domain, which judges")
    parser.add_argument("--blocks", type=int, nargs="+", help="some of the blocks")
    parser.add_argument("--missing", action="store_true", help="only the matrices that have no row yet")
    parser.add_argument("--bits", type=float, default=1.0, help="budget of all but vq, which has one bit a weight")
    args = parser.parse_args()
    model, tokenizer = load(args.model), load_tokenizer(args.model)
    texts = read_text(args.calibration), read_text(args.heldout)
    fit = calibration_tokens(tokenizer, texts[0], ROWS, ROW_LENGTH, torch.Generator().manual_seed(0))
    judge = evaluation_tokens(tokenizer, texts[1])[: HELD_ROWS * ROW_LENGTH].view(HELD_ROWS, ROW_LENGTH)
    header = {
        "model": Path(args.model).resolve().name,
        "bits": args.bits,
        "calibration": {"name": texts[0].name, "sha256": texts[0].sha256, "rows": list(fit.shape)},
        "heldout": {"name": texts[1].name, "sha256": texts[1].sha256, "rows": list(judge.shape)},
        "admm": {"iterations": ADMM_ITERATIONS, "ridge": ADMM_RIDGE, "rho": list(ADMM_RHO)},
    }
    order = list(linears(model, ("lm_head",)))
    known = known_rows(header)
    layers = {n: m for n, m in linears(model, ("lm_head",)).items() if args.blocks is None or int(n.split(".")[2]) in args.blocks}
    layers = {name: m for name, m in layers.items() if not args.missing or name not in known}
    train, held = moments(model.model, layers, fit), moments(model.model, layers, judge)
    codebook = centroids(torch.Generator().manual_seed(0))
    print(f"{'matrix':34} {'auto':>8} {'admm':>8} {'vq':>8} {'own db':>8}  made by, seconds")
    for name, module in layers.items():
        with torch.inference_mode():
            row = compare(name, module.weight.detach(), train[name], held[name], args.bits, codebook)
        figures = " ".join(f"{row[way]:8.4f}" for way in ("auto", *RIVALS))
        print(f"{name:34} {figures}  {row['made by']}, {row['auto seconds']:g}", flush=True)
        known[name] = row
        write(header, [known[n] for n in order if n in known])
    rows = [known[n] for n in order if n in known]
    lines = summary(rows)
    names = " ".join(f"{name:>7}" for name in ("admm", "vq", "own db"))
    print(f"\n{'type':10} {'matrices':>8}  auto below: {names}   mean: {'auto':>7} {names}")
    for line in lines:
        shares = " ".join(f"{line[f'below {rival}']:7.1%}" for rival in RIVALS)
        means = " ".join(f"{line[way]:7.4f}" for way in ("auto", *RIVALS))
        print(f"{line['type']:10} {line['matrices']:8}              {shares}         {means}")
    for rival, wanted in WANTED.items():
        share = lines[-1][f"below {rival}"]
        verdict = "holds" if share >= wanted else "does not hold"
        print(f"below {rival} on {share:.1%} of the matrices, {wanted:.0%} wanted: {verdict}")


if __name__ == "__main__":
    main()
