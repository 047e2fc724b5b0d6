"""Pruned models: against least squares on the activations of hooked models, through transformers, and every refusal."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch
from pico import HIDDEN, INNER, LAYERS
from runs import run, settings
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from lplr.cli import app
from lplr.errors import CheckpointError, LplrError, OutputError, RecipeError, UnsupportedModel
from lplr.evaluate.perplexity import evaluate
from lplr.files import observed
from lplr.hf.load import load_model, load_tokenizer
from lplr.hf.text import Text, calibration_tokens, evaluation_tokens, read_text
from lplr.linalg.eliminate import RIDGE
from lplr.recipe import Recipe, make_recipe
from lplr.stream.checkpoint import open_checkpoint
from lplr.stream.matrix import seeded
from lplr.stream.neurons import RECORD, kept_neurons, planned, prune


def recipe(model: Path, **changes: Any) -> Recipe:
    given = {"model": str(model), "dataset": str(model / "text.txt"), "nsamples": 6, "seqlen": 32, "propagation": 0.0}
    return make_recipe({**given, **changes})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.write(tmp_path_factory.mktemp("base") / "llama", "llama")


def rows_of(model: Path) -> Tensor:
    """The calibration windows of `recipe`."""
    text = read_text(str(model / "text.txt"))
    return calibration_tokens(load_tokenizer(model), text, 6, 32, seeded(0, "calibration"))


def activations(model: Any, index: int, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The inputs of a block's down (tokens, neurons), and 1 / mean(y^2) of its output y (tokens,); float64."""
    seen: list[Tensor] = []
    block = model.model.layers[index]
    handles = [
        block.mlp.down_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0])),
        block.register_forward_hook(lambda _, given, y: seen.append(y[0] if isinstance(y, tuple) else y)),
    ]
    with torch.no_grad():
        model(input_ids=rows)
    for handle in handles:
        handle.remove()
    h, y = (found.flatten(0, 1).double() for found in seen)
    return h, 1 / y.square().mean(1)


def removed(folder: Path) -> list[list[int]]:
    return [block["removed"] for block in json.loads((folder / RECORD).read_text())["blocks"]]


@pytest.mark.parametrize("propagation", [0.0, 1.0])
def test_down_is_least_squares_behind_the_pruned_blocks(propagation: float, base: Path, tmp_path: Path) -> None:
    made = prune(recipe(base, propagation=propagation), "15", tmp_path / "out")
    assert made.plan.neurons == (INNER, INNER - 15) and len(made.blocks) == LAYERS
    original, new, rows = load_model(base), AutoModelForCausalLM.from_pretrained(tmp_path / "out"), rows_of(base)
    assert new.config.intermediate_size == INNER - 15
    for i, gone in enumerate(removed(tmp_path / "out")):
        kept = [j for j in range(INNER) if j not in gone]
        mlp, old = new.model.layers[i].mlp, original.model.layers[i].mlp
        assert torch.equal(mlp.gate_proj.weight, old.gate_proj.weight[kept])
        assert torch.equal(mlp.up_proj.weight, old.up_proj.weight[kept])
        # a model whose blocks are pruned before this one, as they were then
        mixed = copy.deepcopy(new)
        mixed.model.layers[i] = copy.deepcopy(original.model.layers[i])
        whole, weights = activations(mixed, i, rows)
        h, _ = activations(new, i, rows)
        torch.testing.assert_close(h, whole[:, kept], rtol=1e-4, atol=1e-5)
        roots = weights.sqrt()[:, None]
        h, whole = h * roots, whole * roots
        W = old.down_proj.weight.detach().double()
        if propagation:  # the whole step: W (I + D H^-1), with the damping of `stream.moments`
            H = whole.T @ whole / len(whole)
            D = (activations(original, i, rows)[0] * roots - whole).T @ whole / len(whole)
            W = W + W @ D @ torch.linalg.inv(H + 0.01 * H.diagonal().mean() * torch.eye(INNER))
        sizes = (whole.square().mean(0).sqrt())[kept]
        left = torch.cat([h / len(h) ** 0.5, RIDGE**0.5 * torch.diag(sizes)])
        right = torch.cat([whole @ W.T / len(h) ** 0.5, RIDGE**0.5 * sizes[:, None] * W[:, kept].T])
        expected = np.linalg.lstsq(left.numpy(), right.numpy(), rcond=None)[0].T
        found = mlp.down_proj.weight.detach().double().numpy()
        assert found.shape == (HIDDEN, INNER - 15)
        np.testing.assert_allclose(found, expected, atol=2e-3 * np.abs(expected).max())  # moments in float32
        error = ((whole @ W.T - h @ torch.from_numpy(expected).T) ** 2).sum() / ((whole @ W.T) ** 2).sum()
        assert made.blocks[i].error == pytest.approx(float(error), rel=1e-2)


