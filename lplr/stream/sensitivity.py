"""How much the model's loss minds an error in the output of each matrix, token by token.

For y = (W + E) x with small E the model's own predictions move, to second order, by

    KL ~ 1/2 E_t (g_t^T E x_t)^2 ~ s tr(E M E^T),      s = E_t ||g_t||^2 / (2 n),   M = E_t[||g_t||^2 x_t x_t^T] / E_t ||g_t||^2

nats a token, g_t (n) the gradient at y_t of the text's negative log-likelihood with tokens *drawn from the model itself*, so that
the mean of g g^T is the Fisher information and no gradient of the loss stands in the way.  The second step takes the error's
direction as independent of g's, and leaves out what errors at two tokens do together.  G = E_t[g_t g_t^T] (n x n) keeps the
directions: the rounding minimises tr(G E H E^T), the same expectation with g and x independent.  The original model is run
block by block, forward and back, with one block in memory; the inputs of all blocks are kept as `calibrate.Activations`.
Sources: Hassibi, Stork, NeurIPS 1993 (the second-order saliency); Heskes 2000 and Martens, Grosse, ICML 2015 (Fisher information
of layers, sampled targets; G (x) H); Kim et al., "GuidedQuant", ICML 2025 (M).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lplr.hf.skeleton import run_block, run_head
from lplr.linalg.hessian import Hessian
from lplr.stream.calibrate import Activations, embed, loaded, outside
from lplr.stream.checkpoint import Checkpoint, LayerPlan
from lplr.stream.gradients import wanted
from lplr.stream.moments import InputMoments

Say = Callable[[float, str], None]  # (share of the work that is done, what comes next)
FORWARD = 0.25  # share of a pass forward in the time of all


@dataclass(frozen=True)
class Measured:
    """One matrix: the loss in nats a token for one unit of tr(E M E^T); M and H = E[x x^T] (d x d), None where no token came;
    G = E[g g^T] (n x n) where its rounding uses it.
    """

    plan: LayerPlan
    weight: float
    M: Tensor | None
    H: Tensor | None
    G: Tensor | None = None


def measure(
    checkpoint: Checkpoint,
    plans: list[LayerPlan],
    tokens: Tensor,
    folder: Path,
    device: torch.device,
    generator: torch.Generator,
    say: Say,
) -> Iterator[Measured]:
    """The planned matrices, last block first, on tokens (rows, seqlen); `generator` draws the targets.

    Files of activations lie in `folder`.  4 passes of a model's forward in time.  Not for inference mode: gradients are taken.
    """
    ck, count = checkpoint, len(checkpoint.stack)
    with ExitStack() as stack:
        say(0.0, "sensitivity: embedding")
        hidden, kwargs = embed(ck, tokens, folder, device)
        stack.callback(hidden.close)
        inputs: list[Activations] = []
        for i in range(count):
            say(FORWARD * i / count, f"sensitivity: block {i + 1} of {count}, forward")
            inputs.append(Activations(*hidden.shape, folder, share=count))
            stack.callback(inputs[i].close)
            with loaded(ck, i, device) as block, torch.no_grad():
                for rows in hidden.batches():
                    x = hidden.get(rows)
                    inputs[i].set(rows, x)
                    hidden.set(rows, run_block(block, x.to(device), kwargs[i]))
        say(FORWARD, "sensitivity: gradients of the head")
        _head_gradients(ck, tokens, hidden, device, generator)
        for i in reversed(range(count)):
            say(FORWARD + (1 - FORWARD) * (count - 1 - i) / count, f"sensitivity: block {i + 1} of {count}, backward")
            chosen = [p for p in plans if p.block == i]
            with loaded(ck, i, device) as block:
                layers = {p.name: ck.model.get_submodule(p.name) for p in chosen}
                plain, weighted, outputs = _backward(block, layers, wanted(chosen), inputs[i], hidden, kwargs[i], device)
            inputs[i].close()
            for p in chosen:
                H, M = (found[p.name].mean() if p.name in found else None for found in (plain, weighted))
                if H is None or M is None:
                    yield Measured(p, 0.0, None, None)
                else:
                    G = outputs.pop(p.name).mean() if p.name in outputs else None
                    yield Measured(p, weighted[p.name].weight / (2 * p.shape[0] * tokens.numel()), M, H, G)


def _head_gradients(
    ck: Checkpoint, tokens: Tensor, hidden: Activations, device: torch.device, generator: torch.Generator
) -> None:
    """Replace the last block's outputs by the gradients of -sum log p(drawn token) with respect to them; a row at a time."""
    with outside(ck, device, head=True):
        for i in range(tokens.shape[0]):
            x = hidden.get(slice(i, i + 1)).to(device).requires_grad_()
            with torch.enable_grad():
                scores = run_head(ck.model, tokens[i : i + 1].to(device), x)[0].float().log_softmax(-1)
                drawn = torch.multinomial(scores.detach().exp(), 1, generator=generator)
                (gradient,) = torch.autograd.grad(-scores.gather(1, drawn).sum(), x)
            hidden.set(slice(i, i + 1), gradient)


def _backward(
    block: nn.Module,
    layers: Mapping[str, nn.Module],
    directed: Collection[str],
    inputs: Activations,
    gradients: Activations,
    kwargs: Mapping[str, Any],
    device: torch.device,
) -> tuple[dict[str, Hessian], dict[str, Hessian], dict[str, Hessian]]:
    """Second moments of the layers' inputs for all rows, plain and weighted by the squares of the gradients at their outputs,
    and those of the gradients themselves for the layers named in `directed`.

    The gradients move from the block's outputs to its inputs.
    """
    weighted: dict[str, Hessian] = {}
    outputs: dict[str, Hessian] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            x = given[0].detach()
            weighted.setdefault(name, Hessian(x.shape[-1], x.device))
            if name in directed:
                outputs.setdefault(name, Hessian(output.shape[-1], x.device))

            def told(gradient: Tensor) -> None:
                weighted[name].add(x, gradient.float().square().sum(-1))
                if name in directed:
                    outputs[name].add(gradient)

            output.register_hook(told)

        return hook

    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    try:
        with InputMoments(layers) as moments:
            for rows in inputs.batches():
                x = inputs.get(rows).to(device).requires_grad_()
                with torch.enable_grad():
                    y = run_block(block, x, kwargs)
                    (gradient,) = torch.autograd.grad(y, x, gradients.get(rows).to(device))
                gradients.set(rows, gradient)
                moments.end_pass()
    finally:
        for handle in handles:
            handle.remove()
    return moments.hessians, weighted, outputs
