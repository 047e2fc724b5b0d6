"""Exported networks against sums written out in numpy; files against damage."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from convex.oracles import random_problem, value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lplr.convex import Gates, Penalty, Solution, lambda_max, solve
from lplr.convex import network as module
from lplr.convex.network import GatedNetwork, ReluNetwork, describe, export, extras, fold_gates, load, save, two_logits
from lplr.errors import CheckpointError, OutputError, RecipeError

float64 = torch.float64
frames = {"seed": st.integers(0, 9999), "C": st.integers(1, 3), "ones": st.booleans(), "standard": st.booleans()}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=float64)


def solution(U: Tensor, b: Tensor) -> Solution:
    return Solution(U, b, torch.empty(0), 0.0, 0.0, 0.0, 0.0, 0, 0.0, "converged", "")


def samples(seed: int, n: int, ones: bool, standard: bool) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Raw samples (n, 3), mean, scale, and the programme's features."""
    X = normal(seed, n, 3) * torch.tensor([0.5, 1.0, 4.0], dtype=float64) + torch.tensor([3.0, 0.0, -1.0], dtype=float64)
    mean, scale = (X.mean(0), X.std(0)) if standard else (None, None)
    S = X if mean is None or scale is None else (X - mean) / scale
    return X, mean, scale, torch.cat([S, torch.ones(n, 1, dtype=float64)], 1) if ones else S


def features(X: Tensor, mean: Tensor | None, scale: Tensor | None, ones: bool) -> np.ndarray:
    S = X if mean is None or scale is None else (X - mean) / scale
    return (torch.cat([S, torch.ones(len(X), 1, dtype=float64)], 1) if ones else S).numpy()


def in_cones(seed: int, S: Tensor, P: int, C: int) -> tuple[Tensor, Tensor]:
    """Patterns D (n, P) and weights V (2, P, d, C), some zero, no two parallel, with (2 D_i - I) S V >= 0."""
    G = normal(seed + 1, S.shape[1], P)
    scores = S @ G
    room = scores.abs().amin(0) / S.abs().sum(1).max()  # entries of g_i may move by this and leave no score of another sign
    moves = room[:, None, None] * normal(seed + 3, 2, P, S.shape[1], C).clamp(-0.5, 0.5)
    sizes = normal(seed + 2, 2, P, 1, C)
    D, V = scores > 0, (G.T[None, :, :, None] + moves) * sizes.abs() * (sizes > -0.5)
    assert ((2 * D.double() - 1).T[None, :, :, None] * (S @ V) >= 0).all()
    return D, V


@given(**frames)
@settings(max_examples=40, deadline=None)
def test_relu_weights_in_the_cones_are_a_network_with_the_same_fit(seed, C, ones, standard):
    X, mean, scale, S = samples(seed, 15, ones, standard)
    D, V = in_cones(seed, S, 4, C)
    b = normal(seed + 7, C)
    found = export(solution(V, b), mean=mean, scale=scale, ones=ones)
    assert isinstance(found, ReluNetwork) and found.shape == (int((V.norm(dim=2) > 0).sum()), 3, C)
    Z = np.einsum("ni,nd,idc->nc", D.double().numpy(), S.numpy(), (V[0] - V[1]).numpy()) + b.numpy()
    assert np.abs(found(X).detach().numpy() - Z).max() < 1e-10 * (1 + np.abs(Z).max())
    new = normal(seed + 8, 9, 3) * 5
    products = np.einsum("nd,sidc->nsic", features(new, mean, scale, ones), V.numpy()).clip(0)
    Z = (products[:, 0] - products[:, 1]).sum(1) + b.numpy()
    assert np.abs(found(new).detach().numpy() - Z).max() < 1e-10 * (1 + np.abs(Z).max())
    if not standard:
        sizes = V.norm(dim=2)
        decay = sum(layer.square().sum().item() for layer in (found.layers[0].weight, found.layers[1].weight)) / 2
        decay += found.layers[0].bias.square().sum().item() / 2
        assert decay == pytest.approx(sizes.sum().item(), rel=1e-12)
        first = torch.cat([found.layers[0].weight, found.layers[0].bias[:, None]], 1).norm(dim=1)
        assert torch.allclose(first, found.layers[1].weight.abs().sum(0), rtol=1e-12)  # balanced: the least decay


