"""Torch modules: the packed linear layer, swapping it in, and mixtures of experts split into linear layers."""

from lplr.nn.experts import DefusedExperts, defuse, expert_tensors, fused_experts
from lplr.nn.lowrank import LowRankLinear
from lplr.nn.swap import is_conv1d, is_linear, is_skipped, linears, swap, weight_of

__all__ = [
    "DefusedExperts",
    "LowRankLinear",
    "defuse",
    "expert_tensors",
    "fused_experts",
    "is_conv1d",
    "is_linear",
    "is_skipped",
    "linears",
    "swap",
    "weight_of",
]
