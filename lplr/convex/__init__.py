"""Convex training of two-layer networks: programmes, solvers with certificates, gates."""

from lplr.convex.certificate import Certificate, certify, screen
from lplr.convex.gates import Gates, clean, gaussian, patterns, sample
from lplr.convex.lasso import Lasso, solve_lasso
from lplr.convex.penalty import Penalty
from lplr.convex.problem import Problem
from lplr.convex.solution import Solution
from lplr.convex.solve import lambda_max, solve
from lplr.convex.wedge import Wedges

__all__ = [
    "Certificate",
    "Gates",
    "Lasso",
    "Penalty",
    "Problem",
    "Solution",
    "Wedges",
    "certify",
    "clean",
    "gaussian",
    "lambda_max",
    "patterns",
    "sample",
    "screen",
    "solve",
    "solve_lasso",
]
