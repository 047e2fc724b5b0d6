"""The second moments that the driver uses, against those seen by hooks on whole models; the store of activations."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import checkpoints
import pico
import pytest
import torch

from lplr.errors import OutputError
from lplr.hf.load import load_model
from lplr.linalg.hessian import DAMPING
from lplr.nn.swap import is_conv1d
from lplr.recipe import make_recipe
from lplr.stream import calibrate, compress, workers
from lplr.stream.calibrate import Activations, batch_rows
from lplr.stream.moments import InputMoments


def moments(model: Any, names: list[str], tokens: torch.Tensor, beside: Any = None) -> dict[str, torch.Tensor]:
    """E[x x^T] of each layer's input in float64, or E[x' x^T] with x' that in another model, by plain hooks on whole passes."""
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}
    for row in tokens:
        inputs = inputs_of(model, names, row)
        others = inputs if beside is None else inputs_of(beside, names, row)
        for name, x in inputs.items():
            if name in others and others[name].shape == x.shape:
                sums[name] = sums.get(name, 0) + others[name].T @ x
                counts[name] = counts.get(name, 0) + len(x)
    return {name: total / counts[name] for name, total in sums.items()}


def inputs_of(model: Any, names: list[str], row: torch.Tensor) -> dict[str, torch.Tensor]:
    """The layers' inputs (tokens, d) in one pass, in float64."""
    found: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Any:
        def note(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            found[name] = inputs[0].reshape(-1, inputs[0].shape[-1]).double()

        return note

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    with torch.no_grad():
        model(input_ids=row[None])
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3", "mixtral", "opt"])
def test_hessians_are_those_of_the_model_with_its_prefix_compressed(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = checkpoints.write(tmp_path / "base", architecture)
    seen: dict[str, torch.Tensor] = {}
    steps: dict[str, torch.Tensor] = {}
    windows: list[torch.Tensor] = []
    true_matrix, true_windows = workers.compress_matrix, compress.calibration_windows

    def matrix(recipe: Any, p: Any, weight: torch.Tensor, known: Any, device: torch.device) -> Any:
        if known.H is not None:
            seen[p.name] = known.H.clone()
        if known.step is not None:
            steps[p.name] = known.step.clone()
        return true_matrix(recipe, p, weight, known, device)

    def spy(*arguments: Any) -> Any:
        found = true_windows(*arguments)
        windows.append(found[0])
        return found

    monkeypatch.setattr(workers, "compress_matrix", matrix)
    monkeypatch.setattr(compress, "calibration_windows", spy)
    chosen = {"dataset": str(source / "text.txt"), "nsamples": 6, "seqlen": 32, "alternations": 0, "bits": 3}
    chosen |= {"allocation": "uniform", "recovery": "fast"}
    compress.compress(make_recipe({"model": str(source), **chosen}), tmp_path / "out")
    from lplr.hf.skeleton import blocks
    from lplr.nn import defuse

    dense, mixed, original = load_model(source), load_model(tmp_path / "out"), load_model(source)
    defuse(dense)
    defuse(original)
    prefix, originals = blocks(dense)
    stack: Any = mixed.get_submodule(prefix)
    for index in reversed(range(len(stack))):  # those behind block `index` dense, those before it compressed
        packed, stack[index] = stack[index], originals[index]
        names = [name for name in seen if name.startswith(f"{prefix}.{index}.")]
        assert names
        for stage in called(mixed, names, windows[0]):
            found = moments(mixed, stage, windows[0])
            together = moments(mixed, stage, windows[0], beside=original)
            for name, wanted in found.items():
                # float32 sums over 192 inputs, through up to three blocks run in other batches
                mean = float(wanted.diagonal().mean())
                assert torch.allclose(seen[name].double(), wanted, rtol=2e-3, atol=2e-4 * mean), name
                assert (name in steps) == (".experts." not in name)  # routed tokens are not the same ones in both models
                if name in steps:
                    H = wanted + DAMPING * mean * torch.eye(len(wanted))
                    step = torch.linalg.solve(H, (together[name] - wanted).T).T
                    # the same rounding as above, over the damping: an error of 2e-4 in D at most 2e-2 in the step
                    assert torch.allclose(steps[name].double(), step, atol=2e-2), name
            for name in stage:  # compressed before the next stage's inputs are seen
                made, target = packed.get_submodule(name.removeprefix(f"{prefix}.{index}.")).weight, mixed.get_submodule(name)
                target.weight.data = made.T.clone() if is_conv1d(target) else made.clone()


def called(model: Any, names: list[str], tokens: torch.Tensor) -> list[list[str]]:
    """The layers by the input that they are handed, in the order of the calls; experts, whose inputs are fewer tokens, last."""
    order: list[tuple[Any, str]] = []

    def hook(name: str) -> Any:
        return lambda _, inputs: order.append((inputs[0], name))

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    with torch.no_grad():
        model(input_ids=tokens[:1])
    for handle in handles:
        handle.remove()
    whole = [(x, name) for x, name in order if ".experts." not in name]
    grouped = [[name for _, name in run] for _, run in itertools.groupby(whole, key=lambda pair: id(pair[0]))]
    rest = [name for name in names if ".experts." in name]
    return grouped + ([rest] if rest else [])


def test_layers_that_share_an_input_share_a_hessian():
    made = pico.model("llama")
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    attention = made.model.layers[0].self_attn
    with InputMoments({n: getattr(attention, n) for n in names}) as context, torch.no_grad():
        for _ in range(2):
            made(input_ids=pico.tokens())
            context.end_pass()
    h = context.hessians
    assert h["q_proj"] is h["k_proj"] is h["v_proj"] is not h["o_proj"]
    assert h["q_proj"].rows == h["o_proj"].rows == 2 * 2 * 11


@pytest.mark.parametrize("limit", [1 << 28, 0])
def test_activations_are_what_was_put_in_wherever_they_lie(
    limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
):
    monkeypatch.setattr(calibrate, "ACTIVATION_LIMIT", limit)
    store = Activations(6, 5, 3, tmp_path)
    value = torch.randn(6, 5, 3, generator=generator)
    store.set(slice(4, 6), value[4:])
    store.set(slice(0, 4), value[:4])
    got = store.get(slice(1, 6))
    assert torch.equal(got, value[1:])
    got.zero_()  # a copy: the store keeps its own
    assert torch.equal(store.get(slice(0, 6)), value)
    assert [i for s in store.batches() for i in range(s.start, s.stop)] == list(range(6))
    assert not list(tmp_path.iterdir())  # the file has no name: nothing is left behind, however the process ends
    store.close()


def test_a_file_of_activations_that_is_cut_short_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(calibrate, "ACTIVATION_LIMIT", 0)
    store = Activations(4, 5, 3, tmp_path)
    store.set(slice(0, 2), torch.ones(2, 5, 3))
    with pytest.raises(OutputError, match="activations"):
        store.get(slice(2, 4))
    store.close()


@pytest.mark.parametrize("rows, seqlen, most", [(1, 10**6, 1), (128, 512, 8), (7, 512, 7), (11, 512, 1), (12, 1024, 4)])
def test_batches_are_of_equal_size_and_bounded(rows: int, seqlen: int, most: int):
    assert batch_rows(rows, seqlen) == most
    assert rows % batch_rows(rows, seqlen) == 0


def test_few_tokens_shrink_the_second_moments_and_the_record_says_so():
    layer = torch.nn.Linear(8, 3)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with InputMoments({"a": layer, "b": torch.nn.Linear(4, 4)}) as context, torch.no_grad():
        layer(x.float())
    H = x.T @ x / 5
    wanted = 5 / 8 * H + 3 / 8 * H.diagonal().mean() * torch.eye(8)  # by hand
    found = context.of("a")[0]
    assert found is not None and torch.allclose(found.double(), wanted, atol=1e-6)  # float32 sums
    assert context.note("a") == "5 calibration tokens for 8 inputs: second moments shrunk"
    assert context.note("b") == "no calibration token reached it: compressed without data"
    with InputMoments({"a": layer}) as context, torch.no_grad():
        layer(torch.randn(8, 8))
    assert context.note("a") == ""
    with InputMoments({"a": layer}) as context, torch.no_grad():
        layer(torch.full((9, 8), 1e30))
    assert context.of("a") == (None, None) and "leave the range of float32" in context.note("a")


def test_experts_that_few_tokens_reach_are_compressed_by_the_rule(tmp_path: Path):
    """A router with a large bias towards two experts: the others see few tokens or none; all are compressed, and it is told."""
    source = checkpoints.write(tmp_path / "base", "mixtral", num_hidden_layers=1)

    def bias(W: torch.Tensor) -> torch.Tensor:
        W[3] = -100 * W[0].abs()
        return W

    from safetensors.torch import load_file

    name = next(n for n in load_file(source / "model.safetensors") if n.endswith("gate.weight"))
    checkpoints.change_tensor(source, name, bias)
    chosen = {"dataset": str(source / "text.txt"), "nsamples": 1, "seqlen": 16, "alternations": 0, "bits": 3}
    rows = compress.compress(make_recipe({"model": str(source), **chosen}), tmp_path / "out")
    experts = [row for row in rows if ".experts." in row.name]
    assert len(experts) == 8 and all(row.format is not None for row in experts)
    assert any("second moments shrunk" in row.note or "no calibration token" in row.note for row in experts)
    assert load_model(tmp_path / "out") is not None
