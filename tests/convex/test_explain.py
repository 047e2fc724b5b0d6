"""What neurons are made of, on hyperplanes that are known; and the whole of it on a head of a language model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_heads import SMALL, folder, labelled, texts  # noqa: F401  # fixtures
from torch import Tensor
from typer.testing import CliRunner

from lplr.cli import app
from lplr.convex import wedge
from lplr.convex.gates import Gates
from lplr.convex.lasso import Lasso, lambda_max, solve_lasso
from lplr.convex.network import GatedNetwork, linear_layer
from lplr.convex.neurons import explain
from lplr.errors import CheckpointError, DatasetError, OutputError, RecipeError

pytest.importorskip("sklearn")

from lplr.convex.explain import EXPLANATION, explain_head  # noqa: E402
from lplr.convex.heads import fit_head  # noqa: E402
from lplr.report.neurons import write_explanation  # noqa: E402


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gated(gates: Gates, values: Tensor, constants: Tensor) -> GatedNetwork:
    """values (m, C, d), constants (m, C)."""
    m, C, d = values.shape
    return GatedNetwork(
        linear_layer(gates.vectors.T, gates.offsets),
        linear_layer(values.reshape(m * C, d), constants.reshape(m * C)),
        linear_layer(torch.zeros(C, d, dtype=torch.float64), torch.zeros(C, dtype=torch.float64)),
    )


@pytest.mark.parametrize("d", [1, 2, 3])
def test_the_samples_of_a_wedge_lasso_are_found_again(d: int):
    X = normal(d, 25, d) * torch.tensor([1.0, 30.0, 0.1])[:d] + 5  # of other units
    y = (X - X.mean(0))[:, :1].relu()
    wedges = wedge.dictionary(X)
    lasso = Lasso(wedges.columns(X), len(wedges), y, "squared", True)
    found = solve_lasso(lasso, 0.05 * lambda_max(lasso))
    kept = (found.U != 0).flatten()
    neurons = explain(wedge.network(wedges, found), X, samples=d)
    assert len(neurons) == int(kept.sum()) > 0
    for neuron in neurons:
        assert neuron.on == d and set(neuron.samples) == set(wedges.samples[kept][neuron.number].tolist())
        assert neuron.agreement >= 1 - (d + 0.5) / 25 and neuron.correlation == pytest.approx(1, abs=1e-9)  # its own are on it


@pytest.mark.parametrize("C", [1, 3])
def test_a_network_whose_neurons_are_all_zero_has_none_to_explain(C: int):
    none = gated(Gates(normal(0, 4, 0), normal(0, 0)), normal(0, 0, C, 4), normal(0, 0, C))
    assert none.shape == (0, 4, C) and none(normal(1, 5, 4)).shape == (5, C)
    assert explain(none, normal(1, 5, 4), samples=2) == []


def test_what_a_neuron_does():
    """Effects, sides and distances of a gated network, one sample at a time."""
    X = normal(0, 40, 3)
    gates = Gates(normal(1, 3, 4), normal(2, 4))
    values, constants = normal(3, 4, 2, 3), normal(4, 4, 2)
    net = gated(gates, values, constants)
    scale = X.std(0, correction=0)
    for neuron in explain(net, X, samples=2):
        i = neuron.number
        opened = [bool(x @ gates.vectors[:, i] + gates.offsets[i] > 0) for x in X]
        added = torch.stack([(values[i] @ x + constants[i]) * on for x, on in zip(X, opened, strict=True)])
        margin = added[:, neuron.favours] - added[:, 1 - neuron.favours]
        assert torch.allclose(neuron.added, margin) and neuron.share == pytest.approx(sum(opened) / 40)
        assert neuron.effect == pytest.approx(margin.square().mean().sqrt().item())
        assert neuron.when_open == pytest.approx(margin[torch.tensor(opened)].mean().item()) and neuron.when_open >= 0
        foot = -(X @ gates.vectors[:, i] + gates.offsets[i])[:, None] * (gates.vectors[:, i] * scale**2)
        foot = X + foot / (gates.vectors[:, i] * scale).square().sum()  # the nearest point of the hyperplane, standardised
        assert torch.allclose(foot @ gates.vectors[:, i], -gates.offsets[i].expand(40))
        assert torch.allclose(neuron.distances.abs(), ((X - foot) / scale).norm(dim=1))
        assert neuron.on == 0 and len(neuron.samples) == 2
    effects = [neuron.effect for neuron in explain(net, X)]
    assert effects == sorted(effects, reverse=True)


@pytest.mark.parametrize("k", [1, 2, 5, 9])
def test_few_samples_define_a_hyperplane_of_many_features_well(k: int):
    X = normal(0, 400, 30) * torch.logspace(0, -1, 30, dtype=torch.float64)
    net = gated(Gates(normal(1, 30, 3), 0.3 * normal(2, 3)), normal(3, 3, 2, 30), normal(4, 3, 2))
    for neuron in explain(net, X, samples=k):
        assert len(set(neuron.samples)) == k and neuron.on == 0
        assert neuron.agreement > 0.9 and neuron.correlation > 0.95
        rank = neuron.distances.abs().argsort().argsort()
        assert rank[list(neuron.samples)].max() < max(20, 4 * k)  # among the nearest


@pytest.mark.parametrize("outputs", [1, 3])
def test_hard_samples(outputs: int):
    """One sample, equal ones, constant columns, a gate that is always open, one of no direction: an answer, finite."""
    gates = Gates(torch.cat([normal(0, 4, 3), torch.zeros(4, 1)], 1), torch.tensor([0.0, 100.0, -100.0, 1.0]).double())
    net = gated(gates, normal(1, 4, outputs, 4), normal(2, 4, outputs))
    flat = normal(3, 12, 4)
    flat[:, 1] = 7.0
    for X in (normal(4, 1, 4), torch.ones(6, 4).double(), normal(5, 3, 4).repeat(4, 1), flat, 1e150 * flat):
        for neuron in explain(net, X, samples=3):
            assert torch.isfinite(torch.stack([neuron.distances, neuron.along])).all() and neuron.samples
            assert 0 <= neuron.agreement <= 1 and abs(neuron.correlation) <= 1 + 1e-9 and 0 <= neuron.share <= 1
    with pytest.raises(RecipeError, match="the network has 4 features"):
        explain(net, normal(0, 5, 3))
    with pytest.raises(RecipeError, match="1 or more"):
        explain(net, normal(0, 5, 4), samples=0)


@pytest.fixture(scope="module")
def head(folder: Path, texts: tuple[str, str]) -> Path:  # noqa: F811
    return Path(fit_head(str(folder), texts[0], lam=0.02, output=folder / "heads" / "told", **SMALL).folder)


def test_a_head_is_explained_by_texts(head: Path, texts: tuple[str, str]):  # noqa: F811
    found = explain_head(head, texts[0], neurons=2, samples=3)
    lines = [json.loads(line) for line in Path(texts[0]).read_text().splitlines()]
    assert found.samples == 120 and found.accuracy > 0.6 and found.classes == ["bad", "good"] and found.kind == "gated"
    assert 1 <= len(found.neurons) <= 2 and found.linear_effect is not None
    for neuron in found.neurons:
        assert len(neuron["samples"]) == 3 and neuron["favours"] in found.classes
        for text in (*neuron["samples"], *neuron["open"], *neuron["closed"]):
            assert lines[text["row"]]["text"].startswith(text["text"]) and lines[text["row"]]["label"] == text["label"]
        assert all(t["distance"] > 0 for t in neuron["open"]) and all(t["distance"] <= 0 for t in neuron["closed"])
    assert json.loads((head / EXPLANATION).read_text())["neurons"] == json.loads(json.dumps(found.neurons))


def test_the_command_prints_and_writes_a_page(head: Path, texts: tuple[str, str]):  # noqa: F811
    given = ["explain-head", str(head), "--dataset", texts[0], "--neurons", "1", "--samples", "2", "--limit", "50"]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 0, done.output
    assert "nearly the wedge product of these 2 texts" in done.output and "wrote" in done.output
    page = (head / "explain.html").read_text()
    assert (
        page.count("<svg") == 2
        and "nearly the wedge product" in page
        and "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")
    )
    assert CliRunner().invoke(app, ["explain-head", str(head.parent), "--dataset", texts[0]]).exit_code == 2


def test_a_head_without_neurons_is_told_of(folder: Path, texts: tuple[str, str]):  # noqa: F811
    none = fit_head(str(folder), texts[0], lam=1e3, output=folder / "heads" / "none", **SMALL)
    assert none.neurons == 0
    done = CliRunner().invoke(app, ["explain-head", none.folder, "--dataset", texts[0]])
    assert done.exit_code == 0 and "The head has no neurons: it is linear" in done.stdout
    assert "there are none to tell about" in (Path(none.folder) / "explain.html").read_text(encoding="utf-8")
    done = CliRunner().invoke(app, ["prune-head", none.folder, "--dataset", texts[0]])
    assert done.exit_code == 0 and "0 neurons before, 0 now" in done.stdout


def test_what_cannot_be_explained_is_refused(head: Path, texts: tuple[str, str], tmp_path: Path):  # noqa: F811
    cases: list[tuple[Any, str, Path, str, dict[str, Any]]] = [
        (CheckpointError, "is no head", tmp_path, texts[0], {}),
        (DatasetError, "label 'a' is none of .*, which knows", head, labelled(tmp_path / "a.jsonl", 9, classes=("a", "b")), {}),
        (RecipeError, "neurons is 0", head, texts[0], {"neurons": 0}),
        (RecipeError, "samples is 0", head, texts[0], {"samples": 0}),
    ]
    for kind, message, where, dataset, more in cases:
        with pytest.raises(kind, match=message):
            explain_head(where, dataset, **more)
    with pytest.raises(OutputError, match="run `lplr explain-head`"):
        write_explanation(tmp_path)
