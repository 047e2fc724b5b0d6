"""One matrix compressed: weights in, packed tensors and a record out.  It depends on nothing that was done before."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lplr.errors import CheckpointError
from lplr.factor import Factorization, certify, factorize
from lplr.factor.certificates import exact_error, measured_error, probe_certificate, weighted_error
from lplr.factor.rank import made_by
from lplr.recipe import Recipe
from lplr.records import LayerRecord
from lplr.stream.checkpoint import LayerPlan
from lplr.stream.shards import pieces
from lplr.stream.source import check_finite

TUNED, BEFORE = "tuned after it was rounded: no a-priori bound", "; before that: "
VANISHED = "stored as zero: its values lie below the range of bfloat16 scales"


@dataclass(frozen=True)
class Seen:
    """What calibration knows of a matrix: H = E[x x^T], G = E[g g^T], the `propagation` step; None for what it does not."""

    H: Tensor | None = None
    G: Tensor | None = None
    step: Tensor | None = None
    note: str = ""


@dataclass(frozen=True)
class Made:
    """A matrix compressed, f None where it stays dense; and its record."""

    f: Factorization | None
    record: LayerRecord

    def tensors(self) -> dict[str, Tensor]:
        """What is stored of it, by full name; nothing of a dense one."""
        found = {} if self.f is None else self.f.tensors()
        return {f"{self.record.name}.{part}": tensor for part, tensor in found.items()}


@dataclass(frozen=True)
class Factorized:
    """A matrix factorized, f None where it stays dense; `certified` measures and bounds its error, which nothing waits for."""

    f: Factorization | None
    certified: Callable[[], Made]


def seeded(seed: int, name: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of its own for each name: what is drawn does not depend on what was drawn before."""
    key = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(key[:7], "little"))


def tensor_sha256(tensor: Tensor) -> str:
    """SHA-256 of the bytes of a tensor in row-major order."""
    digest = hashlib.sha256()
    for piece in pieces(tensor):
        digest.update(piece)
    return digest.hexdigest()


def compress_matrix(recipe: Recipe, p: LayerPlan, weight: Tensor, seen: Seen, device: torch.device) -> Factorized:
    """Compress the tensor of a checkpoint as planned.

    weight: (n, d), or (d, n) where p.transposed, in the type of the checkpoint.  Raises CheckpointError for values that are not
    finite, and when certified for such that leave the range of the scales.
    """
    started = time.perf_counter()
    check_finite(f"{p.name}.weight", weight)
    common = {"name": p.name, "block": p.block, "shape": p.shape, "source_sha256": tensor_sha256(weight)}
    W = weight.float().to(device)
    W = W.T.contiguous() if p.transposed else W
    if p.format is None:
        norm, dense = float(torch.linalg.vector_norm(W.double())), {"stored": "dense", "bits": p.dense_bits}
        made = Made(None, LayerRecord(**common, **dense, method=p.spec.method, norm=norm, note=p.reason))
        return Factorized(None, lambda: made)
    generator = seeded(recipe.seed, p.name, device)
    target = W if seen.step is None else W + recipe.propagation * (W @ seen.step)
    G = None if seen.G is None else seen.G.to(device)
    f = factorize(target, p.asked, H=seen.H, G=G, generator=generator)
    assert f.stored_bits() <= p.format.stored_bits(), f"{p.name}: planned {p.format}, made {f.format}"
    taken = time.perf_counter() - started

    def certified() -> Made:
        return Made(f, _record(p, common, f, seen, W, target, generator, taken))

    return Factorized(f, certified)


def _record(
    p: LayerPlan,
    common: dict[str, Any],
    f: Factorization,
    seen: Seen,
    W: Tensor,
    target: Tensor,
    generator: torch.Generator,
    taken: float,
) -> LayerRecord:
    """The record of f ~ target in place of W, `taken` seconds of which are over."""
    started = time.perf_counter()
    facts = certify(W, f, p.spec, seen.H, generator, target=target)
    if not math.isfinite(facts["error"]) or not math.isfinite(facts["certificate"]):
        raise CheckpointError(
            f"{p.name}: its values (norm {facts['norm']:.3g}) leave the range of bfloat16 scales: "
            "put it in modules_to_not_convert, or scale the model"
        )
    lost = [name for name, value in facts.items() if isinstance(value, float) and not math.isfinite(value)]
    facts.update(dict.fromkeys(lost))
    beyond = f"{', '.join(lost)} beyond the range of floating point" if lost else ""
    vanished = VANISHED if f.is_zero and facts["norm"] > 0 else ""
    facts["note"] = "; ".join(filter(None, [seen.note, vanished, facts.get("note", ""), beyond]))
    fmt = f.format
    return LayerRecord(
        **common,
        method=made_by(p.shape, p.asked, fmt),
        rank=fmt.rank,
        l_bits=fmt.l_bits,
        r_bits=fmt.r_bits,
        q_bits=fmt.q_bits,
        format=fmt.to_dict(),
        bits=fmt.stored_bits(),
        seconds=taken + time.perf_counter() - started,
        **facts,
    )


def tuned(
    record: LayerRecord,
    weight: Tensor,
    f: Factorization,
    *,
    transposed: bool,
    seed: int,
    device: torch.device,
    H: Tensor | None = None,
) -> Made:
    """What became of a recorded matrix that was tuned to f: its error, certificates and, with H, its outputs' relative error.

    weight: the tensor of the checkpoint, (d, n) where transposed.  No theorem's method makes f, so there is no a-priori bound.
    """
    started = time.perf_counter()
    W = weight.float().to(device)
    W = W.T.contiguous() if transposed else W
    facts: dict[str, Any] = {"error": measured_error(W, f), "certificate": exact_error(W, f), "bound": None}
    before = record.note.removeprefix(TUNED).removeprefix(BEFORE)  # of a block that was tuned already
    facts["note"] = f"{TUNED}{BEFORE}{before}" if before else TUNED
    facts["probe_certificate"] = probe_certificate(W, f, generator=seeded(seed, record.name, device))
    facts["weighted_error"] = None if H is None else weighted_error(W, f, H)
    facts["seconds"] = record.seconds + time.perf_counter() - started
    return Made(f, record.model_copy(update=facts))
