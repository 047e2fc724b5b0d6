"""Factorization of one matrix: methods, ranks from bits, error bounds and certificates."""

from lplr.factor.bounds import Bound, error_bound
from lplr.factor.certificates import certify, exact_error, measured_error, probe_certificate, weighted_error
from lplr.factor.factorization import Factorization, Format
from lplr.factor.methods import METHODS, factorize
from lplr.factor.rank import layout, plan
from lplr.factor.spectrum import optimal_error, spectrum

__all__ = [
    "METHODS",
    "Bound",
    "Factorization",
    "Format",
    "certify",
    "error_bound",
    "exact_error",
    "factorize",
    "layout",
    "measured_error",
    "optimal_error",
    "plan",
    "probe_certificate",
    "spectrum",
    "weighted_error",
]
