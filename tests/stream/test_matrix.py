"""Numbers that go wrong: every method on every kind of matrix and metric gives finite packed weights and a finite record."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from lplr.errors import CheckpointError
from lplr.factor import layout, plan
from lplr.recipe import METHOD_NAMES, make_recipe
from lplr.stream.checkpoint import LayerPlan
from lplr.stream.matrix import VANISHED, Made, Seen, compress_matrix, tensor_sha256


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def holes() -> Tensor:
    W = draw(24, 32)
    W[:, 3] = 0
    W[5] = 0
    return W


MATRICES: dict[str, Tensor] = {
    "zero": torch.zeros(24, 32),
    "constant": torch.full((24, 32), 0.7),
    "one row": draw(1, 32),
    "one column": draw(24, 1),
    "one entry": draw(1, 1),
    "denormal": draw(24, 32) * 1e-40,
    "denormal in half": (draw(24, 32) * 1e-7).half(),
    "tiny": draw(24, 32) * 1e-30,
    "huge": draw(24, 32) * 1e30,
    "the largest half": (draw(24, 32).sign() * 65504).half(),
    "a huge range": draw(24, 32) * torch.logspace(-20, 18, 32),
    "rank one": torch.outer(draw(24), draw(32, seed=1)),
    "zero rows and columns": holes(),
}
METRICS = ("none", "zero", "rank one", "dead inputs", "tiny", "huge", "an outlier")


def metric(kind: str, d: int) -> Tensor | None:
    X = draw(4 * d, d, seed=2)
    match kind:
        case "none":
            return None
        case "zero":
            return torch.zeros(d, d)
        case "rank one":
            X = X[:1]
        case "dead inputs":
            X[:, ::3] = 0
        case "an outlier":
            X[:, 0] *= 1e6
    H = X.T @ X / len(X)
    return H * {"tiny": 1e-38, "huge": 1e34}.get(kind, 1.0)


def made(W: Tensor, method: str, H: Tensor | None, bits: float = 4, **seen: Tensor) -> Made | None:
    """None where no factorization of this shape fits the bits."""
    recipe = make_recipe({"model": "m", "method": method, "bits": bits})
    asked = recipe.spec_for("x")
    spec = plan((W.shape[0], W.shape[1]), asked)
    fmt = layout((W.shape[0], W.shape[1]), spec)
    if not (fmt.rank or fmt.q_bits):
        return None
    p = LayerPlan("x", 0, (W.shape[0], W.shape[1]), False, asked, spec, fmt, 32 * W.numel())
    return compress_matrix(recipe, p, W, Seen(H, **seen), torch.device("cpu")).certified()


@pytest.mark.parametrize("method", ["auto", *METHOD_NAMES])
@pytest.mark.parametrize("kind", MATRICES)
def test_every_method_on_every_kind_of_matrix(kind: str, method: str):
    W = MATRICES[kind]
    for H in (metric(m, W.shape[1]) for m in (METRICS if kind in ("huge", "one row", "zero rows and columns") else METRICS[:2])):
        found = made(W, method, H)
        if found is None:
            continue
        assert found.f is not None and bool(torch.isfinite(found.f.dequantize()).all())
        record = found.record.model_dump(mode="json")
        json.dumps(record, allow_nan=False)
        error = float(torch.linalg.vector_norm(W.double() - found.f.dequantize().double()))
        # `dequantize` sums up to 32 products in float32, the record in float64; below 2^-126 float32 has steps of 2^-149
        slack = 32 * 2**-24 * record["norm"] + 32 * 2**-149 * W.numel() ** 0.5
        assert abs(record["error"] - error) <= slack
        assert record["certificate"] >= error - slack
        if kind == "zero":
            assert error == 0
        elif kind == "denormal":
            assert VANISHED in record["note"] and error == float(W.double().norm())  # zero rather than something larger than W
        elif H is None:
            assert error <= 1.001 * record["norm"] + slack  # never worse than nothing, but for rounding


def test_what_a_record_cannot_say_is_said_to_be_missing():
    """tr(W H W^T) beyond the range of its type: no number, a note, and a ledger line that can be written."""
    found = made(MATRICES["huge"], "lplr", metric("an outlier", 32))
    assert found is not None and found.record.weighted_error is None
    assert "weighted_error beyond the range" in found.record.note


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value: float):
    W = draw(24, 32)
    W[2, 2] = value
    with pytest.raises(CheckpointError, match=r"x\.weight: . NaN and . Inf"):
        made(W, "auto", None)


def test_the_checksum_is_of_the_bytes_that_were_read():
    import hashlib

    W = draw(24, 32).bfloat16()
    found = made(W, "auto", None)
    wanted = hashlib.sha256(W.view(torch.int16).numpy().tobytes()).hexdigest()
    assert found is not None and found.record.source_sha256 == wanted == tensor_sha256(W)
    assert tensor_sha256(W.T) == tensor_sha256(W.T.contiguous()) != wanted
