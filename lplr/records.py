"""The record of one layer, and run.jsonl: ledger, log and report input in one file.

run.jsonl holds one JSON object a line, told apart by `kind`:

    run         first line: format version, fingerprint, the recipe, the source's identity
    allocation  the bits of every matrix and the curves they were chosen by (`stream.allocation`)
    layer       one LayerRecord
    recovery    how tuning went: losses on held-out rows, names of the dense tensors that were tuned (`stream.reconstruct`)
    distillation  the same of the stage that tunes the whole model (`stream.distill`)
    block       a shard is complete: its file name, bytes and SHA-256 (a block counts only if this line is there)
    done        last line: totals, the SHA-256 of every other file of the folder, and the seal of this one (`seal`)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from lplr import files
from lplr.errors import OutputError

LEDGER = "run.jsonl"
UNSEALED = "0" * 64
FileName = Annotated[str, Field(pattern=r"^[^/\\:\x00]*[^/\\:\x00.][^/\\:\x00]*$")]  # of the folder itself: no path, not `..`
# the only fields that differ between two runs of one recipe (where `threads` changes no sum: docs/scale.md)
TIME_FIELDS = ("seconds", "started", "finished", "seal", "threads")


class LayerRecord(BaseModel):
    """What was done to one matrix W (n x d) and how well.  Errors are Frobenius norms unless said otherwise.

    error is measured on the packed weights; certificate is an upper bound of it by another route (`factor.bounds`),
    probe_certificate holds with probability 1 - probe_failure; bound is the a-priori one (None: no theorem covers the method, see
    note, or the matrix was tuned afterwards); optimal is the Eckart-Young error at the same rank without quantization.
    weighted_error is sqrt(tr(E H E^T) / tr(W H W^T)), the relative error of the layer's output on the calibration text (None:
    without such a text, or where the whole model was tuned afterwards).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["layer"] = "layer"
    name: str
    block: int
    shape: tuple[PositiveInt, PositiveInt]
    stored: Literal["compressed", "dense"] = "compressed"
    method: str
    rank: int = 0
    l_bits: float = 0
    r_bits: float = 0
    q_bits: float = 0
    format: dict[str, Any] | None = None  # `factor.Format.to_dict` of what is stored; None of a dense matrix
    bits: int = Field(ge=0)  # all stored bits of the matrix
    source_sha256: str | None = None  # of the bytes of W as they were read, in the type and layout of the checkpoint
    norm: float
    error: float = 0.0
    certificate: float = 0.0
    probe_certificate: float | None = None
    probe_failure: float | None = None
    bound: float | None = None
    optimal: float | None = None
    weighted_error: float | None = None
    spectrum: tuple[tuple[int, float], ...] = ()  # (i, sigma_i), a log-spaced sample, i from 1
    note: str = ""
    seconds: float = 0.0

    @property
    def bits_per_weight(self) -> float:
        """bits / (n d)."""
        return self.bits / (self.shape[0] * self.shape[1])

    @property
    def grids(self) -> tuple[str, ...]:
        """Names of the grids of L, R and Q where they are there; uniform where the record is older than the other grids."""
        found = self.format or {}
        return tuple(found.get(f"{part}_grid", "uniform") if getattr(self, f"{part}_bits") else "" for part in "lrq")

    @property
    def relative_error(self) -> float:
        """error / norm; 0 for a zero matrix reproduced exactly."""
        return self.error / self.norm if self.norm else 0.0


def append(path: Path, entries: Iterable[BaseModel | dict[str, Any]]) -> None:
    """Append entries as lines, in one write that reaches the disk before this returns."""
    files.append(path, encoded(entries))


def encoded(entries: Iterable[BaseModel | dict[str, Any]]) -> bytes:
    """Entries as the lines of a file; ValueError for a number that is not finite."""
    rows = [e.model_dump(mode="json") if isinstance(e, BaseModel) else e for e in entries]
    return "".join(json.dumps(row, sort_keys=True, allow_nan=False) + "\n" for row in rows).encode()


def seal(raw: bytes, told: str = UNSEALED) -> str:
    """SHA-256 of the bytes of a finished run.jsonl with UNSEALED in the place of the seal `told`, which its last line holds.

    Times differ between two runs and are no part of any other checksum; the seal covers every bit.
    """
    return hashlib.sha256(raw.replace(f'"seal": "{told}"'.encode(), f'"seal": "{UNSEALED}"'.encode())).hexdigest()


def read(path: Path) -> list[dict[str, Any]]:
    """Every complete line; a last line torn by a crash is left out, a damaged line elsewhere is an OutputError."""
    lines = path.read_bytes().split(b"\n")
    out = []
    for number, line in enumerate(lines, 1):
        if number == len(lines):
            break  # what follows the last newline: empty, or torn
        try:
            entry = json.loads(line)
            if not isinstance(entry["kind"], str):
                raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise OutputError(f"{path}: line {number} is damaged: delete the folder and compress again") from None
        out.append(entry)
    return out


class _File(BaseModel):
    model_config = ConfigDict(strict=True)

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class _Block(_File):
    index: int = Field(ge=0)
    file: FileName


class _Tuned(BaseModel):
    tuned: list[str]


class _Done(BaseModel):
    files: dict[FileName, _File]
    bits_per_weight: float


def check_files(path: Path, entries: Iterable[dict[str, Any]]) -> None:
    """OutputError when a `block` or `done` line does not tell files by name, size and checksum, or one of recovery no names."""
    for number, entry in enumerate(entries, 1):
        kind = {"block": _Block, "done": _Done, "recovery": _Tuned, "distillation": _Tuned}.get(entry["kind"])
        try:
            if kind is not None:
                kind.model_validate(entry)
        except ValidationError:
            raise OutputError(f"{path}: line {number} is damaged: delete the folder and compress again") from None


def layers(entries: Iterable[dict[str, Any]]) -> Iterator[LayerRecord]:
    """The layer records among the entries; OutputError names one that is damaged."""
    for entry in entries:
        if entry["kind"] == "layer":
            try:
                yield LayerRecord.model_validate(entry)
            except ValidationError as error:
                problem = error.errors()[0]
                place = ".".join(map(str, problem["loc"]))
                raise OutputError(
                    f"{LEDGER}: the record of {entry.get('name', 'a layer')} is damaged at {place} ({problem['msg']}): "
                    "delete the folder and compress again"
                ) from None


def tuned(entries: Iterable[dict[str, Any]]) -> frozenset[str]:
    """Names of the dense tensors that are not the base model's because recovery tuned them."""
    return frozenset(name for entry in entries if entry["kind"] in ("recovery", "distillation") for name in entry["tuned"])


def formats(records: Iterable[LayerRecord]) -> dict[str, dict[str, Any]]:
    """Name -> stored format of every compressed matrix: what was made, which a plan only bounds."""
    return {r.name: r.format for r in records if r.stored == "compressed" and r.format is not None}


def bits_per_weight(records: Iterable[LayerRecord]) -> float:
    """All stored bits over all weights of the compressed matrices (dense ones are left out)."""
    kept = [r for r in records if r.stored == "compressed"]
    weights = sum(r.shape[0] * r.shape[1] for r in kept)
    return sum(r.bits for r in kept) / weights if weights else 0.0