@pytest.mark.parametrize("loss", ["squared", "logistic", "softmax"])
def test_the_weight_decay_objective_is_the_convex_one(loss):
    problem = random_problem(3, loss, n=16, d=3, P=4, C=2, intercept=True, activation="relu")
    penalty = Penalty(0.05 * lambda_max(problem, "columns"), "columns")
    found = solve(problem, penalty, tol=1e-8)
    made = export(found)
    assert isinstance(made, ReluNetwork)
    Z, Y = made(problem.X), problem.Y
    if loss == "squared":
        data = (Z - Y).square().sum() / 32
    elif loss == "logistic":
        data = torch.log1p(torch.exp(-Y * Z)).mean()
    else:
        data = nn.functional.cross_entropy(Z, Y.argmax(1))
    first, second = made.layers
    decay = penalty.lam / 2 * (first.weight.square().sum() + second.weight.square().sum())
    # the solver's weights may leave the cones by 1e-8 of their size
    assert (data + decay).item() == pytest.approx(value(problem, penalty, found.U, found.b), rel=1e-7)
    assert (data + decay).item() == pytest.approx(found.primal, rel=1e-7) and made.shape[0] > 0


@given(**frames, raw=st.booleans(), linear=st.booleans())
@settings(max_examples=40, deadline=None)
def test_gated_weights_are_a_network_with_the_same_outputs_everywhere(seed, C, ones, standard, raw, linear):
    X, mean, scale, S = samples(seed, 15, ones, standard)
    gates = Gates(normal(seed + 1, 3, 5), normal(seed + 2, 5))
    if linear:
        gates.vectors[:, 0], gates.offsets[0] = 0, 2.0
    U, b = normal(seed + 3, 5, 3 + ones, C), normal(seed + 4, C)
    U[3] = 0
    found = export(solution(U, b), gates, mean=mean, scale=scale, ones=ones, raw=raw)
    assert isinstance(found, GatedNetwork) and found.shape == (4 - linear, 3, C)
    for data in (X, normal(seed + 5, 40, 3) * 5):
        F = features(data, mean, scale, ones)
        scores = (data.numpy() if raw else F[:, :3]) @ gates.vectors.numpy() + gates.offsets.numpy()
        clear = (np.abs(scores) > 1e-11).all(1)  # a sample on a hyperplane is on either side by rounding
        Z = np.einsum("ni,nd,idc->nc", scores > 0, F, U.numpy()) + b.numpy()
        assert np.abs(found(data).detach().numpy() - Z)[clear].max(initial=0) < 1e-11 * (1 + np.abs(Z).max())
    if raw:
        rows = torch.cat([gates.vectors, gates.offsets[None]])[:, [i for i in range(linear, 5) if i != 3]].T.tolist()
        made = torch.cat([found.gates.weight, found.gates.bias[:, None]], 1).tolist()
        assert sorted(made) == sorted(rows)


def test_equal_gates_and_parallel_neurons_are_added_up():
    X, _, _, S = samples(0, 12, False, False)
    gates = Gates(normal(1, 3, 2)[:, [0, 1, 0, 0]], normal(2, 2)[[0, 1, 0, 0]])
    U, b = normal(3, 4, 3, 2), normal(4, 2)
    found = export(solution(U, b), gates)
    Z = np.einsum("ni,nd,idc->nc", gates.patterns(X).double().numpy(), X.numpy(), U.numpy()) + b.numpy()
    assert found.shape[0] == 2 and np.abs(found(X).detach().numpy() - Z).max() < 1e-12
    v = normal(5, 3)
    V = torch.zeros(2, 3, 3, 1, dtype=float64)
    V[0, 0, :, 0], V[0, 2, :, 0], V[1, 1, :, 0] = v, 2.5 * v, 0.25 * v
    made = export(solution(V, b[:1]))
    assert isinstance(made, ReluNetwork) and made.shape[0] == 2  # of two signs
    assert torch.allclose(made(X), b[0] + (3.5 - 0.25) * (X @ v).relu()[:, None], rtol=1e-12)
    assert (made.layers[0].weight.square().sum() + made.layers[1].weight.square().sum()).item() / 2 == pytest.approx(
        3.75 * v.norm().item(), rel=1e-12
    )


def test_gates_that_never_open_and_linear_blocks():
    X = normal(0, 6, 2)
    gates = Gates(torch.zeros(2, 3, dtype=float64), torch.tensor([1.0, 0.0, 3.0], dtype=float64))
    U, b = normal(1, 3, 2, 1), normal(2, 1)
    found = export(solution(U, b), gates)
    assert found.shape == (0, 2, 1) and torch.allclose(found(X), X @ (U[0] + U[2]) + b, rtol=1e-12)


@pytest.mark.parametrize("shape", [(4, 3, 2), (2, 4, 3, 2)])
def test_no_neurons(shape, tmp_path):
    X, b = normal(0, 5, 3), normal(1, 2)
    made = export(solution(torch.zeros(shape, dtype=float64), b), Gates(normal(2, 3, 4), normal(3, 4)))
    assert made.shape == (0, 3, 2) and torch.equal(made(X), b.expand(5, 2))
    save(made, tmp_path / "n")
    assert torch.equal(load(tmp_path / "n")(X), made(X))


