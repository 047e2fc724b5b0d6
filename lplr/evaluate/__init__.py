"""Measure a checkpoint, base and compressed side by side."""

from __future__ import annotations

from lplr.evaluate.perplexity import EvalResult, as_table, context_length, evaluate, to_json

__all__ = ["EvalResult", "as_table", "context_length", "evaluate", "to_json"]
