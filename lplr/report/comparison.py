"""Several evaluations beside one another: their JSON in one file, and perplexity against bits per weight as a drawing."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lplr.errors import OutputError
from lplr.report.page import size
from lplr.report.plots import plain_ticks

JSON, PLOT = "comparison.json", "comparison.svg"


def write_comparison(folder: Path, texts: Sequence[str]) -> list[Path]:
    """Write comparison.json and, of the evaluations that have bits and a finite perplexity, comparison.svg; return their paths.

    texts: what `lplr eval` wrote of each model, JSON.  Raises OutputError when the folder cannot be written.
    """
    evaluations = [json.loads(text) for text in texts]
    contents = {JSON: json.dumps({"models": evaluations}, indent=1, allow_nan=False) + "\n"}
    plot = draw(evaluations)
    if plot is not None:
        contents[PLOT] = plot
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            partial = folder / f".{name}.partial"
            partial.write_text(content, encoding="utf-8")
            partial.replace(folder / name)
    except OSError as error:
        raise OutputError(f"{folder} cannot be written ({error.strerror}): give another folder with --output") from None
    return [folder / name for name in contents]


def draw(evaluations: Sequence[dict[str, Any]]) -> str | None:
    """SVG of perplexity (logarithmic, bars of one standard error) over bits per weight, the base a line; None without a point."""
    points = [(e["model"], e) for e in evaluations if e.get("model") and _finite(e.get("perplexity"))]
    if not points:
        return None
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "lplr", "font.size": 9, "text.parse_math": False}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.grid(True, which="major", linewidth=0.4)
        for model, e in points:
            spread = e["perplexity"] * (e.get("nll_se") or 0)
            axes.errorbar(model["bits_per_weight"], e["perplexity"], yerr=spread, fmt="o", markersize=5, capsize=3)
            label = f"{model['name']}, {size(model['bytes'])}"
            place = {"textcoords": "offset points", "xytext": (6, 6)}
            axes.annotate(label, (model["bits_per_weight"], e["perplexity"]), **place)
        first = points[0][1]
        base, theirs = first.get("base"), first.get("base_perplexity")
        if base and theirs is not None and _finite(theirs):
            axes.axhline(theirs, color="black", linewidth=1, linestyle="--")
            label = f"{base['name']} uncompressed, {base['bits_per_weight']:.3g} bits per weight, {size(base['bytes'])}"
            axes.annotate(label, (0.01, theirs), xycoords=("axes fraction", "data"), textcoords="offset points", xytext=(0, -11))
        axes.set_yscale("log")
        axes.margins(x=0.25, y=0.2)
        plain_ticks(axes.yaxis)
        axes.set_xlabel("stored bits per weight, everything counted")
        axes.set_ylabel("perplexity")
        axes.set_title(f"{first.get('dataset')}, {first.get('windows')} windows of {first.get('seqlen')} tokens", fontsize=9)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value > 0