def test_folding_moves_gates_to_raw_samples():
    X, mean, scale, S = samples(0, 30, False, True)
    gates = Gates(normal(1, 3, 6), normal(2, 6))
    found = fold_gates(gates, mean, scale)
    assert (X @ found.vectors + found.offsets - (S @ gates.vectors + gates.offsets)).abs().max() < 1e-12
    assert fold_gates(gates).vectors is gates.vectors


def test_shapes_that_do_not_fit():
    U, b, gates = normal(0, 4, 3, 2), normal(1, 2), Gates(normal(2, 3, 4), normal(3, 4))
    for given_gates, options, message in [
        (None, {}, "gates are none"),
        (gates[torch.arange(3)], {}, r"gates are \(3, 3\)"),
        (Gates(gates.vectors, gates.offsets[:3]), {}, r"gates are \(3, 4\) with offsets \(3,\)"),
        (Gates(gates.vectors[0], gates.offsets), {}, r"gates are \(4,\)"),
        (gates, {"ones": True}, r"gates are \(3, 4\)"),
        (gates, {"mean": torch.zeros(2)}, r"mean is \(2,\)"),
        (gates, {"scale": torch.zeros(3)}, "not positive"),
        (gates, {"scale": torch.tensor([1.0, float("nan"), 1.0])}, "not positive"),
    ]:
        with pytest.raises(RecipeError, match=message):
            export(solution(U, b), given_gates, **options)
    for weights, constants in [(U, b[:1]), (U, b[None]), (U[0], b), (U[None], b), (U[None, None], b)]:
        with pytest.raises(RecipeError, match=r"give U \(P, d, C\)"):
            export(solution(weights, constants), gates)


@pytest.mark.parametrize("kind", ["relu", "gated"])
def test_two_logits(kind):
    made, X = network(kind, C=1), normal(9, 7, 3)
    both = two_logits(made)
    assert torch.equal(both(X)[:, 0], torch.zeros(7, dtype=float64)) and torch.allclose(both(X)[:, 1:], made(X), rtol=1e-13)
    assert torch.allclose(both(X).softmax(1)[:, 1:], made(X).sigmoid(), rtol=1e-12)
    with pytest.raises(RecipeError, match="2 outputs"):
        two_logits(both)


def network(kind: str, C: int = 2, dtype: torch.dtype = float64) -> ReluNetwork | GatedNetwork:
    U = normal(0, 2, 4, 4, C) if kind == "relu" else normal(0, 5, 4, C)
    gates = Gates(normal(1, 3, 5), normal(2, 5))
    gates.vectors[:, 0], gates.offsets[0] = 0, 1.0
    return export(solution(U, normal(3, C)), gates, mean=normal(4, 3), scale=normal(5, 3).exp(), ones=True, dtype=dtype)


@pytest.mark.parametrize("kind", ["relu", "gated"])
@pytest.mark.parametrize("dtype", [float64, torch.float32, torch.bfloat16])
def test_files_keep_every_bit(kind, dtype, tmp_path, monkeypatch):
    for name in ("load", "loads", "dump", "dumps", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, lambda *_, **__: pytest.fail("pickle was used"))
    made, file = network(kind, dtype=dtype), tmp_path / "network.safetensors"
    shared = torch.arange(6.0).view(2, 3)
    save(made, file, metadata={"a": [1, None, "ü"]}, tensors={"one": shared.T, "two": shared, "same": shared, "bits": shared > 2})
    again = load(file)
    assert type(again) is type(made) and again.shape == made.shape
    for (key, old), (other, new) in zip(made.state_dict().items(), again.state_dict().items(), strict=True):
        assert key == other and old.dtype == new.dtype == dtype and torch.equal(old, new)
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in made.parameters()]
    X = normal(7, 20, 3).to(dtype)
    assert torch.equal(made(X), again(X))
    facts = describe(file)
    assert (facts["kind"], facts["neurons"], facts["features"], facts["outputs"]) == (kind, *made.shape)
    assert facts["metadata"] == {"a": [1, None, "ü"]}
    found = extras(file)
    assert torch.equal(found["one"], shared.T) and torch.equal(found["two"], shared) and torch.equal(found["bits"], shared > 2)
    assert file.stat().st_mode & 0o777 == 0o644 and os.listdir(tmp_path) == [file.name]
    raw = file.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert json.loads(header["__metadata__"]["lplr.network"])["version"] == 1


