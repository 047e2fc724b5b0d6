"""prune.html: accuracy against size of a pruned head, from the prune.json beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lplr.errors import OutputError
from lplr.files import write_text_atomic
from lplr.report.html import rendered
from lplr.report.plots import accuracy_of_sizes
from lplr.report.text import number

PRUNED, PAGE = "prune.json", "prune.html"
COLUMNS = ("gates", "neurons", "parameters", "nll", "error", "accuracy", "held_out_accuracy")
TITLES = ("gates", "neurons", "parameters", "NLL kept apart", "standard error", "accuracy kept apart", "accuracy held out")
TEMPLATE = "prune.html.j2"


def write_pruning(folder: Path) -> Path:
    """Write prune.html from the prune.json of a head's folder, and return its path.

    Raises OutputError where it is missing, damaged, or the page cannot be written.
    """
    from markupsafe import Markup

    try:
        found: dict[str, Any] = json.loads((folder / PRUNED).read_text(encoding="utf-8"))
        rows = [[size[name] for name in COLUMNS] for size in found["sizes"]]
        points = [(int(size["gates"]), float(size["accuracy"]), float(size["held_out_accuracy"])) for size in found["sizes"]]
        told = {"head": str(found["head"]["dataset"]), "before": int(found["before"]), "chosen": int(found["chosen"])}
        most, best = max(points)[0], max(apart for _, apart, _ in points)
    except (OSError, ValueError, KeyError, TypeError):
        raise OutputError(f"{folder / PRUNED} is missing or damaged: run `lplr prune-head` again") from None
    shown = [(row[0] == told["chosen"], [number(cell, 9 if isinstance(cell, int) else 4) for cell in row]) for row in rows]
    alt = f"Accuracy of {len(points)} sizes from {min(points)[0]} to {most} gates, at most {number(best)} on texts kept apart"
    plot = Markup(accuracy_of_sizes(points, told["chosen"], "p"))
    path = folder / PAGE
    write_text_atomic(path, rendered(TEMPLATE, **told, rows=shown, titles=TITLES, plot=plot, alt=alt))
    return path
