"""The heads beside a compressed model as tables: how each was fitted, and what `lplr eval` measured of it.

Of head.json and eval-*.json in DIR/heads/NAME, as `lplr fit-head`, `prune-head` and `eval` write them; missing or odd is a dash.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lplr.report.evaluations import Table
from lplr.report.text import number, percent, show, with_error

HEADS, FACTS, PRUNED = "heads", "head.json", "prune.json"
Read = Callable[[Path], dict[str, Any]]

_FITTED = (
    "Classification heads on this model, each trained to a certified duality gap. Accuracy and NLL, in nats a sample, are those "
    "on texts that were held out; the linear probe is a logistic regression on the same features. Before pruning is the number "
    "of neurons of the head that a pruned one was made from."
)
_MEASURED = "By lplr eval, on labelled text of one's own choice; the ± is one standard error."


def head_tables(folder: Path, read: Read) -> list[Table]:
    """Those that have a row; `read` gives the JSON of a file."""
    heads = [(path.parent, read(path)) for path in sorted((folder / HEADS).glob(f"*/{FACTS}"))]
    found = (
        Table("heads", "Heads", _FITTED, [_fitted(head, facts, read) for head, facts in heads]),
        Table("head-evaluations", "Heads, evaluated", _MEASURED, [row for head, _ in heads for row in _measured(head, read)]),
    )
    return [table for table in found if table.rows]


def _fitted(head: Path, facts: dict[str, Any], read: Read) -> dict[str, str]:
    pruned = read(head / PRUNED) if (head / PRUNED).is_file() else {}
    return {
        "Head": head.name,
        "Text": show(facts.get("dataset")),
        "Samples": number(facts.get("samples"), 9),
        "Held out": show(facts.get("held_out")),
        "Neurons": number(facts.get("neurons"), 9),
        "Before pruning": number(pruned.get("before"), 9),
        "Gap, relative": number(facts.get("relative_gap"), 2),
        "Accuracy": percent(facts.get("accuracy"), 2),
        "Linear probe": percent(facts.get("probe_accuracy"), 2),
        "NLL": number(facts.get("nll")),
        "Linear probe's NLL": number(facts.get("probe_nll")),
    }


def _measured(head: Path, read: Read) -> Iterator[dict[str, str]]:
    for path in sorted(head.glob("eval-*.json")):
        e = read(path)
        yield {
            "Head": head.name,
            "Text": show(e.get("text")),
            "Samples": number(e.get("samples"), 9),
            "Accuracy": with_error(e.get("accuracy"), e.get("standard_error")),
            "NLL": number(e.get("nll")),
            "Calibration error": number(e.get("calibration_error")),
        }
