"""Perplexity of a causal language model, and its distance from the model it was made from.

The protocol is that of GPTQ (arXiv:2210.17323): the text is tokenised once without BOS and cut into windows of
`seqlen` tokens without overlap; every window is read on its own and predicts its seqlen - 1 last tokens; what is left
of the text after the last whole window is not read.  Base and compressed model read the same window one after the
other, so memory holds the two models and the logits of one window of each.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from lplr.errors import CheckpointError, DatasetError, RecipeError
from lplr.hf.text import Text
from lplr.metrics import kl_divergence, perplexity, token_nll, top1_agreement

DEFAULT_SEQLEN = 2048
BOS_RULE = "none: each window starts with its own first token, which is not predicted"


class EvalResult(BaseModel):
    """What `evaluate` measured.  nll is the mean of -log p in nats, kl that of KL(base || model), over all predictions.

    The `_se` fields are standard errors of the mean over windows (None for a single window); difference_se is that of
    nll - base_nll, window by window, so ratio is known to a factor of exp(+-difference_se).  finite is False when a
    logit was NaN or a predicted token had probability zero: perplexity is then NaN or inf.
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
    calibration: dict[str, Any] | None = None
    note: str = ""
    versions: dict[str, str] = {}
    seconds: float = 0.0


def evaluate(
    model: nn.Module,
    tokens: Tensor,
    *,
    seqlen: int | None = None,
    max_windows: int | None = None,
    base: nn.Module | None = None,
    text: Text | None = None,
    calibration: dict[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> EvalResult:
    """Perplexity of `model` on `tokens` int64 (n,), beside that of `base` if one is given.

    seqlen None is 2,048 or the model's context if that is shorter.  text names the source in the result, calibration
    (name, sha256, rows, seqlen) is passed through to it.  progress is called with (windows done, windows).
    A model is any causal LM whose forward takes input_ids (1, s) and returns `.logits` (1, s, v).

    Raises DatasetError for fewer than two tokens or one outside of the vocabulary, RecipeError for a window that does
    not fit the model, CheckpointError for two vocabularies.  NaN logits raise nothing: see `EvalResult.finite`.
    """
    started = time.perf_counter()
    models = [model] if base is None else [model, base]
    seqlen = _checked_seqlen(models, seqlen)
    _check_tokens(models, tokens)
    rows, note = _windows(tokens, seqlen, max_windows)
    sums = [_Sums() for _ in range(1 + 3 * (base is not None))]  # nll; base nll, KL, top-1
    difference = _Sums()
    with torch.inference_mode(), _evaluating(models):
        for done, row in enumerate(rows, 1):
            measured = _measure(models, row)
            for total, values in zip(sums, measured, strict=True):
                total.add(values)
            if base is not None:
                difference.add(measured[0] - measured[1])
            if progress is not None:
                progress(done, len(rows))
    fields = _compared(sums, difference) if base is not None else {}
    nll = sums[0]
    finite = all(math.isfinite(total.mean) for total in sums)
    return EvalResult(
        dataset=text.name if text else "",
        dataset_sha256=text.sha256 if text else "",
        seqlen=rows.shape[1],
        windows=len(rows),
        tokens=nll.count,
        text_tokens=tokens.numel(),
        perplexity=perplexity(nll.total, nll.count),
        nll=nll.mean,
        nll_se=nll.standard_error,
        finite=finite,
        calibration=calibration,
        note=note,
        versions=_versions(),
        seconds=time.perf_counter() - started,
        **fields,
    )


def context_length(model: nn.Module) -> int | None:
    """The most tokens that the model reads at once as its config tells, None if it does not."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    found = getattr(config, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def to_json(result: EvalResult) -> str:
    """The result as a JSON object; NaN and inf become null, and `finite` tells of them."""
    return result.model_dump_json(indent=1) + "\n"


def as_table(result: EvalResult) -> list[tuple[str, str]]:
    """(measure, value) rows to print."""
    rows = [("perplexity", _with_error(result.perplexity, result.nll_se))]
    if result.base_perplexity is not None:
        rows += [
            ("perplexity of the base", _with_error(result.base_perplexity, result.base_nll_se)),
            ("ratio", _with_error(result.ratio, result.difference_se)),
            ("KL(base || model), nats a token", _number(result.kl)),
            ("top-1 agreement", "-" if result.top1 is None else f"{100 * result.top1:.2f} %"),
        ]
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


class _Sums:
    """Sum and count over predictions in float64, and the mean of every window."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0
        self.window_means: list[float] = []

    def add(self, values: Tensor) -> None:
        """values (s - 1,) of one window."""
        total = values.double().sum().item()
        self.total += total
        self.count += values.numel()
        self.window_means.append(total / values.numel())

    @property
    def mean(self) -> float:
        return self.total / self.count

    @property
    def standard_error(self) -> float | None:
        """Of the mean, the windows being taken as independent; None for one window."""
        n = len(self.window_means)
        if n < 2:
            return None
        return (torch.tensor(self.window_means, dtype=torch.float64).std() / math.sqrt(n)).item()


def _measure(models: list[nn.Module], row: Tensor) -> list[Tensor]:
    """Per prediction of one window (s,): nll, and with a base its nll, KL and top-1 agreement; each (s - 1,)."""
    logits = [_logits(m, row) for m in models]
    nlls = [token_nll(x, row[1:].to(x.device)) for x in logits]
    if len(logits) == 1:
        return nlls
    model, base = logits
    if base.shape != model.shape:
        raise CheckpointError(
            f"the base has a vocabulary of {base.shape[-1]} and the model one of {model.shape[-1]}: "
            "compare a model with the one it was made from"
        )
    # distances are taken where the base's logits are: the models may be on two devices
    pair = base, model.to(base.device)
    return [nlls[0].cpu(), nlls[1].cpu(), kl_divergence(*pair).cpu(), top1_agreement(*pair).cpu()]


def _logits(model: nn.Module, row: Tensor) -> Tensor:
    """(s - 1, v): the logits that predict row[1:]."""
    ids = row[None].to(_embedding(model).weight.device)
    return model(input_ids=ids, use_cache=False).logits[0, :-1]


def _compared(sums: list[_Sums], difference: _Sums) -> dict[str, Any]:
    """The fields that exist only beside a base."""
    nll, base, kl, top1 = sums
    return {
        "base_perplexity": perplexity(base.total, base.count),
        "base_nll": base.mean,
        "base_nll_se": base.standard_error,
        "ratio": perplexity(nll.total - base.total, nll.count),
        "difference_se": difference.standard_error,
        "kl": kl.mean,
        "kl_se": kl.standard_error,
        "top1": top1.mean,
    }


def _checked_seqlen(models: list[nn.Module], seqlen: int | None) -> int:
    limit = min((n for n in map(context_length, models) if n is not None), default=None)
    if seqlen is None:
        return min(DEFAULT_SEQLEN, limit or DEFAULT_SEQLEN)
    if seqlen < 2:
        raise RecipeError(f"seqlen is {seqlen}: a window needs at least 2 tokens to predict one")
    if limit is not None and seqlen > limit:
        raise RecipeError(f"seqlen is {seqlen}, over the model's context of {limit}: give --seqlen {limit} or less")
    return seqlen


def _check_tokens(models: list[nn.Module], tokens: Tensor) -> None:
    if tokens.ndim != 1 or tokens.numel() < 2:
        raise DatasetError(f"tokens of shape {tuple(tokens.shape)}: at least 2 expected, give a longer text")
    largest = int(tokens.max())
    vocabulary = min(_embedding(m).weight.shape[0] for m in models)
    if largest >= vocabulary:
        raise DatasetError(
            f"token {largest} lies outside of the model's vocabulary of {vocabulary}: use the tokenizer of this model"
        )


def _embedding(model: nn.Module) -> nn.Embedding:
    return model.get_input_embeddings()  # type: ignore[operator, no-any-return]


def _windows(tokens: Tensor, seqlen: int, max_windows: int | None) -> tuple[Tensor, str]:
    """Windows (k, seqlen), or the whole text as one when it is shorter, and a note that says so."""
    if max_windows is not None and max_windows < 1:
        raise RecipeError(f"max_windows is {max_windows}: at least one window is needed")
    n = tokens.numel()
    if n < seqlen:
        return tokens[None], f"the text is shorter than a window of {seqlen}: all its {n} tokens are read as one window"
    whole = n // seqlen
    rows = tokens[: whole * seqlen].view(whole, seqlen)[:max_windows]
    return rows, f"the first {len(rows)} of {whole} windows" if len(rows) < whole else ""


@contextmanager
def _evaluating(models: list[nn.Module]) -> Iterator[None]:
    """Dropout off, and each model's own mode again afterwards."""
    training = [m.training for m in models]
    for m in models:
        m.eval()
    try:
        yield
    finally:
        for m, mode in zip(models, training, strict=True):
            m.train(mode)


def _versions() -> dict[str, str]:
    found = {}
    for package in ("lplr", "torch", "transformers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # run from a source tree that is not installed
            continue
    return found


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}" if abs(value) < 1 else f"{value:,.3f}"


def _with_error(value: float | None, log_error: float | None) -> str:
    """value ± value * log_error: the error of a logarithm is the relative error of what it is taken of."""
    if value is None or log_error is None or not math.isfinite(value):
        return _number(value)
    return f"{_number(value)} ± {_number(value * log_error)}"
