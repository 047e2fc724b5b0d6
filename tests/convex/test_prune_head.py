"""Heads on language models with fewer neurons: what is kept, chosen, stored and said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import checkpoints
import pytest
import torch
from runs import run, settings
from typer.testing import CliRunner

from lplr.errors import CheckpointError, DatasetError, OutputError

pytest.importorskip("sklearn")

from convex.test_heads import SMALL, labelled  # noqa: E402

from lplr.cli import app  # noqa: E402
from lplr.convex.heads import FACTS, HeadFit, fit_head  # noqa: E402
from lplr.convex.network import load  # noqa: E402
from lplr.convex.prune_head import prune_head  # noqa: E402
from lplr.evaluate.classification import evaluate_head  # noqa: E402
from lplr.hf.classifier import WEIGHTS, is_head  # noqa: E402


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("model")
    run(settings(checkpoints.write(root / "base", "llama")), root / "out")
    return root / "out"


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("words")
    return labelled(root / "train.jsonl", 120), labelled(root / "test.jsonl", 60, 1)


@pytest.fixture(scope="module")
def heads(model: Path, words: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, HeadFit]:
    root = tmp_path_factory.mktemp("heads")
    return {
        activation: fit_head(
            str(model), words[0], held_out=words[1], activation=activation, output=root / activation, lam=0.01, **SMALL
        )
        for activation in ("gated", "relu")
    }


@pytest.mark.parametrize("activation", ["gated", "relu"])
def test_every_size_is_measured_and_the_smallest_good_one_is_kept(
    activation: str,
    heads: dict[str, HeadFit],
    words: tuple[str, str],
    tmp_path: Path,
):
    old, (train, test) = heads[activation], words
    found = prune_head(Path(old.folder), train, held_out=test, output=tmp_path / "less")
    counts = [row.gates for row in found.sizes]
    assert counts == sorted(counts, reverse=True) and counts[-1] == (0 if activation == "gated" else 1)
    assert counts[0] <= found.before == old.neurons
    best = min(found.sizes, key=lambda row: row.nll)
    near = [row.gates for row in found.sizes if row.nll <= best.nll + best.error]
    assert found.chosen == min(near)
    target = tmp_path / "less"
    assert is_head(target) and json.loads((target / "prune.json").read_text())["chosen"] == found.chosen
    network = load(target / WEIGHTS)
    if activation == "gated":  # gates are among the old ones, the linear part stays
        assert network.shape[0] <= found.chosen
        rows = load(Path(old.folder) / WEIGHTS).gates.weight
        assert all(bool((rows == gate).all(1).any()) for gate in network.gates.weight)
    assert found.head.lam == old.lam and found.head.samples == old.samples and found.head.status == "converged"
    measured = evaluate_head(str(target), test)
    assert measured.accuracy == found.head.accuracy


def test_a_size_of_ones_own_and_the_command(heads: dict[str, HeadFit], words: tuple[str, str], tmp_path: Path):
    old, (train, _) = heads["gated"], words
    head = tmp_path / "copy"
    shutil.copytree(old.folder, head)
    config = json.loads((head / "config.json").read_text())
    config["backbone"] = str((Path(old.folder) / config["backbone"]).resolve())
    (head / "config.json").write_text(json.dumps(config))
    done = CliRunner().invoke(app, ["prune-head", str(head), "--dataset", train, "--gates", "2"])
    assert done.exit_code == 0, done.output
    assert "chosen" in done.output and f"{old.neurons} neurons before" in done.output
    facts = json.loads((tmp_path / "copy-pruned" / FACTS).read_text())
    assert facts["neurons"] <= 2 and facts["classes"] == ["bad", "good"] and facts["held_out_samples"] == 24
    with torch.no_grad():
        assert load(tmp_path / "copy-pruned" / WEIGHTS).shape[0] <= 2


def test_what_cannot_be_pruned_is_refused(
    heads: dict[str, HeadFit],
    words: tuple[str, str],
    model: Path,
    tmp_path: Path,
):
    head, (train, _) = Path(heads["gated"].folder), words
    with pytest.raises(CheckpointError, match="is no head"):
        prune_head(model, train)
    other = labelled(tmp_path / "three.jsonl", 20, classes=("a", "b"))
    with pytest.raises(DatasetError, match="label 'a' is none of"):
        prune_head(head, other)
    (tmp_path / "taken").mkdir()
    with pytest.raises(OutputError, match="exists and is no head"):
        prune_head(head, train, output=tmp_path / "taken")
