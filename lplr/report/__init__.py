"""One self-contained HTML page of a run: run.jsonl and eval-*.json in, report.html out."""

from __future__ import annotations

from lplr.report.page import REPORT, write_report

__all__ = ["REPORT", "write_report"]
