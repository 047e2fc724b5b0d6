"""From the weights of a convex programme to an ordinary network with the same outputs on any data.

    relu    y = b + sum_i s_i sqrt||v_i|| (x v_i / sqrt||v_i||)_+        Linear, ReLU, Linear; the gates are needed no longer
    gated   y = b + x u_0 + sum_i 1(x g_i + o_i > 0) (x u_i + c_i)       the gates are frozen, the linear block is a skip

With ||W1_i|| = |W2_i| = sqrt||v_i|| the penalty sum_i ||v_i|| is the weight decay 1/2 (||W1||^2 + ||W2||^2), its least value for
this function.  A programme on standardised samples x' = (x - mean) / scale becomes a network of raw ones: w' = w / scale,
c' = c - mean w', for weights and for gates.  Gates without weights are dropped, equal gates and parallel neurons added up.
Stored as safetensors; what kind of network it is, and anything else, is JSON in the file's header.
Source: Pilanci, Ergen, ICML 2020, theorem 1 (relu); Mishkin, Sahiner, Pilanci, ICML 2022, section 3 (gated).
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lplr.convex.gates import Gates
from lplr.convex.solution import Solution
from lplr.errors import CheckpointError, OutputError, RecipeError

HEADER, VERSION = "lplr.network", 1
PARALLEL = 12  # decimals to which directions of equal neurons agree
KEYS = {
    "relu": ("0.weight", "0.bias", "2.weight", "2.bias"),
    "gated": ("gates.weight", "gates.bias", "values.weight", "values.bias", "skip.weight", "skip.bias"),
}


class ReluNetwork(nn.Sequential):
    """Linear (d, m), ReLU, Linear (m, C): (N, d) -> (N, C)."""

    kind = "relu"

    def __init__(self, first: nn.Linear, second: nn.Linear) -> None:
        super().__init__(first, nn.ReLU(), second)

    @property
    def layers(self) -> tuple[nn.Linear, nn.Linear]:
        """Both linear layers."""
        first, _, second = self.children()
        assert isinstance(first, nn.Linear) and isinstance(second, nn.Linear)
        return first, second

    @property
    def shape(self) -> tuple[int, int, int]:
        """Neurons, features, outputs."""
        first, second = self.layers
        return first.weight.shape[0], first.weight.shape[1], second.weight.shape[0]


class GatedNetwork(nn.Module):
    """skip(x) + sum_i 1(gates(x)_i > 0) values(x)_i: (N, d) -> (N, C); values (d, m C), the outputs of a gate side by side."""

    kind = "gated"

    def __init__(self, gates: nn.Linear, values: nn.Linear, skip: nn.Linear) -> None:
        super().__init__()
        self.gates, self.values, self.skip = gates.requires_grad_(False), values, skip

    @property
    def shape(self) -> tuple[int, int, int]:
        """Gates, features, outputs."""
        return self.gates.weight.shape[0], self.skip.weight.shape[1], self.skip.weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        m, _, C = self.shape
        opened = (self.gates(x) > 0).to(x.dtype)
        return self.skip(x) + (self.values(x).unflatten(-1, (m, C)) * opened[..., None]).sum(-2)


Network = ReluNetwork | GatedNetwork


def export(
    solution: Solution,
    gates: Gates | None = None,
    *,
    mean: Tensor | None = None,
    scale: Tensor | None = None,
    ones: bool = False,
    raw: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Network:
    """The network of a Solution, of relu where U is (2, P, d, C), else gated.

    mean, scale (d,): the programme's samples were (x - mean) / scale; gates are over those, or over x with `raw`.  ones: the last
    feature was the constant 1, which gates do not see: d rows of gates, d + 1 of U.  A gate with a zero vector and a positive
    offset is the linear block.  Raises RecipeError where shapes do not fit together.
    """
    U, b = solution.U.double(), solution.b.double()
    if U.ndim not in (3, 4) or (U.ndim == 4 and len(U) != 2) or b.shape != U.shape[-1:]:
        found = f"U is {tuple(U.shape)}, b is {tuple(b.shape)}"
        raise RecipeError(f"{found}: give U (P, d, C), or for relu V (2, P, d, C), and b (C,)")
    d = U.shape[-2] - ones
    for name, given in (("mean", mean), ("scale", scale)):
        if given is not None and tuple(given.shape) != (d,):
            raise RecipeError(f"{name} is {tuple(given.shape)}, the weights have {d} features: give ({d},)")
    if scale is not None and not bool((scale > 0).all()):
        raise RecipeError("scale holds a value that is not positive: use 1 for constant columns")
    if U.ndim == 4:
        made = _relu(U, b, mean, scale, ones)
    elif gates is None or gates.vectors.shape != (d, len(U)) or gates.offsets.shape != (len(U),):
        found = "none" if gates is None else f"{tuple(gates.vectors.shape)} with offsets {tuple(gates.offsets.shape)}"
        raise RecipeError(f"gates are {found}, the weights have {len(U)} gates of {d} features: give the Gates of the programme")
    else:
        gates = Gates(gates.vectors.to(U), gates.offsets.to(U))
        rows = _split(U.permute(1, 0, 2).flatten(1), ones)
        made = _gated(*fold(*rows, mean, scale), gates if raw else fold_gates(gates, mean, scale), b)
    return made.to(dtype)


def fold(W: Tensor, c: Tensor, mean: Tensor | None = None, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """W' (d, m), c' (m,) with x W' + c' = ((x - mean) / scale) W + c."""
    W = W if scale is None else W / scale.to(W)[:, None]
    return W, c if mean is None else c - mean.to(W) @ W


def fold_gates(gates: Gates, mean: Tensor | None = None, scale: Tensor | None = None) -> Gates:
    """Gates over standardised samples, as gates over raw ones."""
    return Gates(*fold(gates.vectors, gates.offsets, mean, scale))


def _relu(V: Tensor, b: Tensor, mean: Tensor | None, scale: Tensor | None, ones: bool) -> Network:
    """Neurons of the columns of V (2, P, d, C) that are not zero."""
    columns = V.mT  # (2, P, C, d)
    s, _, c = (columns.norm(dim=-1) > 0).nonzero(as_tuple=True)
    vectors = columns[columns.norm(dim=-1) > 0]  # (K, d)
    keys = torch.cat([(vectors / vectors.norm(dim=1, keepdim=True)).round(decimals=PARALLEL), s[:, None], c[:, None]], 1)
    keys, group = torch.unique(keys, dim=0, return_inverse=True)
    vectors = vectors.new_zeros(len(keys), vectors.shape[1]).index_add_(0, group, vectors)
    roots = vectors.norm(dim=1).sqrt()
    second = vectors.new_zeros(len(b), len(keys))
    second[keys[:, -1].long(), torch.arange(len(keys), device=keys.device)] = roots * (1 - 2 * keys[:, -2])
    W, constants = _split((vectors / roots[:, None]).T, ones)
    W, constants = fold(W, constants, mean, scale)
    return ReluNetwork(linear_layer(W.T, constants), linear_layer(second, b))


def _gated(W: Tensor, constants: Tensor, gates: Gates, b: Tensor) -> Network:
    """From weights W (d, P C) and constants (P C,) of raw samples, and gates over them."""
    P, C = len(gates), len(b)
    U = torch.cat([W, constants[None]]).view(-1, P, C).permute(1, 0, 2)  # (P, d + 1, C)
    always = (gates.vectors == 0).all(0)
    block = U[always & (gates.offsets > 0)].sum(0)
    kept = ~always & (U.flatten(1) != 0).any(1)
    rows = torch.cat([gates.vectors, gates.offsets[None]])[:, kept].T
    rows, group = torch.unique(rows, dim=0, return_inverse=True)
    U = U.new_zeros(len(rows), *U.shape[1:]).index_add_(0, group, U[kept])
    values, constants = U[:, :-1].mT.flatten(0, 1), U[:, -1].flatten()  # (m C, d), (m C,)
    return GatedNetwork(
        linear_layer(rows[:, :-1], rows[:, -1]), linear_layer(values, constants), linear_layer(block[:-1].T, block[-1] + b)
    )


def _split(W: Tensor, ones: bool) -> tuple[Tensor, Tensor]:
    """Weights of features and of the constant 1."""
    return (W[:-1], W[-1]) if ones else (W, torch.zeros_like(W[0]))


def linear_layer(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A Linear with these parameters; any of its sizes may be zero."""
    made = nn.Linear(1, 1, device="meta")  # which draws no numbers
    made.out_features, made.in_features = weight.shape
    made.weight, made.bias = nn.Parameter(weight.contiguous().clone()), nn.Parameter(bias.contiguous().clone())
    return made


