"""Factorization of one matrix: methods, ranks from bits, and error bounds."""

from lplr.factor.factorization import Factorization, Format
from lplr.factor.methods import METHODS, factorize
from lplr.factor.rank import layout, plan

__all__ = ["METHODS", "Factorization", "Format", "factorize", "layout", "plan"]
