"""Certificates against the float64 error, on every method and on hard matrices; coverage of the probes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from lplr.errors import RecipeError
from lplr.factor import (
    Factorization,
    certify,
    exact_error,
    factorize,
    measured_error,
    optimal_error,
    probe_certificate,
    weighted_error,
)
from lplr.factor import certificates as module
from lplr.factor.methods import METHODS
from lplr.kernels.hadamard import rotate, rotation_signs
from lplr.linalg.hessian import cholesky_factor, damped
from lplr.quant import QTensor, quantize
from lplr.recipe import FACTOR_RANGES, FactorSpec, QuantSpec
from lplr.records import LayerRecord

BACKED = ("naive", "caldera", "ldlq")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def matrices() -> dict[str, torch.Tensor]:
    g = seeded(1)
    normal = torch.randn(45, 33, generator=g)
    spikes = normal * 1e-4
    spikes[3, 4] = 1e3
    coherent = normal * 0.01
    coherent[7] = 5.0
    return {
        "normal": normal,
        "wide": torch.randn(20, 70, generator=g),
        "coherent": coherent,
        "spikes": spikes,
        "rank one": torch.outer(torch.linspace(-1, 1, 40), torch.linspace(1, 2, 30)),
        "zero": torch.zeros(12, 9),
        "identity": torch.eye(25),
        "huge": torch.randn(18, 14, generator=g, dtype=torch.float64) * 1e30,
        "tiny": torch.randn(18, 14, generator=g, dtype=torch.float64) * 1e-30,
        "one row": torch.randn(1, 17, generator=g),
        "one column": torch.randn(17, 1, generator=g),
        "bfloat16": torch.randn(16, 24, generator=g).bfloat16(),
    }


def orthogonal(seed: int, size: int) -> np.ndarray:
    """The dense matrix of a rotation, the identity for the seed 0, in float64."""
    I = torch.eye(size, dtype=torch.float64)  # noqa: E741
    O = rotate(I, rotation_signs(seed, size)) if seed else I  # noqa: E741
    assert float((O @ O.T - I).abs().max()) < 1e-14
    return O.numpy()


def rotated(W: torch.Tensor, f: Factorization) -> np.ndarray:
    """P^T W O with the dense P and O, in float64."""
    return orthogonal(f.output_rotation, W.shape[0]).T @ W.double().numpy() @ orthogonal(f.rotation, W.shape[1])


def true_error(W: torch.Tensor, f: Factorization) -> float:
    """In numpy, float64, from levels and scales multiplied out by hand."""

    def dense(q: QTensor | None) -> np.ndarray | None:
        if q is None:
            return None
        out = q.levels(torch.float64).numpy()
        if q.row_scale is not None:
            out = out * q.row_scale.double().numpy()[:, None]
        return out if q.col_scale is None else out * q.col_scale.double().numpy()

    L, R, Q = dense(f.l), dense(f.r), dense(f.q)
    E = rotated(W, f) - (0 if L is None or R is None else L @ R) - (0 if Q is None else Q)
    return float(np.sqrt((E**2).sum()))


@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_certificate_is_an_upper_bound(method: str, blocked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if blocked:
        monkeypatch.setattr(module, "_BLOCK", 100)
    for name, W in matrices().items():
        for bits, rank in ((1, 1), (4, max(1, min(W.shape) // 4)), (8, min(W.shape))):
            q = QuantSpec(bits=min(bits, 4), ranges="row") if method in BACKED else None
            l, r = (QuantSpec(bits=bits, ranges=ranges) for ranges in FACTOR_RANGES.get(method, ("both", "both")))
            narrow = min(W.shape[1] - 1, 3) if method in ("ldlq", "caldera") else 0
            spec = FactorSpec(method=method, rank=rank, l=l, r=r, q=q, alternations=1, q_narrow=narrow)
            f = factorize(W, spec, generator=seeded(2))
            true = true_error(W, f)
            norm = float(W.double().norm())
            assert measured_error(W, f) == pytest.approx(true, rel=1e-9, abs=1e-13 * norm), name
            certificate = exact_error(W, f)
            assert certificate >= true, (name, certificate, true)
            assert certificate >= measured_error(W, f), name
            if true > 1e-3 * norm:
                assert certificate <= true * (1 + 1e-4), name
            assert certificate <= true * (1 + 1e-4) + 1e-10 * norm
            assert probe_certificate(W, f, generator=seeded(3)) >= true * (1 - 1e-12), name


@pytest.mark.parametrize(("grid", "bits"), [("trellis", 1.5), ("lattice", 2), ("normal_float", 3), ("uniform", 3)])
@pytest.mark.parametrize("blocked", [False, True])
def test_every_grid_in_both_bases(grid: str, bits: float, blocked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if blocked:
        monkeypatch.setattr(module, "_BLOCK", 100)
    g = seeded(12)
    for n, d, rank in ((45, 33, 4), (20, 70, 3), (1, 17, 1), (17, 1, 1), (30, 30, 29)):
        W, X = torch.randn(n, d, generator=g), torch.randn(3 * d, d, generator=g)
        quant = QuantSpec(grid=grid, bits=bits, ranges="tensor")  # type: ignore[arg-type]
        for method, l, rotations in (("ldlq", None, (1, 2)), ("caldera", quant, (3, 4)), ("lplr", quant, (0, 5))):
            spec = FactorSpec(
                method=method, rank=rank, l=l, r=l, q=quant, q_narrow=d // 4, rotation=rotations[0], output_rotation=rotations[1]
            )
            f = factorize(W, spec, H=X.T @ X, generator=g)
            assert (f.rotation, f.output_rotation) == rotations
            true = true_error(W, f)
            assert float((W.double() - f.dequantize(torch.float64)).norm()) == pytest.approx(true, rel=1e-12)
            assert measured_error(W, f) == pytest.approx(true, rel=1e-9)
            assert true <= exact_error(W, f) <= true * (1 + 1e-6)
            assert probe_certificate(W, f, generator=seeded(3)) >= true
            E = W.double() - f.dequantize(torch.float64)
            oracle = math.sqrt(float((E @ X.double().T).square().sum() / (W.double() @ X.double().T).square().sum()))
            assert weighted_error(W, f, X.T @ X) == pytest.approx(oracle, rel=1e-5)


def test_cancellation_falls_back_to_the_residual() -> None:
    """W is L R up to 1e-9: the expansion of the square has no digit left, the certificate keeps four."""
    g = seeded(4)
    left = quantize(torch.randn(60, 3, generator=g), 8, axis="tensor")
    r = quantize(torch.randn(3, 50, generator=g), 8, axis="row")
    f = Factorization(QTensor(left.codes, 8, left.shape), r)
    exact = f.dequantize(torch.float64)
    assert exact_error(exact, f) <= 1e-12 * float(exact.norm())
    W = exact + 1e-9 * exact.abs().max() * torch.randn(60, 50, generator=g, dtype=torch.float64)
    true = true_error(W, f)
    assert true <= exact_error(W, f) <= true * (1 + 1e-4)
    square, allowance = module._gram_square(W, f)
    assert abs(square - true**2) <= allowance


def test_both_routes_agree_and_bound_their_rounding() -> None:
    W = torch.randn(80, 60, generator=seeded(5))
    f = factorize(W, FactorSpec(method="caldera", rank=5, q=QuantSpec(bits=1, ranges="row")), generator=seeded(6))
    true = true_error(W, f)
    square, allowance = module._gram_square(W, f)
    assert abs(square - true**2) <= allowance <= 1e-9 * true**2
    assert true <= module._residual_bound(W, f) <= true * (1 + 1e-9)


def test_probe_certificate_covers() -> None:
    """At failure 0.2, of 2000 sets of 5 probes on a rank-one error (the worst case) about 0.2 or fewer may fall short."""
    W = torch.outer(torch.randn(8, generator=seeded(1)), torch.randn(6, generator=seeded(2)))
    f = factorize(torch.zeros(8, 6), FactorSpec(method="lplr", rank=1), generator=seeded())
    g, true = seeded(7), float(W.norm())
    short = sum(probe_certificate(W, f, probes=5, failure=0.2, generator=g) < true for _ in range(2000))
    assert short / 2000 <= 0.2 + 4 * math.sqrt(0.2 * 0.8 / 2000)
    assert short / 2000 > 0.02  # not vacuous either
    assert probe_certificate(W, f, generator=g) <= 2.5 * true


@pytest.mark.parametrize(("probes", "failure"), [(1, 0.5), (5, 0.1), (64, 1e-6), (1000, 1e-12)])
def test_lower_tail_against_chi_square(probes: int, failure: float) -> None:
    t = module.lower_tail(probes, failure)
    assert 0 < t < 1
    assert -math.log1p(-t) - t == pytest.approx(2 * math.log(1 / failure) / probes)
    assert stats.chi2(probes).cdf(probes * (1 - t)) <= failure
    x = math.log(1 / failure)
    assert t <= 2 * math.sqrt(x / probes)  # Laurent and Massart


def test_probe_arguments() -> None:
    W = torch.ones(3, 4)
    f = factorize(W, FactorSpec(method="lplr", rank=1), generator=seeded())
    for probes, failure in ((0, 0.1), (4, 0.0), (4, 1.0)):
        with pytest.raises(RecipeError, match="probes"):
            probe_certificate(W, f, probes=probes, failure=failure, generator=seeded())


@pytest.mark.parametrize("method", METHODS)
def test_weighted_error_against_traces(method: str) -> None:
    g = seeded(8)
    W, X = torch.randn(24, 20, generator=g), torch.randn(50, 20, generator=g)
    H = X.T @ X / 50
    q = QuantSpec(bits=2, ranges="row") if method in BACKED else None
    f = factorize(W, FactorSpec(method=method, rank=4, q=q), H=H, generator=g)
    E = W.double() - f.dequantize(torch.float64)
    oracle = math.sqrt(float((E @ X.double().T).square().sum() / (W.double() @ X.double().T).square().sum()))
    assert weighted_error(W, f, H) == pytest.approx(oracle, rel=1e-5)
    assert weighted_error(W, f, torch.zeros(20, 20)) == 0.0


@pytest.mark.parametrize("seed", range(4))
def test_least_singular_value_is_below_and_near(seed: int) -> None:
    X = torch.randn(10 if seed % 2 else 60, 24, generator=seeded(seed)) * torch.logspace(0, -3, 24)
    H = X.T @ X
    true = float(torch.linalg.svdvals(cholesky_factor(damped(H)).double())[-1])
    found = module.least_singular_value(H)
    assert 0.7 * true <= found <= true if seed % 2 else 0 < found <= true


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("method", [*METHODS, "auto"])
def test_certify_fills_a_record(method: str, calibrated: bool) -> None:
    g = seeded(9)
    W = torch.randn(30, 22, generator=g)
    X = torch.randn(80, 22, generator=g)
    H = X.T @ X / 80 if calibrated else None
    for alternations in (0, 1):
        spec = FactorSpec(method=method, bits_per_weight=3.0, rounding="stochastic", alternations=alternations)
        f = factorize(W, spec, H=H, generator=g)
        facts = certify(W, f, spec, H, g)
        record = LayerRecord(name="a", block=0, shape=(30, 22), method=method, rank=f.rank, bits=f.stored_bits(), **facts)
        assert record.error == pytest.approx(true_error(W, f), rel=1e-9)
        assert record.error <= record.certificate <= (record.probe_certificate or 0)
        assert record.norm == pytest.approx(float(W.double().norm()))
        assert record.bound is None or record.error <= record.bound
        assert record.bound is None or "bound (" in record.note
        assert record.bound is not None or "no statement" in record.note
        assert (record.weighted_error is None) == (H is None)
        assert [i for i, _ in record.spectrum] == list(range(1, 23))
        if record.optimal is not None:
            singular = np.linalg.svd(W.double().numpy(), compute_uv=False)
            assert record.optimal == pytest.approx(math.sqrt((singular[f.rank :] ** 2).sum()))
            assert record.error >= record.optimal
        assert record.model_dump_json() and optimal_error(torch.ones(3), 3) == 0.0


def test_certify_on_degenerate_matrices() -> None:
    for W in (torch.zeros(6, 9), torch.zeros(1, 4), torch.ones(5, 1)):
        facts = certify(
            W, f := factorize(W, FactorSpec(method="lplr", rank=1), generator=seeded()), FactorSpec(rank=1), None, seeded()
        )
        assert facts["error"] <= facts["certificate"] and facts["error"] == true_error(W, f)
        assert facts["spectrum"][0][0] == 1 and len(facts["spectrum"]) == min(W.shape)


def test_spectrum_sample_is_log_spaced() -> None:
    W = torch.randn(300, 250, generator=seeded(1))
    spec = FactorSpec(method="naive", q=QuantSpec(bits=2, ranges="row"))
    indices = [i for i, _ in certify(W, factorize(W, spec, generator=seeded()), spec, None, seeded())["spectrum"]]
    assert indices[0] == 1 and indices[-1] == 250 and 30 <= len(indices) <= 48 and indices == sorted(set(indices))


@pytest.mark.parametrize("apart", [0.0, 0.3, 30.0])
def test_bound_for_another_target_covers_the_error_of_the_matrix(apart: float) -> None:
    """T far from W: the certain bound of `ldlq` on ||T - What|| plus ||T - W|| covers ||W - What||, errors stay those of W."""
    W, g = torch.randn(40, 24, generator=seeded(3)), seeded(4)
    x = torch.randn(200, 24, generator=g)
    H = x.T @ x / 200
    T = W + apart * torch.randn(40, 24, generator=g)
    spec = FactorSpec(method="ldlq", bits_per_weight=3)
    f = factorize(T, spec, H=H, generator=seeded())
    facts = certify(W, f, spec, H, seeded(), target=T)
    error = float(torch.linalg.vector_norm(W.double() - f.dequantize(torch.float64)))
    assert facts["error"] == pytest.approx(error, rel=1e-9) and facts["certificate"] >= error
    plain = certify(T, f, spec, H, seeded())
    difference = float(torch.linalg.vector_norm(T.double() - W.double()))
    assert facts["bound"] >= error
    assert facts["bound"] == pytest.approx(plain["bound"] + difference, rel=1e-6)
    assert "differs from W" in facts["note"]
