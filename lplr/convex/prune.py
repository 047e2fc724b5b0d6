"""Fewer neurons: exactly as long as fits depend on each other, then with least-squares correction, then fitted again.

Neuron b of a two-layer network adds Z_b (n, C) to the outputs on the samples ("contribution").  Both steps scale neurons, Z_b ->
c_b Z_b with c_b >= 0, and the intercept takes up the change of the mean:

    exact           sum beta_b c_b Z_b = 0, beta_b* = max |beta_b|:   c_b <- c_b (1 - beta_b / beta_b*);  the outputs stay
    least squares   i with the least ||Z_i - sum_{b != i} a_b Z_b||, beta = (a, -1):  the same step, off by at most this residual

Exact pruning of a stationary network keeps its weight decay too: lam sum beta_b ||w_b|| = <theta, sum beta_b Z_b> = 0.  It ends
with independent contributions less means, at most (n - 1) C neurons; no strict part of them has the same outputs with rescaled
neurons, though another choice might (`polytope`).
With n much larger than the number of neurons contributions are mostly independent, and nothing can be removed exactly.
Refit: what is left is trained again at its own size, which rescaling alone does not do: a gated network to the optimum of its
gates' programme, a ReLU network to a local minimum of the same objective, f + lam/2 (||W1||^2 + ||W2||^2), so patterns may move.
The size is chosen on samples that were kept apart: the smallest within one standard error of the best.

With the Gram matrix G of contributions, residual i is 1 / (G^{-1})_ii^{1/2} and beta is column i of G^{-1}: one factor a step.
Source: Mishkin, Pilanci, "Optimal sets and solution paths of ReLU networks", ICML 2023, algorithm 1 and section 6 (both steps);
Breiman, Friedman, Olshen, Stone, "Classification and regression trees", 1984, section 3.4.3 (one standard error).  Refit: here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

from lplr.convex.gates import Gates
from lplr.convex.losses import LOSSES
from lplr.convex.network import GatedNetwork, Network, ReluNetwork, export, linear_layer
from lplr.convex.optimal_set import optimal_set
from lplr.convex.penalty import Penalty
from lplr.convex.polytope import RANK, descend
from lplr.convex.problem import Problem
from lplr.convex.solution import Solution
from lplr.convex.solve import solve
from lplr.errors import RecipeError, choose

STEPS, ROUNDS, FALL = 150, 3, 1e-3  # of L-BFGS in a refit of a ReLU network, as long as a round gains this share
GAP = 1e-6  # relative, of a refit of a gated network
Refit = Callable[[Network], Network]


@dataclass(frozen=True)
class Sized:
    """A network with `count` neurons, and its loss on samples kept apart with its standard error."""

    count: int
    network: Network
    loss: float
    error: float


def exact(contributions: Tensor, rank: float = RANK) -> Tensor:
    """Multipliers c (K,) >= 0 with sum c_b Z_b = sum Z_b, Z_b with c_b > 0 independent; contributions (n, C, K) or (m, K)."""
    return descend(_flat(contributions), torch.ones(contributions.shape[-1], dtype=torch.float64), rank)


def least_squares(contributions: Tensor) -> Iterator[Tensor]:
    """Multipliers c (K,) >= 0 of ever fewer neurons: first those of `exact`, then one neuron less each, down to one."""
    F, c = _flat(contributions), exact(contributions)
    yield c
    while (used := (c > 0).nonzero()[:, 0]).numel() > 1:
        columns = F[:, used] * c[used]
        sizes = columns.norm(dim=0)
        R = torch.linalg.qr(columns / sizes, mode="r")[1]
        half = torch.linalg.solve_triangular(R, torch.eye(len(R), dtype=R.dtype), upper=True)
        inverse = (half @ half.T) / sizes / sizes[:, None]
        beta = inverse[:, inverse.diagonal().argmax()]
        pivot = int(beta.abs().argmax())
        c = c.clone()
        c[used] = c[used] * (1 - beta / beta[pivot]).clamp_min(0)
        c[used[pivot]] = 0
        yield c


def by_size(contributions: Tensor, scores: Tensor) -> Iterator[Tensor]:
    """Multipliers 0 or 1: neurons of the least scores (K,) go first, nothing is corrected; what the others are compared with."""
    c = torch.ones(contributions.shape[-1], dtype=torch.float64)
    yield c
    for b in scores.argsort()[:-1]:
        c = c.clone()
        c[b] = 0
        yield c


def minimal(problem: Problem, penalty: Penalty, solution: Solution) -> Solution:
    """An optimum that uses no more blocks than it must: a vertex of the optimal set, certified.  See `optimal_set` for errors."""
    every = optimal_set(problem, penalty, solution)
    return every.solution(every.polytope.vertex(every.polytope.point))


def two_layers(module: nn.Module) -> Network:
    """A network of `lplr.convex` as it is; any Sequential of Linear, ReLU, Linear as one, in float64.  RecipeError for others."""
    if isinstance(module, ReluNetwork | GatedNetwork):
        return module
    parts = list(module.children())
    if [type(part) for part in parts] != [nn.Linear, nn.ReLU, nn.Linear]:
        shown = ", ".join(type(part).__name__ for part in parts) or type(module).__name__
        raise RecipeError(
            f"only networks of two layers can be pruned, this is {shown}: give a Sequential of Linear, ReLU, Linear"
        )
    return ReluNetwork(*(_double(part) for part in parts if isinstance(part, nn.Linear)))


@torch.no_grad()
def contributions(network: Network, X: Tensor) -> Tensor:
    """Z (n, C, K) of every neuron, or gate, on samples X (n, d) in float64; the skip and the intercept are not among them."""
    m, _, C = network.shape
    if isinstance(network, ReluNetwork):
        first, second = network.layers
        hidden = torch.relu(X.double() @ first.weight.double().T + first.bias.double())
        return hidden[:, None, :] * second.weight.double()
    opened = X.double() @ network.gates.weight.double().T + network.gates.bias.double() > 0
    values = X.double() @ network.values.weight.double().T + network.values.bias.double()
    return (values.unflatten(1, (m, C)) * opened[:, :, None]).mT


@torch.no_grad()
def rescaled(network: Network, multipliers: Tensor, X: Tensor) -> Network:
    """The network with neuron b times c_b (K,), without those of c_b = 0, its intercept moved by the mean change on X (n, d)."""
    kept = multipliers > 0
    c, C = multipliers[kept], network.shape[2]
    Z = contributions(network, X)
    change = (Z @ (1 - multipliers).to(Z)).mean(0) if len(X) else Z.new_zeros(C)
    if isinstance(network, ReluNetwork):
        first, second = network.layers
        roots = c.sqrt().to(first.weight)
        W, b = first.weight[kept] * roots[:, None], first.bias[kept] * roots
        return ReluNetwork(linear_layer(W, b), linear_layer(second.weight[:, kept] * roots, second.bias + change.to(second.bias)))
    factors = c.repeat_interleave(C).to(network.values.weight)
    rows = kept.repeat_interleave(C)
    values = linear_layer(network.values.weight[rows] * factors[:, None], network.values.bias[rows] * factors)
    gates = linear_layer(network.gates.weight[kept], network.gates.bias[kept])
    return GatedNetwork(gates, values, linear_layer(network.skip.weight, network.skip.bias + change.to(network.skip.bias)))


def refit(network: Network, X: Tensor, Y: Tensor, *, loss: str = "squared", lam: float = 1e-3) -> Network:
    """The network trained again at its size: min f(Z; Y) + lam/2 (||W1||^2 + ||W2||^2), output bias free.

    Gated: with its gates as they are, to the global optimum (a relative gap of GAP); a skip without weights stays so.  ReLU: from
    the present weights, to a local minimum.  Neurons may end at zero.  X (n, d), Y (n, C) as `Problem` wants them, of as many
    outputs.
    """
    choose(LOSSES, loss, "loss")
    if Y.shape[1] != network.shape[2]:
        raise RecipeError(f"Y has {Y.shape[1]} columns, the network {network.shape[2]} outputs: give targets of the same number")
    if isinstance(network, GatedNetwork):
        return _refit_gated(network, X.double(), Y.double(), loss, lam)
    return _refit_relu(network, X.double(), Y.double(), loss, lam)


def shrink(network: Network, X: Tensor, counts: Sequence[int], refit: Refit) -> Iterator[Network]:
    """Ever smaller networks, one for each of descending counts: pruned from the last one by least squares on X, then refitted.

    What has fewer neurons than a count already is refitted as it is.
    """
    for count in sorted(set(counts), reverse=True):
        if network.shape[0] > count:
            network = rescaled(network, _of(least_squares(contributions(network, X)), count), X)
        network = refit(network)
        yield network


def smallest(found: Sequence[Sized]) -> Sized:
    """The smallest of those whose loss is within one standard error of the least, the error being that of the least."""
    best = min(found, key=lambda one: one.loss)
    return min((one for one in found if one.loss <= best.loss + best.error), key=lambda one: (one.count, one.loss))


def _of(every: Iterator[Tensor], count: int) -> Tensor:
    """The first multipliers with at most `count` neurons; all zero for none."""
    for c in every:
        if int((c > 0).sum()) <= count:
            return c
    return torch.zeros_like(c)


def _refit_gated(network: GatedNetwork, X: Tensor, Y: Tensor, loss: str, lam: float) -> Network:
    d = X.shape[1]
    gates = Gates(network.gates.weight.detach().double().T, network.gates.bias.detach().double())
    if bool(network.skip.weight.any()) or not len(gates):
        always = Gates(torch.zeros(d, 1, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
        gates = Gates(torch.cat([gates.vectors, always.vectors], 1), torch.cat([gates.offsets, always.offsets]))
    samples = torch.cat([X, torch.ones_like(X[:, :1])], 1)
    problem = Problem(samples, Y, gates.patterns(X), loss, intercept=True)
    return export(solve(problem, Penalty(lam), tol=GAP), gates, ones=True)


def _refit_relu(network: ReluNetwork, X: Tensor, Y: Tensor, loss: str, lam: float) -> Network:
    first, second = (_double(layer) for layer in network.layers)
    parts = [p.detach() for p in (first.weight, first.bias, second.weight, second.bias)]
    sizes, shapes = [p.numel() for p in parts], [p.shape for p in parts]

    def unpacked(x: Tensor) -> list[Tensor]:
        return [part.view(shape) for part, shape in zip(x.split(sizes), shapes, strict=True)]

    def value_and_gradient(x: np.ndarray) -> tuple[float, np.ndarray]:
        with torch.enable_grad():
            at = torch.from_numpy(x.copy()).requires_grad_()
            W, b, A, c = unpacked(at)
            f = _smooth(loss, torch.relu(X @ W.T + b) @ A.T + c, Y)
            value = f + lam / 2 * (at.square().sum() - c.square().sum())
            return value.item(), torch.autograd.grad(value, at)[0].numpy()

    value = math.inf
    for _ in range(ROUNDS):  # a line search that ends at a kink goes on from there with a fresh model
        start = torch.cat([p.flatten() for p in parts]).numpy()
        found = minimize(value_and_gradient, start, jac=True, method="L-BFGS-B", options={"maxiter": STEPS, "maxcor": 20})
        parts = _balanced(unpacked(torch.from_numpy(found.x)))
        if not found.fun < value * (1 - FALL):
            break
        value = found.fun
    W, b, A, c = parts
    return ReluNetwork(linear_layer(W, b), linear_layer(A, c))


def _balanced(parts: list[Tensor]) -> list[Tensor]:
    """Both layers of every neuron equally long: the same function, the least weight decay."""
    W, b, A, c = parts
    inner, outer = (W.square().sum(1) + b.square()).sqrt(), A.norm(dim=0)
    alive = (inner > 0) & (outer > 0)
    ratio = torch.where(alive, (outer / inner).sqrt(), torch.zeros_like(inner))
    return [W * ratio[:, None], b * ratio, torch.where(alive, A / ratio, torch.zeros_like(A)), c]


def _smooth(loss: str, Z: Tensor, Y: Tensor) -> Tensor:
    """f(Z; Y), differentiable."""
    if loss == "squared":
        return (Z - Y).square().sum() / (2 * len(Y))
    if loss == "logistic":
        return nn.functional.softplus(-Y * Z).mean()
    return nn.functional.cross_entropy(Z, Y)


def _flat(contributions: Tensor) -> Tensor:
    """(m, K) of (n, C, K), less the means over samples, which the intercept takes up; (m, K) as it is."""
    F = contributions.double()
    return F if F.ndim == 2 else (F - F.mean(0)).flatten(0, 1)


def _double(linear: nn.Linear) -> nn.Linear:
    bias = linear.weight.new_zeros(len(linear.weight)) if linear.bias is None else linear.bias
    return linear_layer(linear.weight.detach().double(), bias.detach().double())
