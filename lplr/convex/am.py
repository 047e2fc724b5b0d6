"""CRONOS-AM: features by stochastic gradients, the head above them by convex solves that are taken only where they help.

    J(phi, V, b) = f(Z; Y) + lam sum ||V_{s,i,c}||,   Z_c = sum_i (phi(X) V_{0,i,c})_+ - (phi(X) V_{1,i,c})_+ + b_c

over any torch module phi and a two-layer ReLU network (V, b): the value of the convex programme at feasible V is J.
A head step computes H = phi(X) for all samples and solves the ReLU programme on the patterns 1(H v > 0) of the present neurons
and of fresh Gaussian gates.  The present head is feasible there, so it is the warm start and its J an upper bound of the
optimum; what comes out replaces it if J does not grow, and is rejected otherwise (features may be too ill-conditioned for the
solver, or the programme cut short).  So J never grows across a head step.  In between, every minibatch moves the features alone,
by AdamW with the learning rate that Prodigy estimates (D-adaptation); its state is kept across head steps.
No more is claimed: J is not convex in phi, and alternation has no guarantee of convergence.  Where the features are good
already, one `solve` on them is the better tool.

Departures from the published algorithm: warm starts and accept/reject instead of a few cold iterations that overwrite the head;
patterns that follow the features instead of one seed throughout; any loss of `losses`; an intercept.
Source: Feng, Frangella, Pilanci, "CRONOS", NeurIPS 2024, algorithm 3; Mishchenko, Defazio, "Prodigy: an expeditiously adaptive
parameter-free learner", ICML 2024.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lplr.convex.gates import clean, gaussian, patterns
from lplr.convex.losses import LOSSES
from lplr.convex.penalty import Penalty
from lplr.convex.problem import Problem
from lplr.convex.solution import Callback, Solution
from lplr.convex.solve import solve
from lplr.errors import RecipeError, choose

NEURONS = 4  # times the gates asked for: patterns of present neurons that a head step keeps, the longest first


@dataclass(frozen=True)
class Head:
    """A two-layer ReLU network: V (2, P, d, C), its signs first, and b (C,)."""

    V: Tensor
    b: Tensor

    def __call__(self, H: Tensor) -> Tensor:
        """Z (n, C) of features H (n, d)."""
        V = self.V.to(H)
        P, d, C = V.shape[1:]
        up, down = (torch.relu(H @ part.permute(1, 0, 2).reshape(d, P * C)).view(-1, P, C).sum(1) for part in V)
        return up - down + self.b.to(H)

    def objective(self, H: Tensor, Y: Tensor, loss: str, lam: float) -> float:
        """J on features H (n, d)."""
        H = H.double()
        return LOSSES[loss].value(self(H), Y.double()) + Penalty(lam, "columns").value(self.V)


@dataclass(frozen=True)
class Alternated:
    """The features trained in place, the head above them, and a line of history for every head step and every epoch.

    Calling it gives the scores (n, C) of X.
    """

    features: nn.Module
    head: Head
    objective: float
    history: list[dict[str, Any]]

    def __call__(self, X: Tensor) -> Tensor:
        return self.head(extract(self.features, X))


def cronos_am(
    features: nn.Module,
    X: Tensor,
    y: Tensor,
    *,
    loss: str = "logistic",
    lam: float = 1e-3,
    gates: int = 32,
    epochs: int = 10,
    batch: int = 256,
    head_every: int = 1,
    intercept: bool = True,
    rate: float = 1.0,
    weight_decay: float = 0.0,
    tol: float = 1e-3,
    generator: torch.Generator | None = None,
    callback: Callback | None = None,
    head_solver: Callable[..., Solution] = solve,
) -> Alternated:
    """Alternate `head_every` epochs of minibatch steps on `features` (in place) with head steps, which come first and last too.

    features: a module from X (n, ...) to (n, d).  y (n, C) as in `Problem`.  rate multiplies Prodigy's estimate; tol is the
    relative duality gap of a head step.  The order of samples and the gates are drawn from generator, alone.  A callback sees
    every line of history and ends the run by returning True.
    Raises RecipeError for an unknown loss, and for targets that do not fit it.
    """
    choose(LOSSES, loss, "loss")
    if y.ndim != 2 or len(y) != len(X) or not len(X):
        raise RecipeError(f"y is {tuple(y.shape)}, X {tuple(X.shape)}: give targets (n, C), one row a sample")
    if min(gates, batch, head_every) < 1 or epochs < 0:
        raise RecipeError(
            f"gates {gates}, batch {batch}, head_every {head_every} start at 1 and epochs {epochs} at 0: raise them"
        )
    run = _Run(features, X, y, loss, lam, gates, intercept, tol, generator or torch.Generator().manual_seed(0), callback)
    run.head_step(head_solver, 0)
    optimiser = _prodigy(features, rate, weight_decay) if epochs else None
    for epoch in range(1, epochs + 1):
        if run.stopped or optimiser is None:
            break
        run.epoch(optimiser, batch, epoch)
        if not run.stopped and (epoch % head_every == 0 or epoch == epochs):
            run.head_step(head_solver, epoch)
    return Alternated(features, run.head, run.head.objective(extract(features, run.X), run.y, loss, lam), run.history)


@torch.no_grad()
def extract(features: nn.Module, X: Tensor, batch: int = 1024) -> Tensor:
    """H (n, d), the features in evaluation mode; the mode is put back."""
    modes = {module: module.training for module in features.modules()}
    features.eval()
    try:
        H = torch.cat([features(X[i : i + batch]) for i in range(0, len(X), batch)])
    finally:
        for module, mode in modes.items():
            module.training = mode
    if H.ndim != 2:
        raise RecipeError(f"features give {tuple(H.shape)} for {len(H)} samples: end the module with nn.Flatten or a pooling")
    return H


@dataclass
class _Run:
    """The head and the history of one alternation."""

    features: nn.Module
    X: Tensor
    y: Tensor
    loss: str
    lam: float
    gates: int
    intercept: bool
    tol: float
    generator: torch.Generator
    callback: Callback | None
    stopped: bool = False
    start: float = field(default_factory=time.perf_counter)
    history: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        H = extract(self.features, self.X[:1])
        d, C = H.shape[1], self.y.shape[1]
        self.y, self.head = self.y.to(H), Head(H.new_zeros(2, 1, d, C), H.new_zeros(C))

    def head_step(self, solver: Callable[..., Solution], epoch: int) -> None:
        """Solve for the head on the present features; keep the old one where the new one has a larger J."""
        H = extract(self.features, self.X)
        before = self.head.objective(H, self.y, self.loss, self.lam)
        problem, warm = head_problem(self.head, H, self.y, self.loss, self.gates, self.intercept, self.generator)
        found = solver(problem, Penalty(self.lam, "columns"), tol=self.tol, warm=warm if self.head.V.any() else None)
        active = found.U.flatten(2).norm(dim=2).amax(0) > 0
        active[0] |= not active.any()
        new = Head(found.U[:, active], found.b)
        after = new.objective(H, self.y, self.loss, self.lam)
        accepted = after <= before
        self.head = new if accepted else self.head
        self.record("head", epoch, before=before, after=after, accepted=accepted, status=found.status, gates=len(problem.D[0]))

    def epoch(self, optimiser: torch.optim.Optimizer, batch: int, epoch: int) -> None:
        """A pass over the samples; the penalty does not depend on the features."""
        self.features.train()
        total = 0.0
        for rows in self.batches(batch):
            optimiser.zero_grad()
            value = DIFFERENTIABLE[self.loss](self.head(self.features(self.X[rows])), self.y[rows])
            value.backward()
            optimiser.step()
            total += value.item() * len(rows)
        self.record("features", epoch, training_loss=total / len(self.X))

    def batches(self, size: int) -> Iterator[Tensor]:
        order = torch.randperm(len(self.X), generator=self.generator, device=self.generator.device).to(self.X.device)
        return iter(order.split(size))

    def record(self, kind: str, epoch: int, **values: Any) -> None:
        entry = {"kind": kind, "epoch": epoch, "seconds": time.perf_counter() - self.start, **values}
        self.history.append(entry)
        self.stopped = self.callback is not None and self.callback(entry) is True


def head_problem(
    head: Head, H: Tensor, y: Tensor, loss: str, gates: int, intercept: bool, generator: torch.Generator
) -> tuple[Problem, Solution]:
    """The programme of a head step on features H (n, d), and the present head as a point of it."""
    P, d, C = head.V.shape[1:]
    neurons = head.V.to(H).permute(2, 0, 1, 3).reshape(d, -1)  # (d, 2 P C)
    sizes = neurons.norm(dim=0)
    order = sizes.argsort(descending=True)[: NEURONS * gates]
    order = order[sizes[order] > 0]
    own = patterns(H, neurons[:, order])
    D = torch.cat([own, patterns(H, gaussian(d, gates, generator).to(H))], 1)
    kept = clean(D)
    D = D[:, kept] if len(kept) else torch.ones_like(D[:, :1])
    V = H.new_zeros(2, D.shape[1], d, C)
    place = {column.numpy().tobytes(): i for i, column in enumerate(D.T.cpu().contiguous())}
    for k, pattern in zip(order.tolist(), own.T.cpu().contiguous(), strict=True):
        s, c = k // (P * C), k % C
        where = place.get(pattern.numpy().tobytes())
        if where is not None:  # a neuron that sees no sample has no part in Z
            V[s, where, :, c] += neurons[:, k]
    problem = Problem(H, y, D, loss, "relu", intercept)
    b = head.b.to(H) if intercept else torch.zeros_like(head.b.to(H))
    theta = -LOSSES[loss].gradient(problem.fit(V, b), y).double()
    nan = math.nan
    return problem, Solution(V, b, theta, nan, nan, nan, nan, 0, 0.0, status="stopped", message="a head to start from")


def _prodigy(features: nn.Module, rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW with D-adaptation over the parameters that want gradients."""
    try:
        from prodigyopt import Prodigy
    except ImportError:
        raise RecipeError("cronos_am needs the package prodigyopt: pip install 'lplr[convex]'") from None
    wanted = [parameter for parameter in features.parameters() if parameter.requires_grad]
    if not wanted:
        raise RecipeError("features have no parameters to train: use `solve` on their output, or give epochs=0")
    options: dict[str, Any] = {"lr": rate, "weight_decay": weight_decay}
    return Prodigy(wanted, **options)


DIFFERENTIABLE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "squared": lambda Z, Y: (Z - Y).square().sum() / (2 * len(Y)),
    "logistic": lambda Z, Y: functional.softplus(-Y * Z).sum() / len(Y),
    "softmax": functional.cross_entropy,
}
