"""`lplr export`: a compressed folder in the formats of other engines, and what each of them loses, measured.

    dense   a plain transformers folder in bfloat16: every matrix as large as it was
    peft    Q as bitsandbytes NF4, L R as a LoRA adapter
    gguf    Q as a GGUF quantization, L R as a GGUF LoRA; a matrix without Q goes into the model whole

The loss is the KL divergence of the export, read back from its files by the libraries of its format, to the model that lplr
runs in float32, on a short text.  What the other engine's own arithmetic adds is not in it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import lplr
from lplr.errors import CheckpointError, OutputError, choose
from lplr.files import write_text_atomic
from lplr.hf import gguf_write, peft
from lplr.hf.hub import resolve
from lplr.hf.load import load_model, load_tokenizer
from lplr.hf.text import evaluation_tokens, read_text
from lplr.metrics import kl_divergence, top1_agreement
from lplr.ship.dense import write_dense
from lplr.ship.unpacked import Backbone, Unpacked

if TYPE_CHECKING:
    from lplr.hf.load import PreTrainedModel, PreTrainedTokenizerBase

REPORT = "export.json"
WINDOWS, WINDOW = 2, 256  # of the text on which the loss is measured
Notify = Callable[[str], None]
Step = Callable[[float, float, str], None]


@dataclass(frozen=True)
class Exported:
    """What was written, what it loses in words, and the mean KL divergence (nats a token) and top-1 agreement measured of it.

    Of a folder without a tokenizer nothing can be measured: None.
    """

    to: str
    folder: str
    lost: str
    bytes: int
    kl: float | None
    top1: float | None
    text: str
    tokens: int


def export(
    folder: str | Path,
    to: str,
    output: Path | str,
    *,
    gguf_type: str = "q8_0",
    dataset: str = "builtin:heldout",
    notify: Notify | None = None,
    progress: Step | None = None,
) -> Exported:
    """Write a compressed folder (or Hub id) as `to` (dense, peft or gguf) into the new folder `output`, and measure the loss.

    output appears whole or not at all, with the result as export.json in it.  Raises RecipeError for an unknown format,
    OutputError for a folder that is there, UnsupportedModel for what the format cannot hold, BackendError without its packages.
    """
    write, read_back = choose(_FORMATS, to, "format")
    target = Path(output).expanduser()
    if target.exists():
        raise OutputError(f"{target} is there already: give a new folder")
    step = progress or (lambda *_: None)
    source = resolve(str(folder), notify=notify or (lambda _: None))
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        step(0.0, 3.0, f"writing {to}")
        lost = write(source, partial, gguf_type)
        step(1.0, 3.0, "measuring what it loses")
        kl, top1, text, tokens = _loss(source, lambda: read_back(partial), dataset, step)
        size = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
        found = Exported(to, target.name, lost, size, kl, top1, text, tokens)
        versions = {"lplr": lplr.__version__, "torch": torch.__version__}
        write_text_atomic(partial / REPORT, json.dumps({**asdict(found), "versions": versions}, indent=1) + "\n")
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return found


def as_table(found: Exported) -> list[tuple[str, str]]:
    """(measure, value) for a table."""
    rows = [("format", found.to), ("loses", found.lost), ("size", f"{found.bytes:,} bytes")]
    if found.kl is None:
        return [*rows, ("KL divergence to the lplr model", "not measured: the folder holds no tokenizer")]
    measured = f"{found.kl:.3e} nats a token, on {found.tokens} tokens of {found.text}"
    return [*rows, ("KL divergence to the lplr model", measured), ("top-1 agreement", f"{found.top1:.4f}")]


def _write_dense(source: Path, output: Path, _: str) -> str:
    write_dense(Unpacked(source), output)
    return "every matrix is rounded to bfloat16, and takes 16 bits a weight again"


def _write_peft(source: Path, output: Path, _: str) -> str:
    backbone = Backbone(source)
    scratch = output / ".dense"
    scratch.mkdir()
    write_dense(backbone, scratch)
    count = peft.write_peft(scratch, output, backbone.formats, backbone.low_rank(), _tokenizer(source))
    shutil.rmtree(scratch)
    if not count:
        return "Q is rounded to NF4 in blocks of 64 (4.5 bits a weight); no matrix has a low-rank part, so there is no adapter"
    without = sum(not fmt.q_bits for fmt in backbone.formats.values())
    zeros = f"; {without} matrices without Q are zeros in NF4 below their adapter" if without else ""
    return f"Q is rounded to NF4 in blocks of 64 (4.5 bits a weight), L R of {count} matrices to bfloat16{zeros}"


def _write_gguf(source: Path, output: Path, kind: str) -> str:
    backbone = _Gguf(source, torch.float32)
    tokenizer = load_tokenizer(source)
    shapes = {name: shape for name, (shape, _) in backbone.layout.items()}
    half = torch.bfloat16 if any(backbone.stored_dtype(name) == torch.bfloat16 for name in backbone) else torch.float16
    options = {"matrices": set(backbone.formats), "kind": kind, "half": half}
    gguf_write.write_model(output / gguf_write.MODEL, backbone.config, tokenizer, backbone, shapes, **options)
    lost = f"the compressed matrices are rounded to {kind}, the others to {str(half).removeprefix('torch.')}"
    pairs = [pair for pair in backbone.low_rank() if backbone.formats[pair[0]].q_bits]
    if not pairs:
        return f"{lost}; no matrix has both Q and a low-rank part, so there is no adapter"
    gguf_write.write_adapter(output / gguf_write.ADAPTER, backbone.config, pairs)
    return f"{lost}, L R of {len(pairs)} matrices to float16"


class _Gguf(Backbone):
    """Q alone where there is a Q: zeros below an adapter would cost as many bits as a matrix."""

    def matrix(self, layer: str) -> Tensor:
        return super().matrix(layer) if self.formats[layer].q_bits else Unpacked.matrix(self, layer)


def _read_gguf(output: Path) -> PreTrainedModel:
    """The model file as transformers reads it, with the adapter added to its weights."""
    model = load_model(output / gguf_write.MODEL)
    if (output / gguf_write.ADAPTER).is_file():
        layers = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        for layer, product in gguf_write.read_adapter(output / gguf_write.ADAPTER, model.config, layers).items():
            model.get_submodule(layer).get_parameter("weight").data += product
    return model


# format -> (writes it and says what it loses, reads it back)
_FORMATS: dict[str, tuple[Callable[[Path, Path, str], str], Callable[[Path], Any]]] = {
    "dense": (_write_dense, load_model),
    "peft": (_write_peft, peft.load_peft),
    "gguf": (_write_gguf, _read_gguf),
}


def _tokenizer(source: Path) -> PreTrainedTokenizerBase | None:
    try:
        return load_tokenizer(source)
    except CheckpointError:
        return None


def _loss(source: Path, read_back: Callable[[], Any], dataset: str, step: Step) -> tuple[float | None, float | None, str, int]:
    """Mean KL(lplr || export) in nats and top-1 agreement over the predictions of a short text, its name, and their number."""
    tokenizer = _tokenizer(source)
    if tokenizer is None:
        return None, None, dataset, 0
    text = read_text(dataset, split="heldout")
    tokens = evaluation_tokens(tokenizer, text)[: WINDOWS * WINDOW]
    ours = _logits(load_model(source), tokens)  # one model in memory at a time
    step(2.0, 3.0, "measuring what it loses")
    theirs = _logits(read_back(), tokens)
    kl, same = kl_divergence(ours, theirs), top1_agreement(ours, theirs)
    return float(kl.double().mean()), float(same.double().mean()), text.name, kl.numel()


@torch.inference_mode()
def _logits(model: Any, tokens: Tensor) -> Tensor:
    """Logits (t, v) float32 of the windows of a text."""
    context = getattr(model.config, "max_position_embeddings", WINDOW)
    return torch.cat([model(input_ids=row[None]).logits[0].float() for row in tokens.split(min(WINDOW, context))])
