"""Texts as vectors: the last hidden states of a language model, pooled over the tokens of each text.

    mean        sum_t h_t / T
    last        h_T, all that a causal model has read
    attention   sum_t softmax_t(<k_t, q> / sqrt(d)) h_t,   k_t = h_t / rms(h_t), q the mean of k_t: weighed by likeness to all

h_t (d) are the hidden states that the model's output layer sees.  `attention` has no parameters: the equation of Vaswani et al.,
"Attention is all you need", 2017, with states of one length in place of learned queries and keys.  (With q = k_T the last token
looks at itself alone.)
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lplr.errors import CheckpointError, OutputError, choose
from lplr.records import LEDGER

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Step = Callable[[float, float, str], None]
TOKENS_AT_ONCE = 4096  # of a batch, padding included


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    weights = mask / mask.sum(1, keepdim=True)
    return torch.einsum("bt,btd->bd", weights, hidden)


def _last(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden[torch.arange(len(hidden), device=hidden.device), _last_token(mask)]


def _attention(hidden: Tensor, mask: Tensor) -> Tensor:
    keys = hidden / hidden.square().mean(-1, keepdim=True).sqrt().clamp_min(torch.finfo(hidden.dtype).tiny)
    scores = torch.einsum("btd,bd->bt", keys, _mean(keys, mask)) / math.sqrt(hidden.shape[-1])
    return torch.einsum("bt,btd->bd", scores.masked_fill(mask == 0, -math.inf).softmax(1), hidden)


POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mean": _mean, "last": _last, "attention": _attention}


def _last_token(mask: Tensor) -> Tensor:
    """Index of the last token that counts, whichever side is padded."""
    return mask.shape[1] - 1 - mask.flip(1).argmax(1)


def pool(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """Hidden states (b, t, d) and mask (b, t), 1 where a token counts and at least one in a row -> (b, d)."""
    return choose(POOLINGS, pooling, "pooling")(hidden, mask.to(hidden.dtype))


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], seqlen: int) -> list[list[int]]:
    """Token ids of each text, the first seqlen of them, with the special tokens of the tokenizer; at least one token."""
    rows = tokenizer(texts, truncation=True, max_length=seqlen, return_attention_mask=False, verbose=False)["input_ids"]
    ids = tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id, 0
    nothing = next(i for i in ids if isinstance(i, int))
    return [list(row) or [nothing] for row in rows]  # type: ignore[arg-type]


def features(
    model: PreTrainedModel,
    tokens: list[list[int]],
    *,
    pooling: str = "mean",
    cache: Path | None = None,
    progress: Step | None = None,
) -> Tensor:
    """Features (n, d) float32 of texts, token ids of `encode`, of `model` without its output layer.

    cache: a .npy file that keeps finished rows (NaN in the others), so that a killed run goes on; its name should hold the
    `fingerprint`.  Raises CheckpointError where the model gives NaN or Inf, OutputError for a cache that is not of these texts.
    """
    choose(POOLINGS, pooling, "pooling")
    step = progress or (lambda *_: None)
    kept = _open(cache, len(tokens), pool_texts(model, [[0]], pooling).shape[1])
    left = np.flatnonzero(np.isnan(kept).any(1))
    order = sorted(left.tolist(), key=lambda i: len(tokens[i]))  # batches of like length have little padding
    total, done, first = float(sum(len(tokens[i]) for i in order)), 0.0, 0
    while first < len(order):
        stop = first + 1
        while stop < len(order) and (stop - first + 1) * len(tokens[order[stop]]) <= TOKENS_AT_ONCE:
            stop += 1
        chosen = order[first:stop]
        step(done, total, f"text {first + 1} of {len(order)}")
        found = pool_texts(model, [tokens[i] for i in chosen], pooling)
        if not bool(torch.isfinite(found).all()):
            raise CheckpointError("the model's hidden states hold NaN or Inf: load it in float32, or compress it again")
        kept[chosen] = found.float().cpu().numpy()
        done += sum(len(tokens[i]) for i in chosen)
        first = stop
    if isinstance(kept, np.memmap):
        kept.flush()
    return torch.from_numpy(np.array(kept))


@torch.inference_mode()
def pool_texts(model: PreTrainedModel, ids: list[list[int]], pooling: str) -> Tensor:
    """Features (b, d) of token ids, padded on the right."""
    device = next(model.parameters()).device
    length = max(map(len, ids))
    tokens = torch.tensor([row + [0] * (length - len(row)) for row in ids], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ids], device=device)
    return pool(last_hidden(model, tokens, mask), mask, pooling)


def last_hidden(model: PreTrainedModel, tokens: Tensor, mask: Tensor) -> Tensor:
    """Hidden states (b, t, d) that the output layer of `model` sees."""
    inner = model.base_model
    return inner(input_ids=tokens, attention_mask=mask).last_hidden_state


def _open(cache: Path | None, n: int, d: int) -> np.ndarray:
    """Rows (n, d) of NaN, or what a cache has of them."""
    if cache is None:
        return np.full((n, d), np.nan, np.float32)
    if cache.is_file():
        try:
            found = np.load(cache, mmap_mode="r+", allow_pickle=False)
        except (OSError, ValueError):
            found = np.empty(0)
        if found.shape == (n, d) and found.dtype == np.float32:
            return found
        raise OutputError(f"{cache} is no cache of {n} x {d} features: delete it")
    cache.parent.mkdir(parents=True, exist_ok=True)
    fresh = cache.with_suffix(".part")
    rows = np.lib.format.open_memmap(fresh, mode="w+", dtype=np.float32, shape=(n, d))
    rows[:] = np.nan
    rows.flush()
    fresh.replace(cache)
    return rows


def fingerprint(model: Path, tokens: list[list[int]], pooling: str) -> str:
    """SHA-256 of everything that features depend on, as far as the folder of the model tells: its ledger or, without one, its
    configuration and the names, sizes and times of its weights.
    """
    digest = hashlib.sha256(f"{pooling}\n".encode())
    ledger = model / LEDGER
    for file in (model / "config.json", ledger):
        digest.update(file.read_bytes() if file.is_file() else b"-")
    if not ledger.is_file():
        for file in sorted(model.glob("*.safetensors")) if model.is_dir() else [model]:
            facts = file.stat()
            digest.update(f"{file.name} {facts.st_size} {facts.st_mtime_ns}\n".encode())
    for row in tokens:
        digest.update(np.array([len(row), *row], np.int64).tobytes())
    return digest.hexdigest()
