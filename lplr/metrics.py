"""How far two language models are apart, as pure functions on logits.

Every function takes logits (..., v) of any float type and works in float32 on a bounded number of rows at a time, so
the float32 copy of a window (2,048 x 49,152 would be 400 MB) never exists as a whole.  A logit of -inf is a token of
probability zero; a row that holds NaN or +inf, or nothing but -inf, is no distribution and gives NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 23  # logits upcast at a time: 32 MB in float32


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(logits)[target] in nats, float32, of the shape of `targets`.

    logits (..., v), targets (...) of integers in [0, v).  Raises ValueError when the shapes do not fit.
    """
    if logits.shape[:-1] != targets.shape:
        found = f"logits {tuple(logits.shape)} do not fit targets {tuple(targets.shape)}"
        raise ValueError(f"{found}: (..., v) and (...) expected")
    flat = targets.reshape(-1, 1)
    out = torch.empty(flat.shape[0], dtype=torch.float32, device=logits.device)
    for rows, (chunk,) in _chunks(logits):
        # the largest logit is subtracted first, so that logits near 1e4 lose no digits in the difference
        shifted = chunk.sub_(chunk.amax(dim=-1, keepdim=True))
        picked = shifted.gather(-1, flat[rows].to(shifted.device))[:, 0]
        out[rows] = shifted.exp_().sum(dim=-1).log_().sub_(picked)
    return out.reshape(targets.shape)


def perplexity(nll_sum: float, count: int) -> float:
    """exp(nll_sum / count); inf where that overflows, NaN for a NaN sum.  Raises ValueError when count < 1."""
    if count < 1:
        raise ValueError(f"perplexity of {count} predictions: at least one is needed")
    try:
        return math.exp(nll_sum / count)
    except OverflowError:
        return math.inf


def kl_divergence(base_logits: Tensor, logits: Tensor, smoothing: float = 0.0) -> Tensor:
    """KL(base || model) = sum_i p_i (log p_i - log q_i) of every position in nats, float32.

    base_logits and logits (..., v) of one shape; the result is (...).  inf where the model gives probability zero to
    a token that the base does not.  smoothing e puts (1 - e) q + e / v in place of q; the result is at most log(v / e) then.
    Raises ValueError when the shapes differ.
    """
    _same_shape(base_logits, logits)
    out = torch.empty(base_logits.shape[:-1].numel(), dtype=torch.float32, device=base_logits.device)
    for rows, (base, other) in _chunks(base_logits, logits):
        log_p = base.log_softmax(dim=-1)
        p = log_p.exp()
        # 0 log 0 = 0, also where the model's probability is zero as well
        term = torch.where(p == 0, 0.0, p * (log_p - _log_smoothed(other, smoothing)))
        # rounding can leave a sum of order -1e-8 for equal distributions; a divergence is never negative
        out[rows] = term.sum(dim=-1).clamp_(min=0)
    return out.reshape(base_logits.shape[:-1])


def _log_smoothed(logits: Tensor, smoothing: float) -> Tensor:
    """log((1 - e) softmax + e / v)."""
    if not smoothing:
        return logits.log_softmax(dim=-1)
    return logits.softmax(dim=-1).mul_(1 - smoothing).add_(smoothing / logits.shape[-1]).log_()


def top1_agreement(base_logits: Tensor, logits: Tensor) -> Tensor:
    """Whether both models rank the same token first, as bool (...); a position with NaN never agrees.

    base_logits and logits (..., v) of one shape.  Raises ValueError when the shapes differ.
    """
    _same_shape(base_logits, logits)
    base_value, base_index = base_logits.max(dim=-1)
    value, index = logits.max(dim=-1)
    finite = ~(base_value.isnan() | value.to(base_value.device).isnan())
    return (base_index == index.to(base_index.device)) & finite


def _same_shape(base_logits: Tensor, logits: Tensor) -> None:
    if base_logits.shape != logits.shape:
        found = f"{tuple(base_logits.shape)} and {tuple(logits.shape)}"
        raise ValueError(f"logits of two shapes, {found}: one vocabulary expected")


def _chunks(*logits: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
    """(rows, float32 copies of these rows of each argument on the first one's device), bounded in size."""
    vocabulary, device = logits[0].shape[-1], logits[0].device
    flat = [x.reshape(-1, vocabulary) for x in logits]
    step = max(1, CHUNK_ELEMENTS // vocabulary)
    for start in range(0, flat[0].shape[0], step):
        rows = slice(start, start + step)
        yield rows, [x[rows].to(device=device, dtype=torch.float32, copy=True) for x in flat]
