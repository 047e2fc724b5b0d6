"""Check a compressed folder: every file, every tensor, every bit count, and with the base model every certificate."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lplr import records
from lplr.errors import CheckpointError, OutputError, VerificationError
from lplr.factor import Factorization, Format, measured_error
from lplr.files import sha256
from lplr.hf.card import CARD
from lplr.nn.swap import is_conv1d
from lplr.records import LEDGER, LayerRecord
from lplr.stream.checkpoint import Checkpoint, open_checkpoint
from lplr.stream.entries import Entry
from lplr.stream.ledger import digest
from lplr.stream.matrix import tensor_sha256
from lplr.stream.shards import INDEX
from lplr.stream.source import read_entries

AGAIN = "copy the folder again, or compress the model again"
SAME = "give the model that was compressed"
SLACK = 1e-5  # relative: sums of the same float64 numbers in another order differ by less
ROUNDING = 1e-12  # of the norm: what is left of that difference where the error itself is next to nothing
_LATER = (LEDGER, CARD, "report.html", "heads")  # what comes or changes after the `done` line; evaluations and hidden files too

Step = Callable[[float, float, str], None]


@dataclass(frozen=True)
class Verified:
    """What `verify` established.  worst is the largest error / certificate (None without a base model)."""

    files: int
    tensors: int
    layers: int
    bits_per_weight: float
    worst: float | None = None
    worst_layer: str = ""


@dataclass(frozen=True)
class _Folder:
    """A compressed folder whose files agree with their checksums."""

    path: Path
    done: dict[str, Any]
    layers: dict[str, Format]
    rows: dict[str, LayerRecord]
    held: dict[str, Entry]
    tuned: frozenset[str]  # dense tensors that are not the base model's


def verify(
    folder: Path | str, against: str | None = None, *, allow_pickle: bool = False, progress: Step | None = None
) -> Verified:
    """Check a folder written by `compress`; with `against`, recompute every layer's error from the base model's weights.

    Raises VerificationError at the first file, tensor, bit count or certificate that is not as recorded, and the errors
    of `open_checkpoint` for a base model that cannot be read; allow_pickle: pickled weights of a base model's folder are read.
    """
    path, step = Path(folder), progress or (lambda *_: None)
    entries = _entries(path)
    done = entries[-1]
    _check_files(path, done["files"], step)
    try:
        rows = {row.name: row for row in records.layers(entries)}
        found = _Folder(path, done, _config_layers(path), rows, _check_index(path), records.tuned(entries))
    except (CheckpointError, OutputError) as error:  # the files are those of the run, but say what no run says
        raise VerificationError(str(error)) from None
    _check_tensors(found)
    worst, name = None, ""
    if against is not None:
        worst, name = _check_against(found, open_checkpoint(against, allow_pickle=allow_pickle), against, step)
    return Verified(len(done["files"]), len(found.held), len(found.rows), done["bits_per_weight"], worst, name)


def _entries(folder: Path) -> list[dict[str, Any]]:
    """The lines of a finished run whose own digest agrees."""
    if not folder.is_dir():
        raise VerificationError(f"{folder} is no folder: give one that `lplr compress` wrote")
    if not (folder / LEDGER).is_file():
        raise VerificationError(f"{folder} holds no {LEDGER}: give a folder that `lplr compress` wrote")
    try:
        entries = records.read(folder / LEDGER)
        records.check_files(folder / LEDGER, entries)
    except OutputError as error:
        raise VerificationError(str(error)) from None
    if not entries or entries[-1]["kind"] != "done":
        raise VerificationError(f"{folder} is not finished: run the same `lplr compress` command again to go on")
    done = {k: v for k, v in entries[-1].items() if k != "ledger_sha256"}
    sealed = entries[-1].get("seal")  # None in folders older than the seal; no accident takes it out
    if digest([*entries[:-1], done]) != entries[-1].get("ledger_sha256") or (
        sealed is not None and records.seal((folder / LEDGER).read_bytes(), str(sealed)) != sealed
    ):
        raise VerificationError(f"{folder / LEDGER} was altered: {AGAIN}")
    return entries


def _check_files(folder: Path, files: dict[str, dict[str, Any]], step: Step) -> None:
    strangers = {p.name for p in folder.iterdir() if not p.name.startswith(("eval-", "."))} - {*files, *_LATER}
    if strangers:
        raise VerificationError(f"{folder} holds {min(strangers)}, which the run did not write: remove it")
    total = float(sum(facts["bytes"] for facts in files.values()))
    seen = 0.0
    for name, facts in files.items():
        if name == CARD:  # in the list of runs of old
            continue
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
    try:
        table = json.loads((folder / "config.json").read_text())["quantization_config"]["layers"]
        return {name: Format.from_dict(entry) for name, entry in table.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise VerificationError(f"{folder / 'config.json'} holds no table of layers ({error!r}): {AGAIN}") from None


def _check_index(folder: Path) -> dict[str, Entry]:
    """Every tensor of the shards, by name, once what they hold agrees with the index."""
    try:
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        files = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise VerificationError(f"{folder / INDEX} holds no weight_map ({error!r}): {AGAIN}") from None
    held: dict[str, Entry] = {}
    for file in files:
        for name, entry in read_entries(folder / file).items():
            if weight_map.get(name) != file:
                raise VerificationError(f"tensor {name} of {file} stands elsewhere in {INDEX}: {AGAIN}")
            held[name] = entry
    if missing := sorted(set(weight_map) - set(held)):
        raise VerificationError(f"tensor {missing[0]} is missing in {folder / weight_map[missing[0]]}: {AGAIN}")
    return held


def _check_tensors(found: _Folder) -> None:
    """Compare what the shards hold with config.json and the records, to the bit."""
    compressed = {name for name, row in found.rows.items() if row.stored == "compressed"}
    if compressed != set(found.layers):
        name = min(compressed ^ set(found.layers))
        raise VerificationError(f"layer {name} stands in only one of config.json and {LEDGER}: {AGAIN}")
    total = 0
    for name, fmt in found.layers.items():
        bits = 0
        for part, (shape, dtype) in fmt.layout().items():
            entry = found.held.get(f"{name}.{part}")
            if entry is None or tuple(entry.shape) != shape or entry.dtype != dtype:
                state = "missing" if entry is None else f"{entry.dtype} {tuple(entry.shape)}"
                raise VerificationError(f"tensor {name}.{part} is {state}, {dtype} {shape} expected: {AGAIN}")
            bits += 8 * entry.nbytes
        if bits != found.rows[name].bits:
            raise VerificationError(f"layer {name} takes {bits} bits, its record says {found.rows[name].bits}: {AGAIN}")
        recorded = found.rows[name].format
        if recorded is not None and recorded != fmt.to_dict():
            raise VerificationError(f"layer {name} has one format in config.json and another in {LEDGER}: {AGAIN}")
        total += bits
    weights = sum(fmt.shape[0] * fmt.shape[1] for fmt in found.layers.values())
    told = found.done["bits_per_weight"]
    if total / weights != told:
        raise VerificationError(f"{found.path} takes {total / weights} bits per weight, its record says {told}: {AGAIN}")


def _check_against(found: _Folder, base: Checkpoint, against: str, step: Step) -> tuple[float, str]:
    """The largest error / certificate over the layers, and where; VerificationError above 1, or for another base model."""
    total = float(sum(fmt.shape[0] * fmt.shape[1] for fmt in found.layers.values()))
    seen, worst, worst_layer = 0.0, 0.0, ""
    for name, fmt in found.layers.items():
        step(seen, total, name)
        row = found.rows[name]
        error = _true_error(found, name, fmt, _base_weight(base, against, row))
        slack = SLACK * max(error, row.error) + ROUNDING * row.norm
        if not error <= row.certificate + slack:
            raise VerificationError(f"{name} has error {error:.7g}, above its certificate {row.certificate:.7g}: {AGAIN}")
        if not abs(error - row.error) <= slack:
            raise VerificationError(f"{name} has error {error:.7g}, its record says {row.error:.7g}: {AGAIN}")
        ratio = error / row.certificate if row.certificate else 0.0
        if ratio > worst:
            worst, worst_layer = ratio, name
        seen += fmt.shape[0] * fmt.shape[1]
    _check_dense(found, base, against)
    return worst, worst_layer


def _base_weight(base: Checkpoint, against: str, row: LayerRecord) -> Tensor:
    """The matrix that was compressed; VerificationError when the base model has another one."""
    name = row.name
    try:
        stored = base.view.get(f"{name}.weight")
        module = base.model.get_submodule(name)
    except (CheckpointError, AttributeError):
        raise VerificationError(f"{against} has no tensor {name}.weight: {SAME}") from None
    W = stored.float().T if is_conv1d(module) else stored.float()
    if tuple(W.shape) != row.shape:
        raise VerificationError(f"{name} is {tuple(W.shape)} in {against}, {row.shape} here: {SAME}")
    norm = float(torch.linalg.vector_norm(W.double()))
    if not abs(norm - row.norm) <= SLACK * max(row.norm, norm):
        raise VerificationError(f"{name} has norm {norm:.7g} in the base model, {row.norm:.7g} when compressed: {SAME}")
    if row.source_sha256 is not None and tensor_sha256(stored) != row.source_sha256:
        raise VerificationError(f"{name}.weight is not, to the bit, what was compressed: {SAME}")
    return W


def _true_error(found: _Folder, name: str, fmt: Format, W: Tensor) -> float:
    """||W - W_hat||_F."""
    return measured_error(W, Factorization.from_tensors(fmt, {p: found.held[f"{name}.{p}"].read() for p in fmt.layout()}))


def _check_dense(found: _Folder, base: Checkpoint, against: str) -> None:
    """Tensors that were neither compressed nor tuned are the base model's, bit for bit in the type that they are stored in."""
    replaced = {f"{name}.weight" for name in found.layers}
    packed = {f"{name}.{part}" for name, fmt in found.layers.items() for part in fmt.layout()}
    dense = set(found.held) - packed
    for name in sorted(dense | (set(base.view.names()) - replaced)):
        if name not in found.held or name not in base.view.names():
            where = found.path if name not in found.held else against
            raise VerificationError(f"tensor {name} is missing in {where}: {SAME}")
        here, there = found.held[name].read(), base.stored(name)
        same = torch.equal(here, there) or (name in found.tuned and here.shape == there.shape)
        if here.dtype != there.dtype or not same:
            raise VerificationError(f"tensor {name} is not the base model's: {SAME}, or {AGAIN}")
