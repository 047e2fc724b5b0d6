"""Pooled hidden states against plain loops; padding, batches, caches that were cut short."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pico
import pytest
import torch

from lplr.errors import CheckpointError, OutputError, RecipeError
from lplr.hf import features as module
from lplr.hf.features import POOLINGS, encode, features, fingerprint, pool


def texts(count: int, longest: int = 12) -> list[list[int]]:
    g = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, longest, (count,), generator=g).tolist()
    return [torch.randint(4, pico.VOCAB, (length,), generator=g).tolist() for length in lengths]


def by_hand(h: torch.Tensor, pooling: str) -> torch.Tensor:
    """One text (t, d), float64."""
    h = h.double()
    if pooling == "mean":
        return h.mean(0)
    if pooling == "last":
        return h[-1]
    k = h / h.square().mean(1, keepdim=True).sqrt()
    scores = k @ k.mean(0) / h.shape[1] ** 0.5
    return (scores.exp() / scores.exp().sum()) @ h


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_pooling_by_hand(pooling: str, side: str):
    h = torch.randn(3, 7, 8, generator=torch.Generator().manual_seed(0))
    lengths = [7, 1, 4]
    mask = torch.zeros(3, 7, dtype=torch.long)
    rows = []
    for i, length in enumerate(lengths):
        part = slice(0, length) if side == "right" else slice(7 - length, 7)
        mask[i, part] = 1
        rows.append(by_hand(h[i, part], pooling))
        h[i, mask[i] == 0] = 1e6  # what is padded must not tell
    torch.testing.assert_close(pool(h, mask, pooling).double(), torch.stack(rows), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3", "opt"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_features_of_batches_are_those_of_single_texts(architecture: str, pooling: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "TOKENS_AT_ONCE", 40)
    model, tokens = pico.model(architecture), texts(20)
    found = features(model, tokens, pooling=pooling)
    for row, ids in zip(found, tokens, strict=True):
        with torch.no_grad():
            hidden = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
        torch.testing.assert_close(row.double(), by_hand(hidden, pooling), rtol=1e-4, atol=1e-4)  # float32, padded or not


def test_a_run_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "TOKENS_AT_ONCE", 30)
    model, tokens, cache = pico.model("llama"), texts(30), tmp_path / "x" / "cache.npy"
    whole = features(model, tokens)
    seen: list[str] = []

    def stop(done: float, total: float, what: str) -> None:
        seen.append(what)
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        features(model, tokens, cache=cache, progress=stop)
    held = np.load(cache)
    finished = ~np.isnan(held).any(1)
    assert 0 < finished.sum() < 30
    batches = len(seen)
    seen.clear()
    assert torch.equal(features(model, tokens, cache=cache, progress=lambda *a: seen.append(a[2])), whole)
    assert 0 < len(seen) <= batches
    seen.clear()
    assert torch.equal(features(model, tokens, cache=cache, progress=lambda *a: seen.append(a[2])), whole) and not seen
    with pytest.raises(OutputError, match="delete it"):
        features(model, tokens[:5], cache=cache)
    cache.write_bytes(b"not numbers")
    with pytest.raises(OutputError, match="delete it"):
        features(model, tokens, cache=cache)


def test_hidden_states_that_are_not_numbers_and_unknown_pooling():
    model = pico.model("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("inf"))
    with pytest.raises(CheckpointError, match="NaN or Inf"):
        features(model, texts(3))
    with pytest.raises(RecipeError, match="did you mean 'mean'"):
        features(model, texts(3), pooling="maen")


def test_encoding_cuts_and_never_is_empty(tmp_path: Path):
    import checkpoints

    from lplr.hf.load import load_tokenizer

    source = checkpoints.write(tmp_path / "base", "llama")
    rows = encode(load_tokenizer(source), ["w1 w2 w3 w4", "", "w5"], 3)
    assert [len(row) for row in rows] == [3, 1, 1]
    given = rows, rows[:2], [[1, 2], [3]], [[1], [2, 3]]
    prints = {fingerprint(source, tokens, pooling) for tokens in given for pooling in POOLINGS}
    assert len(prints) == 12
    (source / "config.json").write_text((source / "config.json").read_text() + " ")
    assert fingerprint(source, rows, "mean") not in prints