def test_neurons_that_are_there_twice_go_for_nothing(tmp_path: Path) -> None:
    model = checkpoints.write(tmp_path / "twice", "llama")
    for i in range(LAYERS):
        for name in ("gate_proj", "up_proj"):
            checkpoints.change_tensor(model, f"model.layers.{i}.mlp.{name}.weight", lambda W: W[: INNER // 2].repeat(2, 1))
    made = prune(recipe(model), "50%", tmp_path / "out", selection="elimination")
    assert made.plan.neurons == (40, 24)  # a multiple of eight stays
    whole, new = load_model(model), load_model(tmp_path / "out")
    ids = rows_of(model)
    with torch.no_grad():
        difference = (whole(input_ids=ids).logits - new(input_ids=ids).logits).norm() / whole(input_ids=ids).logits.norm()
    # the ridge holds about its share back of what the twin should take over
    assert difference < 2 * RIDGE
    assert all(block.error is not None and block.error < RIDGE**2 for block in made.blocks)


def test_elimination_with_a_refit_is_nearer_than_the_others(base: Path, tmp_path: Path) -> None:
    errors = {}
    for selection in ("elimination", "activation", "magnitude"):
        for correct in (True, False):
            made = prune(recipe(base), "15", tmp_path / f"{selection}-{correct}", selection=selection, correct=correct)
            errors[selection, correct] = made.blocks[0].error
    for other in ("activation", "magnitude"):
        assert errors["elimination", True] <= errors[other, True] <= errors[other, False]


def test_magnitude_needs_no_text(base: Path, tmp_path: Path) -> None:
    prune(recipe(base, dataset="none"), "25%", tmp_path / "out", selection="magnitude", correct=False)
    old, new = load_model(base), load_model(tmp_path / "out")
    for i, gone in enumerate(removed(tmp_path / "out")):
        a, b = old.model.layers[i].mlp, new.model.layers[i].mlp
        squares = a.gate_proj.weight.square().sum(1) + a.up_proj.weight.square().sum(1) + a.down_proj.weight.square().sum(0)
        assert sorted(squares.argsort()[: len(gone)].tolist()) == gone
        kept = [j for j in range(INNER) if j not in gone]
        assert torch.equal(b.down_proj.weight, a.down_proj.weight[:, kept])


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {"mlp_bias": True, "dtype": torch.bfloat16}),
        ("gemma2", {"shards": 3}),
        ("gemma3", {}),
        ("qwen3", {"dtype": torch.float16, "tokenizer": True}),
    ],
)
def test_the_folder_is_what_was_planned(architecture: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = checkpoints.write(tmp_path / "base", architecture, **changes)
    chosen = recipe(model, propagation=0.5)
    plan = planned(open_checkpoint(str(model)), chosen, "20%")
    made = prune(chosen, "20%", tmp_path / "out")
    assert made.plan == plan or made.plan.seconds != plan.seconds  # times are measured
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == plan.tensor_bytes[1]
    new = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert sum(p.numel() for p in new.parameters()) == plan.parameters[1]
    assert new.dtype == changes.get("dtype", torch.float32)
    assert load_tokenizer(tmp_path / "out")
    assert not list(tmp_path.glob(".*"))


def test_the_same_run_gives_the_same_bytes_and_can_be_compressed(base: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        prune(recipe(base, propagation=0.5), "20%", tmp_path / name)
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "b").iterdir())
    for name in names:
        if name != RECORD:
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    run(settings(tmp_path / "a"), tmp_path / "small")
    assert load_model(tmp_path / "small").config.intermediate_size == 32


@pytest.mark.parametrize(
    ("neurons", "before", "after"),
    [
        ("10%", 1536, 1384),
        ("5%", 1536, 1464),
        ("20%", 1536, 1232),
        ("50%", 40, 24),
        ("12.5%", 64, 56),
        ("10%", 35, 32),
        ("3", 40, 37),
    ],
)
def test_how_many_stay(neurons: str, before: int, after: int) -> None:
    assert kept_neurons(neurons, before) == after


@pytest.mark.parametrize("neurons", ["", "x", "10", "-1", "0", "11", "0%", "100%", "-5%", "nan%", "1e400%", "1%", "10 %%"])
def test_what_is_no_number_of_neurons(neurons: str) -> None:
    with pytest.raises(RecipeError, match="--neurons"):
        kept_neurons(neurons, 10)


