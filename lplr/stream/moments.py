"""Second moments of the inputs of a block's layers, H = E[x x^T], and what the compressed prefix did to those inputs.

With x' a layer's input in the original model and x its input behind everything that is compressed already,

    T = argmin_T E ||W x' - T x||^2 = W (I + D H^-1),      D = E[(x' - x) x^T],

is the weight that takes the new inputs nearest to the original outputs.  What is compressed is W + share (T - W), H damped, share
the recipe's `propagation`.
Sources: Li et al., "GPTAQ", ICML 2025 (the whole step, inside of the rounding); Arai, Ichikawa, "Quantization Error
Propagation", NeurIPS 2025 (a share of it, before the rounding).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lplr.hf.skeleton import run_block
from lplr.linalg.hessian import Hessian, cholesky_factor, damped, shrunk
from lplr.nn import weight_of
from lplr.stream.calibrate import A_PASS, Activations, pass_memory
from lplr.stream.workers import Spread, here

UNREACHED = "no calibration token reached it: compressed without data"


class Enough(Exception):
    """Raised in a forward pass when every layer of interest has been called: the rest need not run."""


class Drift:
    """Running sum of (x' - x) x^T over all rows that were added."""

    def __init__(self, d: int, device: torch.device | str = "cpu") -> None:
        self.total = torch.zeros(d, d, dtype=torch.float32, device=device)
        self.rows = 0

    def add(self, original: Tensor, x: Tensor) -> None:
        """Add inputs x' and x, both (..., d)."""
        x = x.reshape(-1, x.shape[-1]).float()
        self.total.addmm_((original.reshape(x.shape).float() - x).T, x)
        self.rows += len(x)

    def merge(self, other: Drift) -> None:
        """Add the rows that another one has."""
        self.total += other.total
        self.rows += other.rows

    def step(self, H: Tensor) -> Tensor | None:
        """D (H + damping)^-1 (d x d), H as collected; None where something is not finite."""
        found = torch.cholesky_solve(self.total.T / self.rows, cholesky_factor(damped(H))).T
        return found if bool(torch.isfinite(found).all()) else None


@dataclass
class Original:
    """A block with its original weights, and its inputs behind original blocks."""

    block: nn.Module
    inputs: Activations

    @classmethod
    def of(cls, block: nn.Module, inputs: Activations) -> Original:
        """With a copy of the block's present weights."""
        return cls(copy.deepcopy(block), inputs)

    def run(
        self, rows: slice, names: Collection[str], kwargs: Mapping[str, Any], device: torch.device, *, last: bool
    ) -> dict[str, Tensor]:
        """The inputs of the block's modules `names` for some rows; the `last` run replaces the rows by the block's outputs."""
        found: dict[str, Tensor] = {}

        def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def note(_: nn.Module, given: tuple[Tensor, ...]) -> None:
                found[name] = given[0]
                if not last and len(found) == len(names):
                    raise Enough

            return note

        handles = [self.block.get_submodule(name).register_forward_pre_hook(watch(name)) for name in names]
        try:
            with suppress(Enough):
                y = run_block(self.block, self.inputs.get(rows).to(device), kwargs)
                if last:
                    self.inputs.set(rows, y)
        finally:
            for handle in handles:
                handle.remove()
        return found


class InputMoments:
    """A context in which each forward pass adds the inputs of the given layers to their Hessians.

    Layers that are handed the same tensor object (q, k and v; gate and up) share one Hessian.  A layer that is never
    called, such as an expert that no token is routed to, has none.  With `stop` a pass ends by Enough at the last layer's call.
    `drifts` holds what `end_pass` was told of, by the names that `hessians` has.
    """

    def __init__(self, layers: Mapping[str, nn.Module], *, stop: bool = False) -> None:
        self.hessians: dict[str, Hessian] = {}
        self.drifts: dict[str, Drift] = {}
        self._layers, self._stop = layers, stop
        self._called: set[str] = set()
        self._pass: list[tuple[Tensor, Hessian, str]] = []  # holds the inputs, so that identity is certain
        self._handles: list[Any] = []
        self._known: dict[int, tuple[Tensor | None, Tensor | None]] = {}  # by Hessian, once the passes are over

    def __enter__(self) -> InputMoments:
        for name, layer in self._layers.items():
            self._handles.append(layer.register_forward_pre_hook(self._hook(name)))
        return self

    def __exit__(self, *_: object) -> None:
        self.end_pass()
        for handle in self._handles:
            handle.remove()
        by_hessian = {id(self.hessians[name]): drift for name, drift in self.drifts.items()}
        self.drifts = {name: by_hessian[id(h)] for name, h in self.hessians.items() if id(h) in by_hessian}

    def of(self, name: str) -> tuple[Tensor | None, Tensor | None]:
        """H of a layer and the step to be taken from W, W times it; None for what is not known.  After the last pass only: layers
        that share a Hessian share both.
        """
        hessian, drift = self.hessians.get(name), self.drifts.get(name)
        if hessian is None:
            return None, None
        if id(hessian) not in self._known:
            H = hessian.mean()
            H = None if H is None else shrunk(H, hessian.rows)
            self._known[id(hessian)] = H, None if H is None or drift is None else drift.step(H)
        return self._known[id(hessian)]

    def note(self, name: str) -> str:
        """What a record should say of the second moments of a layer; nothing where they are full.

        The rule for experts that few tokens are routed to: with fewer than they have inputs, `linalg.hessian.shrunk`; with none,
        or with inputs beyond the range of float32, they are compressed without data.
        """
        hessian = self.hessians.get(name)
        if hessian is None or not hessian.rows:
            return UNREACHED
        if self.of(name)[0] is None:
            return "its inputs on the calibration text leave the range of float32: compressed without data"
        d = len(hessian.upper)
        return "" if hessian.rows >= d else f"{hessian.rows} calibration tokens for {d} inputs: second moments shrunk"

    def merge(self, hessians: Mapping[str, Hessian], drifts: Mapping[str, Drift]) -> None:
        """Add what the passes of other rows found, under the same names; what layers shared there they share here."""
        _merge(self.hessians, hessians)
        _merge(self.drifts, drifts)

    def end_pass(self, originals: Mapping[str, Tensor] | None = None) -> None:
        """Forget the tensors of the last forward pass; with the inputs that layers had in the original model, note the drift."""
        for x, _, name in self._pass:
            if originals and name in originals and originals[name].shape == x.shape:
                self.drifts.setdefault(name, Drift(x.shape[-1], x.device)).add(originals[name], x)
        self._pass.clear()
        self._called.clear()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            shared = (h for seen, h, _ in self._pass if seen is x and self.hessians.get(name, h) is h)
            hessian = next(shared, None)
            if hessian is None:
                hessian = self.hessians.setdefault(name, Hessian(x.shape[-1], x.device))
                hessian.add(x.detach())
                self._pass.append((x, hessian, name))
            self.hessians[name] = hessian
            self._called.add(name)
            if self._stop and len(self._called) == len(self._layers):
                raise Enough

        return note


def _merge(mine: dict[str, Any], others: Mapping[str, Any]) -> None:
    """Add to each name's sum the other one of that name; names that share both go on sharing, and no others do."""
    pairs: dict[tuple[int, int], list[str]] = {}
    for name, other in others.items():
        pairs.setdefault((id(mine.get(name)), id(other)), []).append(name)
    for names in pairs.values():
        total, other = mine.get(names[0]), others[names[0]]
        if total is None:
            total = other
        else:
            apart = any(found is total and name not in names for name, found in mine.items())
            total = copy.deepcopy(total) if apart else total
            total.merge(other)
        mine.update(dict.fromkeys(names, total))


@torch.no_grad()
def collect(
    block: nn.Module,
    layers: Mapping[str, nn.Module],
    inputs: Activations,
    kwargs: Mapping[str, Any],
    device: torch.device,
    original: Original | None = None,
    *,
    last: bool = False,
    spread: Spread = here,
) -> InputMoments:
    """Run a block on all calibration rows, as far as its given layers: their Hessians and, with the original block, drifts.

    Drifts are of layers that see every token: where tokens are routed, the two models may send others.  The `last` collection of
    a block leaves original.inputs at the block's outputs.  Each batch has sums of its own, which are added in order.
    """
    within = {module: name for name, module in block.named_modules()}
    names = {within[layer]: name for name, layer in layers.items()}
    batches, theirs = list(inputs.batches()), None if original is None else original.inputs
    common = block, None if original is None else original.block, names, kwargs, device, last
    parts = ((inputs.get(rows), None if theirs is None else theirs.part(rows)) for rows in batches)
    moments = InputMoments(layers)
    squares = [weight_of(layer).shape[1] ** 2 for layer in layers.values()]
    # two sums of each input's width, and both twice more to be sent; where tokens are routed, layers have inputs of their own
    memory = 2 * pass_memory(block, batches[0], inputs) + 24 * max(squares) + 8 * sum(squares)
    results = spread(_collected, common, parts, memory=memory, what=A_PASS)
    for rows in batches:
        hessians, drifts, outputs = next(results)
        moments.merge(hessians, drifts)
        if theirs is not None and outputs is not None:
            theirs.set(rows, outputs)
        del hessians, drifts, outputs  # large, and the next ones are made meanwhile
    return moments


@torch.no_grad()
def _collected(
    block: nn.Module,
    original: nn.Module | None,
    names: Mapping[str, str],
    kwargs: Mapping[str, Any],
    device: torch.device,
    last: bool,
    states: Tensor,
    theirs: Activations | None,
) -> tuple[dict[str, Hessian], dict[str, Drift], Tensor | None]:
    """Hessians and drifts of a batch and, if it is the `last` pass, the original block's outputs; names: of the layers in the
    block -> what they are called.
    """
    whole = slice(0, len(states))
    found: dict[str, Tensor] = {}
    if original is not None and theirs is not None:
        found = Original(original, theirs).run(whole, names, kwargs, device, last=last)
    with InputMoments({name: block.get_submodule(inner) for inner, name in names.items()}, stop=True) as moments:
        with suppress(Enough):
            run_block(block, states.to(device), kwargs)
        tokens = states.shape[:-1].numel()
        moments.end_pass({names[name]: x for name, x in found.items() if x.shape[:-1].numel() == tokens})
    return moments.hessians, moments.drifts, theirs.get(whole) if last and theirs is not None else None
