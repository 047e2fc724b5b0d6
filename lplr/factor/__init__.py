"""Factorization of one matrix: methods, ranks from bits, and error bounds."""
