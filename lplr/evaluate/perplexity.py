"""Perplexity of a causal language model, and its distance from the model it was made from.

The protocol is that of GPTQ (arXiv:2210.17323): the text is tokenised once without BOS and cut into windows of
`seqlen` tokens without overlap; every window is read on its own and predicts its seqlen - 1 last tokens; what is left
of the text after the last whole window is not read.  Base and compressed model read the same windows one after the
other, so memory holds the two models and the logits of one batch of windows of each.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lplr.errors import CheckpointError, DatasetError, RecipeError
from lplr.evaluate.certificate import SMOOTHING, certify
from lplr.evaluate.facts import versions
from lplr.evaluate.kept import Kept
from lplr.evaluate.result import EvalResult
from lplr.hf.text import Text
from lplr.metrics import kl_divergence, perplexity, token_nll, top1_agreement

DEFAULT_SEQLEN = 2048
ALONE, BESIDE = ("nll",), ("nll", "base_nll", "kl", "top1", "smoothed_kl", "smoothed_excess")  # measures of a window


def evaluate(
    model: nn.Module,
    tokens: Tensor,
    *,
    seqlen: int | None = None,
    max_windows: int | None = None,
    batch_size: int = 1,
    base: nn.Module | None = None,
    text: Text | None = None,
    calibration: dict[str, Any] | None = None,
    kept: Kept | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> EvalResult:
    """Perplexity of `model` on `tokens` int64 (n,), beside that of `base` if one is given, and then what the windows certify.

    seqlen None is 2,048 or the model's context if that is shorter.  batch_size windows are read at once.  text names the source
    in the result, calibration (name, sha256, rows, seqlen) is passed through to it.  kept holds finished windows, which are
    not read again, and gets those that are read.  progress is called with (windows done, windows).
    A model is any causal LM whose forward takes input_ids (b, s) and returns `.logits` (b, s, v).

    Raises DatasetError for fewer than two tokens or one outside of the vocabulary, RecipeError for a window that does
    not fit the model, CheckpointError for two vocabularies.  NaN logits raise nothing: see `EvalResult.finite`.
    """
    started = time.perf_counter()
    models = [model] if base is None else [model, base]
    seqlen = _checked_seqlen(models, seqlen)
    _check_tokens(models, tokens)
    if batch_size < 1:
        raise RecipeError(f"batch_size is {batch_size}: at least one window is needed")
    rows, note = _windows(tokens, seqlen, max_windows)
    kept, seconds, read = kept or Kept(), 0.0, 0
    with torch.inference_mode(), _evaluating(models):
        for first in range(0, len(rows), batch_size):
            chosen = range(first, min(first + batch_size, len(rows)))
            if any(str(i) not in kept for i in chosen):  # whole batches, so that a resumed run rounds as an unbroken one
                measured, spent = _measure(models, rows[chosen.start : chosen.stop])
                seconds, read = seconds + spent, read + len(chosen) * rows.shape[1]
                for i, values in zip(chosen, measured, strict=True):
                    kept.put(str(i), values)
            if progress is not None:
                progress(chosen.stop, len(rows))
    names = ALONE if base is None else BESIDE
    per_window = {name: tuple(kept[str(i)][k] for i in range(len(rows))) for k, name in enumerate(names)}
    return EvalResult(
        dataset=text.name if text else "",
        dataset_sha256=text.sha256 if text else "",
        seqlen=rows.shape[1],
        windows=len(rows),
        tokens=len(rows) * (rows.shape[1] - 1),
        text_tokens=tokens.numel(),
        finite=all(math.isfinite(z) for name in names for z in per_window[name] if not name.startswith("smoothed")),
        per_window=per_window,
        certificate=certify(per_window, _embedding(model).weight.shape[0]) if base is not None else None,
        tokens_per_second=read / seconds if seconds > 0 else None,
        batch_size=batch_size,
        calibration=calibration,
        note=note,
        versions=versions(),
        seconds=time.perf_counter() - started,
        **_summary(per_window),
    )


def context_length(model: nn.Module) -> int | None:
    """The most tokens that the model reads at once as its config tells, None if it does not."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    found = getattr(config, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def _measure(models: list[nn.Module], rows: Tensor) -> tuple[list[list[float]], float]:
    """Of each window of rows (b, s) the means of ALONE or BESIDE, in that order; and seconds of the model's forward pass."""
    started = time.perf_counter()
    logits = [_logits(models[0], rows)]
    if logits[0].is_cuda:
        torch.cuda.synchronize(logits[0].device)
    seconds = time.perf_counter() - started
    logits += [_logits(base, rows) for base in models[1:]]
    nlls = [token_nll(x, rows[:, 1:].to(x.device)).cpu() for x in logits]
    if len(logits) == 1:
        return [[_mean(nll)] for nll in nlls[0]], seconds
    model, base = logits
    if base.shape != model.shape:
        raise CheckpointError(
            f"the base has a vocabulary of {base.shape[-1]} and the model one of {model.shape[-1]}: "
            "compare a model with the one it was made from"
        )
    # distances are taken where the base's logits are: the models may be on two devices
    pair = base, model.to(base.device)
    measured = [*nlls, kl_divergence(*pair), top1_agreement(*pair), kl_divergence(*pair, smoothing=SMOOTHING)]
    measured.append(_smoothed(nlls[0], base.shape[-1]) - nlls[1])
    return [[_mean(values[i]) for values in measured] for i in range(len(rows))], seconds


def _smoothed(nll: Tensor, vocabulary: int) -> Tensor:
    """-ln((1 - e) q + e / v) from -ln q, elementwise."""
    return -((1 - SMOOTHING) * (-nll).exp() + SMOOTHING / vocabulary).log()


def _mean(values: Tensor) -> float:
    return values.double().mean().item()


def _logits(model: nn.Module, rows: Tensor) -> Tensor:
    """(b, s - 1, v): the logits that predict rows[:, 1:]."""
    ids = rows.to(_embedding(model).weight.device)
    return model(input_ids=ids, use_cache=False).logits[:, :-1]


def _summary(per_window: dict[str, tuple[float, ...]]) -> dict[str, Any]:
    """Means over all predictions and their errors; windows are of one length, so the mean of their means."""
    mean = {name: _over(values)[0] for name, values in per_window.items()}
    nll, nll_se = _over(per_window["nll"])
    fields = {"nll": nll, "nll_se": nll_se, "perplexity": perplexity(nll, 1)}
    if "base_nll" not in per_window:
        return fields
    gap = [z - b for z, b in zip(per_window["nll"], per_window["base_nll"], strict=True)]
    difference, difference_se = _over(gap)
    base_nll, base_nll_se = _over(per_window["base_nll"])
    return fields | {
        "base_perplexity": perplexity(base_nll, 1),
        "base_nll": base_nll,
        "base_nll_se": base_nll_se,
        "ratio": perplexity(difference, 1),
        "difference_se": difference_se,
        "kl": mean["kl"],
        "kl_se": _over(per_window["kl"])[1],
        "top1": mean["top1"],
    }


def _over(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean over windows and, these being taken as independent, its standard error; None for one window."""
    found = torch.tensor(values, dtype=torch.float64)
    n = len(values)
    return found.mean().item(), (found.std() / math.sqrt(n)).item() if n > 1 else None


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