@pytest.mark.parametrize("when", ["writing", "format", "replacing", "metadata"])
def test_a_write_that_fails_leaves_the_old_file(when, tmp_path, monkeypatch):
    file = tmp_path / "network"
    save(network("relu"), file)
    before = file.read_bytes()

    def half(state, path, metadata):
        Path(path).write_bytes(b"half of it")
        raise OSError(28, "No space left on device") if when == "writing" else SafetensorError("no")

    def refused(*_):
        raise PermissionError(13, "Permission denied")

    if when in ("writing", "format"):
        monkeypatch.setattr(module, "save_file", half)
    elif when == "replacing":
        monkeypatch.setattr(module.os, "replace", refused)
    kind, message = (RecipeError, "JSON") if when == "metadata" else (OutputError, "cannot be written")
    with pytest.raises(kind, match=message):
        save(network("gated"), file, metadata={"x": object()} if when == "metadata" else None)
    assert file.read_bytes() == before and os.listdir(tmp_path) == ["network"]


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "folder").mkdir()
    for target in (tmp_path / "absent" / "network", tmp_path / "folder"):
        with pytest.raises(OutputError, match="cannot be written"):
            save(network("relu"), target)
    assert os.listdir(tmp_path) == ["folder"]
    with pytest.raises(RecipeError, match="Sequential is not a network"):
        save(nn.Sequential(nn.Linear(2, 2)), tmp_path / "other")


def rewritten(file: Path, target: Path, *, facts: object = None, **changes: Tensor | None) -> Path:
    """The file with other facts in its header (raw text as it is), and tensors changed or, None, left out."""
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    tensors = {key: t for key, t in (tensors | {k.replace("__", "."): v for k, v in changes.items()}).items() if t is not None}
    old = json.loads(metadata["lplr.network"])
    facts = old | facts if isinstance(facts, dict) else old if facts is None else facts
    save_file(tensors, target, metadata={"lplr.network": facts if isinstance(facts, str) else json.dumps(facts)})
    return target


def test_files_that_are_no_network_are_refused(tmp_path):
    file, other = tmp_path / "network", tmp_path / "other"
    save(network("gated"), file)
    load(rewritten(file, other))
    bias = load(file).state_dict()["gates.bias"]
    cases = [
        ({"facts": {"version": 2}}, "version 2"),
        ({"facts": {"kind": "tanh"}}, "kind 'tanh'"),
        ({"facts": {"kind": ["gated"]}}, "kind \\['gated'\\]"),
        ({"facts": {"kind": "relu"}}, "0.weight is missing"),
        ({"facts": [1]}, "version None"),
        ({"facts": "{"}, "no JSON"),
        ({"facts": {"neurons": "four"}}, "lacks sizes"),
        ({"facts": {"metadata": 3}}, "lacks sizes or metadata"),
        ({"facts": {"neurons": 5}}, "its header says"),
        ({"facts": {"outputs": -2}}, "its header says"),
        ({"skip__bias": None}, "skip.bias is missing"),
        ({"gates__bias": bias[:-1]}, "gates.bias is"),
        ({"gates__bias": bias.long()}, "one floating-point type"),
        ({"gates__bias": bias.float()}, "one floating-point type"),
        ({"gates__bias": bias.where(bias != bias[1], torch.nan)}, "NaN or Inf"),
        ({"gates__bias": bias.where(bias != bias[1], -torch.inf)}, "NaN or Inf"),
        ({"more": bias.clone()}, "more belongs to no gated network"),
    ]
    for change, message in cases:
        with pytest.raises(CheckpointError, match=message):
            load(rewritten(file, other, **change))
    save_file({"0.weight": bias}, other)
    (tmp_path / "text").write_text("hello")
    (tmp_path / "pickled").write_bytes(pickle.dumps({"a": 1}))
    (tmp_path / "empty").touch()
    for name, message in [
        ("other", "no network of lplr"), ("text", "not a readable"), ("pickled", "not a readable"), ("empty", "not a readable"),
        ("absent", "is no file"), (".", "is no file"),
    ]:  # fmt: skip
        for reader in (load, describe, extras):
            with pytest.raises(CheckpointError, match=message):
                reader(tmp_path / name)


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_file_is_refused_or_a_network(tmp_path, data):
    """Safetensors has no checksum: a changed weight is not seen, but nothing other than CheckpointError is ever raised."""
    file, broken = tmp_path / "network", tmp_path / "broken"
    save(network(data.draw(st.sampled_from(["relu", "gated"]))), file)
    raw = bytearray(file.read_bytes())
    cut = data.draw(st.booleans())
    if cut:
        raw = raw[: data.draw(st.integers(0, len(raw) - 1))]
    else:
        for _ in range(data.draw(st.integers(1, 3))):
            raw[data.draw(st.integers(0, len(raw) - 1) | st.integers(0, 700))] = data.draw(st.integers(0, 255))
    broken.write_bytes(raw)
    try:
        found = load(broken)
    except CheckpointError as error:
        assert "broken" in str(error)
    else:
        assert not cut and all(torch.isfinite(t).all() for t in found.state_dict().values())