def two_logits(network: Network) -> Network:
    """The logits (0, z) of two classes from one output z: what a softmax turns into the logistic probabilities.

    Raises RecipeError for another number of outputs.
    """
    if network.shape[2] != 1:
        raise RecipeError(f"the network has {network.shape[2]} outputs: only one output can become two logits")

    def doubled(linear: nn.Linear) -> nn.Linear:
        """Every row below a row of zeros."""
        weight, bias = linear.weight.detach(), linear.bias.detach()
        rows = torch.stack([torch.zeros_like(weight), weight], 1).flatten(0, 1)
        return linear_layer(rows, torch.stack([torch.zeros_like(bias), bias], 1).flatten())

    if isinstance(network, ReluNetwork):
        first, second = network.layers
        return ReluNetwork(linear_layer(first.weight.detach(), first.bias.detach()), doubled(second))
    gates = linear_layer(network.gates.weight, network.gates.bias)
    return GatedNetwork(gates, doubled(network.values), doubled(network.skip))


def save(
    network: nn.Module,
    path: str | Path,
    *,
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a network to one safetensors file, whole or not at all.

    metadata: anything JSON holds, kept in the header (`describe`); tensors: more of them, of dotted names ("extra.name"), which
    `load` leaves alone.  Raises RecipeError for another module or metadata, OutputError where the file cannot be written.
    """
    if not isinstance(network, ReluNetwork | GatedNetwork):
        raise RecipeError(f"{type(network).__name__} is not a network of lplr.convex: save what `export` or `load` returned")
    path = Path(path)
    m, d, C = network.shape
    facts = {
        "version": VERSION,
        "kind": network.kind,
        "neurons": m,
        "features": d,
        "outputs": C,
        "metadata": dict(metadata or {}),
    }
    try:
        header = json.dumps(facts)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"metadata cannot be written as JSON ({error}): give text, numbers, lists and dictionaries") from None
    named = network.state_dict() | {f"extra.{name}": value for name, value in (tensors or {}).items()}
    state = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in named.items()}
    scratch = ""
    try:
        handle, scratch = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        os.close(handle)
        save_file(state, scratch, metadata={"format": "pt", HEADER: header})
        Path(scratch).chmod(0o644)
        os.replace(scratch, path)
    except (OSError, SafetensorError) as error:
        if scratch:
            Path(scratch).unlink(missing_ok=True)
        raise OutputError(f"{path} cannot be written ({error}): check the folder, the disk and its permissions") from None


def describe(path: str | Path) -> dict[str, Any]:
    """The header of a file: version, kind, neurons, features, outputs, metadata.  Raises CheckpointError for another file."""
    return _read(path, tensors=False)[0]


def load(path: str | Path) -> Network:
    """The network in a file of `save`, on the CPU, in the type it was saved in.

    Raises CheckpointError for a file that is missing, damaged, of another kind or version, or that holds NaN or Inf.
    """
    facts, tensors = _read(path)
    kind = facts["kind"]
    return _build(kind, {key: tensors[key] for key in KEYS[kind]})


def extras(path: str | Path) -> dict[str, Tensor]:
    """The other tensors that were saved beside the network."""
    return {key[len("extra.") :]: value for key, value in _read(path)[1].items() if key.startswith("extra.")}


def _build(kind: str, tensors: Mapping[str, Tensor]) -> Network:
    parts = [linear_layer(tensors[w], tensors[b]) for w, b in zip(KEYS[kind][::2], KEYS[kind][1::2], strict=True)]
    return ReluNetwork(*parts) if kind == "relu" else GatedNetwork(*parts)


def _read(path: str | Path, tensors: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors, both checked."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} is no file: give one that lplr.convex.network.save wrote")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = file.metadata() or {}
            found = {key: file.get_tensor(key) for key in file.keys()} if tensors else {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file ({error}): save the network again") from None
    facts = _facts(path, header)
    if tensors:
        _check(path, facts, found)
    return facts, found


def _facts(path: Path, header: Mapping[str, str]) -> dict[str, Any]:
    if HEADER not in header:
        raise CheckpointError(f"{path} holds no network of lplr.convex: give a file that lplr.convex.network.save wrote")
    try:
        facts = json.loads(header[HEADER])
    except ValueError:
        raise CheckpointError(f"{path}: its header is no JSON: save the network again") from None
    if not isinstance(facts, dict) or facts.get("version") != VERSION or facts.get("kind") not in list(KEYS):
        known = facts if isinstance(facts, dict) else {}
        raise CheckpointError(
            f"{path} is version {known.get('version')!r} of kind {known.get('kind')!r}, this lplr reads version {VERSION} of "
            f"{', '.join(KEYS)}: save it with this version"
        )
    if not isinstance(facts.get("metadata"), dict) or not all(
        isinstance(facts.get(key), int) for key in ("neurons", "features", "outputs")
    ):
        raise CheckpointError(f"{path}: its header lacks sizes or metadata: save the network again")
    return facts


def _check(path: Path, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    m, d, C = facts["neurons"], facts["features"], facts["outputs"]
    shapes = [(m, d), (m,), (C, m), (C,)] if facts["kind"] == "relu" else [(m, d), (m,), (m * C, d), (m * C,), (C, d), (C,)]
    keys = KEYS[facts["kind"]]
    for key, shape in zip(keys, shapes, strict=True):
        if key not in tensors or tuple(tensors[key].shape) != shape:
            found = tuple(tensors[key].shape) if key in tensors else "missing"
            raise CheckpointError(f"{path}: {key} is {found}, its header says {shape}: save the network again")
        if not tensors[key].is_floating_point() or tensors[key].dtype != tensors[keys[0]].dtype:
            raise CheckpointError(f"{path}: {key} is {tensors[key].dtype}: all weights must have one floating-point type")
        if not bool(torch.isfinite(tensors[key]).all()):
            raise CheckpointError(f"{path}: {key} holds NaN or Inf: save the network again")
    strange = [key for key in tensors if key not in keys and not key.startswith("extra.")]
    if strange:
        raise CheckpointError(f"{path}: {strange[0]} belongs to no {facts['kind']} network: save the network again")
