"""Mixtures of experts: 3-D expert parameters split into ordinary linear layers.

transformers 5 holds all experts of a block in two parameters, gate_up_proj (E, 2f, d) and down_proj (E, d, f), and runs

    y_t = sum_k p_tk  D_e (act(g) * u),   [g; u] = G_e x_t,   e = index of the k-th expert of token t

`defuse` replaces them by experts.{e}.gate_up_proj (2f, d) and experts.{e}.down_proj (d, f), so that
compression and swapping see nothing but linear layers.  Only this layout is accepted; others are refused by name.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from lplr.errors import UnsupportedModel

_FUSED = ("gate_up_proj", "down_proj")
_SIGNATURE = ("hidden_states", "top_k_index", "top_k_weights")
# flags that transformers sets on an experts module, and the value of the layout above
_FLAGS = {
    "has_gate": True,
    "is_concatenated": True,
    "is_transposed": False,
    "has_bias": False,
    "has_post_expert_norm": False,
}


class Expert(nn.Module):
    """One expert: two linear layers, no bias."""

    def __init__(self, hidden: int, inner: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden, 2 * inner, bias=False, device=device, dtype=dtype)
        self.down_proj = nn.Linear(inner, hidden, bias=False, device=device, dtype=dtype)


class DefusedExperts(nn.Module):
    """E experts as modules named "0" .. "E-1", called like the fused module that they replace."""

    def __init__(self, num_experts: int, hidden: int, inner: int, act_fn: nn.Module, like: Tensor) -> None:
        super().__init__()
        self.num_experts, self.hidden_dim, self.intermediate_dim = num_experts, hidden, inner
        for e in range(num_experts):
            self.add_module(str(e), Expert(hidden, inner, like.device, like.dtype))
        self.act_fn = act_fn

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states (t, d), top_k_index and top_k_weights (t, k) -> (t, d).  An index of E stands for no expert."""
        out = torch.zeros_like(hidden_states)
        for e in torch.unique(top_k_index).tolist():
            if e >= self.num_experts:
                continue
            token, slot = torch.where(top_k_index == e)
            expert: Any = self.get_submodule(str(e))  # its layers may have been swapped
            gate, up = expert.gate_up_proj(hidden_states[token]).chunk(2, dim=-1)  # (t_e, f) each
            y = expert.down_proj(self.act_fn(gate) * up) * top_k_weights[token, slot, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out


def _has_fused_parameters(name: str, module: nn.Module) -> bool:
    """Whether a module holds 3-D parameters of several experts, of any layout."""
    own = dict(module.named_parameters(recurse=False))
    if any(key in own and own[key].dim() == 3 for key in _FUSED):
        return True
    called_experts = "expert" in type(module).__name__.lower() or "expert" in name.rpartition(".")[2].lower()
    return called_experts and any(p.dim() == 3 for p in own.values())


def _misfit(module: nn.Module) -> str:
    """Why a module with fused parameters is not of the supported layout; empty when it is."""
    own = dict(module.named_parameters(recurse=False))
    if set(own) != set(_FUSED):
        return f"parameters {', '.join(sorted(own))}"
    for flag, wanted in _FLAGS.items():
        if getattr(module, flag, None) is not wanted:
            return f"{flag} = {getattr(module, flag, None)}"
    gate_up, down = (tuple(own[key].shape) for key in _FUSED)
    experts, twice, hidden = gate_up
    if twice % 2 or down != (experts, hidden, twice // 2):
        return f"shapes {gate_up} and {down}"
    if tuple(inspect.signature(type(module).forward).parameters)[1:] != _SIGNATURE:
        return "another forward signature"
    gate = getattr(type(module), "_apply_gate", None)
    if gate is None or not gate.__module__.endswith("integrations.moe") or not hasattr(module, "act_fn"):
        return "a gate of its own"
    return ""


def fused_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module of every fused experts module; UnsupportedModel for one whose layout is not the one above."""
    found = {name: m for name, m in model.named_modules() if _has_fused_parameters(name, m)}
    for name, module in found.items():
        if reason := _misfit(module):
            raise UnsupportedModel(
                f"{name} ({type(module).__name__}) holds its experts with {reason}, gate_up_proj (E, 2f, d) and "
                "down_proj (E, d, f) without bias expected: choose a model with such experts, or a dense one"
            )
    return found


def expert_tensors(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Views of a fused parameter, by the names they have in the defused model.

    name `...experts.down_proj`, tensor (E, n, d) -> `...experts.{e}.down_proj.weight` (n, d); gate_up_proj likewise.
    """
    prefix, _, leaf = name.rpartition(".")
    return {f"{prefix}.{e}.{leaf}.weight": tensor[e] for e in range(tensor.shape[0])}


def defuse(model: nn.Module) -> list[str]:
    """Replace every fused experts module by DefusedExperts with the same weights; returns their names.

    Works on meta.  Raises UnsupportedModel before anything is changed (see `fused_experts`).
    """
    found = fused_experts(model)
    for name, module in found.items():
        gate_up, down = (module.get_parameter(key) for key in _FUSED)
        experts, twice, hidden = gate_up.shape
        new = DefusedExperts(experts, hidden, twice // 2, module.get_submodule("act_fn"), gate_up)
        if not gate_up.is_meta:
            parts = {**expert_tensors("gate_up_proj", gate_up), **expert_tensors("down_proj", down)}
            new.load_state_dict({k.lstrip("."): v.detach().clone() for k, v in parts.items()}, assign=True)
        new.train(module.training)
        model.set_submodule(name, new)
    return list(found)
