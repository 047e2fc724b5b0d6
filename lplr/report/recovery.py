"""How tuning went, from the lines `recovery` and `distillation` of run.jsonl: a panel of blocks, a curve of the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lplr.report.plots import before_and_after, course
from lplr.report.text import finite, number


def recovery(entries: Sequence[dict[str, Any]]) -> list[tuple[str, Any, str]]:
    """(what it is, SVG, the same in words) of each stage that there was; lines without finite losses are left out."""
    from markupsafe import Markup

    out: list[tuple[str, Any, str]] = []
    blocks = [line for line in entries if line.get("kind") == "recovery" and _known(line)]
    if blocks:
        points = [(int(line["block"]) + 1, line["before"], line["after"]) for line in blocks]
        better = sum(after < before for _, before, after in points)
        shares = [after / before for _, before, after in points if before > 0] or [1.0]
        words = (
            f"{better} of {len(points)} blocks better on held-out rows; error after over error before "
            f"{number(min(shares))} to {number(max(shares))}"
        )
        out.append(("blocks", Markup(before_and_after(points, "r0")), words))
    for line in entries:
        if line.get("kind") == "distillation" and _known(line):
            losses = [line["before"], *(v for v in line["losses"] if finite(v) is not None)]
            words = f"divergence on held-out rows from {number(line['before'])} to {number(line['after'])} nats a token"
            out.append(("the whole model", Markup(course(losses, "r1")), f"{words} in {len(losses) - 1} passes"))
    return out


def _known(line: dict[str, Any]) -> bool:
    """Whether the losses of a line are numbers."""
    return all(finite(line.get(key)) is not None for key in ("before", "after")) and isinstance(line.get("losses"), list)
