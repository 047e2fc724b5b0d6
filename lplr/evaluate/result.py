"""What an evaluation found: one record a model, which is its JSON, and its table."""

from __future__ import annotations

import math
from typing import Any

from pydantic import BaseModel, ConfigDict

from lplr.evaluate.certificate import Certificate
from lplr.evaluate.facts import ModelFacts
from lplr.evaluate.speed import Speed
from lplr.evaluate.tasks import TaskResult

BOS_RULE = "none: each window starts with its own first token, which is not predicted"


class EvalResult(BaseModel):
    """What `evaluate` measured.  nll is the mean of -log p in nats, kl that of KL(base || model), over all predictions.

    The `_se` fields are standard errors of the mean over windows (None for a single window); difference_se is that of
    nll - base_nll, window by window, so ratio is known to a factor of exp(+-difference_se).  finite is False when a
    logit was NaN or a predicted token had probability zero: perplexity is then NaN or inf.  per_window holds the mean of every
    measure in every window, certificate what they prove.  tokens_per_second is that of the forward passes of the windows.
    model, base, tasks and speed are there where a folder was evaluated, and the last two where they were asked for.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="null")

    dataset: str
    dataset_sha256: str
    seqlen: int
    windows: int
    tokens: int  # predictions
    text_tokens: int
    bos: str = BOS_RULE
    perplexity: float
    nll: float
    nll_se: float | None = None
    base_perplexity: float | None = None
    base_nll: float | None = None
    base_nll_se: float | None = None
    ratio: float | None = None
    difference_se: float | None = None
    kl: float | None = None
    kl_se: float | None = None
    top1: float | None = None
    finite: bool = True
    certificate: Certificate | None = None
    per_window: dict[str, tuple[float, ...]] = {}
    tokens_per_second: float | None = None
    batch_size: int = 1
    calibration: dict[str, Any] | None = None
    note: str = ""
    versions: dict[str, str] = {}
    machine: str = ""
    started: str = ""
    seconds: float = 0.0
    model: ModelFacts | None = None
    base: ModelFacts | None = None
    tasks: tuple[TaskResult, ...] = ()
    speed: Speed | None = None


def to_json(result: EvalResult) -> str:
    """The result as a JSON object; NaN and inf become null, and `finite` tells of them."""
    return result.model_dump_json(indent=1) + "\n"


def as_table(result: EvalResult) -> list[tuple[str, str]]:
    """(measure, value) rows to print."""
    rows = [("perplexity", with_error(result.perplexity, result.nll_se))]
    if result.base_perplexity is not None:
        rows += [
            ("perplexity of the base", with_error(result.base_perplexity, result.base_nll_se)),
            ("ratio", with_error(result.ratio, result.difference_se)),
            ("KL(base || model), nats a token", number(result.kl)),
            ("top-1 agreement", "-" if result.top1 is None else f"{100 * result.top1:.2f} %"),
        ]
    rows += _certified(result.certificate)
    rows += [row for task in result.tasks for row in task.table()]
    rows += _size(result.model) + _speed(result)
    text = result.dataset or "unnamed"
    digest = f", sha256 {result.dataset_sha256[:8]}" if result.dataset_sha256 else ""
    rows += [
        ("text", f"{text}, {result.text_tokens:,} tokens{digest}"),
        ("context", f"{result.windows} windows of {result.seqlen:,} tokens, {result.tokens:,} predictions"),
        ("BOS", result.bos),
    ]
    if result.calibration is not None:
        rows.append(("calibrated on", str(result.calibration.get("name") or "nothing (data-free)")))
    if not result.finite:
        rows.append(("warning", "a logit is NaN or a token of the text has probability zero: a model is damaged"))
    if result.note:
        rows.append(("note", result.note))
    return rows


def _certified(found: Certificate | None) -> list[tuple[str, str]]:
    if found is None:
        return []
    sure = f"at {100 * found.confidence:g} % confidence"
    return [
        (
            f"certified {sure}",
            f"KL <= {found.kl_bound:.4g} nats, ratio <= {found.ratio_bound:.4g}, smoothed by {found.smoothing:g}",
        ),
        ("", f"another first token in <= {100 * found.disagreement_bound:.1f} % of places"),
        ("where", f"{found.windows} windows are independent draws; more, shorter windows prove more"),
    ]


def _size(model: ModelFacts | None) -> list[tuple[str, str]]:
    if model is None:
        return []
    bits = f"{model.bits_per_weight:.4f} bits per weight, {model.bits_per_parameter:.3f} per parameter of the whole model"
    return [("weights", f"{model.bytes:,} bytes, {bits}")]


def _speed(result: EvalResult) -> list[tuple[str, str]]:
    rows = []
    if result.tokens_per_second is not None:
        rows.append(("reading the windows", f"{result.tokens_per_second:,.1f} tokens a second"))
    if result.speed is not None:
        rows += result.speed.table()
    return rows


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}" if abs(value) < 1 else f"{value:,.3f}"


def with_error(value: float | None, log_error: float | None) -> str:
    """value ± value * log_error: the error of a logarithm is the relative error of what it is taken of."""
    if value is None or log_error is None or not math.isfinite(value):
        return number(value)
    return f"{number(value)} ± {number(value * log_error)}"
