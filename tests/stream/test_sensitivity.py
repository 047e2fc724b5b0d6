"""Sensitivities against whole-model autograd, and against what an actual error does to the model's predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpoints
import pico
import pytest
import torch

from lplr.hf.load import load_model
from lplr.recipe import make_recipe
from lplr.stream.checkpoint import open_checkpoint, plan_layers
from lplr.stream.sensitivity import Measured, measure


def measured(folder: Path, tokens: torch.Tensor, scratch: Path, seed: int = 0) -> list[Measured]:
    checkpoint = open_checkpoint(str(folder))
    plans = plan_layers(checkpoint, make_recipe({"model": str(folder), "bits": 4}))
    generator = torch.Generator().manual_seed(seed)
    return list(measure(checkpoint, plans, tokens, scratch, torch.device("cpu"), generator, lambda *_: None))


def by_autograd(model: Any, names: list[str], tokens: torch.Tensor, seed: int) -> dict[str, torch.Tensor]:
    """sum over tokens of g g^T at the output of each layer, the whole model in one graph."""
    generator = torch.Generator().manual_seed(seed)
    kept: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for name in names:
        def keep(_: Any, __: Any, output: torch.Tensor, name: str = name) -> None:
            output.retain_grad()
            kept[name].append(output)

        model.get_submodule(name).register_forward_hook(keep)
    for row in tokens:
        embedded = model.get_input_embeddings()(row[None]).detach().requires_grad_()
        scores = model(inputs_embeds=embedded, use_cache=False).logits[0].float().log_softmax(-1)
        drawn = torch.multinomial(scores.detach().exp(), 1, generator=generator)
        (-scores.gather(1, drawn).sum()).backward()
    # an expert that no token of a row is routed to has no gradient there
    gradients = {n: [o.grad.flatten(0, -2).double() for o in outputs if o.grad is not None] for n, outputs in kept.items()}
    return {n: torch.cat(rows).T @ torch.cat(rows) for n, rows in gradients.items()}


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3", "opt"])
def test_weights_are_the_mean_squares_of_the_output_gradients(architecture: str, tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", architecture)
    tokens = torch.randint(4, pico.VOCAB, (6, 16), generator=torch.Generator().manual_seed(1))
    found = measured(source, tokens, tmp_path)
    expected = by_autograd(load_model(source), [m.plan.name for m in found], tokens, 0)
    assert len(found) == len(expected) > 6
    for m in found:
        # float32 on both sides, another order of sums
        G = expected[m.plan.name]
        assert m.weight == pytest.approx(float(G.trace()) / (2 * m.plan.shape[0] * tokens.numel()), rel=1e-3)
        assert m.G is not None  # the trellis rounds with it
        torch.testing.assert_close(m.G.double() / m.G.trace(), G / G.trace(), rtol=1e-3, atol=1e-5)
        assert m.H is not None and m.H.shape == (m.plan.shape[1],) * 2


def test_predicted_divergence_is_what_random_errors_cause(tmp_path: Path):
    """KL(base || disturbed) for isotropic errors of 3 % in one matrix, against s tr(E M E^T): the claim of the module."""
    source = checkpoints.write(tmp_path / "base", "llama")
    tokens = torch.randint(4, pico.VOCAB, (32, 16), generator=torch.Generator().manual_seed(1))
    found = measured(source, tokens, tmp_path)
    model = load_model(source)
    with torch.no_grad():
        base = model(input_ids=tokens, use_cache=False).logits.double().log_softmax(-1)
        for m in found:
            weight = model.get_submodule(m.plan.name).weight
            W, observed, predicted = weight.clone(), 0.0, 0.0
            for trial in range(4):
                E = torch.randn(W.shape, generator=torch.Generator().manual_seed(trial)) * 0.03 * W.std()
                weight.copy_(W + E)
                after = model(input_ids=tokens, use_cache=False).logits.double().log_softmax(-1)
                observed += float((base.exp() * (base - after)).sum(-1).mean())
                assert m.M is not None
                predicted += m.weight * float(((E @ m.M) * E).sum())
            weight.copy_(W)
            # one sample of targets for 512 tokens, the independence of g and x, and second order: within a factor of 2
            assert 0.5 < observed / predicted < 2, m.plan.name


def test_experts_that_no_token_reaches_weigh_nothing(tmp_path: Path):
    source = checkpoints.write(tmp_path / "base", "mixtral")
    found = measured(source, torch.full((1, 4), 5), tmp_path)
    for m in found:
        assert (m.H is None) == (m.M is None) == (m.weight == 0)
    assert any(m.H is None for m in found)
