"""Accuracy of a model on a task, and how far it is from that of the model it was made from, sample by sample.

standard error      sqrt(1/(n-1) sum (z_i - z)^2 / n), as lm-eval has it
difference          mean of z_i - b_i over the same samples, b the base
its 95 % interval   of right / wrong answers: Wald's after 1/2 is added to each of the four counts of (base, model) right and
                    wrong (Agresti, Min, Statistics in Medicine 24, 2005), which holds its level for few samples too
changed             share of samples that only one of the two gets right: a difference of 0 may hide many
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

Z95 = 1.959963984540054  # the normal distribution's 97.5 % point
PERPLEXITY = "perplexity"  # of the targets: its per-sample values are log-likelihoods


@dataclass(frozen=True)
class TaskScores:
    """Values of one metric for every sample of a task, in order; samples_sha256 is that of the prompts and targets."""

    task: str
    metric: str
    values: tuple[float, ...]
    source: str
    samples_sha256: str
    version: str


class TaskResult(BaseModel):
    """One metric of one task: value and standard error; beside a base its own, the paired difference and its 95 % interval."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="null")

    task: str
    metric: str
    samples: int
    value: float
    se: float | None
    base_value: float | None = None
    base_se: float | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    changed: float | None = None
    source: str
    samples_sha256: str
    version: str
    per_sample: tuple[float, ...]
    base_per_sample: tuple[float, ...] = ()

    def table(self) -> list[tuple[str, str]]:
        """(measure, value) rows to print."""
        scale, unit = (1.0, "") if self.metric == PERPLEXITY else (100.0, " %")
        told = f"{scale * self.value:.2f}{unit}" + (f" ± {scale * self.se:.2f}" if self.se is not None else "")
        if self.base_value is not None:
            told += f", base {scale * self.base_value:.2f}{unit}"
        if self.difference is not None and self.low is not None and self.high is not None:
            told += f", difference {100 * self.difference:+.2f} ({100 * self.low:+.2f} to {100 * self.high:+.2f})"
            told += f", {100 * (self.changed or 0):.1f} % changed"
        return [(f"{self.task}, {self.metric}", f"{told}, {self.samples:,} samples")]


def compared(scores: TaskScores, base: TaskScores | None = None) -> TaskResult:
    """The figures of a model, and beside a base's scores of the same samples the paired ones.

    Raises ValueError when the two are of other samples.
    """
    value, se = _mean(scores)
    fields: dict[str, object] = {}
    if base is not None:
        ours, theirs = ((s.task, s.metric, s.samples_sha256, len(s.values)) for s in (scores, base))
        if ours != theirs:
            raise ValueError(f"{scores.task}: model and base were measured on other samples: {ours} and {theirs}")
        base_value, base_se = _mean(base)
        fields = {"base_value": base_value, "base_se": base_se, "base_per_sample": base.values}
        if scores.metric != PERPLEXITY:
            low, high = paired_interval(scores.values, base.values)
            changed = sum(z != b for z, b in zip(scores.values, base.values, strict=True)) / len(scores.values)
            fields |= {"difference": value - base_value, "low": low, "high": high, "changed": changed}
    return TaskResult(
        task=scores.task,
        metric=scores.metric,
        samples=len(scores.values),
        value=value,
        se=se,
        source=scores.source,
        samples_sha256=scores.samples_sha256,
        version=scores.version,
        per_sample=scores.values,
        **fields,  # type: ignore[arg-type]
    )


def paired_interval(values: Sequence[float], base: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of values_i - base_i, both of 0 and 1; within [-1, 1]."""
    n = len(values) + 2
    only_model = sum(z > b for z, b in zip(values, base, strict=True)) + 0.5
    only_base = sum(z < b for z, b in zip(values, base, strict=True)) + 0.5
    middle = (only_model - only_base) / n
    spread = Z95 * math.sqrt(only_model + only_base - (only_model - only_base) ** 2 / n) / n
    return max(-1.0, middle - spread), min(1.0, middle + spread)


def _mean(scores: TaskScores) -> tuple[float, float | None]:
    """Value and standard error; of the perplexity exp(-mean), whose relative error is the error of the mean."""
    n = len(scores.values)
    mean = math.fsum(scores.values) / n
    se = math.sqrt(math.fsum((z - mean) ** 2 for z in scores.values) / (n - 1) / n) if n > 1 else None
    if scores.metric != PERPLEXITY:
        return mean, se
    value = math.exp(-mean) if mean > -700 else math.inf
    return value, None if se is None else value * se
