"""What a solver hands back: a feasible point, a dual point, and the proof of how good the first is.

`Run` is what the solvers share: it counts, keeps the best certified point, and words the outcome.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lplr.convex.certificate import Certificate, certify
from lplr.convex.penalty import Penalty
from lplr.convex.problem import Problem

Callback = Callable[[dict[str, Any]], object]


@dataclass(frozen=True)
class Solution:
    """U (P, d, C), or V (2, P, d, C) in the cones for "relu"; b (C,); theta (n, C) feasible for the
    dual, in float64.

    primal >= optimum >= dual, gap = primal - dual; kkt is the residual of `certificate`.  status: "converged", "max_iterations",
    "stalled" (no further progress in this precision) or "stopped" (by the callback); message says what it means and what to do.
    The optimum is that of the programme with the given gates, not of all networks.
    """

    U: Tensor
    b: Tensor
    theta: Tensor
    primal: float
    dual: float
    gap: float
    kkt: float
    iterations: int
    seconds: float
    status: str
    message: str
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def relative_gap(self) -> float:
        """gap / |primal|; 0 where both are zero."""
        return self.gap / max(abs(self.primal), 1e-300) if self.gap or math.isnan(self.gap) else 0.0

    @property
    def converged(self) -> bool:
        return self.status == "converged"


class Run:
    """One solve of `problem` to a relative gap `tol` in at most `limit` iterations; a callback that returns True ends it."""

    def __init__(
        self, problem: Problem, penalty: Penalty, tol: float, limit: int, callback: Callback | None, start: float | None = None
    ) -> None:
        self.problem, self.penalty, self.tol, self.limit, self.callback = problem, penalty, tol, limit, callback
        self.start = time.perf_counter() if start is None else start
        self.count, self.stopped, self.stalled = 0, False, False
        self.history: list[dict[str, Any]] = []
        self.U, self.b, self.theta = torch.empty(0), torch.empty(0), torch.empty(0)
        self.primal, self.dual, self.kkt = math.inf, -math.inf, math.inf

    @property
    def reached(self) -> bool:
        return math.isfinite(self.primal) and self.primal - self.dual <= self.tol * abs(self.primal)

    @property
    def over(self) -> bool:
        return self.stopped or self.stalled or self.reached or self.count >= self.limit

    def certify(self, U: Tensor, b: Tensor, theta: Tensor | None = None) -> bool:
        """Certificate of a feasible point in the precision of the problem; the best primal and dual points are kept apart.

        True when they are close enough.
        """
        U, b = U.to(self.problem.Y.dtype), b.to(self.problem.Y.dtype)
        return self.take(U, b, certify(self.problem, self.penalty, U, b, theta))

    def take(self, U: Tensor, b: Tensor, found: Certificate) -> bool:
        """`certify` with a certificate that was computed elsewhere."""
        if found.primal < self.primal or not self.U.numel():
            self.U, self.b, self.primal, self.kkt = U, b, found.primal, found.kkt
        if found.dual > self.dual or not self.theta.numel():
            self.theta, self.dual = found.theta, found.dual
        return self.reached

    def record(self, **values: Any) -> None:
        """One line of history, shown to the callback."""
        entry = {"iteration": self.count, "seconds": time.perf_counter() - self.start, **values}
        self.history.append(entry)
        self.stopped = self.stopped or (self.callback is not None and self.callback(entry) is True)

    def finish(self, advice: str) -> Solution:
        """The best certified point; `advice` is what to do where the iterations did not suffice."""
        gap = max(self.primal - self.dual, 0.0)  # negative by rounding only
        relative = f"{gap / max(abs(self.primal), 1e-300):.1e}"
        if self.reached:
            status, message = "converged", f"relative duality gap {relative}, {self.tol:.0e} asked for"
        elif self.stopped:
            status, message = "stopped", f"ended by the callback at relative duality gap {relative}"
        elif self.count >= self.limit:
            status, message = "max_iterations", f"relative duality gap {relative} after {self.count} iterations, "
            message += f"{self.tol:.0e} asked for: {advice}"
        else:
            status, message = "stalled", f"no progress below relative duality gap {relative}, {self.tol:.0e} asked for: "
            message += "raise tol, or lam where it is tiny" + (
                "" if self.problem.X.dtype == torch.float64 else ", or use float64"
            )
        values = (self.primal, self.dual, gap, self.kkt, self.count, time.perf_counter() - self.start)
        return Solution(self.U, self.b, self.theta, *values, status=status, message=message, history=self.history)
