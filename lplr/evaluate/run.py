"""Evaluate a folder: load it and its base, read the text, measure, and keep the result beside the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from lplr import records
from lplr.errors import OutputError
from lplr.evaluate.perplexity import EvalResult, evaluate, to_json
from lplr.files import write_text_atomic
from lplr.hf.hub import resolve
from lplr.hf.load import load_model, load_tokenizer
from lplr.hf.text import evaluation_tokens, read_text
from lplr.records import LEDGER
from lplr.stream.device import usable_device


def evaluate_folder(
    folder: str,
    dataset: str,
    against: str | None = None,
    *,
    base: nn.Module | None = None,
    seqlen: int | None = None,
    max_windows: int | None = None,
    device: str = "cpu",
    notify: Callable[[str], None] | None = None,
    progress: Callable[[float, float, str], None] | None = None,
) -> EvalResult:
    """Evaluate the model at `folder` (any model: folder, GGUF file, Hub id) in float32, beside its base.

    The base is `against`, or a model that is loaded already.  A folder that `compress` wrote keeps the
    result as eval-<text>.json.  The tokenizer is the folder's own.  Raises the errors of `load_model`, `read_text` and
    `evaluate`, RecipeError for a device that cannot be used.
    """
    tell = notify or (lambda _: None)
    where = usable_device(device)
    path = resolve(folder, notify=tell)
    text = read_text(dataset, split="heldout")
    tokens = evaluation_tokens(load_tokenizer(path), text)
    model: nn.Module = nn.Module.to(load_model(path), where)
    if against is not None:
        base = load_model(resolve(against, notify=tell))
    base = None if base is None else nn.Module.to(base, where)
    step = progress or (lambda *_: None)
    result = evaluate(
        model,
        tokens,
        seqlen=seqlen,
        max_windows=max_windows,
        base=base,
        text=text,
        calibration=_calibration(path),
        progress=lambda done, total: step(float(done), float(total), f"window {done} of {total}"),
    )
    if (path / LEDGER).is_file():
        try:
            write_text_atomic(path / f"eval-{text.slug}.json", to_json(result))
        except OutputError as error:  # the numbers are had: they are shown in any case
            tell(f"the result is not kept beside the model: {error}")
    return result


def _calibration(path: Path) -> dict[str, Any] | None:
    """The calibration set that a compressed folder names."""
    if not (path / LEDGER).is_file():
        return None
    return records.read(path / LEDGER)[0].get("calibration")
