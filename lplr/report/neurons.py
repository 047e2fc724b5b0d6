"""explain.html: the neurons of a head, the texts they are made of, and their pictures, from the explain.json beside it.

Texts and labels come from files and are escaped by the template; the pictures hold numbers alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lplr.errors import OutputError
from lplr.files import write_text_atomic
from lplr.report.html import rendered
from lplr.report.plots import CLASSES, neuron
from lplr.report.text import number

EXPLANATION, PAGE = "explain.json", "explain.html"
TEMPLATE = "neurons.html.j2"
MARKS = {"o": "●", "^": "▲", "s": "■", "D": "◆"}
COLOURS = ("error", "certificate", "optimal", "bound")


def write_explanation(head: Path) -> Path:
    """Write explain.html from explain.json in the folder of a head, and return its path.

    Raises OutputError when the file is missing or damaged, or the page cannot be written.
    """
    file = head / EXPLANATION
    if not file.is_file():
        raise OutputError(f"{head} has no {EXPLANATION}: run `lplr explain-head` on it")
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        html = render(facts)
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise OutputError(f"{file} is damaged ({error!r}): run `lplr explain-head` again") from None
    write_text_atomic(head / PAGE, html)
    return head / PAGE


def render(facts: dict[str, Any]) -> str:
    """The page as text."""
    classes = list(facts["classes"])
    keys = [(name, MARKS[CLASSES[c % len(CLASSES)][1]], COLOURS[c % len(COLOURS)]) for c, name in enumerate(classes)]
    linear, shown = facts["linear_effect"], len(facts["neurons"])
    cards = [
        (
            "Accuracy",
            number(100 * facts["accuracy"], 3) + " %",
            f"of the head on {number(facts['samples'], 9)} texts of {facts['dataset']}",
        ),
        (
            "Neurons",
            number(facts["network_neurons"], 9),
            f"of the {facts['kind']} network; " + (f"the {shown} strongest follow" if shown else "there are none to tell about"),
        ),
    ]
    if linear is not None:
        cards.append(("Linear part", number(linear, 3), "logits, root mean square: what the head does without its neurons"))
    return rendered(
        TEMPLATE,
        head=Path(facts["head"]).name,
        cards=cards,
        keys=keys,
        neurons=[_neuron(n, facts["labels"], i) for i, n in enumerate(facts["neurons"])],
    )


def _neuron(facts: dict[str, Any], labels: list[int], place: int) -> dict[str, Any]:
    """What the template shows of one neuron."""
    from markupsafe import Markup

    points = facts["points"]
    x, own = points["distances"], points["samples"]
    distance = "signed distance to the hyperplane"
    pictures = [
        neuron(x, points["added"], labels, [(a, b) for a, b, _ in own], (distance, "added to the logit"), f"a{place}"),
        neuron(x, points["along"], labels, [(a, c) for a, _, c in own], (distance, "leading direction within"), f"w{place}"),
    ]
    return {
        "title": f"Neuron {facts['number']}",
        "what": sentence(facts),
        "made": made_of(facts),
        "samples": [_text(t) for t in facts["samples"]],
        "sides": [
            ("Deepest on its open side", [_text(t) for t in facts["open"]]),
            ("On its closed side", [_text(t) for t in facts["closed"]]),
        ],
        "pictures": [Markup(p) for p in pictures],
        "alt": f"signed distances of {len(x)} texts, beside what it adds, and the leading direction within the hyperplane",
    }


def sentence(facts: dict[str, Any]) -> str:
    """What a neuron does, in words."""
    sign = "raises" if facts["when_open"] >= 0 else "lowers"
    return (
        f"open for {100 * facts['share']:.0f} % of the texts, where it {sign} the logit of {facts['favours']!r} by "
        f"{number(abs(facts['when_open']), 3)} on average; effect {number(facts['effect'], 3)} (root mean square)"
    )


def made_of(facts: dict[str, Any]) -> str:
    """How well its samples define a neuron, in words."""
    count = len(facts["samples"])
    if facts["on"] > count:
        return f"goes through {facts['on']} texts; {count} of them, far apart:"
    if facts["on"]:
        return f"goes through these {count} texts:"
    if not facts["agreement"]:
        return "no hyperplane is defined by the texts next to it:"
    return (
        f"nearly the wedge product of these {count} texts: {100 * facts['agreement']:.1f} % of all texts are on the same side, "
        f"correlation of the distances {facts['correlation']:.4f}:"
    )


def _text(facts: dict[str, Any]) -> tuple[str, str, str]:
    return number(facts["distance"], 3), str(facts["label"]), str(facts["text"])
