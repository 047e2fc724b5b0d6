"""The evaluations of a folder as tables of texts: what was measured, what it proves, tasks, speed.

The JSON of `lplr eval` may be older than a measure, or edited by hand: what is missing or odd is a dash.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from lplr.report.text import DASH, finite, number, percent, show, size, with_error

Evaluations = Sequence[tuple[str, dict[str, Any]]]  # (file name, its JSON)
PERPLEXITY = "perplexity"  # the one metric of tasks that is no share


class Table(NamedTuple):
    """Rows of heading -> text, all with the same headings; the first column names the row."""

    key: str
    title: str
    about: str
    rows: list[dict[str, str]]


def tables(evaluations: Evaluations, heads: Evaluations = ()) -> list[Table]:
    """Those that have a row.  heads: (name of the head, the JSON of an evaluation of it)."""
    found = (
        Table("results", "Perplexity and divergence", _MEASURED, [_measured(name, e) for name, e in evaluations]),
        Table("certificates", "What the windows prove", _PROVED, [_proved(*c) for c in _objects(evaluations, "certificate")]),
        Table("tasks", "Tasks", _TASKS, [_task(t) for _, t in _objects(evaluations, "tasks")]),
        Table("speed", "Speed and memory", _SPEED, [_speed(*s) for s in _objects(evaluations, "speed")]),
        Table("heads", "Heads", _HEADS, [_head(*h) for h in heads]),
    )
    return [table for table in found if table.rows]


_MEASURED = (
    "Perplexity is exp of the mean negative log-likelihood of a token: lower is better, 1 is perfect. The text is read in "
    "windows without overlap, and base and compressed model read the same ones. KL is the divergence of the compressed model's "
    "next-token distribution from the base's; top-1 is how often both rank the same token first. The ± is one standard error "
    "over windows, that of the ratio window by window; BOS tells whether a token was put in front of each window."
)
_PROVED = (
    "Upper bounds of what is expected on the distribution that the text was drawn from (empirical Bernstein), each at its "
    "confidence by itself. Assumed: the windows are independent draws; divergence and ratio are of the model mixed with a "
    "little of the uniform distribution, as “smoothed by” says. Lag-1 is the correlation of neighbouring windows: far from 0, "
    "they are not independent. Many short windows prove more than few long ones."
)
_TASKS = (
    "Measured by lm-eval; the ± is one standard error. The difference, in percentage points, is taken sample by sample, with "
    "its 95 % interval: where that holds 0, the samples do not tell the models apart. Changed is the share of samples that only "
    "one of the two gets right."
)
_HEADS = (
    "Classifiers that lplr fit-head trained on this model, on labelled text. The ± is one standard error. NLL is the mean "
    "negative log-likelihood of the right class; the calibration error is how far, on average over 15 bins of confidence, the "
    "share of right answers lies from the confidence: 0 is perfect."
)
_SPEED = "Measured alone, in a process of its own; read is one pass over a prompt, written is greedy decoding after it."


def _measured(name: str, e: dict[str, Any]) -> dict[str, str]:
    # the error of a mean log-likelihood is the relative error of the perplexity
    compressed = with_error(e.get("perplexity"), _times(e.get("perplexity"), e.get("nll_se")))
    broken = e.get("finite") is False and finite(e.get("perplexity")) is None
    return {
        "Text": _text(name, e),
        "Context": number(e.get("seqlen"), 9),
        "Windows": number(e.get("windows"), 9),
        "Predictions": number(e.get("tokens"), 12),
        "Base": number(e.get("base_perplexity")),
        "Compressed": "not finite" if broken else compressed,
        "Ratio": with_error(e.get("ratio"), _times(e.get("ratio"), e.get("difference_se"))),
        "KL, nats": with_error(e.get("kl"), e.get("kl_se"), 3),
        "Top-1": percent(e.get("top1")),
        "BOS": show(e.get("bos")).split(":")[0],
        "Note": show(e.get("note")),
    }


def _proved(text: str, c: dict[str, Any]) -> dict[str, str]:
    return {
        "Text": text,
        "Confidence": percent(c.get("confidence"), 0),
        "Windows": number(c.get("windows"), 9),
        "KL, nats": _at_most(number(c.get("kl"), 3), number(c.get("kl_bound"), 3)),
        "Ratio of perplexities": _at_most(number(c.get("ratio")), number(c.get("ratio_bound"))),
        "Another first token": _at_most(percent(c.get("disagreement")), percent(c.get("disagreement_bound"))),
        "Smoothed by": number(c.get("smoothing"), 2),
        "Lag-1": number(c.get("lag1"), 2),
    }


def _task(t: dict[str, Any]) -> dict[str, str]:
    scale, unit = (1.0, "") if t.get("metric") == PERPLEXITY else (100.0, " %")

    def told(value: Any, se: Any = None) -> str:
        if finite(value) is None:
            return DASH
        return f"{scale * value:,.2f}{unit}" + ("" if finite(se) is None else f" ± {scale * se:,.2f}")

    ends = [finite(t.get(end)) for end in ("difference", "low", "high")]
    middle, low, high = (None if end is None else f"{100 * end:+.2f}" for end in ends)
    return {
        "Task": show(t.get("task")),
        "Metric": show(t.get("metric")),
        "Samples": number(t.get("samples"), 12),
        "Base": told(t.get("base_value"), t.get("base_se")),
        "Compressed": told(t.get("value"), t.get("se")),
        "Difference": DASH if middle is None else middle + (f" ({low} to {high})" if low and high else ""),
        "Changed": percent(t.get("changed")),
        "Samples from": show(t.get("source")),
    }


def _speed(text: str, s: dict[str, Any]) -> dict[str, str]:
    return {
        "Measured with": text,
        "Written, tokens a second": number(s.get("writing"), 3),
        "Read, tokens a second": number(s.get("reading"), 3),
        "Peak memory": size(s.get("peak_memory")),
        "Of it before loading": size(s.get("idle_memory")),
        "Loading": DASH if finite(s.get("load_seconds")) is None else f"{number(s['load_seconds'], 3)} s",
        "Where": f"{show(s.get('dtype'))}, {show(s.get('device'))}, {number(s.get('threads'), 9)} threads",
    }


def _head(name: str, e: dict[str, Any]) -> dict[str, str]:
    share, se = finite(e.get("accuracy")), finite(e.get("standard_error"))
    return {
        "Head": name,
        "Text": show(e.get("text")),
        "Samples": number(e.get("samples"), 12),
        "Accuracy": percent(share) if share is None or se is None else f"{100 * share:.2f} % ± {100 * se:.2f}",
        "NLL, nats": number(e.get("nll"), 4),
        "Calibration error": number(e.get("calibration_error"), 3),
    }


def _objects(evaluations: Evaluations, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(text, object) of every object, or list of objects, that stands under the key."""
    for name, e in evaluations:
        found = e.get(key)
        yield from ((_text(name, e), one) for one in (found if isinstance(found, list) else [found]) if isinstance(one, dict))


def _text(name: str, e: dict[str, Any]) -> str:
    return show(e.get("dataset") or name)


def _times(value: Any, other: Any) -> float | None:
    return None if finite(value) is None or finite(other) is None else value * other


def _at_most(mean: str, bound: str) -> str:
    return mean if bound == DASH else f"{mean}, at most {bound}"
