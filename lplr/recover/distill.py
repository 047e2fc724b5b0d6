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
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
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
    return _Divergence.apply(logits, told.log_p, told.index.long())


class _Divergence(torch.autograd.Function):
    """With its gradient in closed form, one pass over the logits z instead of autograd's six:

        dD/dz_j = q_j (sum_top p + p') - p_j   for j in top,     q_j (sum_top p + p' - p' / q')   for the others.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, log_p: Tensor, index: Tensor) -> Tensor:
        z = logits.float()
        q = z.softmax(-1)
        largest, at = q.max(-1, keepdim=True)
        # a log of q_top itself could be that of 0; differences of logits first, or their size costs digits
        log_q = (z.gather(-1, index) - z.gather(-1, at)) + largest.log()
        p_top, q_top = log_p.exp(), log_q.exp()
        found = (p_top * (log_p - log_q)).sum(-1)
        told, rest, ratio = p_top.sum(-1, keepdim=True), torch.zeros_like(largest), torch.zeros_like(largest)
        if log_p.shape[-1] < logits.shape[-1]:
            left = 1 - q_top.sum(-1, keepdim=True)
            p, outside = (1 - told).clamp_min(SMALLEST), left.clamp_min(SMALLEST)
            found = found + (p * (p.log() - outside.log())).squeeze(-1)
            rest = torch.where(left > SMALLEST, p, rest)  # below SMALLEST the loss does not depend on q'
            ratio = rest / outside
        if ctx.needs_input_grad[0]:
            gradient = q.mul_(told + rest - ratio).scatter_(-1, index, q_top * (told + rest) - p_top)
            ctx.save_for_backward(gradient.to(logits.dtype))
        return found.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0], None, None  # a number: the type stays


def taught(hidden: Tensor, head: Callable[[Tensor], Tensor], told: Likeliest) -> Tensor:
    """The mean divergence over tokens of head(hidden), hidden (b, t, d), TOKENS_AT_ONCE at a time; differentiable."""
    tokens = hidden.flatten(0, 1)
    log_p, index = told.log_p.flatten(0, 1), told.index.flatten(0, 1)

    def part(x: Tensor, log_p: Tensor, index: Tensor) -> Tensor:
        return divergence(head(x), Likeliest(log_p, index))

    if len(tokens) <= TOKENS_AT_ONCE:
        return part(tokens, log_p, index) / len(tokens)
    total = hidden.new_zeros(())
    for rows in torch.arange(len(tokens)).split(TOKENS_AT_ONCE):
        at = slice(int(rows[0]), int(rows[-1]) + 1)
        total = total + checkpoint(part, tokens[at], log_p[at], index[at], use_reentrant=False)  # type: ignore[operator]
    return total / len(tokens)
