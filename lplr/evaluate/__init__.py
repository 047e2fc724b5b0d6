"""Measure a checkpoint, base and compressed side by side."""

from __future__ import annotations

from lplr.evaluate.certificate import Certificate
from lplr.evaluate.perplexity import context_length, evaluate
from lplr.evaluate.result import EvalResult, as_table, to_json

__all__ = ["Certificate", "EvalResult", "as_table", "context_length", "evaluate", "to_json"]
