"""prune.html: accuracy against size of a pruned head, from the prune.json beside it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from lplr.errors import OutputError
from lplr.report.plots import accuracy_of_sizes

PRUNED, PAGE = "prune.json", "prune.html"
COLUMNS = ("gates", "neurons", "parameters", "nll", "error", "accuracy", "held_out_accuracy")
TITLES = ("gates", "neurons", "parameters", "NLL kept apart", "standard error", "accuracy kept apart", "accuracy held out")
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>lplr prune-head: {{ head }}</title>
<style>
:root { color-scheme: light dark; --grid: #8886; --error: light-dark(#1d5fb8, #7db3ff);
  --optimal: light-dark(#0b7a6a, #58d3bd); --certificate: light-dark(#b3500a, #f6a45c); }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 1.5rem auto; padding: 0 1rem; }
td, th { padding: .2rem .7rem; text-align: right; }
tr.chosen { font-weight: 650; color: var(--certificate); }
</style>
</head>
<body>
<h1>{{ head }}</h1>
<p>{{ before }} neurons before. The smallest size within one standard error of the least NLL on texts kept apart is {{ chosen }}
gates (dashed). Dots: accuracy on texts kept apart; squares: on held-out texts, which chose nothing.</p>
<figure>{{ plot }}</figure>
<table>
<thead><tr>{% for title in titles %}<th>{{ title }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in rows %}<tr{% if row[0] == chosen %} class="chosen"{% endif %}>
{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</tbody>
</table>
</body>
</html>
"""


def write_pruning(folder: Path) -> Path:
    """Write prune.html from the prune.json of a head's folder, and return its path.

    Raises OutputError where it is missing, damaged, or the page cannot be written.
    """
    import jinja2
    from markupsafe import Markup

    try:
        found: dict[str, Any] = json.loads((folder / PRUNED).read_text(encoding="utf-8"))
        rows = [[size[name] for name in COLUMNS] for size in found["sizes"]]
        points = [(int(size["gates"]), float(size["accuracy"]), float(size["held_out_accuracy"])) for size in found["sizes"]]
        told = {"head": str(found["head"]["dataset"]), "before": int(found["before"]), "chosen": int(found["chosen"])}
    except (OSError, ValueError, KeyError, TypeError):
        raise OutputError(f"{folder / PRUNED} is missing or damaged: run `lplr prune-head` again") from None
    shown = [[f"{cell:.4f}" if isinstance(cell, float) else cell for cell in row] for row in rows]
    plot = Markup(accuracy_of_sizes(points, told["chosen"], "p"))
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    html = environment.from_string(_PAGE).render(**told, rows=shown, titles=TITLES, plot=plot)
    path, scratch = folder / PAGE, folder / f".{PAGE}"
    try:
        scratch.write_text(html, encoding="utf-8")
        os.replace(scratch, path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({error.strerror}): check the disk and its permissions") from None
    return path
