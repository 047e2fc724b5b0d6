"""Convex training of two-layer networks: programmes, solvers with certificates, gates."""

from lplr.convex.certificate import Certificate, certify, screen
from lplr.convex.gates import Gates, clean, gaussian, patterns, sample
from lplr.convex.penalty import Penalty
from lplr.convex.problem import Problem
from lplr.convex.solution import Solution
from lplr.convex.solve import lambda_max, solve

__all__ = [
    "Certificate",
    "Gates",
    "Penalty",
    "Problem",
    "Solution",
    "certify",
    "clean",
    "gaussian",
    "lambda_max",
    "patterns",
    "sample",
    "screen",
    "solve",
]
