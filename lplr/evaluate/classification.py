"""How good class probabilities are: pure functions, and the evaluation of a head on a dataset.

    accuracy            share of samples whose most probable class is the right one
    nll                 -1/n sum log p_i(y_i), nats
    calibration error   sum_b |B_b| / n |accuracy(B_b) - confidence(B_b)|, confidence = max_c p_c in 15 bins of equal width
                        (Guo, Pleiss, Sun, Weinberger, ICML 2017, equation 3)
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

import lplr
from lplr.files import write_text_atomic
from lplr.hf.classifier import HeadModel
from lplr.hf.features import encode, features
from lplr.hf.labelled import read_labelled
from lplr.hf.load import load_tokenizer
from lplr.stream.device import usable_device

BINS = 15


@dataclass(frozen=True)
class Classified:
    """Of one head on one dataset; standard_error is that of the accuracy, sqrt(a (1 - a) / n)."""

    text: str
    text_sha256: str
    samples: int
    accuracy: float
    standard_error: float
    nll: float
    calibration_error: float
    versions: dict[str, str]


def accuracy(p: Tensor, y: Tensor) -> float:
    """p (n, C) probabilities, y (n,) classes."""
    return float((p.argmax(1) == y).double().mean())


def nll(p: Tensor, y: Tensor) -> float:
    """Nats a sample; probabilities below 1e-300 count as that."""
    return float(-p.double().gather(1, y[:, None]).clamp_min(1e-300).log().mean())


def calibration_error(p: Tensor, y: Tensor) -> float:
    """Expected calibration error in BINS bins."""
    confidence, chosen = p.double().max(1)
    right = (chosen == y).double()
    bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1  # bin b is (b / BINS, (b + 1) / BINS]
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins.cpu(), (right - confidence).cpu())
    return float(gaps.abs().sum() / len(y))


def evaluate_head(
    folder: str,
    dataset: str,
    *,
    device: str = "cpu",
    progress: Callable[[float, float, str], None] | None = None,
) -> Classified:
    """Accuracy, NLL and calibration error of the head in `folder` on labelled text; kept as eval-<text>.json beside it.

    Raises DatasetError for labels that the head does not know, and the errors of `read_labelled` and of loading.
    """
    where = usable_device(device)
    data = read_labelled(dataset, split="heldout")
    model: HeadModel = HeadModel.from_pretrained(folder)
    torch.nn.Module.to(model, where)
    y = torch.tensor(data.numbers(model.labels, folder))
    tokens = encode(load_tokenizer(folder), data.texts, model.config.seqlen)
    X = features(model.backbone, tokens, pooling=model.config.pooling, progress=progress)
    with torch.inference_mode():
        p = torch.softmax(model.head(X.to(where, next(iter(model.head.state_dict().values())).dtype)).double(), 1).cpu()
    a = accuracy(p, y)
    versions = {"lplr": lplr.__version__} | {name: metadata.version(name) for name in ("torch", "transformers")}
    error = math.sqrt(a * (1 - a) / len(y))
    found = Classified(data.name, data.sha256, len(y), a, error, nll(p, y), calibration_error(p, y), versions)
    slug = "".join(c if c.isalnum() or c in "._" else "-" for c in data.name)
    write_text_atomic(Path(folder) / f"eval-{slug}.json", json.dumps(asdict(found), indent=1) + "\n")
    return found


def as_table(found: Classified) -> list[tuple[str, str]]:
    """(measure, value) rows for people."""
    return [
        ("text", f"{found.text}, {found.samples:,} samples"),
        ("accuracy", f"{found.accuracy:.4f} +- {found.standard_error:.4f}"),
        ("NLL", f"{found.nll:.4f} nats"),
        ("calibration error", f"{found.calibration_error:.4f}"),
    ]
