"""What a model is taught end to end: the next-token distributions of the original, kept as their k largest probabilities.

    minimise  E_t [ sum_{i in top} p_i ln(p_i / q_i) + p' ln(p' / q') ],     p' = 1 - sum_top p_i,  q' = 1 - sum_top q_i,

the divergence of the two distributions when all tokens outside of the original's k likeliest count as one: never above the
divergence KL(p || q) itself, equal to it at k = vocabulary.  The original runs once.  Logits of the model that is taught are made
some tokens at a time, forward and back, and never all at once: with a vocabulary of 49,152 they would be most of the memory.
Source: Hinton, Vinyals, Dean, 2015 (distillation).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

TOKENS_AT_ONCE = 512
SMALLEST = 1e-6  # of p' and q': below it a float32 sum of probabilities says nothing


@dataclass(frozen=True)
class Likeliest:
    """The k likeliest next tokens after each token: log-probabilities and indices, (..., k) each."""

    log_p: Tensor
    index: Tensor

    @classmethod
    def of(cls, logits: Tensor, k: int) -> Likeliest:
        """Of logits (..., v); k is cut to v."""
        log_p, index = logits.float().log_softmax(-1).topk(min(k, logits.shape[-1]), -1)
        return cls(log_p, index.int())

    def to(self, device: torch.device | str) -> Likeliest:
        """The same on a device."""
        return Likeliest(self.log_p.to(device), self.index.to(device))

    def __getitem__(self, rows: slice) -> Likeliest:
        return Likeliest(self.log_p[rows], self.index[rows])


def divergence(logits: Tensor, told: Likeliest) -> Tensor:
    """The sum over tokens of what the module minimises, in nats: logits (..., v), told (..., k)."""
    log_p, index = told.log_p, told.index.long()
    log_q = logits.float().log_softmax(-1).gather(-1, index)
    found = (log_p.exp() * (log_p - log_q)).sum(-1)
    if log_p.shape[-1] < logits.shape[-1]:
        p, q = ((1 - x.exp().sum(-1)).clamp_min(SMALLEST) for x in (log_p, log_q))
        found = found + p * (p.log() - q.log())
    return found.sum()


def taught(hidden: Tensor, head: Callable[[Tensor], Tensor], told: Likeliest) -> Tensor:
    """The mean divergence over tokens of head(hidden), hidden (b, t, d), TOKENS_AT_ONCE at a time; differentiable."""
    tokens = hidden.flatten(0, 1)
    log_p, index = told.log_p.flatten(0, 1), told.index.flatten(0, 1)

    def part(x: Tensor, log_p: Tensor, index: Tensor) -> Tensor:
        return divergence(head(x), Likeliest(log_p, index))

    total = hidden.new_zeros(())
    for rows in torch.arange(len(tokens)).split(TOKENS_AT_ONCE):
        at = slice(int(rows[0]), int(rows[-1]) + 1)
        total = total + checkpoint(part, tokens[at], log_p[at], index[at], use_reentrant=False)  # type: ignore[operator]
    return total / len(tokens)
