"""What measured windows prove about the text that they were drawn from: upper bounds of what a compressed model loses on it.

For independent Z_1 .. Z_n in [0, b] with mean m and variance V = 1/(n-1) sum (Z_i - m)^2, with probability at least 1 - delta

    E Z <= m + sqrt(2 V ln(2/delta) / n) + 7 b ln(2/delta) / (3 (n - 1))        (Maurer, Pontil, COLT 2009, Theorem 4)

A divergence has no range b: a model may give a token as small a probability as it likes, and then no finite number of windows
bounds the mean.  So the bounds are for the model that is *smoothed*: with q the compressed model's probabilities of v tokens

    q_e = (1 - e) q + e / v,     e = SMOOTHING          which anybody can serve, and costs at most ln(1 / (1 - e)) nats a token

Then, p being the base, of a window with predictions t = 1 .. T

    Z = 1/T sum_t KL(p_t || q_e,t)                        in [0, ln(v / e)]:  -ln q_e <= ln(v / e), and the entropy of p is >= 0
    Z = max(0, 1/T sum_t ln p_t(x_t) - ln q_e,t(x_t))     in [0, ln(v / e)];  E Z >= log ratio of perplexities
    Z = 1/T sum_t [argmax p_t != argmax q_t]              in [0, 1], of the model as it is

Each of the three bounds holds with 95 % confidence by itself.  Assumed: the windows are independent draws from the distribution
that the bound speaks of.  Consecutive windows of one document are not quite that; `lag1`, the correlation of neighbouring
windows' divergence, tells how far off they are (+- 2 / sqrt(n) is what independent ones give).  The last term falls as 1 / n:
many short windows prove more than few long ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict

CONFIDENCE = 0.95
SMOOTHING = 0.01
ASSUMED = "windows are independent draws; divergence and perplexity are of the model mixed with 1 % of the uniform distribution"


class Certificate(BaseModel):
    """Measured means and their upper bounds; kl in nats a token, ratio that of the perplexities, range in nats."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    confidence: float = CONFIDENCE
    windows: int
    smoothing: float
    vocabulary: int
    range: float
    kl: float
    kl_bound: float
    ratio: float
    ratio_bound: float
    disagreement: float
    disagreement_bound: float
    lag1: float | None = None
    assumed: str = ASSUMED


def upper_bound(values: Sequence[float], largest: float, confidence: float = CONFIDENCE) -> float:
    """The bound above for E Z from values Z_i in [0, largest]; never more than `largest`.

    Raises ValueError for fewer than two values, one that is outside of the range, or a confidence outside of (0, 1).
    """
    n = len(values)
    if n < 2 or not 0 < confidence < 1:
        raise ValueError(f"{n} values at confidence {confidence}: at least 2 and a confidence between 0 and 1 expected")
    if not all(0 <= z <= largest for z in values):
        raise ValueError(f"a value lies outside of [0, {largest:g}]: the bound needs a range that holds for all")
    mean = math.fsum(values) / n
    variance = math.fsum((z - mean) ** 2 for z in values) / (n - 1)
    log = math.log(2 / (1 - confidence))
    return min(largest, mean + math.sqrt(2 * variance * log / n) + 7 * largest * log / (3 * (n - 1)))


def certify(per_window: Mapping[str, Sequence[float]], vocabulary: int, smoothing: float = SMOOTHING) -> Certificate | None:
    """The certificate from `smoothed_kl`, `smoothed_excess` (before the maximum is taken) and `top1` of every window.

    None for fewer than two windows, or where a value is NaN.
    """
    kls, tops = per_window["smoothed_kl"], per_window["top1"]
    excess = [max(0.0, z) for z in per_window["smoothed_excess"]]
    n, largest = len(kls), math.log(vocabulary / smoothing)
    if n < 2 or any(math.isnan(z) for z in (*kls, *per_window["smoothed_excess"])):
        return None
    # values are sums of float32: one that rounding lifted over the range is put back on it
    kls, excess = ([min(z, largest) for z in values] for values in (kls, excess))
    disagreement = [1 - z for z in tops]
    return Certificate(
        windows=n,
        smoothing=smoothing,
        vocabulary=vocabulary,
        range=largest,
        kl=math.fsum(kls) / n,
        kl_bound=upper_bound(kls, largest),
        ratio=math.exp(math.fsum(excess) / n),
        ratio_bound=math.exp(upper_bound(excess, largest)),
        disagreement=math.fsum(disagreement) / n,
        disagreement_bound=upper_bound(disagreement, 1.0),
        lag1=_lag1(kls),
    )


def _lag1(values: Sequence[float]) -> float | None:
    """Correlation of each value with the next one; None where nothing varies."""
    mean = math.fsum(values) / len(values)
    off = [z - mean for z in values]
    total = math.fsum(z * z for z in off)
    return math.fsum(a * b for a, b in zip(off, off[1:], strict=False)) / total if total > 0 else None
