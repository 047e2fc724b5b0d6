"""Check a compressed folder: every file, every tensor, every bit count, and with the base model every certificate."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lplr import records
from lplr.errors import CheckpointError, OutputError, VerificationError
from lplr.factor import Factorization, Format, measured_error
from lplr.nn.swap import is_conv1d
from lplr.records import LEDGER, LayerRecord
from lplr.stream.checkpoint import Checkpoint, open_checkpoint
from lplr.stream.ledger import digest
from lplr.stream.shards import sha256
from lplr.stream.source import open_source, read_entries

AGAIN = "copy the folder again, or compress the model again"
SLACK = 1e-5  # relative: two float32 products summed in different orders differ by less


@dataclass(frozen=True)
class Verified:
    """What `verify` established.  worst is the largest error / certificate (None without a base model)."""

    files: int
    tensors: int
    layers: int
    bits_per_weight: float
    worst: float | None = None
    worst_layer: str = ""


def verify(
    folder: Path | str, against: str | None = None, *, progress: Callable[[float, float, str], None] | None = None
) -> Verified:
    """Check a folder written by `compress`; with `against`, recompute every layer's error from the base model's weights.

    Raises VerificationError at the first file, tensor, bit count or certificate that is not as recorded, and the errors
    of `open_checkpoint` for a base model that cannot be read.
    """
    folder = Path(folder)
    step = progress or (lambda *_: None)
    entries = _entries(folder)
    done = entries[-1]
    _check_files(folder, done["files"], step)
    layers = _config_layers(folder)
    rows = {row.name: row for row in records.layers(entries)}
    tensors = _check_tensors(folder, done, layers, rows)
    if against is None:
        return Verified(len(done["files"]), tensors, len(rows), done["bits_per_weight"])
    worst, name = _check_certificates(folder, against, layers, rows, step)
    return Verified(len(done["files"]), tensors, len(rows), done["bits_per_weight"], worst, name)


def _entries(folder: Path) -> list[dict[str, Any]]:
    """The lines of a finished run whose own digest agrees."""
    if not folder.is_dir():
        raise VerificationError(f"{folder} is no folder: give one that `lplr compress` wrote")
    if not (folder / LEDGER).is_file():
        raise VerificationError(f"{folder} holds no {LEDGER}: give a folder that `lplr compress` wrote")
    try:
        entries = records.read(folder / LEDGER)
    except OutputError as error:
        raise VerificationError(str(error)) from None
    if not entries or entries[-1]["kind"] != "done":
        raise VerificationError(f"{folder} is not finished: run the same `lplr compress` command again to go on")
    done = {k: v for k, v in entries[-1].items() if k != "ledger_sha256"}
    if digest([*entries[:-1], done]) != entries[-1].get("ledger_sha256"):
        raise VerificationError(f"{folder / LEDGER} was altered: {AGAIN}")
    return entries


def _check_files(folder: Path, files: dict[str, dict[str, Any]], step: Callable[[float, float, str], None]) -> None:
    strangers = {p.name for p in folder.glob("*.safetensors")} - set(files)
    if strangers:
        raise VerificationError(f"{folder} holds {min(strangers)}, which the run did not write: remove it")
    total = float(sum(facts["bytes"] for facts in files.values()))
    seen = 0.0
    for name, facts in files.items():
        step(seen, total, f"checksum of {name}")
        path = folder / name
        if not path.is_file():
            raise VerificationError(f"{path} is missing: {AGAIN}")
        size = path.stat().st_size
        if size != facts["bytes"]:
            raise VerificationError(f"{path} has {size} bytes, {facts['bytes']} expected: {AGAIN}")
        if sha256(path) != facts["sha256"]:
            raise VerificationError(f"{path} was altered (its SHA-256 differs): {AGAIN}")
        seen += size


def _config_layers(folder: Path) -> dict[str, Format]:
    table = json.loads((folder / "config.json").read_text())["quantization_config"]["layers"]
    return {name: Format.from_dict(entry) for name, entry in table.items()}


def _check_tensors(folder: Path, done: dict[str, Any], layers: dict[str, Format], rows: dict[str, LayerRecord]) -> int:
    """Compare what the shards hold with config.json, the index and the records; returns the number of tensors."""
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    held = {name: e for file in sorted(set(weight_map.values())) for name, e in read_entries(folder / file).items()}
    if set(held) != set(weight_map):
        name = min(set(held) ^ set(weight_map))
        raise VerificationError(f"tensor {name} is {'missing' if name in weight_map else 'unexpected'} in {folder}: {AGAIN}")
    compressed = {name for name, row in rows.items() if row.stored == "compressed"}
    if compressed != set(layers):
        name = min(compressed ^ set(layers))
        raise VerificationError(f"layer {name} stands in only one of config.json and {LEDGER}: {AGAIN}")
    for name, fmt in layers.items():
        bits = 0
        for part, (shape, dtype) in fmt.layout().items():
            entry = held.get(f"{name}.{part}")
            if entry is None or tuple(entry.shape) != shape or entry.dtype != dtype:
                state = "missing" if entry is None else f"{entry.dtype} {tuple(entry.shape)}"
                raise VerificationError(f"tensor {name}.{part} is {state}, {dtype} {shape} expected: {AGAIN}")
            bits += 8 * entry.nbytes
        if bits != rows[name].bits:
            raise VerificationError(f"layer {name} takes {bits} bits, its record says {rows[name].bits}: {AGAIN}")
    found = sum(8 * held[f"{name}.{part}"].nbytes for name, fmt in layers.items() for part in fmt.layout())
    weights = sum(fmt.shape[0] * fmt.shape[1] for fmt in layers.values())
    if abs(found / weights - done["bits_per_weight"]) > 1e-9:
        raise VerificationError(f"{folder} takes {found / weights} bits per weight, its record says otherwise: {AGAIN}")
    return len(held)


def _check_certificates(
    folder: Path, against: str, layers: dict[str, Format], rows: dict[str, LayerRecord], step: Callable[[float, float, str], None]
) -> tuple[float, str]:
    """The largest error / certificate over the layers, and where; VerificationError above 1."""
    base: Checkpoint = open_checkpoint(against)
    source = open_source(folder)
    total = float(sum(fmt.shape[0] * fmt.shape[1] for fmt in layers.values()))
    seen, worst, worst_layer = 0.0, 0.0, ""
    for name, fmt in layers.items():
        step(seen, total, name)
        row = rows[name]
        try:
            W = base.view.get(f"{name}.weight").float()
        except CheckpointError:
            raise VerificationError(f"{against} has no tensor {name}.weight: give the model that was compressed") from None
        W = W.T if is_conv1d(base.model.get_submodule(name)) else W
        if tuple(W.shape) != fmt.shape:
            raise VerificationError(f"{name} is {tuple(W.shape)} in {against}, {fmt.shape} here: give the model that was compressed")
        f = Factorization.from_tensors(fmt, {part: source.get(f"{name}.{part}") for part in fmt.layout()})
        error = measured_error(W, f)
        norm = float(torch.linalg.vector_norm(W.double()))
        if abs(norm - row.norm) > SLACK * max(row.norm, norm):
            raise VerificationError(f"{name} has norm {norm:.7g} in {against}, {row.norm:.7g} when compressed: give the same base model")
        if error > row.certificate * (1 + SLACK):
            raise VerificationError(f"{name} has error {error:.7g}, above its certificate {row.certificate:.7g}: {AGAIN}")
        ratio = error / row.certificate if row.certificate else 0.0
        if ratio > worst:
            worst, worst_layer = ratio, name
        seen += fmt.shape[0] * fmt.shape[1]
    return worst, worst_layer