@pytest.mark.parametrize(("architecture", "said"), [("gpt2", "no gated MLP"), ("opt", "no gated MLP"), ("mixtral", "mixture")])
def test_models_without_one_gated_mlp_a_block(architecture: str, said: str, tmp_path: Path) -> None:
    model = checkpoints.write(tmp_path / "base", architecture)
    with pytest.raises(UnsupportedModel, match=said):
        prune(recipe(model), "10%", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_a_compressed_model_is_told_what_to_do(base: Path, tmp_path: Path) -> None:
    run(settings(base), tmp_path / "small")
    with pytest.raises(UnsupportedModel, match="full-precision"):
        prune(recipe(tmp_path / "small", dataset=str(base / "text.txt")), "20%", tmp_path / "out")


def test_refusals(base: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="selection 'eliminaton'.*did you mean"):
        prune(recipe(base), "20%", tmp_path / "out", selection="eliminaton")
    with pytest.raises(RecipeError, match="--dataset"):
        prune(recipe(base, dataset="none"), "20%", tmp_path / "out")
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputError, match="there already"):
        prune(recipe(base), "20%", tmp_path / "there")
    with pytest.raises(CheckpointError, match="no such file or folder"):
        prune(recipe(base).model_copy(update={"model": str(tmp_path / "absent")}), "20%", tmp_path / "out")


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    model = checkpoints.write(tmp_path / "base", "llama")
    checkpoints.change_tensor(model, "model.layers.1.mlp.up_proj.weight", lambda W: W.index_fill(0, torch.tensor([3]), torch.nan))
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj.*NaN"):
        prune(recipe(model), "20%", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]


@pytest.mark.parametrize("after", [1, 3])
def test_a_run_that_is_stopped_leaves_nothing(after: int, base: Path, tmp_path: Path) -> None:
    def stop(done: float, total: float, text: str) -> None:
        if text.startswith(f"block {after} of"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(recipe(base), "20%", tmp_path / "out", progress=stop)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("at", [1, 7, 20])
def test_a_disk_that_fills(at: int, base: Path, tmp_path: Path) -> None:
    steps = iter(range(1000))

    def full(step: str, path: Path) -> None:
        if step == "write" and next(steps) == at:
            raise OSError(28, "No space left on device")

    with pytest.raises(LplrError, match="full"), observed(full):
        prune(recipe(base), "20%", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_on_a_real_model_the_others_take_over(shared: Path, tmp_path: Path) -> None:
    model, text = shared / "data/models/stories260k", (shared / "data/calibration/tinystories_1mb.txt").read_text()
    (tmp_path / "text.txt").write_text(text[:200_000])
    tokens = evaluation_tokens(load_tokenizer(model), Text("rest", [text[-60_000:]], ""))
    chosen = recipe(model, dataset=str(tmp_path / "text.txt"), nsamples=24, seqlen=512)
    ratio = {}
    for selection, correct in (("elimination", True), ("activation", True), ("elimination", False), ("magnitude", False)):
        out = tmp_path / f"{selection}-{correct}"
        prune(chosen, "20%", out, selection=selection, correct=correct)
        found = evaluate(load_model(out), tokens, base=load_model(model), max_windows=8)
        ratio[selection, correct] = found.ratio
    # eval/results/prune_mlp.json, on 64 windows: 1.38, 1.41, 1.76, 3.02
    assert 1 < ratio["elimination", True] < ratio["activation", True] < ratio["elimination", False] < ratio["magnitude", False]


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_the_command(base: Path, tmp_path: Path) -> None:
    common = ("prune", base, "--neurons", "20%", "--dataset", base / "text.txt", "--nsamples", "4", "--seqlen", "16")
    dry = call(*common, "--output", tmp_path / "out", "--dry-run")
    assert dry.exit_code == 0 and "40 -> 32" in dry.stdout and not (tmp_path / "out").exists()
    done = call(*common, "--output", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    assert "40 -> 32 (20.0% fewer), in 3 blocks" in done.stdout and "4 windows of 16 tokens" in done.stdout
    assert load_model(tmp_path / "out").config.intermediate_size == 32
    again = call(*common, "--output", tmp_path / "out")
    assert again.exit_code == 2 and re.search(r"error: .*there already: give a new folder", again.stderr)
    wrong = call("prune", base, "--neurons", "lots", "--output", tmp_path / "other")
    assert wrong.exit_code == 2 and "--neurons is 'lots'" in wrong.stderr
