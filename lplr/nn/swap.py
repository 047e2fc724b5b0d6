"""Find the linear layers of a model, read their weights, and put LowRankLinear in their place; on meta too."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase

from torch import Tensor, nn

from lplr.errors import CheckpointError
from lplr.factor.factorization import Format
from lplr.nn.lowrank import LowRankLinear


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's Conv1D: a linear layer that holds its weight as (in, out).  Told by its class name and its fields."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and module.get_parameter("weight").dim() == 2


def is_linear(module: nn.Module) -> bool:
    """A plain linear layer: nn.Linear that keeps nn.Linear's own forward, or Conv1D."""
    return (isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward) or is_conv1d(module)


def is_skipped(name: str, patterns: Collection[str]) -> bool:
    """Whether a pattern is the name, its last component, a prefix of whole components, or a shell pattern that fits."""
    last = name.rpartition(".")[2]
    return any(p in (name, last) or name.startswith(p + ".") or fnmatchcase(name, p) for p in patterns)


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a linear layer as (out, in), a view."""
    weight = module.get_parameter("weight").detach()
    return weight.T if is_conv1d(module) else weight


def _shared_with_others(model: nn.Module) -> set[int]:
    """The ids of parameters that a module other than a linear layer holds as well, such as a tied embedding."""
    return {id(p) for m in model.modules() if not is_linear(m) for p in m.parameters(recurse=False)}


def linears(model: nn.Module, skip: Collection[str] = ()) -> dict[str, nn.Module]:
    """Name -> module of every linear layer that may be compressed, in the model's order.

    Left out are the names that `skip` matches (see `is_skipped`), and layers whose weight is tied to an embedding.
    A module that the model holds under several names is listed once, under the first.
    """
    shared = _shared_with_others(model)
    return {
        name: module
        for name, module in model.named_modules()
        if is_linear(module) and id(module.weight) not in shared and not is_skipped(name, skip)
    }


def swap(model: nn.Module, formats: Mapping[str, Format]) -> dict[str, LowRankLinear]:
    """Replace each named linear layer by an empty LowRankLinear on its device, with room for its bias.

    Every name under which the model holds the layer is replaced.  Raises CheckpointError for a name
    that is no linear layer of the model, or whose shape is another.
    """
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for key, child in parent._modules.items():
            if child is not None:
                holders.setdefault(id(child), []).append((parent, key))
    found = dict(model.named_modules(remove_duplicate=False))
    new: dict[str, LowRankLinear] = {}
    for name, fmt in formats.items():
        old = found.get(name)
        if old is None or not is_linear(old):
            what = "has no such module" if old is None else f"holds a {type(old).__name__} there"
            raise CheckpointError(f"{name}: the model {what}, a linear layer expected: compress the model again")
        weight = weight_of(old)
        if tuple(weight.shape) != fmt.shape:
            shapes = f"{tuple(weight.shape)} in the model, {fmt.shape} in its table"
            raise CheckpointError(f"{name}: the weight is {shapes}: compress the model again")
        bias = getattr(old, "bias", None) is not None
        new[name] = LowRankLinear(fmt, bias, device=weight.device, dtype=weight.dtype)
        new[name].train(old.training)
        for parent, key in holders[id(old)]:
            parent._modules[key] = new[name]
    return new
